"""Adapters against W x + (alpha / rank) B A x written out: their fresh start, dropout, files and merging, and runs that train them."""

import json
import math

import pytest
import torch

from model.errors import LanguageModelError, SpecError
from model.language_model import checkpoint_layers, load_language_model, load_tokenizer
from model.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_adapters,
    is_adapter,
    load_adapters,
    merge_adapters,
    num_adapter_parameters,
    save_adapters,
    sequence_keys,
    target_layers,
)
from model.schedule import LANGUAGE_MODEL_BASE, block_hashes, parameters_by_block, proven_parameters
from model.specs import (
    BranchMix,
    CompressionSpec,
    DCISpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    LoraSpec,
    PhaseSpec,
    ScheduleSpec,
    TextGuidedSelectorSpec,
    fingerprint,
)
from tests.tiny_training import FakeFeatures, fake_samples, tiny_connector_spec, tiny_schedule, tiny_training_spec
from tests.unit.test_training_loop import Interrupted, lines, run
from workers.errors import TrainingError
from workers.storage import Store
from workers.training.assemble import assemble_model
from workers.training.batches import BatchBuilder
from workers.training.checkpoints import CheckpointFolder, load_weights, weights_of
from workers.training.engine import DeepSpeedEngine, TorchEngine

LORA = LoraSpec(rank=4, alpha=8.0, dropout=0.0)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(tiny_language_model_folder):
    return load_language_model(tiny_language_model_folder).network


def adapted(folder, lora=LORA, *, seed=0, spread=0.2):
    """A model whose adapters do something: B is no longer zero."""
    network = load_language_model(folder).network
    add_adapters(network, lora, seed=seed)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return network


def written_out(network, lora):
    """The same model with no adapter: every adapted weight is W + (alpha / rank) B A, one entry at a time."""
    weights = {}
    named = dict(network.named_parameters())
    for name, parameter in named.items():
        if is_adapter(name):
            continue
        value = parameter.detach().clone()
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            down, up = named[f"{stem}.lora_A.default.weight"], named[f"{stem}.lora_B.default.weight"]
            for out in range(value.shape[0]):
                for into in range(value.shape[1]):
                    value[out, into] += lora.alpha / lora.rank * float((up[out] * down[:, into]).sum().detach())
        weights[name.replace(".base_layer.", ".")] = value
    return weights


def test_forward_and_backward_are_those_of_the_written_out_weights(tiny_language_model_folder):
    network = adapted(tiny_language_model_folder)
    plain = load_language_model(tiny_language_model_folder).network
    plain.load_state_dict(written_out(network, LORA), strict=False)
    ids = torch.arange(40).reshape(2, 20)
    found, expected = network(ids).logits, plain(ids).logits
    # 6e-7 was seen on a CPU, of logits up to 0.65.
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, load_language_model(tiny_language_model_folder).network(ids).logits, atol=1e-2)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    scale = LORA.alpha / LORA.rank
    for name, parameter in network.named_parameters():
        if not is_adapter(name):
            assert parameter.grad is None, name
            continue
        stem = name.partition(".lora_")[0]
        down, up = (network.get_parameter(f"{stem}.lora_{side}.default.weight") for side in "AB")
        whole = gradients[f"{stem}.weight"]
        chain = scale * (up.T @ whole if ".lora_A." in name else whole @ down.T)  # of W + scale B A
        assert torch.allclose(parameter.grad, chain, atol=1e-4 * float(chain.detach().abs().max()) + 1e-7), name


