"""What holds for every connector that a recipe can describe: drawn specs, a real language model of two layers, real gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.chat import Conversation
from model.connector import Connector
from model.language_model import embedding_rms, load_language_model
from model.schedule import block_hashes, parameters_by_block, set_active_blocks
from model.specs import (
    BLOCKS,
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    MLPSpec,
    SCISpec,
    SingleSpec,
    STISpec,
    TextGuidedSelectorSpec,
)
from model.views import ViewSpec, plan_views
from model.vision_language import VisionLanguageModel, lay_out_images, plan_sequences
from tests.drawn_fusions import dci_fields, sparse_fields
from workers.training.engine import TorchEngine

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")  # beartype samples containers at random

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

layers = st.integers(0, 6)
map_pools = st.sampled_from([1, 1, 2])
squares = st.one_of(
    st.builds(SingleSpec, layer=layers, map_pool=map_pools),
    st.builds(lambda fields, map_pool: SCISpec(**fields, map_pool=map_pool), sparse_fields(6, 3), map_pools),
    st.builds(lambda fields, map_pool: DCISpec(**fields, map_pool=map_pool), dci_fields(6, 3), map_pools),
)
stis = st.one_of(
    st.builds(lambda fields, pool: STISpec(**fields, pool=pool), sparse_fields(6, 2), st.sampled_from([3, 8, (2, 2), (1, 4)])),
    st.builds(lambda fields, pool: STISpec(**fields, pool=pool, map_pool=2), sparse_fields(6, 2), st.sampled_from([3, (2, 1)])),
)
starts = st.sampled_from(["positional", "authors"])
mixtures = st.builds(GatedMixtureSpec, attention_init=starts, noise=st.sampled_from(["own", "authors", "none"]))
global_branches = st.one_of(
    st.builds(GlobalBranchSpec, fusion=squares, adapters=st.one_of(st.just(MLPSpec()), mixtures), output_grid=st.sampled_from([None, 2, 3])),
    st.builds(GlobalBranchSpec, fusion=stis, adapters=st.just(MLPSpec())),
)
selectors = st.one_of(
    st.none(),
    st.builds(TextGuidedSelectorSpec, top_p=st.sampled_from([0.1, 0.6, 0.95, 1.0]), reduce=st.sampled_from(["sum", "mean"])),
    st.builds(LearnableSelectorSpec, top_p=st.sampled_from([0.1, 0.6, 0.95]), width=st.sampled_from([4, 64])),
)


@st.composite
def local_branches(draw, beside):
    """A local branch that goes with a global one: fused alike where they share a projector."""
    projector = draw(st.sampled_from(["shared", "own"]))
    merge = draw(st.sampled_from(["flat", "spatial", "spatial_unpad"]))
    queries = st.sampled_from([1, 4, 16] if merge == "spatial_unpad" else [1, 3, 4, 6, 16])
    compression = draw(st.one_of(st.none(), st.builds(CompressionSpec, queries=queries, attention_init=starts)))
    placed = merge != "flat" or compression is not None  # tokens need a place in the view, which pooled ones of sti have not
    if projector == "own":
        fusion = draw(squares if placed else st.one_of(squares, stis))
    elif not isinstance(beside.fusion, STISpec):
        fusion = beside.fusion
    else:
        fusion = SingleSpec(layer=beside.fusion.base) if placed else beside.fusion
    return LocalBranchSpec(
        fusion=fusion,
        compression=compression,
        projector=projector,
        output_grid=draw(st.sampled_from([None, 2])) if compression is None and not isinstance(fusion, STISpec) else None,
        merge=merge,
        newline=draw(st.booleans()) and merge != "flat",
        selector=draw(selectors),
    )


@st.composite
def connector_specs(draw):
    branch = draw(global_branches)
    return ConnectorSpec(
        global_branch=branch,
        local_branch=draw(st.one_of(st.none(), local_branches(branch), local_branches(branch))),
        separator=draw(st.sampled_from([",", None])),
    )


connectors = connector_specs()

PLANS = (plan_views(112, 60, 56, ViewSpec.anyres()), plan_views(60, 112, 56, ViewSpec.slime()), plan_views(90, 90, 56, ViewSpec.slime_paper()))
VIEWS = [len(plan.local_views) for plan in PLANS]
ANSWERS = 3


@pytest.fixture(scope="module")
def language_model(tiny_language_model_folder):
    return load_language_model(tiny_language_model_folder)


def make_model(language_model, spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    connector = Connector(
        spec,
        encoder_width=8,
        num_patches=16,
        hidden=language_model.hidden,
        embedding_rms=embedding_rms(language_model.network),
        generator=generator,
    )
    with torch.no_grad():
        for parameter in connector.parameters():  # a gate of zeros would hide what goes through it
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model = VisionLanguageModel(connector, language_model)
    model.language_model.requires_grad_(requires_grad=False)
    return model


def conversation(number, answer_seed=0):
    words = np.random.default_rng(number).integers(5, 90, size=8).tolist()
    answer = np.random.default_rng([answer_seed, number]).integers(5, 90, size=ANSWERS).tolist()
    return Conversation(before=tuple(words[:2]), after=(*words[2:], *answer), supervised=(False,) * 6 + (True,) * ANSWERS, turns_kept=1)


def maps_of(spec, count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = spec.map_tokens(16)
    return {name: torch.randn(count, tokens, 8, generator=generator) for name in sorted({m.name for m in spec.maps})}


def batch_of(model, order=(0, 1, 2), answer_seed=0, *, noisy=False):
    spec = model.connector.spec
    local = spec.local_branch
    starts_ = np.cumsum([0, *VIEWS])
    views = [view for image in order for view in range(starts_[image], starts_[image] + VIEWS[image])]
    most = max(len(model.connector.local_order(plan)) for plan in PLANS)
    mixture = isinstance(spec.global_branch.adapters, GatedMixtureSpec)
    generator = torch.Generator().manual_seed(5)
    return plan_sequences(
        [conversation(image, answer_seed) for image in order],
        ["global" if local is None else "both"] * 3,
        [0, 1, 2],
        lay_out_images(model.connector, [True] * 3, [PLANS[image] for image in order]),
        global_maps={name: value[list(order)] for name, value in maps_of(spec.global_branch.fusion, 3, 1).items()},
        local_maps=None if local is None else {name: value[views] for name, value in maps_of(local.fusion, sum(VIEWS), 2).items()},
        gate_noise=torch.randn(3, model.connector.num_global_patches, 2, generator=generator)
        if noisy and mixture and spec.global_branch.adapters.noise != "none"
        else None,
        selects=spec.selector is not None,
        selector_noise=torch.randn(3, most, generator=generator) if noisy and spec.selector is not None else None,
    )


@given(spec=connectors)
@SETTINGS
def test_gradients_reach_every_block_and_nothing_that_is_frozen(language_model, spec):
    model = make_model(language_model, spec)
    blocks = parameters_by_block(model)
    assert tuple(block for block in blocks if block != "language_model") == spec.blocks
    set_active_blocks(blocks, spec.blocks)
    model(batch_of(model, noisy=True))[0].backward()
    silent = []
    for block in spec.blocks:
        for name, parameter in blocks[block].items():
            if parameter.grad is None or not parameter.grad.abs().sum() > 0:
                silent.append(name)
    assert silent == []
    assert all(parameter.grad is None for parameter in blocks["language_model"].values())


@given(spec=connectors, chosen=st.sets(st.sampled_from(BLOCKS[:-1])))
@SETTINGS
def test_a_step_changes_the_active_blocks_alone(language_model, spec, chosen):
    active = [block for block in spec.blocks if block in chosen]
    if not active:
        active = ["global_mlp"]
    model = make_model(language_model, spec)
    blocks = parameters_by_block(model)
    engine = TorchEngine(model, spec.blocks)
    engine.set_active(active)
    before = block_hashes(blocks)
    engine.step([batch_of(model)], supervised=3 * ANSWERS, rates=dict.fromkeys(active, 1e-2), max_grad_norm=1.0)
    after = block_hashes(blocks)
    assert {block for block in before if before[block] != after[block]} <= set(active)
    assert before["global_mlp"] != after["global_mlp"] or "global_mlp" not in active


@given(spec=connectors)
@SETTINGS
def test_permuting_the_batch_permutes_what_it_gives(language_model, spec):
    model = make_model(language_model, spec)
    straight, turned = batch_of(model), batch_of(model, order=(2, 0, 1))
    one, two = (model.sequences(batch, model.visual_tokens(batch)) for batch in (straight, turned))
    for place, image in enumerate((2, 0, 1)):
        length = int(one.lengths[image])
        assert int(two.lengths[place]) == length
        torch.testing.assert_close(two.embedded[place, :length], one.embedded[image, :length], atol=1e-5, rtol=1e-5)


@given(spec=connectors.filter(lambda spec: spec.selector is not None))
@SETTINGS
def test_the_answer_changes_no_selection(language_model, spec):
    model = make_model(language_model, spec)
    one, two = batch_of(model, answer_seed=0), batch_of(model, answer_seed=1)
    assert not torch.equal(one.text_ids, two.text_ids)
    first, second = (model.sequences(batch, model.visual_tokens(batch)) for batch in (one, two))
    assert first.lengths.tolist() == second.lengths.tolist()
    for row in range(3):
        shown = int(first.lengths[row]) - ANSWERS
        assert torch.equal(first.embedded[row, :shown], second.embedded[row, :shown])


@given(spec=connectors.filter(lambda spec: spec.selector is not None))
@SETTINGS
def test_selection_keeps_at_least_one_token_in_order_and_all_at_one(language_model, spec):
    model = make_model(language_model, spec)
    batch = batch_of(model, noisy=True)
    visual = model.visual_tokens(batch)
    whole, some = model.embed_sequences(batch, visual), model.sequences(batch, visual)
    for row, plan in enumerate(PLANS):
        length, kept = int(batch.lengths[row]), int(some.lengths[row])
        places, at = [], 0
        for token in some.embedded[row, :kept]:
            while not torch.equal(whole[row, at], token):
                at += 1  # in the old order, or this runs past the end
            places.append(at)
            at += 1
        dropped = set(range(length)) - set(places)
        local = torch.nonzero(batch.gather[row, :length] >= batch.first_local_row).squeeze(1).tolist()
        assert dropped <= set(local)
        assert len(dropped) < len(local)
        assert len(local) == sum(place >= 0 for place in model.connector.local_order(plan))
        if spec.selector.top_p == 1.0:
            assert not dropped


@given(spec=connectors.filter(lambda spec: isinstance(spec.global_branch.adapters, GatedMixtureSpec)), seed=st.integers(0, 100))
@SETTINGS
def test_gates_sum_to_one(language_model, spec, seed):
    model = make_model(language_model, spec, seed)
    tokens = torch.randn(2, 16, 8 * spec.global_branch.fusion.num_wide)
    for noise in (None, torch.randn(2, 16, 2)):
        weights = model.connector.gate(tokens, noise)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 16))
        assert (weights > 0).all()


@given(spec=connectors)
@SETTINGS
def test_what_is_announced_is_what_comes_out(language_model, spec):
    model = make_model(language_model, spec)
    batch = batch_of(model)
    visual = model.visual_tokens(batch)
    assert visual.global_tokens.shape == (3, spec.global_tokens(16), language_model.hidden)
    local = spec.local_branch
    if local is None:
        assert visual.local_tokens is None
    else:
        assert visual.local_tokens.shape == (sum(VIEWS), local.view_tokens(16), language_model.hidden)
    separator = spec.separator is not None and local is not None
    for row, plan in enumerate(PLANS):
        text = conversation(row).num_text_tokens
        assert int(batch.lengths[row]) == text + spec.global_tokens(16) + separator + len(model.connector.local_order(plan))


@given(spec=connectors)
@SETTINGS
def test_specs_survive_their_json(spec):
    import json

    from model.decoding import from_json
    from model.specs import canonical_json, fingerprint

    again = from_json(ConnectorSpec, json.loads(canonical_json(spec)))
    assert again == spec
    assert fingerprint(again) == fingerprint(spec)
    other = replace(spec, standardise_inputs=not spec.standardise_inputs)
    assert fingerprint(other) != fingerprint(spec)
