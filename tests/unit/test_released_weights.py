"""The authors' weights in and out: equal outputs against modules written from the papers' facts, and a report for whatever does not fit."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.connector import Connector, build_connector
from model.errors import ExportError, ReleasedWeightsError
from model.fusion import fuse
from model.released_export import write_llava_layout
from model.released_language_model import released_config
from model.released_weights import authors_fusion, canonical_name, load_released
from model.specs import (
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    EncoderSpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    MLPSpec,
    SingleSpec,
    TextGuidedSelectorSpec,
)
from model.tensor_files import open_tensor_files, weight_files
from model.views import ViewSpec
from tests.released import HIDDEN, ReferenceProjector, ReferenceResampler, parameters_as, shake, slime_modules, write_dense, write_slime
from tests.tiny_training import tiny_encoder_spec

PATCHES, QUERIES, WIDTH = 16, 4, 8


def encoder_spec(**changes) -> EncoderSpec:
    return tiny_encoder_spec(**changes)


def slime_spec(**changes) -> ConnectorSpec:
    local = changes.pop("local", {})
    fusion = SingleSpec(layer=5)
    values = {
        "global_branch": GlobalBranchSpec(fusion=fusion, adapters=GatedMixtureSpec(noise="authors")),
        "local_branch": LocalBranchSpec(**({"fusion": fusion, "compression": CompressionSpec(queries=QUERIES)} | local)),
        "standardise_inputs": False,
    }
    return ConnectorSpec(**(values | changes))


def dense_spec(kind="dci", encoder=None, **changes) -> ConnectorSpec:
    fusion = authors_fusion(kind, encoder or encoder_spec(num_blocks=24)) or SingleSpec(layer=5)
    values = {"global_branch": GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()), "local_branch": None, "standardise_inputs": False}
    return ConnectorSpec(**(values | changes))


def load(folder, spec, encoder=None, views=None):
    files = open_tensor_files(weight_files([folder]))
    return load_released(files, released_config(folder), spec, encoder or encoder_spec(), views or ViewSpec.slime())


def connector_of(imported, spec, encoder=None) -> Connector:
    connector = build_connector(spec, encoder or encoder_spec(), hidden=imported.facts.hidden, embedding_rms=0.3, seed=1)
    connector.load_state_dict(imported.state)
    return connector


def in_double(module):
    """A reference module in double precision, its position table as rounded as it was."""
    table = module.pos_embed.dtype
    double = copy.deepcopy(module).double()
    double.pos_embed.data = double.pos_embed.data.to(table)
    return double


def maps_for(spec, encoder, batch=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    names = {map_spec.name for branch in (spec.global_branch, spec.local_branch) if branch is not None for map_spec in branch.fusion.maps}
    return {name: torch.randn(batch, encoder.num_patches, encoder.width, generator=generator) for name in sorted(names)}


# -- in: equal outputs


@torch.no_grad()
def test_slime_computes_what_the_authors_modules_compute(tmp_path):
    modules = slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH)
    spec = slime_spec()
    imported = load(write_slime(tmp_path, modules), spec)
    connector = connector_of(imported, spec)
    maps = maps_for(spec, encoder_spec())
    tokens = maps["layer_5"]
    torch.testing.assert_close(connector.global_tokens(maps), modules[0](tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(connector.global_tokens(maps, experts="mlp"), modules[0].projection(tokens), atol=1e-5, rtol=1e-5)
    expert = modules[0].projection(modules[0].attn(tokens))
    torch.testing.assert_close(connector.global_tokens(maps, experts="resampler"), expert, atol=1e-5, rtol=1e-5)
    compressed = modules[0].projection(modules[1].post_qformer(tokens))
    torch.testing.assert_close(connector.local_tokens(maps), compressed, atol=1e-5, rtol=1e-5)
    assert connector.token_scale == 1.0


@torch.no_grad()
@pytest.mark.parametrize(("width", "heads"), [(128, 1), (256, 2), (1024, 8)])
def test_every_head_of_the_authors_width_is_ours(tmp_path, width, heads):
    """Packed projections are split by heads in the same order; both ways of computing (regrouped for few queries) are gone through."""
    encoder = encoder_spec(width=width)
    modules = slime_modules(patches=PATCHES, queries=QUERIES, width=width, heads=heads)
    spec = slime_spec()
    connector = connector_of(load(write_slime(tmp_path, modules), spec, encoder), spec, encoder)
    assert connector.resampler.num_heads == heads
    maps = maps_for(spec, encoder)
    tokens = maps["layer_5"]
    for ours, theirs in ((connector.resampler, modules[0].attn), (connector.compression, modules[1].post_qformer)):
        exact = in_double(theirs)(tokens.double()).float()  # at 1024 channels the reference in fp32 is 2e-5 off this itself
        torch.testing.assert_close(ours(tokens), exact, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_their_half_precision_position_table_costs():
    """Theirs is fp16, ours fp32: at their size (576 patches, 144 queries, 1024 wide, 8 heads) outputs of unit variance differ by 4e-4 at most and
    8e-5 in the mean at an initialisation like theirs, by ten times that where the packed projections have grown fourfold."""
    outputs = {}
    for table in (torch.float32, torch.float16):
        torch.manual_seed(0)
        module = ReferenceResampler(144, 1024, 8, table=table)
        torch.manual_seed(1)
        tokens = torch.randn(1, 576, 1024)
        outputs[table] = module(tokens)
    difference = (outputs[torch.float32] - outputs[torch.float16]).abs()
    assert 1e-5 < float(difference.max()) < 1e-3
    assert float(difference.square().mean().sqrt()) < 2e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dci", "sci", "sti", "none"])
def test_dense_connectors_compute_what_the_authors_projector_computes(tmp_path, kind):
    encoder = encoder_spec(num_blocks=24)
    fusion = authors_fusion(kind, encoder) or SingleSpec(layer=23)
    spec = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()), local_branch=None, standardise_inputs=False)
    projector = ReferenceProjector(WIDTH * fusion.num_wide, HIDDEN)
    imported = load(write_dense(tmp_path, projector, kind), spec, encoder)
    connector = connector_of(imported, spec, encoder)
    maps = maps_for(spec, encoder)
    torch.testing.assert_close(connector.global_tokens(maps), projector(fuse(maps, fusion)), atol=1e-6, rtol=1e-6)
    assert len(imported.report.lines()) == 4  # four tensors, nothing ignored, left or noted


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_half_precision_is_kept_to_the_bit(tmp_path, dtype):
    projector = ReferenceProjector(WIDTH, HIDDEN)
    spec = dense_spec("none")
    imported = load(write_dense(tmp_path, projector, "none", dtype), spec)
    assert torch.equal(imported.state["global_mlp.linear_1.weight"], projector[0].weight.to(dtype).float())
    assert {tensor.dtype for tensor in imported.state.values()} == {torch.float32}
    assert {item.dtype for item in imported.report.imported} == {str(dtype).removeprefix("torch.")}


def test_the_paper_s_noise_matrix_is_taken_where_the_recipe_has_one(tmp_path):
    modules = slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH)
    folder = write_slime(tmp_path, modules)
    own = slime_spec(global_branch=GlobalBranchSpec(fusion=SingleSpec(layer=5), adapters=GatedMixtureSpec(noise="own")))
    assert torch.equal(load(folder, own).state["gate.noise_weight"], modules[0].w_noise)
    report = load(folder, slime_spec()).report
    assert {item.name: item.reason for item in report.ignored}["model.mm_projector.w_noise"].startswith("the authors' code never reads it")


def test_position_tables_that_are_ours_are_ignored_and_others_refused(tmp_path):
    for table in (torch.float32, torch.float16, torch.bfloat16):
        folder = write_slime(tmp_path / str(table), slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH, table=table))
        ignored = {item.name: item.reason for item in load(folder, slime_spec()).report.ignored}
        assert ignored["model.sampler.post_qformer.pos_embed"].startswith("the fixed position table")
    tensors = torch.load(folder / "sampler.bin")
    table = tensors["model.sampler.post_qformer.pos_embed"]
    torch.save(tensors | {"model.sampler.post_qformer.pos_embed": torch.full_like(table, torch.nan)}, folder / "sampler.bin")
    assert "holds NaN, which their code replaces" in "\n".join(load(folder, slime_spec()).report.lines())
    swapped = torch.cat([table[:, WIDTH // 2 :], table[:, : WIDTH // 2]], dim=1)  # rows for columns
    torch.save(tensors | {"model.sampler.post_qformer.pos_embed": swapped}, folder / "sampler.bin")
    with pytest.raises(ReleasedWeightsError, match=r"unexpected  model\.sampler\.post_qformer\.pos_embed \[4, 8\]"):
        load(folder, slime_spec())


@pytest.mark.parametrize(
    ("found", "canonical"),
    [
        ("model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.model.mm_projector.w_gate", "model.mm_projector.w_gate"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.sampler.post_qformer.query", "model.sampler.post_qformer.query"),
        ("sampler.post_qformer.query", "model.sampler.post_qformer.query"),
    ],
)
def test_names_of_every_training_mean_the_same(found, canonical):
    assert canonical_name(found) == canonical


def test_a_lora_run_s_trainables_are_imported_beside_what_is_left(tmp_path):
    modules = slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH)
    write_slime(tmp_path, modules)
    parts = [torch.load(tmp_path / f"{part}.bin") for part in ("mm_projector", "sampler")]
    tensors = {f"base_model.model.{name}": tensor for part in parts for name, tensor in part.items()}
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(10, HIDDEN)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, HIDDEN)
    for name in ("mm_projector.bin", "sampler.bin"):
        (tmp_path / name).unlink()
    torch.save(tensors, tmp_path / "non_lora_trainables.bin")
    report = load(tmp_path, slime_spec()).report
    assert {(part.part, part.num_tensors, part.num_values) for part in report.left} == {
        ("language model", 1, 10 * HIDDEN),
        ("LoRA matrices", 1, 2 * HIDDEN),
    }
    assert any("LoRA matrices are not merged" in note for note in report.notes)


def test_what_no_weight_shows_is_noted_where_the_config_tells_otherwise(tmp_path):
    folder = write_dense(tmp_path, ReferenceProjector(WIDTH, HIDDEN), "none")
    config = json.loads((folder / "config.json").read_text())
    more = {"mm_vision_tower": "openai/clip", "unfreeze_mm_vision_tower": True, "mm_patch_merge_type": "spatial"}
    (folder / "config.json").write_text(json.dumps(config | more))
    plain = GlobalBranchSpec(fusion=SingleSpec(layer=5), adapters=MLPSpec())
    spec = dense_spec(global_branch=plain, local_branch=LocalBranchSpec(fusion=SingleSpec(layer=5), compression=None))
    assert load(folder, spec).report.notes == (
        "trained with the encoder openai/clip, the recipe has tiny",
        "trained its vision tower too (unfreeze_mm_vision_tower), which is not imported: its features are not the recipe's encoder's",
        "config.json has mm_patch_merge_type spatial, the recipe's merge is flat",
        "LLaVA's code puts no separator between global and local tokens, the recipe has ','",
    )
    (folder / "config.json").unlink()
    assert load(folder, spec).report.notes[0].startswith("no config.json: whether the weights were trained with single over these layers")


# -- in: what is refused


@pytest.fixture
def slime_folder(tmp_path):
    return write_slime(tmp_path / "released", slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH))


def change(folder, file, edit):
    tensors = torch.load(folder / file)
    edit(tensors)
    torch.save(tensors, folder / file)


GATE, PACKED = "model.mm_projector.w_gate", "model.mm_projector.attn.attn.in_proj_weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda held: held.pop(GATE), r"1 of the connector's tensors do not fit.*\n  missing     model\.mm_projector\.w_gate \[8, 2\]\n  imported"),
        (lambda held: held.update(more=torch.zeros(2)), r"unexpected  more \[2\]"),
        (
            lambda held: held.update({PACKED: held[PACKED].T.contiguous()}),
            r"shape       .*in_proj_weight: expected \[24, 8\], found \[8, 24\] of float32",
        ),
        (lambda held: held.update({GATE: held[GATE].int()}), r"w_gate: expected \[8, 2\], found \[8, 2\] of int32"),
        (lambda held: held[GATE].fill_(torch.nan), r"not finite  model\.mm_projector\.w_gate"),
        (lambda held: held[PACKED][0].fill_(torch.inf), r"not finite  .*in_proj_weight"),
        (lambda held: held.update({GATE: torch.zeros(0)}), r"1 tensors have no values \(such as .*w_gate\): DeepSpeed ZeRO-3 .*zero_to_fp32\.py"),
        (
            lambda held: held.update({"model.sampler.selector.query": torch.zeros(1, 8)}),
            r"unexpected  model\.sampler\.selector\.query \[1, 8\]",  # SliME's other selector
        ),
    ],
)
def test_damage_is_refused_with_the_report(slime_folder, edit, message):
    change(slime_folder, "mm_projector.bin", edit)
    with pytest.raises(ReleasedWeightsError, match=message):
        load(slime_folder, slime_spec())


def test_a_missing_sampler_is_told_before_its_eleven_tensors(slime_folder):
    (slime_folder / "sampler.bin").unlink()
    with pytest.raises(
        ReleasedWeightsError, match=r"compression: the files hold no compression, the recipe says 4 queries; give sampler\.bin beside"
    ):
        load(slime_folder, slime_spec())


def test_a_mid_run_checkpoint_of_slime_is_recognised(slime_folder):
    (slime_folder / "mm_projector.bin").write_bytes((slime_folder / "sampler.bin").read_bytes())
    (slime_folder / "sampler.bin").unlink()
    with pytest.raises(ReleasedWeightsError, match=r"hold SliME's sampler alone, as the mm_projector\.bin of its checkpoint-N folders does"):
        load(slime_folder, slime_spec())


def refusal(folder, spec, encoder=None) -> str:
    with pytest.raises(ReleasedWeightsError, match="the recipe describes another connector than the files hold") as caught:
        load(folder, spec, encoder)
    return str(caught.value)


def test_a_recipe_of_another_connector_is_told_key_by_key(slime_folder):
    single = SingleSpec(layer=5)
    spec = ConnectorSpec(
        global_branch=GlobalBranchSpec(fusion=single, adapters=MLPSpec()),
        local_branch=LocalBranchSpec(
            fusion=SingleSpec(layer=4), compression=CompressionSpec(queries=9), projector="own", selector=LearnableSelectorSpec()
        ),
    )
    text = refusal(slime_folder, spec)
    for line in (
        "connector.standardise_inputs: the authors' connectors read features as they are, the recipe says true; set standardise_inputs = false",
        "connector.global.adapters: the files hold gated_mixture, the recipe says mlp; set kind = 'gated_mixture'",
        "connector.local.compression: the files hold 4 queries, the recipe says 9 queries; set compression = { queries = 4 }",
        "connector.local.fusion: the authors read the same layers of global and local views",
        "connector.local.projector: the authors have one projector",
        "selector has no weights, the recipe's learnable one does; use kind = 'text_guided'",
    ):
        assert line in text
    assert "connector.global.fusion" not in text


def test_widths_tell_the_number_of_maps(tmp_path, slime_folder):
    text = refusal(write_dense(tmp_path / "dense", ReferenceProjector(3 * WIDTH, HIDDEN)), dense_spec("none"))
    assert "reads 24 channels, the recipe's single of tiny gives 8; 24 is 3 maps of that encoder's width 8" in text
    text = refusal(slime_folder, slime_spec(), encoder_spec(width=12))
    assert "8 is no whole number of maps of that encoder's width 12" in text


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("sci", dense_spec("dci"), "config.json tells of sci, the recipe says dci; set kind = 'sci'"),
        (
            "dci",
            dense_spec(global_branch=GlobalBranchSpec(fusion=DCISpec(base=23, groups=((0, 10), (11, 23))), adapters=MLPSpec())),
            "the authors' dci reads ['layer_23', 'mean_0_11', 'mean_12_23'], the recipe's ['layer_23', 'mean_0_10', 'mean_11_23']",
        ),
    ],
)
def test_maps_of_another_meaning_are_refused_though_their_widths_fit(tmp_path, kind, spec, message):
    folder = write_dense(tmp_path, ReferenceProjector(3 * WIDTH, HIDDEN), kind)
    assert message in refusal(folder, spec, encoder_spec(num_blocks=24))


def test_another_layer_than_the_config_s_is_refused(slime_folder):
    assert "mm_vision_select_layer -2 is layer 23, the recipe says 5" in refusal(slime_folder, slime_spec(), encoder_spec(num_blocks=24))


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.mm_projector.weight": torch.zeros(4, 8), "model.mm_projector.bias": torch.zeros(4)},
        {f"model.mm_projector.{layer}.weight": torch.zeros(8, 8) for layer in (0, 2, 4)},
        {"model.mm_projector.projection.0.weight": torch.zeros(8, 8)},
    ],
)
def test_projectors_without_a_counterpart_are_told(tmp_path, tensors):
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(
        ReleasedWeightsError, match=r"expected a projector of two linear layers .*, found model\.mm_projector\..*no counterpart in Loupe"
    ):
        load(tmp_path, dense_spec("none"))


def test_a_stage_with_one_expert_is_noted(tmp_path):
    folder = write_slime(tmp_path, slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH), mm_learnable_gated=0, mm_resampler_topp=0.95)
    notes = load(folder, slime_spec(local={"selector": TextGuidedSelectorSpec(top_p=0.5)})).report.notes
    assert any("trained with experts = 'mlp' alone" in note for note in notes)
    assert any("mm_resampler_topp 0.95, the recipe's selector keeps 0.5" in note for note in notes)


def test_what_the_selector_does_otherwise_and_a_template_that_is_missing_are_noted(tmp_path):
    modules = slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH)
    told = {"mm_resampler_temp": 0.5, "mm_dense_connector_type": "none", "vocab_size": 128_256}
    folder = write_slime(tmp_path, modules, **told)
    notes = load(folder, slime_spec(local={"selector": TextGuidedSelectorSpec(top_p=0.5, reduce="mean")})).report.notes
    assert any("mm_resampler_temp 0.5, the recipe's selector a temperature of 1" in note for note in notes)
    assert any("sums over the text, the recipe's takes the mean" in note for note in notes)
    assert any("template for Llama 3 begins the assistant's turns with the system's header" in note for note in notes)
    same = load(write_slime(tmp_path / "same", modules, mm_resampler_temp=1.0), slime_spec(local={"selector": TextGuidedSelectorSpec()})).report.notes
    assert not any("temperature" in note or "takes the mean" in note or "Llama 3" in note for note in same)


def test_widths_whose_heads_differ_are_refused(tmp_path):
    """260 channels: 2 heads by their rule, which do not share the position codes' 65 frequencies evenly, so that Loupe has 1."""
    encoder = encoder_spec(width=260)
    folder = write_slime(tmp_path, slime_modules(patches=PATCHES, queries=QUERIES, width=260, heads=2))
    with pytest.raises(ReleasedWeightsError, match="over 260 channels has 2 heads, Loupe's 1"):
        load(folder, slime_spec(), encoder)


