"""Fusion: named maps of one branch become one tensor of tokens, without parameters.

Input: maps by name, prefix tokens removed, all of one shape. Output: tokens, wider (sci, dci) or more (sti) than one map. Invariant: a map that the
spec names and the features do not hold raises; zeros in its place would train, and be wrong.

Source: Dense Connector (arXiv 2405.13800) section 3.1 and the authors' code, which puts the base layer first.
"""

from collections.abc import Mapping
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.errors import MissingMapError
from model.specs import DCISpec, FusionSpec, SCISpec, SingleSpec, STISpec

__all__ = ["fuse", "fused_tokens", "fused_width"]


def fused_width(spec: FusionSpec, width: int) -> int:
    """Channels of the fused tokens.

    Args:
        spec: the fusion.
        width: the encoder's width.

    Returns:
        The encoder's width, times the number of maps for sci and dci.
    """
    match spec:
        case SingleSpec() | STISpec():
            return width
        case SCISpec() | DCISpec():
            return width * len(spec.maps)
        case _:
            assert_never(spec)


def fused_tokens(spec: FusionSpec, num_patches: int) -> int:
    """Tokens of a fused view.

    Args:
        spec: the fusion.
        num_patches: patches in a view.

    Returns:
        The patches, and for sti the pooled tokens behind them.
    """
    match spec:
        case SingleSpec() | SCISpec() | DCISpec():
            return num_patches
        case STISpec():
            return num_patches + len(spec.layers) * (num_patches // spec.pool)
        case _:
            assert_never(spec)


def fuse(maps: Mapping[str, Float[Tensor, "batch patches width"]], spec: FusionSpec) -> Float[Tensor, "batch tokens wide"]:
    """Merge the maps that a fusion names, in its order.

    Args:
        maps: maps by name; those that the spec does not name are left alone.
        spec: the fusion.

    Returns:
        Tokens: [batch, fused_tokens, fused_width].

    Raises:
        MissingMapError: a named map is not there.

    Differs: sti floors where the patches are no multiple of the pool, as the authors' code does (it drops the rest).
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
            # 1-D over the flattened raster, so that a token of the pool may span a row's end: that is what the authors trained.
            pooled = [F.avg_pool1d(extra.transpose(1, 2), kernel_size=spec.pool, stride=spec.pool).transpose(1, 2) for extra in chosen[1:]]
            return torch.cat([chosen[0], *pooled], dim=1)
        case _:
            assert_never(spec)
