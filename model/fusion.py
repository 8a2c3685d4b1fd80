"""Fusion: named maps of one branch become one tensor of tokens, without parameters.

Input: maps by name, prefix tokens removed, all of one shape. Output: tokens, wider (sci, dci) or more (sti) than one map. Invariant: a map that the
spec names and the features do not hold raises; zeros in its place would train, and be wrong.

Source: Dense Connector (arXiv 2405.13800) section 3.1 and the authors' code, which puts the base layer first.
"""

import math
from collections.abc import Mapping
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.errors import MissingMapError
from model.specs import DCISpec, FusionSpec, SCISpec, SingleSpec, STISpec

__all__ = ["fuse"]


def fuse(maps: Mapping[str, Float[Tensor, "batch patches width"]], spec: FusionSpec) -> Float[Tensor, "batch tokens wide"]:
    """Merge the maps that a fusion names, in its order.

    Args:
        maps: maps by name; those that the spec does not name are left alone.
        spec: the fusion.

    Returns:
        Tokens: [batch, spec.num_tokens(patches), spec.num_wide * width].

    Raises:
        MissingMapError: a named map is not there.

    Differs: sti may also pool squares of the grid (`pool = [rows, columns]`), which no paper does; one number pools as the authors' code, which
    drops the tokens that fill no pool.
    """
    names = [map_spec.name for map_spec in spec.maps]
    if missing := [name for name in names if name not in maps]:
        raise MissingMapError(f"the connector's {spec.kind} fusion needs the maps {missing}, the features hold {sorted(maps)}; cache them as well")
    chosen = [maps[name] for name in names]
    match spec:
        case SingleSpec():
            return chosen[0]
        case SCISpec() | DCISpec():
            return torch.cat(chosen, dim=-1)
        case STISpec():
            return torch.cat([chosen[0], *(_pooled(extra, spec.pool) for extra in chosen[1:])], dim=1)
        case _:
            assert_never(spec)


def _pooled(tokens: Float[Tensor, "batch patches width"], pool: int | tuple[int, int]) -> Float[Tensor, "batch pooled width"]:
    channels_first = tokens.transpose(1, 2)
    if isinstance(pool, int):
        # 1-D over the flattened raster, so that a pool may span a row's end: that is what the authors trained.
        return F.avg_pool1d(channels_first, kernel_size=pool, stride=pool).transpose(1, 2)
    grid = math.isqrt(tokens.shape[1])
    raster = channels_first.unflatten(2, (grid, grid))
    return F.avg_pool2d(raster, kernel_size=pool, stride=pool).flatten(2).transpose(1, 2)
