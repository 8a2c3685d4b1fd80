"""What is counted without numbers is what is built with them, and what the papers' authors have."""

from itertools import product
from typing import get_args

import pytest
from transformers import AutoConfig

from model.architectures import known_encoder
from model.connector import build_connector
from model.counting import count_by_block, count_fixed_numbers, empty_connector, language_model_shape
from model.errors import LanguageModelError
from model.specs import (
    AdapterSpec,
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    EncoderSpec,
    FusionSpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    MLPSpec,
    SCISpec,
    SelectorSpec,
    SingleSpec,
    STISpec,
    TextGuidedSelectorSpec,
)

CLIP, SIGLIP = known_encoder("openai/clip-vit-large-patch14-336"), known_encoder("google/siglip-so400m-patch14-384")
SINGLE = {"clip": SingleSpec(layer=23), "siglip": SingleSpec(layer=26)}
DCI = {"clip": DCISpec(base=23, groups=((0, 11), (12, 23))), "siglip": DCISpec(base=26, groups=((0, 12), (13, 25)))}

# hidden: CLIP base, CLIP dci, SigLIP base, SigLIP dci, in millions, as two linear layers with biases make them.
PROJECTORS = {
    2560: (9.18, 14.42, 9.51, 15.41),
    4096: (20.98, 29.37, 21.50, 30.94),
    5120: (31.47, 41.95, 32.12, 43.92),
    7168: (58.73, 73.41, 59.65, 76.17),
    8192: (75.51, 92.29, 76.56, 95.44),
}


def global_only(fusion, adapters=None):
    return ConnectorSpec(global_branch=GlobalBranchSpec(fusion=fusion, adapters=adapters or MLPSpec()), local_branch=None)


@pytest.mark.parametrize("hidden", PROJECTORS)
def test_projectors_have_the_papers_parameters(hidden):
    cases = ((CLIP, SINGLE["clip"]), (CLIP, DCI["clip"]), (SIGLIP, SINGLE["siglip"]), (SIGLIP, DCI["siglip"]))
    for (encoder, fusion), millions in zip(cases, PROJECTORS[hidden], strict=True):
        counts = count_by_block(empty_connector(global_only(fusion), encoder, hidden=hidden))
        assert list(counts) == ["global_mlp"]
        assert counts["global_mlp"] / 1e6 == pytest.approx(millions, abs=0.0051)
    for fusion, column in ((STISpec(base=23, layers=(7, 15)), 0), (SCISpec(base=23, layers=(7, 15)), 1)):
        counts = count_by_block(empty_connector(global_only(fusion), CLIP, hidden=hidden))
        assert counts["global_mlp"] / 1e6 == pytest.approx(PROJECTORS[hidden][column], abs=0.0051)


def test_resamplers_have_the_papers_parameters():
    """4.79 M with 576 queries, 4.35 M with 144, as trained; the codes of places beside them are fixed numbers."""
    local = LocalBranchSpec(fusion=SINGLE["clip"], compression=CompressionSpec(queries=144))
    spec = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=SINGLE["clip"], adapters=GatedMixtureSpec()), local_branch=local)
    connector = empty_connector(spec, CLIP, hidden=4096)
    counts = count_by_block(connector)
    assert counts["resampler"] / 1e6 == pytest.approx(4.79, abs=0.0051)
    assert counts["compression"] / 1e6 == pytest.approx(4.35, abs=0.0051)
    assert counts["gate"] == 2 * 2 * 1024
    # Of the resampler its queries' and keys' places, of the compression those of 144 queries and 576 keys; two standardisations; one scale.
    assert count_fixed_numbers(connector) == 1024 * (576 + 576 + 144 + 576) + 2 * 2 * 1024 + 1


def small_encoder():
    return EncoderSpec(
        model="small",
        weights_sha256="0" * 64,
        family="clip",
        view_px=56,
        patch_px=14,
        width=16,
        num_blocks=6,
        prefix_tokens=1,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_heads=2,
        mlp_width=32,
        activation="gelu",
        norm_eps=1e-5,
    )


