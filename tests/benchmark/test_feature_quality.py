"""Claims guarded: int8 behind a calibration keeps more of a vision transformer's maps than int8 alone at the same bytes, the more its channels
differ in size; fp8 keeps less; and a calibration of some images holds for others. `pytest -m benchmark -s tests/benchmark/test_feature_quality.py`
prints the table: bytes of one map of one view, signal over rounding, cosine of tokens, on drawn pictures that were not measured, for the shipped
encoder and for CLIP-L/14-336 with random weights (the real ones are not at hand where this runs; random ones have no outlier channels, real ones
do).
"""

import numpy as np
import pytest
import torch

from model.encoder import Encoder, describe_encoder, known_encoder, load_encoder
from model.images import cut_views, decode_image
from model.quality import MapQuality
from model.quantisation import ChannelMoments, dequantise, map_quality, quantise
from model.specs import DCISpec, MapSpec
from model.views import ViewSpec, plan_views
from tests.benchmark.formats import fp8, plain_int8
from workers.dataset.rendering import FAMILIES, render
from workers.dataset.spec import DatasetSpec, LegibilitySpec, RenderedSourceSpec

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

CLIP_L = "openai/clip-vit-large-patch14-336"


def pictures(count, view_px):
    """Views of drawn pictures, one of each family in turn."""
    dataset = DatasetSpec(
        sources=(RenderedSourceSpec(family="charts", num_images=1),),
        seed=3,
        held_out_fraction=0.1,
        view_px=112,  # of the demo; what is drawn does not depend on who looks at it
        views=ViewSpec.slime(),
        legibility=LegibilitySpec(local_min_px=6.5, global_max_px=6.0),
    )
    views = []
    for number in range(count):
        image = decode_image(render(FAMILIES[number % len(FAMILIES)], number, dataset).png)
        views.append(cut_views(image, plan_views(image.width, image.height, view_px, ViewSpec.slime())))
    return views


def clip_l():
    """CLIP-L/14-336 by its published configuration, at random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    spec = known_encoder(CLIP_L)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        num_hidden_layers=spec.num_blocks - 1,
        num_attention_heads=spec.num_heads,
        image_size=spec.view_px,
        patch_size=spec.patch_px,
    )
    return Encoder(CLIPVisionModel(config), spec, spec.num_blocks - 1)


def kinds(calibration):
    """Ways to store a map: bytes of a number, bytes of a token besides, and what a reader gets."""
    return {
        "fp16": (2, 0, lambda tokens: tokens.half().float()),
        "int8 calibrated": (1, 2, lambda tokens: dequantise(*quantise(tokens, calibration), calibration)),
        "int8 plain": (1, 2, plain_int8),
        "fp8 calibrated": (1, 2, lambda tokens: fp8((tokens - calibration.centre) / calibration.scale) * calibration.scale + calibration.centre),
        "fp8 plain": (1, 2, fp8),
    }


@pytest.mark.parametrize(("name", "num_measured", "num_checked"), [("builtin:vision-encoder", 30, 10), (CLIP_L, 1, 1)])
def test_what_precisions_keep(name, num_measured, num_checked):
    torch.set_num_threads(2)
    builtin = name.startswith("builtin:")
    encoder = load_encoder(describe_encoder(name), 7) if builtin else clip_l()
    spec = encoder.spec
    fusion = DCISpec(base=7, groups=((0, 3), (4, 7))) if builtin else DCISpec(base=23, groups=((0, 11), (12, 23)))
    maps = [*fusion.maps, *(MapSpec(layers=item.layers, pool=2) for item in fusion.maps)]
    views = pictures(num_measured + num_checked, spec.view_px)
    moments = {item.name: ChannelMoments(spec.width) for item in maps}
    for some in views[:num_measured]:
        for item_name, tokens in encoder(torch.from_numpy(some), maps).items():
            moments[item_name].update(tokens)
    found: dict[tuple[str, str], MapQuality] = {}
    pooled: dict[str, MapQuality] = {}
    for some in views[num_measured:]:
        computed = encoder(torch.from_numpy(some), maps)
        for item in maps:
            for kind, (_, _, store) in kinds(moments[item.name].calibration()).items():
                quality = map_quality(computed[item.name], store(computed[item.name]))
                found[item.name, kind] = found.get((item.name, kind), MapQuality()) + quality
        for item in fusion.maps:
            half = spec.grid // 2
            squares = computed[f"{item.name}_pool_2"].unflatten(1, (half, half)).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            pooled[item.name] = pooled.get(item.name, MapQuality()) + map_quality(computed[item.name], squares.flatten(1, 2))
    print(f"\n{name}{'' if builtin else ', random weights'}: {sum(map(len, views[num_measured:]))} views, measured on {num_measured} pictures")
    print(f"{'map':<22} {'stored as':<17} {'bytes a view':>12} {'dB':>7} {'cosine':>9} {'worst':>9}")
    for item in maps:
        deviation = moments[item.name].deviation
        for kind, (number_bytes, token_bytes, _) in kinds(moments[item.name].calibration()).items():
            quality = found[item.name, kind]
            size = item.num_tokens(spec.num_patches) * (spec.width * number_bytes + token_bytes)
            print(f"{item.name:<22} {kind:<17} {size:>12,} {quality.snr_db:>7.1f} {quality.cosine:>9.6f} {quality.worst_cosine:>9.6f}")
        print(f"{'':<22} widest channel over the median one: {float(deviation.max() / deviation.median()):.1f}")
        if item.name in pooled:
            quality = pooled[item.name]
            print(f"{'':<22} what squares of 2 x 2 keep of it: {quality.snr_db:.1f} dB, cosine {quality.cosine:.4f}")
        calibrated, plain, eighth = (found[item.name, kind].snr_db for kind in ("int8 calibrated", "int8 plain", "fp8 calibrated"))
        assert calibrated > 35
        assert calibrated > plain
        assert calibrated > eighth
        assert np.isfinite(found[item.name, "fp16"].snr_db)