FUZZED = sorted(
    {*parameters_as(slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH)[0], "model.mm_projector")} - {"model.mm_projector.w_noise"}
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FUZZED), st.sampled_from(["missing", "longer", "extra axis", "nan"]))
def test_no_single_fault_passes(tmp_path_factory, name, fault):
    """Whatever one tensor of the projector lacks, the import is refused, or the tensor is one that decides nothing."""
    folder = write_slime(tmp_path_factory.mktemp("fault"), slime_modules(patches=PATCHES, queries=QUERIES, width=WIDTH))

    def edit(held):
        tensor = held.pop(name)
        match fault:
            case "longer":
                held[name] = torch.cat([tensor, tensor])
            case "extra axis":
                held[name] = tensor[None]
            case "nan":
                held[name] = tensor.clone().flatten().index_fill(0, torch.tensor([0]), torch.nan).reshape(tensor.shape)

    change(folder, "mm_projector.bin", edit)
    if name.endswith("pos_embed") and fault in ("missing", "nan"):  # of these, their code makes the table anew
        assert not load(folder, slime_spec()).report.refused
        return
    # Those by which the connector's kind and sizes are known speak of these; every other fault names its tensor.
    expected = "." if name.endswith(("attn.query", "projection.0.weight", "projection.2.weight")) else name.replace(".", r"\.")
    # Those by which the connector's kind and sizes are known speak of these; every other fault names its tensor.
    expected = "." if name.endswith(("attn.query", "projection.0.weight", "projection.2.weight")) else name.replace(".", r"\.")
    with pytest.raises(ReleasedWeightsError, match=expected):
        load(folder, slime_spec())


