import itertools

import pytest
import torch
from torch import nn

from model.connector import build_connector
from model.errors import FrozenBlockChangedError, SpecError
from model.schedule import assert_frozen, block_hashes, learning_rates, parameters_by_block, schedule_factor, set_active_blocks, steps_before
from model.specs import BranchMix, PhaseSpec
from tests.tiny_training import tiny_connector_spec, tiny_encoder_spec


def phase(**changes):
    values = {"name": "p", "train": ("global_mlp",), "branch": BranchMix(both=1.0), "steps": 100, "batch_size": 4, "learning_rate": 1e-3}
    return PhaseSpec(**(values | changes))


def test_warm_up_then_half_a_cosine():
    spec = phase(warmup_fraction=0.1)
    factors = [schedule_factor(spec, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_no_warm_up_and_one_step():
    assert schedule_factor(phase(warmup_fraction=0.0), 0) == 1.0
    assert schedule_factor(phase(steps=1), 0) == 1.0


def test_the_language_model_has_a_rate_of_its_own():
    spec = phase(train=("global_mlp", "language_model"), language_model_learning_rate=1e-5, warmup_fraction=0)
    assert learning_rates(spec, 0) == {"global_mlp": 1e-3, "language_model": 1e-5}
    assert learning_rates(phase(train=("language_model",), warmup_fraction=0), 50) == {"language_model": pytest.approx(5e-4)}


def test_steps_lie_in_phases():
    phases = [phase(steps=3), phase(steps=2)]
    assert [steps_before(phases, index) for index in range(3)] == [0, 3, 5]


def test_experts_must_leave_what_trains_with_an_effect():
    with pytest.raises(SpecError, match="without effect"):
        phase(train=("gate",), experts="mlp")
    with pytest.raises(SpecError, match="without effect"):
        phase(train=("resampler",), experts="mlp")
    phase(train=("resampler",), experts="resampler")


SHOWN = {
    "both": BranchMix(both=1.0),
    "global": BranchMix(global_only=1.0),
    "local": BranchMix(local_only=1.0),
    "mixed": BranchMix(global_only=0.5, local_only=0.25, blind=0.25),
    "blind": BranchMix(blind=1.0),
}


@pytest.mark.parametrize("experts", ["mixture", "mlp", "resampler"])
@pytest.mark.parametrize("shown", SHOWN)
def test_a_phase_may_train_what_gradients_reach_and_nothing_else(shown, experts):
    spec = tiny_connector_spec()
    connector = build_connector(spec, tiny_encoder_spec(), hidden=8, embedding_rms=1.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    maps = {map_spec.name: torch.randn(2, 16, 8, generator=generator) for map_spec in spec.global_branch.fusion.maps}
    mix = SHOWN[shown]
    if experts != "mixture" and not mix.shows_global:
        with pytest.raises(SpecError, match="shows no global view, for which there are experts"):
            phase(train=("language_model",), branch=mix, experts=experts)
        return
    if mix.shows_global:
        connector.global_tokens(maps, experts=experts, noise=torch.randn(2, 16, 2, generator=generator)).square().sum().backward()
    if mix.shows_local:
        connector.local_tokens(maps).square().sum().backward()
    reached = {name.split(".")[0] for name, parameter in connector.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    for block in spec.blocks:
        if block in reached:
            assert phase(train=(block,), branch=mix, experts=experts).train == (block,)
        else:
            with pytest.raises(SpecError, match="without effect"):
                phase(train=(block,), branch=mix, experts=experts)
    phase(train=("language_model",), branch=mix, experts=experts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ("compression",), "branch": SHOWN["global"]}, r"branch \(found both 0, global 1, .*leaves compression of train without effect"),
        ({"train": ("global_mlp", "gate", "resampler"), "branch": SHOWN["local"]}, "leaves gate, resampler of train without effect"),
        ({"train": ("local_mlp",), "branch": SHOWN["global"]}, "leaves local_mlp of train without effect"),
        ({"train": ("global_mlp", "language_model"), "branch": SHOWN["blind"]}, "leaves global_mlp of train without effect"),
        ({"language_model_learning_rate": 1e-4}, r"found language_model_learning_rate 0\.0001, but train is \['global_mlp'\]"),
        ({"evidence_weight": 0.5, "branch": SHOWN["global"]}, r"found evidence_weight 0\.5, but branch shows no local views"),
        ({"train": ("global_mlp", "global_mlp")}, "train must name each block once"),
    ],
)
def test_a_phase_says_nothing_that_has_no_effect(changes, message):
    with pytest.raises(SpecError, match=message):
        phase(**changes)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.connector = nn.ModuleDict({"global_mlp": nn.Linear(2, 2), "gate": nn.Linear(2, 2)})
        self.language_model = nn.Linear(2, 2)


def test_activity_and_hashes():
    model = Toy()
    blocks = parameters_by_block(model)
    assert list(blocks) == ["global_mlp", "gate", "language_model"]
    set_active_blocks(blocks, ("gate",))
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True, False, False]
    before = block_hashes(blocks)
    assert block_hashes(blocks) == before
    with torch.no_grad():
        model.connector["gate"].weight[0, 0] += 1
    after = block_hashes(blocks)
    assert_frozen(before, after, phase(train=("gate",)))
    with pytest.raises(FrozenBlockChangedError, match=r"'p'.*\['gate'\]"):
        assert_frozen(before, after, phase(train=("global_mlp",)))


def test_a_sign_flip_of_zero_changes_the_hash():
    model = Toy()
    with torch.no_grad():
        model.language_model.weight.zero_()
    before = block_hashes(parameters_by_block(model))
    with torch.no_grad():
        model.language_model.weight.mul_(-1)
    assert block_hashes(parameters_by_block(model)) != before


def test_the_type_that_holds_a_number_does_not_change_the_hash():
    model = Toy().to(torch.bfloat16)
    before = block_hashes(parameters_by_block(model))
    assert block_hashes(parameters_by_block(model.float())) == before
    with torch.no_grad():
        model.language_model.weight[0, 0] *= 1 + 2**-20  # between two numbers of bf16
    assert block_hashes(parameters_by_block(model)) != before


def test_a_block_that_is_not_there_cannot_train():
    with pytest.raises(FrozenBlockChangedError, match="resampler"):
        set_active_blocks(parameters_by_block(Toy()), ("resampler",))
