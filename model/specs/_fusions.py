"""Dense Connector's ways to merge several maps before the projector: single, STI, SCI and DCI.

Source: Dense Connector (arXiv 2405.13800) section 3.1 and the authors' code.
"""

from dataclasses import dataclass
from typing import Literal

from model.errors import SpecError
from model.specs._features import MapSpec

__all__ = ["DCISpec", "FusionSpec", "SCISpec", "STISpec", "SingleSpec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fusion:
    """What all fusions share: their maps may be pooled before anything merges them, and so are stored pooled."""

    map_pool: int = 1
    """Side of the squares of patches whose mean is one token of every map, as `MapSpec.pool`."""

    def _map(self, *layers: int) -> MapSpec:
        return MapSpec(layers=layers, pool=self.map_pool)

    def map_tokens(self, num_patches: int) -> int:
        """Tokens of each of its maps.

        Args:
            num_patches: patches in a view.
        """
        return num_patches // self.map_pool**2


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleSpec(_Fusion):
    """One layer, as LLaVA does it."""

    kind: Literal["single"] = "single"
    layer: int

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in channel order."""
        return (self._map(self.layer),)

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view.

        Args:
            num_patches: patches in a view.
        """
        return self.map_tokens(num_patches)


@dataclass(frozen=True, kw_only=True, slots=True)
class STISpec(_Fusion):
    """Sparse token integration: the base layer's tokens, then pooled tokens of other layers.

    Source: Dense Connector (arXiv 2405.13800) section 3.1 and the authors' code, which pools the flattened raster.

    Raises:
        SpecError: a pool of nothing.
    """

    kind: Literal["sti"] = "sti"
    base: int
    layers: tuple[int, ...]
    pool: int | tuple[int, int] = 8
    """How many tokens become one. A number: so many neighbours along the flattened raster, as the authors do it; where rows are no multiple of it, a
    pool spans a row's end, and tokens that fill no pool are dropped. Two numbers: rows and columns of a patch of the grid, which it must divide."""

    def __post_init__(self) -> None:
        if min(self.pool if isinstance(self.pool, tuple) else (self.pool,)) < 1:
            raise SpecError(f"fusion.pool must be a number, or [rows, columns], of at least 1; found {self.pool}")
        _check_distinct(self.base, self.layers)

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in token order."""
        return tuple(self._map(layer) for layer in (self.base, *self.layers))

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view: the base layer's and the pooled ones.

        Args:
            num_patches: patches in a view.
        """
        num_base = self.map_tokens(num_patches)
        if isinstance(self.pool, int):
            return num_base + len(self.layers) * (num_base // self.pool)
        rows, columns = self.pool
        return num_base + len(self.layers) * (num_base // (rows * columns))


@dataclass(frozen=True, kw_only=True, slots=True)
class SCISpec(_Fusion):
    """Sparse channel integration: the base layer and others side by side in the channel dimension.

    Source: Dense Connector section 3.1, eq. 2. Differs from the paper, equals the code: the base layer comes first.
    """

    kind: Literal["sci"] = "sci"
    base: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_distinct(self.base, self.layers)

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in channel order."""
        return tuple(self._map(layer) for layer in (self.base, *self.layers))

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1 + len(self.layers)

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view.

        Args:
            num_patches: patches in a view.
        """
        return self.map_tokens(num_patches)


@dataclass(frozen=True, kw_only=True, slots=True)
class DCISpec(_Fusion):
    """Dense channel integration: the base layer and the means of groups of adjacent layers.

    Source: Dense Connector section 3.1, eqs. 3 and 4. Differs from the paper, equals the code: the base layer comes first.
    """

    kind: Literal["dci"] = "dci"
    base: int
    groups: tuple[tuple[int, int], ...]
    """First and last layer of each group, both inclusive."""

    def __post_init__(self) -> None:
        for first, last in self.groups:
            if not 0 <= first <= last:
                raise SpecError(f"a DCI group is [first, last] with 0 <= first <= last, found [{first}, {last}]")
        if len(set(self.maps)) < len(self.maps):
            raise SpecError(
                f"fusion.groups: found {[list(group) for group in self.groups]} beside the base layer {self.base}, in which the same layers stand "
                "twice; allowed: groups that differ from each other and from the base layer alone (they may overlap, and leave layers out)"
            )

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in channel order."""
        return (self._map(self.base), *(self._map(*range(first, last + 1)) for first, last in self.groups))

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1 + len(self.groups)

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view.

        Args:
            num_patches: patches in a view.
        """
        return self.map_tokens(num_patches)


def _check_distinct(base: int, layers: tuple[int, ...]) -> None:
    if len({base, *layers}) <= len(layers):
        raise SpecError(
            f"fusion.layers: found {list(layers)} beside the base layer {base}, in which a layer stands twice; allowed: each layer once, and the "
            "base one only as base"
        )


FusionSpec = SingleSpec | STISpec | SCISpec | DCISpec