def test_fresh_adapters_change_nothing_and_come_from_the_seed_alone(tiny_language_model_folder, base):
    ids = torch.arange(30).reshape(2, 15)
    expected = base(ids).logits
    before = torch.random.get_rng_state()
    add_adapters(base, LORA, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(base(ids).logits, expected)
    torch.manual_seed(99)
    again, other = (load_language_model(tiny_language_model_folder).network for _ in range(2))
    add_adapters(again, LORA, seed=3)
    add_adapters(other, LORA, seed=4)
    down = {name: parameter for name, parameter in base.named_parameters() if ".lora_A." in name}
    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in down.items())
    assert not any(torch.equal(parameter, other.get_parameter(name)) for name, parameter in down.items())
    for parameter in down.values():
        bound = 1 / math.sqrt(parameter.shape[1])
        assert parameter.abs().max() <= bound
        assert float(parameter.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_all_linear_is_every_linear_layer_but_the_head(base):
    layers = target_layers(base, LORA)
    assert sorted({name.rpartition(".")[2] for name in layers}) == sorted(LINEARS)
    assert len(layers) == 2 * len(LINEARS)
    counted = num_adapter_parameters(base, LORA)
    add_adapters(base, LORA, seed=0)
    assert counted == sum(parameter.numel() for name, parameter in base.named_parameters() if is_adapter(name))
    assert {parameter.dtype for name, parameter in base.named_parameters() if is_adapter(name)} == {torch.float32}


@pytest.mark.parametrize("targets", [("q_proj",), ("layers.0.mlp.up_proj", "v_proj")])
def test_named_layers_get_an_adapter_and_no_other(base, targets):
    add_adapters(base, LoraSpec(rank=2, alpha=2, targets=targets), seed=0)
    names = {name.partition(".lora_")[0] for name, _ in base.named_parameters() if is_adapter(name)}
    assert names
    assert all(any(name.endswith(f".{target}") for target in targets) for name in names)
    assert len(names) == (2 if len(targets) == 1 else 3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("qproj",),
            r"targets: found 'qproj', but in a LlamaForCausalLM no layer has that name; allowed: 'all-linear', or names out of \['down_proj'",
        ),
        (("q_proj", "norm"), r"found 'norm', but .* model\.norm is not linear"),
        (("lm_head",), r"found 'lm_head', but .* no layer has that name; .*The head gets no adapter"),
    ],
)
def test_targets_that_match_nothing_good_are_refused(base, targets, message):
    with pytest.raises(LanguageModelError, match=message):
        add_adapters(base, LoraSpec(rank=2, alpha=2, targets=targets), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, found 0; leave lora out to fine-tune every weight"),
        ({"alpha": 0.0}, "found alpha 0 and dropout 0"),
        ({"dropout": 1.0}, "found alpha 8 and dropout 1"),
        ({"targets": ()}, r"targets: found \(\); allowed: 'all-linear', or names"),
        ({"targets": ("q_proj", "q_proj")}, "each once"),
    ],
)
def test_specs_that_cannot_be_are_refused(change, message):
    with pytest.raises(SpecError, match=message):
        LoraSpec(**({"rank": 4, "alpha": 8.0} | change))


def test_adapters_that_nothing_trains_are_refused_with_advice(tiny_language_model_folder):
    with pytest.raises(
        SpecError, match=r"asks for adapters, but there is no schedule\.sft.*add language_model to schedule\.sft\.train, or leave lora out"
    ):
        tiny_training_spec(tiny_language_model_folder, lora=LORA, schedule=tiny_schedule(with_sft=False))


def test_lora_is_identity(tiny_language_model_folder):
    keys = {fingerprint(tiny_training_spec(tiny_language_model_folder, lora=lora)) for lora in (None, LORA, LoraSpec(rank=4, alpha=9.0))}
    assert len(keys) == 3


# ---- dropout


