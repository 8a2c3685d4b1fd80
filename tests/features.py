"""Features of images one by one, as tests compare them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from model.specs import FeatureSpec
from workers.caching.layout import BRANCHES
from workers.caching.reader import FeatureSource
from workers.caching.units import num_views
from workers.dataset.samples import Sample


@dataclass(frozen=True, kw_only=True)
class ImageMaps:
    """Of one image, in fp32; None where it was not asked for."""

    global_maps: Tensor | None = None
    """[maps, tokens, width]."""
    local_maps: Tensor | None = None
    """[views, maps, tokens, width]."""


def fetch_images(source: FeatureSource, samples: Sequence[Sample], *, want_global: bool, want_local: bool) -> list[ImageMaps]:
    """One fetch for all, shared out over the images."""
    spec: FeatureSpec = source._spec  # type: ignore[attr-defined]
    wants = {"global": want_global, "local": want_local}
    fetched = source.fetch({branch: samples if wants[branch] else [] for branch in BRANCHES})
    assert set(fetched) == {branch for branch in BRANCHES if wants[branch] and samples}
    found: list[dict[str, Any]] = [{} for _ in samples]
    for branch, maps in fetched.items():
        dense = torch.stack([packed.dense() for packed in maps.values()], dim=1)
        stops = list(accumulate(num_views(spec, sample, branch) for sample in samples))
        assert stops[-1] == len(dense)
        for image, start, stop in zip(found, [0, *stops], stops, strict=False):
            image[f"{branch}_maps"] = dense[start] if branch == "global" else dense[start:stop]
    return [ImageMaps(**image) for image in found]
