"""Folding: what stock models do not compute is refused with every reason; the numbers are those of plain loops."""

from dataclasses import replace

import pytest
import torch

from model.connector import build_connector
from model.errors import FoldingError
from model.folding import check_foldable, fold_connector
from model.specs import (
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LocalBranchSpec,
    MLPSpec,
    SCISpec,
    SingleSpec,
    STISpec,
    TextGuidedSelectorSpec,
)
from model.views import ViewSpec
from tests.tiny_training import tiny_encoder_spec

DCI = DCISpec(base=5, groups=((0, 2), (3, 5)))
ANYRES = ViewSpec.anyres()


def alone(**changes) -> ConnectorSpec:
    return ConnectorSpec(global_branch=GlobalBranchSpec(**({"fusion": DCI, "adapters": MLPSpec()} | changes)), local_branch=None)


def beside(**changes) -> ConnectorSpec:
    values = {"fusion": DCI, "compression": None, "merge": "spatial_unpad", "newline": True} | changes
    return ConnectorSpec(global_branch=GlobalBranchSpec(fusion=DCI, adapters=MLPSpec()), local_branch=LocalBranchSpec(**values), separator=None)


def test_what_folds_is_let_pass():
    for fusion in (DCI, SCISpec(base=5, layers=(1, 3)), SingleSpec(layer=0)):
        for views in (ViewSpec.slime(), ViewSpec.slime(global_fit="pad"), ANYRES):
            check_foldable("llava-hf", alone(fusion=fusion), tiny_encoder_spec(), views)
    check_foldable("llava-next-hf", beside(), tiny_encoder_spec(), ANYRES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (alone(fusion=STISpec(base=5, layers=(1,))), r"connector\.global\.fusion is sti, .* allowed: single, sci, dci"),
        (alone(adapters=GatedMixtureSpec()), r"connector\.global\.adapters is gated_mixture, .* allowed: mlp"),
        (alone(output_grid=2), r"connector\.global\.output_grid changes the number of tokens; allowed: absent"),
        (beside(), r"found \[connector\.local\], but stock LLaVA shows one view of a picture; allowed: none"),
    ],
)
def test_what_llava_has_no_place_for(spec, message):
    with pytest.raises(FoldingError, match=r"LlavaForConditionalGeneration does not compute this connector: .*" + message) as caught:
        check_foldable("llava-hf", spec, tiny_encoder_spec(), ANYRES)
    assert str(caught.value).endswith("take --to loupe, which holds every connector")


@pytest.mark.parametrize(
    ("spec", "views", "message"),
    [
        (alone(), ANYRES, r"found no \[connector\.local\], but LLaVA-NeXT always shows local views; take --to llava-hf"),
        (beside(fusion=SingleSpec(layer=5), projector="own"), ANYRES, r"connector\.local\.fusion: found single; allowed: the global branch's"),
        (beside(compression=CompressionSpec(queries=4)), ANYRES, r"connector\.local\.compression: found a table; allowed: absent"),
        (beside(projector="own"), ANYRES, r"connector\.local\.projector: found own; allowed: shared"),
        (beside(output_grid=2), ANYRES, r"connector\.local\.output_grid: found 2; allowed: absent"),
        (beside(merge="spatial"), ANYRES, r"connector\.local\.merge: found spatial; allowed: spatial_unpad"),
        (beside(newline=False), ANYRES, r"connector\.local\.newline: found false; allowed: true"),
        (beside(selector=TextGuidedSelectorSpec()), ANYRES, r"connector\.local\.selector: found a table; allowed: absent"),
        (replace(beside(), separator=","), ANYRES, r"connector\.separator: found ','; allowed: empty"),
        (beside(), ViewSpec.slime(), r"views\.rule: found slime; allowed: anyres"),
        (beside(), ViewSpec.anyres(global_fit="pad"), r"views\.global_view: found pad; allowed: squash"),
    ],
)
def test_what_llava_next_has_no_place_for(spec, views, message):
    with pytest.raises(FoldingError, match=message):
        check_foldable("llava-next-hf", spec, tiny_encoder_spec(), views)


def test_every_reason_is_told_at_once():
    with pytest.raises(FoldingError) as caught:
        check_foldable("llava-next-hf", replace(beside(merge="flat", newline=False), separator=","), tiny_encoder_spec(), ViewSpec.slime())
    assert str(caught.value).count("; allowed: ") == 4


def test_an_encoder_with_several_prefix_tokens_is_refused():
    with pytest.raises(FoldingError, match="has 5 tokens before its patches, of which stock models drop one"):
        check_foldable("llava-hf", alone(), tiny_encoder_spec(prefix_tokens=5), ANYRES)


def build(spec):
    return build_connector(spec, tiny_encoder_spec(), hidden=12, embedding_rms=0.05, seed=1)


def maps_of(*, images: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    names = {map_spec.name for map_spec in DCI.maps}
    return {name: torch.randn(images, 16, 8, generator=generator) * 3 + 1 for name in sorted(names)}


def test_one_projector_of_both_branches_is_standardised_once():
    """As LLaVA-NeXT has it; where something stands between, each branch has numbers of its own."""
    connector = build(beside())
    some, others = maps_of(images=3, seed=0), maps_of(images=7, seed=1)
    connector.measure_inputs(some, others)
    together = torch.cat([connector.fuse_global(some), connector.fuse_local(others)])
    assert torch.allclose(connector.global_input(together).mean(dim=(0, 1)), torch.zeros(24), atol=1e-5)
    assert torch.allclose(connector.global_input(together).std(dim=(0, 1), correction=0), torch.ones(24), atol=1e-5)
    assert torch.equal(connector.global_input.mean, connector.local_input.mean)
    fold_connector(connector)
    for spec in (beside(compression=CompressionSpec(queries=4), merge="flat", newline=False), beside(projector="own")):
        apart = build(spec)
        apart.measure_inputs(some, others)
        assert not torch.equal(apart.global_input.mean, apart.local_input.mean)


def test_branches_that_are_standardised_apart_do_not_fold():
    connector = build(beside())
    connector.measure_inputs(maps_of(images=3, seed=0), maps_of(images=3, seed=1))
    connector.local_input.mean += 0.5
    with pytest.raises(FoldingError, match="standardised by different numbers, and LLaVA-NeXT has one projector for both"):
        fold_connector(connector)


def test_a_layer_that_several_maps_hold_is_read_once():
    """Weight by weight, in plain loops: layer 5 is the base layer and a third of a group."""
    connector = build(alone())
    connector.measure_inputs(maps_of(images=3, seed=0), None)
    folded = fold_connector(connector)
    assert folded.layers == (0, 1, 2, 3, 4, 5)
    weight, scale = connector.global_mlp.linear_1.weight.detach().double(), connector.global_input.scale.double()
    for row in range(12):
        for layer in range(6):
            for channel in range(8):
                wanted = 0.0
                for number, (first, last) in enumerate(((5, 5), (0, 2), (3, 5))):
                    if first <= layer <= last:
                        column = number * 8 + channel
                        wanted += float(weight[row, column] * scale[column]) / (last - first + 1)
                assert float(folded.weight_1[row, layer * 8 + channel]) == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert folded.newline is None