def test_dropout_is_a_function_of_key_length_and_layer(tiny_language_model_folder):
    network = adapted(tiny_language_model_folder, LoraSpec(rank=4, alpha=8.0, dropout=0.5))
    told = sequence_keys(network)
    ids = torch.arange(60).reshape(3, 20)
    undropped = network(ids).logits
    told.tell((11, 22, 33), (20, 20, 20))
    together = network(ids).logits
    assert torch.equal(network(ids).logits, together)
    assert not torch.allclose(together, undropped, atol=1e-3)
    for row, key in enumerate((11, 22, 33)):  # alone, in another place, padded: the same sequence drops the same
        told.tell((key,), (20,))
        assert torch.allclose(network(ids[row : row + 1]).logits[0], together[row], atol=1e-5)
        told.tell((5, key), (25, 20))
        padded = torch.cat([ids[row], torch.zeros(5, dtype=torch.int64)])
        assert torch.allclose(network(torch.stack([padded, padded])).logits[1, :20], together[row], atol=1e-5)
    told.tell((12, 22, 33), (20, 20, 20))
    other = network(ids).logits
    assert not torch.allclose(other[0], together[0], atol=1e-3)
    assert torch.allclose(other[1:], together[1:], atol=1e-5)
    told.tell(None, ())
    assert torch.equal(network(ids).logits, undropped)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    from model.lora import SequenceKeys, _KeyedDropout

    told = SequenceKeys()
    told.tell((1, 2), (200, 150))
    masks = [_KeyedDropout(0.25, layer, told)(torch.ones(2, 200, 64)) for layer in range(3)]
    for mask in masks:
        assert mask[0].unique().tolist() == [0.0, pytest.approx(4 / 3)]
        assert (mask[0] == 0).float().mean() == pytest.approx(0.25, abs=0.02)
        assert bool((mask[1, 150:] == 1).all())
    assert 0.5 < float((masks[0][0] == masks[1][0]).float().mean()) < 0.7  # 0.625 when independent
    with pytest.raises(LanguageModelError, match=r"sees inputs of shape \(400, 64\) for 2 sequences.*use dropout = 0"):
        _KeyedDropout(0.25, 0, told)(torch.ones(400, 64))


# ---- files and merging


def test_peft_itself_reads_what_is_saved(tiny_language_model_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = adapted(tiny_language_model_folder)
    save_adapters(network, LORA, tmp_path, "the/base")
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("the/base", 4, 8)
    assert sorted(config["target_modules"]) == sorted(LINEARS)
    ids = torch.arange(30).reshape(2, 15)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_language_model_folder, dtype=torch.float32), tmp_path)
    assert torch.equal(stock(ids).logits, network(ids).logits)
    ours = load_language_model(tiny_language_model_folder).network
    load_adapters(ours, LORA, tmp_path)
    assert torch.equal(ours(ids).logits, network(ids).logits)


def test_files_of_other_adapters_are_refused(tiny_language_model_folder, base, tmp_path):
    save_adapters(adapted(tiny_language_model_folder, LoraSpec(rank=4, alpha=8.0, targets=("q_proj",))), LORA, tmp_path, "b")
    with pytest.raises(LanguageModelError, match=f"{ADAPTER_WEIGHTS} holds other adapters .* stands on one side only"):
        load_adapters(base, LORA, tmp_path)
    fresh = load_language_model(tiny_language_model_folder).network
    with pytest.raises(LanguageModelError, match=r"has the shape \(4, 64\), expected \(2, 64\)"):
        load_adapters(fresh, LoraSpec(rank=2, alpha=8.0, targets=("q_proj",)), tmp_path)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_merged_weights_give_the_same_logits(tiny_language_model_folder, dtype, tolerance):
    network = load_language_model(tiny_language_model_folder).network.to(dtype)
    add_adapters(network, LORA, seed=0)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = network(ids).logits.float()
        merge_adapters(network)
        found = network(ids).logits.float()
    plain = load_language_model(tiny_language_model_folder).network
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    # Of logits up to 1.1, 4e-7 in fp32 and 8e-3 in bf16 was seen on a CPU.
    assert float((found - expected).abs().max()) < tolerance
    if dtype == torch.float32:
        assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))  # so greedy text is the same
        assert len(expected.argmax(dim=-1).unique()) > 3
    assert not torch.allclose(found, plain(ids).logits, atol=2 * tolerance)


# ---- training


@pytest.fixture(scope="module")
def spec(tiny_language_model_folder):
    return tiny_training_spec(tiny_language_model_folder, lora=LoraSpec(rank=4, alpha=8.0, dropout=0.1))


@pytest.fixture(scope="module")
def straight(spec, tmp_path_factory):
    """Fine-tuning with adapters, uninterrupted, on the twin."""
    store = Store(str(tmp_path_factory.mktemp("lora")))
    model, state = run(spec, store, "sft")
    return {"store": store, "model": model, "state": state, "losses": [line["loss"] for line in lines(store)]}