# -- out


def layout(folder, connector, encoder, **more):
    views = ViewSpec.slime(global_fit="pad" if connector.spec.local_branch is None else "squash")
    return write_llava_layout(folder, connector, encoder=encoder, **({"views": views, "separator_id": 11} | more))


def slime_encoder(**changes) -> EncoderSpec:
    return encoder_spec(view_px=336, patch_px=14, **changes)  # 24 x 24 patches: the only number for which their gate counts


def trained(spec, encoder, seed=3) -> Connector:
    """A connector as training leaves it: no parameter at its start, keys' and values' norms apart."""
    connector = build_connector(spec, encoder, hidden=HIDDEN, embedding_rms=0.37, seed=seed)
    shake(connector, seed)
    return connector


@torch.no_grad()
def test_slime_goes_out_and_comes_back(tmp_path):
    encoder = slime_encoder()
    spec = slime_spec(local={"selector": TextGuidedSelectorSpec(top_p=0.9)})
    connector = trained(spec, encoder)
    assert layout(tmp_path, connector, encoder) == ("mm_projector.bin", "sampler.bin", "config.json")
    modules = slime_modules(patches=576, queries=QUERIES, width=WIDTH)
    for module, prefix, file in ((modules[0], "model.mm_projector.", "mm_projector.bin"), (modules[1], "model.sampler.", "sampler.bin")):
        stored = {name.removeprefix(prefix): tensor for name, tensor in torch.load(tmp_path / file, weights_only=True).items()}
        own = dict(module.named_buffers())
        for name in [name for name in stored if name.endswith("pos_embed")]:
            own[name] = module.state_dict()[name]
            assert torch.equal(stored.pop(name), own[name].half())  # else equal to the rounding of their table, which has its own test
        module.load_state_dict(own | stored, strict=True)
    maps = maps_for(spec, encoder, batch=2)
    again = connector_of(load(tmp_path, spec, encoder), spec, encoder)
    for tokens, reference in (
        (connector.global_tokens(maps), modules[0](maps["layer_5"])),
        (connector.local_tokens(maps), modules[0].projection(modules[1].post_qformer(maps["layer_5"]))),
    ):
        torch.testing.assert_close(reference, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.global_tokens(maps), connector.global_tokens(maps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.local_tokens(maps), connector.local_tokens(maps), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["mm_projector_type"], config["mm_hidden_size"], config["mm_resampler_dim"], config["mm_resampler_topp"]) == ("gated", 8, 4, 0.9)
    assert (config["mm_vision_select_layer"], config["seperator"], config["mm_resampler_type"]) == (-2, 11, "cosine")


@torch.no_grad()
def test_an_imported_connector_goes_out_to_the_bit(tmp_path):
    """Where nothing was trained on, keys and values still share their norm, and nothing has to be folded."""
    encoder, modules = slime_encoder(), slime_modules(patches=576, queries=QUERIES, width=WIDTH, table=torch.float16)
    spec = slime_spec()
    connector = connector_of(load(write_slime(tmp_path / "in", modules), spec, encoder), spec, encoder)
    layout(tmp_path / "out", connector, encoder)
    for file in ("mm_projector.bin", "sampler.bin"):
        before, after = torch.load(tmp_path / "in" / file), torch.load(tmp_path / "out" / file)
        assert before.keys() == after.keys()
        different = sorted(name for name in before if not torch.equal(before[name], after[name]))
        assert {name.rpartition(".")[2] for name in different} <= {"in_proj_bias", "w_noise"}  # a part that a softmax ignores, and one never read
        for name in different:
            if name.endswith("in_proj_bias"):
                assert torch.equal(before[name][:WIDTH], after[name][:WIDTH])
                assert torch.equal(before[name][2 * WIDTH :], after[name][2 * WIDTH :])


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["dci", "sci", "sti", "none"]))
def test_dense_connectors_go_out_and_come_back(tmp_path_factory, seed, kind):
    encoder, folder = encoder_spec(num_blocks=24), tmp_path_factory.mktemp("dense")
    fusion = authors_fusion(kind, encoder) or SingleSpec(layer=23)
    spec = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()), local_branch=None)
    connector = trained(spec, encoder, seed)
    maps = maps_for(spec, encoder, seed=seed % 1000)
    connector.measure_inputs({name: 3 * tensor - 1 for name, tensor in maps.items()}, None)
    assert layout(folder, connector, encoder, separator_id=None) == ("mm_projector.bin", "config.json")
    projector = ReferenceProjector(WIDTH * fusion.num_wide, HIDDEN)
    stored = torch.load(folder / "mm_projector.bin", weights_only=True)
    projector.load_state_dict({name.removeprefix("model.mm_projector."): tensor for name, tensor in stored.items()})
    torch.testing.assert_close(projector(fuse(maps, fusion)), connector.global_tokens(maps), atol=1e-5, rtol=1e-5)
    plain = ConnectorSpec(global_branch=spec.global_branch, local_branch=None, standardise_inputs=False)
    again = connector_of(load(folder, plain, encoder, ViewSpec.slime(global_fit="pad")), plain, encoder)
    torch.testing.assert_close(again.global_tokens(maps), connector.global_tokens(maps), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_anyres_s_newline_goes_out_in_the_tokens_scale_and_comes_back(tmp_path):
    encoder = encoder_spec()
    single = SingleSpec(layer=5)
    spec = ConnectorSpec(
        global_branch=GlobalBranchSpec(fusion=single, adapters=MLPSpec()),
        local_branch=LocalBranchSpec(fusion=single, compression=None, merge="spatial_unpad", newline=True),
        separator=None,
        standardise_inputs=False,
    )
    connector = trained(spec, encoder)
    layout(tmp_path, connector, encoder, views=ViewSpec.anyres(), separator_id=None)
    again = connector_of(load(tmp_path, spec, encoder, ViewSpec.anyres()), spec, encoder)
    torch.testing.assert_close(again.newline_token(), connector.newline_token())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"][0] == [columns * 56 for columns in ViewSpec.anyres().candidate_grids[0]]
    without = ConnectorSpec(
        global_branch=spec.global_branch,
        local_branch=LocalBranchSpec(fusion=single, compression=None),
        separator=None,
        standardise_inputs=False,
    )
    assert "ignored     model.image_newline [48]: the recipe has no newline" in load(tmp_path, without, views=ViewSpec.anyres()).report.lines()


def test_a_language_model_s_config_becomes_the_authors(tmp_path):
    encoder = encoder_spec(num_blocks=24)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": 10}
    layout(tmp_path, trained(dense_spec(), encoder), encoder, separator_id=None, language_model_config=config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"], written["vocab_size"]) == ("llava_llama", ["LlavaLlamaForCausalLM"], 10)
    assert (written["mm_dense_connector_type"], written["mm_hidden_size"]) == ("dci", 3 * WIDTH)
    with pytest.raises(ExportError, match="written for language models of type llama, mistral, found 'phi'"):
        layout(tmp_path, trained(dense_spec(), encoder), encoder, separator_id=None, language_model_config={"model_type": "phi"})


SINGLE = SingleSpec(layer=5)
GATED = GlobalBranchSpec(fusion=SINGLE, adapters=GatedMixtureSpec())
PLAIN = GlobalBranchSpec(fusion=SINGLE, adapters=MLPSpec())


@pytest.mark.parametrize(
    ("encoder", "spec", "message"),
    [
        (encoder_spec(), slime_spec(), "gate counts for views of 576 patches alone, tiny has 16"),
        (slime_encoder(num_blocks=24), slime_spec(global_branch=GlobalBranchSpec(fusion=authors_fusion("dci", encoder_spec(num_blocks=24)),
         adapters=GatedMixtureSpec()), local={"fusion": authors_fusion("dci", encoder_spec(num_blocks=24))}), "resamplers read one map"),
        (encoder_spec(), dense_spec(global_branch=GlobalBranchSpec(fusion=DCISpec(base=5, groups=((0, 2), (3, 5))), adapters=MLPSpec())),
         "knows its own layers"),
        (encoder_spec(), dense_spec(global_branch=GlobalBranchSpec(fusion=SINGLE, adapters=MLPSpec(), output_grid=2)), "resizes no grid"),
        (encoder_spec(), dense_spec(global_branch=PLAIN, local_branch=LocalBranchSpec(fusion=SINGLE, compression=None, projector="own")), "own"),
        (encoder_spec(), dense_spec(global_branch=PLAIN, local_branch=LocalBranchSpec(fusion=SINGLE, compression=None)), "puts no separator between"),
        (encoder_spec(), dense_spec(global_branch=PLAIN, local_branch=LocalBranchSpec(fusion=SingleSpec(layer=4), compression=None)), "views alike"),
        (slime_encoder(), slime_spec(local={"selector": LearnableSelectorSpec()}), "selector has no weights"),
        (slime_encoder(), slime_spec(local={"selector": TextGuidedSelectorSpec(reduce="mean")}), "sums over the text"),
        (slime_encoder(), slime_spec(separator=None), "always puts a separator"),
        (encoder_spec(family="siglip", num_blocks=8), dense_spec(global_branch=PLAIN), "always reads layer 7 of this SigLIP"),
    ],
)  # fmt: skip
def test_what_their_code_cannot_compute_is_refused(tmp_path, encoder, spec, message):
    with pytest.raises(ExportError, match=message):
        layout(tmp_path, trained(spec, encoder), encoder, **({"views": ViewSpec.anyres()} if "separator between" in message else {}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "views", "message"),
    [
        (dense_spec(), ViewSpec.slime(), "crops an unpadded picture for CLIP"),
        (slime_spec(), ViewSpec.slime(max_slices=12), "by its own rule alone"),
        (slime_spec(), ViewSpec.slime(global_fit="pad"), "by its own rule alone"),
        (slime_spec(), ViewSpec.anyres(), "by its own rule alone"),
        (
            dense_spec(global_branch=PLAIN, local_branch=LocalBranchSpec(fusion=SINGLE, compression=None), separator=None),
            ViewSpec.slime(),
            "listed grids",
        ),
    ],
)
def test_views_that_their_code_would_not_cut_are_refused(tmp_path, spec, views, message):
    encoder = slime_encoder(num_blocks=24 if spec.local_branch is None else 6)
    with pytest.raises(ExportError, match=message):
        layout(tmp_path, trained(spec, encoder), encoder, views=views)


@pytest.mark.parametrize(
    ("config", "views", "message"),
    [
        ({"image_aspect_ratio": "pad"}, ViewSpec.slime(), r"tells of padded pictures .* set global_view = \"pad\""),
        ({"mm_vision_select_feature": "cls_patch"}, ViewSpec.slime(), "these weights cannot be used"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[56, 112]]}, ViewSpec.anyres(), "name the same grids"),
        ({"image_aspect_ratio": "anyres"}, ViewSpec.anyres(global_fit="pad"), "squashes the whole picture"),
    ],
)
def test_weights_that_saw_other_pixels_are_refused(tmp_path, config, views, message):
    folder = write_dense(tmp_path, ReferenceProjector(WIDTH, HIDDEN), "none")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    with pytest.raises(ReleasedWeightsError, match=message):
        load(folder, dense_spec(global_branch=PLAIN), views=views)


def test_a_standardisation_behind_which_a_norm_stands_is_refused(tmp_path):
    encoder = slime_encoder()
    spec = slime_spec(standardise_inputs=True)
    connector = trained(spec, encoder)
    with pytest.raises(
        ExportError, match=r"a resampler's norm and the gate read the standardised tokens.*train with connector\.standardise_inputs = false"
    ):
        layout(tmp_path / "measured", connector, encoder)  # before a single image is measured


def test_a_dead_channel_of_the_keys_norm_is_refused_unless_the_values_is_the_same(tmp_path):
    encoder = slime_encoder()
    connector = trained(slime_spec(), encoder)
    with torch.no_grad():
        connector.resampler.norm_keys.weight[3] = 0
    with pytest.raises(ExportError, match=r"mm_projector\.attn: 1 of 8 channels of the keys' norm are 0 and the values' norm differs"):
        layout(tmp_path, connector, encoder)
    with torch.no_grad():
        connector.resampler.norm_values.weight.copy_(connector.resampler.norm_keys.weight)
    layout(tmp_path, connector, encoder)