FUSIONS = (SingleSpec(layer=5), STISpec(base=5, layers=(1, 3)), SCISpec(base=5, layers=(1, 3)), DCISpec(base=5, groups=((0, 2), (3, 5))))
ADAPTERS = (MLPSpec(), GatedMixtureSpec(), GatedMixtureSpec(attention_init="authors", noise="authors"))
LOCALS = (None, *((queries, start, projector) for queries in (4, 9) for start in ("positional", "authors") for projector in ("shared", "own")))


def check_empty(spec):
    """Shapes and counts of the empty connector are the built one's."""
    built = build_connector(spec, small_encoder(), hidden=24, embedding_rms=1.0, seed=0)
    empty = empty_connector(spec, small_encoder(), hidden=24)
    assert {value.device.type for value in (*empty.parameters(), *empty.buffers())} == {"meta"}
    shapes = [{name: tuple(value.shape) for name, value in connector.named_parameters()} for connector in (built, empty)]
    assert shapes[0] == shapes[1]
    assert count_by_block(built) == count_by_block(empty)
    assert tuple(count_by_block(built)) == tuple(dict.fromkeys(name.split(".")[0] for name in shapes[0]))
    assert set(count_by_block(built)) == set(spec.blocks)
    assert count_fixed_numbers(built) == count_fixed_numbers(empty)
    for tokens in ("tokens_per_global_view", "tokens_per_local_view"):
        assert getattr(built, tokens) == getattr(empty, tokens)


UNCOMPRESSED = (
    LocalBranchSpec(fusion=FUSIONS[0], compression=None, merge="spatial_unpad", newline=True, output_grid=2),
    LocalBranchSpec(fusion=FUSIONS[0], compression=None, selector=LearnableSelectorSpec(width=6)),
    LocalBranchSpec(fusion=FUSIONS[0], compression=CompressionSpec(queries=4), selector=TextGuidedSelectorSpec()),
)


@pytest.mark.parametrize("local", UNCOMPRESSED)
def test_the_other_parts_of_local_branches_are_counted_too(local):
    check_empty(ConnectorSpec(global_branch=GlobalBranchSpec(fusion=FUSIONS[0], adapters=MLPSpec(), output_grid=2), local_branch=local))


def test_every_kind_of_part_is_tried():
    assert {type(fusion) for fusion in FUSIONS} == set(get_args(FusionSpec))
    assert {type(adapters) for adapters in ADAPTERS} == set(get_args(AdapterSpec))
    assert {type(local.selector) for local in UNCOMPRESSED if local.selector is not None} == set(get_args(SelectorSpec))


def can_be(fusion, adapters, local):
    """Sti has no grid of tokens for a resampler."""
    return not isinstance(fusion, STISpec) or (isinstance(adapters, MLPSpec) and local is None)


@pytest.mark.parametrize(("fusion", "adapters", "local"), [parts for parts in product(FUSIONS, ADAPTERS, LOCALS) if can_be(*parts)])
def test_an_empty_connector_is_the_built_one_without_its_numbers(fusion, adapters, local):
    branch = None
    if local is not None:
        queries, start, projector = local
        branch = LocalBranchSpec(fusion=fusion, compression=CompressionSpec(queries=queries, attention_init=start), projector=projector)
    spec = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=fusion, adapters=adapters), local_branch=branch)
    check_empty(spec)


def test_a_language_models_shape_needs_its_config_alone(tiny_language_model_folder, tmp_path):
    AutoConfig.from_pretrained(tiny_language_model_folder).save_pretrained(tmp_path)
    shape = language_model_shape(tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tiny_language_model_folder / "model.safetensors")
    assert (shape.hidden, shape.context_tokens) == (64, 2048)
    assert shape.num_parameters == sum(value.numel() for value in stored.values())  # the tied head is not stored, and counted once
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LanguageModelError, match=r"config\.json cannot be read"):
        language_model_shape(tmp_path)