def test_the_block_is_the_adapters_and_the_base_is_proven_frozen(spec, straight):
    record = straight["state"].records[0]
    assert record.hashes_before.keys() == {*parameters_by_block(straight["model"]), LANGUAGE_MODEL_BASE}
    changed = {block for block in record.hashes_before if record.hashes_before[block] != record.hashes_after[block]}
    assert changed == {"global_mlp", "resampler", "gate", "compression", "language_model"}
    aligned = assemble_model(spec, freeze_language_model=True)
    assert not any(is_adapter(name) for name, _ in aligned.named_parameters())
    # The same hash as the whole language model had in alignment.
    assert block_hashes(proven_parameters(aligned))["language_model"] == record.hashes_after[LANGUAGE_MODEL_BASE]


def test_a_base_that_moves_stops_the_run(spec, tmp_path):
    from model.errors import FrozenBlockChangedError

    def spoil(engine):
        step = engine.step

        def moving(*args, **kwargs):
            with torch.no_grad():
                engine.model.language_model.model.norm.weight[0] += 1e-3
            return step(*args, **kwargs)

        engine.step = moving

    with pytest.raises(FrozenBlockChangedError, match=r"yet \['language_model_base'\] changed as well"):
        run(spec, Store(str(tmp_path)), "sft", spoil=spoil)


def test_checkpoints_hold_the_adapters_alone(straight):
    saved = CheckpointFolder(straight["store"], "k", "sft").latest()
    names = [name for name in saved.model if name.startswith("language_model.")]
    assert names
    assert all(is_adapter(name) for name in names)
    assert {name.rpartition(":")[0] for name in saved.optimizer} <= saved.model.keys()


@pytest.mark.parametrize(
    ("engine", "kill_after"),
    [(TorchEngine, 2), pytest.param(DeepSpeedEngine, 1, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(spec, straight, tmp_path, engine, kill_after):
    store = Store(str(tmp_path))
    with pytest.raises(Interrupted):
        run(spec, store, "sft", engine=engine, kill_after=kill_after, every=1)
    model, state = run(spec, store, "sft", engine=engine, every=1)
    assert [line["loss"] for line in lines(store)] == straight["losses"]
    assert state.records[-1].hashes_after == straight["state"].records[-1].hashes_after
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), straight["model"].parameters(), strict=True))


def test_dropout_does_not_depend_on_micro_batches(spec, straight, tmp_path):
    run(spec, Store(str(tmp_path)), "sft", micro_batch_size=1)
    assert [line["loss"] for line in lines(Store(str(tmp_path)))] == pytest.approx(straight["losses"], rel=1e-5)


def test_dropout_takes_part(spec, straight, tiny_language_model_folder, tmp_path):
    without = tiny_training_spec(tiny_language_model_folder, lora=LORA)
    run(without, Store(str(tmp_path)), "sft")
    found = [line["loss"] for line in lines(Store(str(tmp_path)))]
    assert found[0] == straight["losses"][0]  # B is zero yet, so nothing that is dropped is missed
    assert found[1:] != straight["losses"][1:]


def test_weights_without_adapters_are_refused_and_the_other_way_round(spec, tiny_language_model_folder):
    whole = assemble_model(tiny_training_spec(tiny_language_model_folder), freeze_language_model=False)
    model = assemble_model(spec, freeze_language_model=False)
    for into, out_of in ((whole, model), (model, whole)):
        with pytest.raises(TrainingError, match="another model"):
            load_weights(into, weights_of(out_of, with_language_model=True))


@pytest.mark.parametrize("native", [True, False])
def test_a_bf16_run_holds_the_base_in_numbers_of_bf16_and_the_adapters_in_fp32(native, tiny_language_model_folder, monkeypatch):
    monkeypatch.setattr("workers.training.assemble.multiplies_bf16", lambda device: native)
    spec = tiny_training_spec(tiny_language_model_folder, lora=LORA, precision="bf16")
    model = assemble_model(spec, freeze_language_model=False)
    types = {(is_adapter(name), parameter.dtype, parameter.requires_grad) for name, parameter in model.language_model.named_parameters()}
    assert types == {(True, torch.float32, True), (False, torch.bfloat16 if native else torch.float32, False)}
    aligned = assemble_model(spec, freeze_language_model=True)
    assert block_hashes(proven_parameters(model))[LANGUAGE_MODEL_BASE] == block_hashes(proven_parameters(aligned))["language_model"]


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4, alpha=8.0, dropout=0.3)])
def test_layers_that_are_computed_again_change_no_number(tiny_language_model_folder, tmp_path, lora):
    spec = tiny_training_spec(tiny_language_model_folder, lora=lora)
    losses, calls = {}, []
    for name in ("kept", "again"):
        model = assemble_model(spec, freeze_language_model=False)
        if name == "again":
            checkpoint_layers(model.language_model)
            model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        store = Store(str(tmp_path / name))
        run(spec, store, "sft", model=model, micro_batch_size=2)
        losses[name] = [line["loss"] for line in lines(store)]
    assert len(calls) == 2 * 2 * 3  # forward, and again for the backward pass; micro-batches; steps
    assert losses["again"] == losses["kept"]


