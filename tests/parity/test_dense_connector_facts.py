"""Dense Connector's facts on its authors' two encoders: our cut-off encoder and our fusion against the hidden states of transformers' own towers.

The real configurations (CLIP ViT-L/14 at 336 px, SigLIP SO400M/14 at 384 px) with random weights: at their full width where that is asked for (slow),
and else at width 32 with every layer, view and patch as they are. Fusion's reference is written in plain loops over the stock hidden states.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from model.encoder import describe_encoder, load_encoder
from model.fusion import fuse
from model.specs import DCISpec, EncoderSpec, FusionSpec, SCISpec, SingleSpec, STISpec
from pipelines.connector_tables import DCIFusion, SCIFusion, SingleFusion, STIFusion

NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 384,
    "patch_size": 14,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An encoder and what the authors do to it."""

    family: str
    config: dict[str, int]
    num_images: int
    tolerance: float

    @property
    def base(self) -> int:
        """V: hs[23] of CLIP, hs[26] of SigLIP."""
        return 23 if self.family == "clip" else 26

    @property
    def groups(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Layers of the two means."""
        return ((0, 11), (12, 23)) if self.family == "clip" else ((0, 12), (13, 25))

    @property
    def patches(self) -> int:
        """Patches of a view."""
        return 576 if self.family == "clip" else 729


@dataclass(frozen=True, kw_only=True, slots=True)
class Towers:
    """The stock tower's hidden states beside our encoder of the same files."""

    case: Case
    spec: EncoderSpec
    encoder: Any
    views: torch.Tensor
    states: tuple[torch.Tensor, ...]
    """hs[0] and up, prefix tokens included."""
    maps: dict[str, torch.Tensor]
    """What our encoder makes of the views: all maps that the facts need, in one pass."""


# The same kernels in the same order: measured difference 0 on CPU for layers; means differ by the order of their sums, 4e-7 at most.
CASES = [
    pytest.param(Case(family="clip", config=CLIP_L | NARROW, num_images=2, tolerance=2e-6), id="clip-narrow"),
    pytest.param(Case(family="siglip", config=SIGLIP_SO400M | NARROW, num_images=2, tolerance=2e-6), id="siglip-narrow"),
    pytest.param(Case(family="clip", config=CLIP_L, num_images=1, tolerance=1e-5), id="clip-large-336", marks=pytest.mark.slow),
    pytest.param(Case(family="siglip", config=SIGLIP_SO400M, num_images=1, tolerance=1e-5), id="siglip-so400m-384", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES)
def towers(request, tmp_path_factory):
    """Write a stock tower with random weights, take its hidden states, and load it cut off as a DCI connector needs it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    case = request.param
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    stock: Any = (
        CLIPVisionModel(CLIPVisionConfig(**case.config)) if case.family == "clip" else SiglipVisionModel(SiglipVisionConfig(**case.config))
    ).eval()
    stock.save_pretrained(folder)
    spec = describe_encoder(str(folder))
    encoder = load_encoder(spec, case.base)
    side = case.config["image_size"]
    views = torch.randint(0, 256, (case.num_images, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        states = stock(pixel_values=encoder.normalise(views), output_hidden_states=True).hidden_states
    del stock
    fusions = (DCISpec(base=case.base, groups=case.groups), SCISpec(base=case.base, layers=(7, 15)))
    maps = encoder(views, list(dict.fromkeys(map_spec for fusion in fusions for map_spec in fusion.maps)))
    yield Towers(case=case, spec=spec, encoder=encoder, views=views, states=states, maps=maps)
    for file in folder.iterdir():
        file.unlink()


def without_prefix(towers: Towers, layer: int) -> torch.Tensor:
    return towers.states[layer][:, 1:] if towers.case.family == "clip" else towers.states[layer]


def mean_by_loop(towers: Towers, first: int, last: int) -> torch.Tensor:
    total = torch.zeros_like(without_prefix(towers, first), dtype=torch.float64)
    for layer in range(first, last + 1):
        total += without_prefix(towers, layer).double()
    return (total / (last - first + 1)).float()


def pooled_by_loop(tokens: torch.Tensor, pool: int) -> torch.Tensor:
    groups = [tokens[:, start : start + pool].mean(dim=1) for start in range(0, tokens.shape[1] - pool + 1, pool)]
    return torch.stack(groups, dim=1)


def fused(towers: Towers, spec: FusionSpec) -> torch.Tensor:
    return fuse(towers.maps, spec)


def test_the_stock_tower_has_the_states_that_the_authors_count_from(towers):
    case = towers.case
    assert len(towers.states) == case.config["num_hidden_layers"] + 1 == (25 if case.family == "clip" else 28)
    prefix = 1 if case.family == "clip" else 0
    assert {tuple(state.shape) for state in towers.states} == {(case.num_images, case.patches + prefix, case.config["hidden_size"])}


def test_dci_is_the_base_layer_and_the_means_of_both_halves(towers):
    case, width = towers.case, towers.case.config["hidden_size"]
    spec = DCIFusion(kind="dci").spec(towers.spec)
    assert spec == DCISpec(base=case.base, groups=case.groups)
    found = fused(towers, spec)
    assert tuple(found.shape) == (case.num_images, case.patches, 3 * width)
    torch.testing.assert_close(found[..., :width], without_prefix(towers, case.base), rtol=0, atol=case.tolerance)
    for place, (first, last) in enumerate(case.groups, start=1):
        channels = found[..., place * width : (place + 1) * width]
        torch.testing.assert_close(channels, mean_by_loop(towers, first, last), rtol=0, atol=case.tolerance)


def test_sci_puts_the_base_layer_and_two_others_side_by_side(towers):
    case = towers.case
    spec = SCIFusion(kind="sci").spec(towers.spec)
    assert spec == SCISpec(base=case.base, layers=(7, 15))
    expected = torch.cat([without_prefix(towers, layer) for layer in (case.base, 7, 15)], dim=-1)
    torch.testing.assert_close(fused(towers, spec), expected, rtol=0, atol=case.tolerance)


def test_sti_appends_pooled_tokens_of_two_other_layers(towers):
    case = towers.case
    spec = STIFusion(kind="sti").spec(towers.spec)
    assert spec == STISpec(base=case.base, layers=(7, 15), pool=8)
    found = fused(towers, spec)
    assert tuple(found.shape) == (case.num_images, 720 if case.family == "clip" else 911, case.config["hidden_size"])
    parts = [without_prefix(towers, case.base), *(pooled_by_loop(without_prefix(towers, layer), 8) for layer in (7, 15))]
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=0, atol=case.tolerance)


def test_the_single_layer_of_llava_is_the_last_but_one(towers):
    spec = SingleFusion(kind="single").spec(towers.spec)
    assert spec == SingleSpec(layer=towers.case.base)
    torch.testing.assert_close(fused(towers, spec), without_prefix(towers, towers.case.base), rtol=0, atol=towers.case.tolerance)


def test_the_last_block_is_neither_held_nor_run(towers):
    assert len(towers.encoder.blocks) == towers.case.base == towers.case.config["num_hidden_layers"] - 1
    ran = []
    hooks = [block.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, block in enumerate(towers.encoder.blocks, 1)]
    towers.encoder(towers.views, SCISpec(base=15, layers=(7,)).maps)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(1, 16))  # not even those that are held for other maps
