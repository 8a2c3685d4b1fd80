import pytest
import torch

from model.errors import MissingMapError
from model.fusion import fuse
from model.specs import DCISpec, SCISpec, SingleSpec, STISpec

SPECS = [
    SingleSpec(layer=5),
    STISpec(base=5, layers=(2, 3), pool=8),
    SCISpec(base=5, layers=(2, 3)),
    DCISpec(base=5, groups=((0, 2), (3, 5))),
]


def maps_for(spec, batch=2, patches=16, width=8):
    generator = torch.Generator().manual_seed(1)
    return {m.name: torch.randn(batch, patches, width, generator=generator) for m in spec.maps}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_shapes_are_as_announced(spec):
    fused = fuse(maps_for(spec), spec)
    assert fused.shape == (2, spec.num_tokens(16), 8 * spec.num_wide)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_a_missing_map_is_named(spec):
    maps = maps_for(spec)
    missing = spec.maps[-1].name
    del maps[missing]
    with pytest.raises(MissingMapError, match=missing.replace(".", r"\.")):
        fuse(maps, spec)


def test_other_maps_are_left_alone():
    spec = SingleSpec(layer=1)
    maps = maps_for(spec) | {"layer_9": torch.full((2, 16, 8), torch.nan)}
    assert torch.equal(fuse(maps, spec), maps["layer_1"])


def test_siglip_sti_drops_the_token_that_does_not_fill_a_pool():
    assert STISpec(base=26, layers=(7, 15)).num_tokens(729) == 911
    assert STISpec(base=23, layers=(7, 15)).num_tokens(576) == 720