def test_a_model_whose_layers_drop_in_training_is_refused(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    network = OPTForCausalLM(
        OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16, dropout=0.5)
    ).eval()
    with pytest.raises(LanguageModelError, match="compute something else in training"):
        checkpoint_layers(network)


FUSION = DCISpec(base=5, groups=((0, 2), (3, 5)))


@pytest.mark.parametrize(
    ("local", "also"),
    [
        (LocalBranchSpec(fusion=FUSION, compression=CompressionSpec(queries=4)), ("compression",)),
        (LocalBranchSpec(fusion=FUSION, compression=None, merge="spatial_unpad", newline=True), ("newline",)),
        (LocalBranchSpec(fusion=FUSION, compression=None, output_grid=2, selector=LearnableSelectorSpec()), ("selector",)),
        (LocalBranchSpec(fusion=FUSION, compression=None, projector="own", merge="spatial"), ("local_mlp",)),
        (LocalBranchSpec(fusion=FUSION, compression=CompressionSpec(queries=4), selector=TextGuidedSelectorSpec()), ("compression",)),
    ],
    ids=["compression", "newline", "learnable-selector", "own-projector", "text-guided-selector"],
)
def test_every_block_runs_whatever_a_batch_shows(tiny_language_model_folder, local, also):
    """Blank views give every parameter a gradient, in one order, and change neither loss nor any gradient that was there."""
    mix = BranchMix(both=0.25, global_only=0.25, local_only=0.25, blind=0.25)
    train = ("global_mlp", "resampler", "gate", *also, "language_model")
    selects = local.selector is not None
    sft = PhaseSpec(name="tuning", train=train, branch=mix, steps=6, batch_size=4, learning_rate=2e-3, selector=selects)
    resized = GlobalBranchSpec(fusion=FUSION, adapters=GatedMixtureSpec(), output_grid=local.output_grid)
    spec = tiny_training_spec(
        tiny_language_model_folder,
        lora=LoraSpec(rank=4, alpha=8.0, dropout=0.1),
        connector=tiny_connector_spec(global_branch=resized, local_branch=local),
        schedule=ScheduleSpec(align=(), sft=sft),
    )
    assert set(spec.connector.blocks) == set(train) - {"language_model"}
    model = assemble_model(spec, freeze_language_model=False)
    builder = BatchBuilder(
        samples=fake_samples(),
        source=FakeFeatures(spec),
        features=spec.features,
        connector=model.connector,
        schedule=spec.schedule,
        tokenizer=load_tokenizer(tiny_language_model_folder, None),
        max_tokens=model.max_tokens,
    )
    sft = len(spec.schedule.align)
    seen, orders, come = set(), set(), []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: come.append(name))
    for step in range(6):
        for batch in builder.build(sft, step, micro_batch_size=1).micro_batches:
            results = []
            for model.runs_every_block in (False, True):
                model.zero_grad(set_to_none=True)
                come.clear()
                objective, total, _ = model(batch)
                if objective.requires_grad:
                    objective.backward()
                if model.runs_every_block:
                    orders.add(tuple(come))
                results.append((total, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}))
            (plain, some), (whole, every) = results
            seen.add((batch.global_maps is None, batch.local_maps is None))
            assert torch.equal(plain, whole)
            assert all(gradient is not None for gradient in every.values())
            for name, gradient in every.items():
                assert torch.equal(gradient, torch.zeros_like(gradient) if some[name] is None else some[name]), name
    assert len(seen) == 4
    assert len(orders) == 1
