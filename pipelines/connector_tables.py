"""A recipe's `[connector]`: fusion, adapters, compression, selector, and what they are over an encoder's layers.

Input: TOML tables. Output: the specs of model.specs, layers filled in. Invariant: a default that depends on the encoder is decided here and nowhere
else.

Source: Dense Connector's and SliME's code for the defaults; see each table.
"""

import itertools
from typing import Annotated, Literal, assert_never

from pydantic import Field

from model.errors import SpecError
from model.specs import (
    CompressionSpec,
    DCISpec,
    EncoderFamily,
    EncoderSpec,
    GatedMixtureSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    MLPSpec,
    SCISpec,
    SingleSpec,
    STISpec,
    TextGuidedSelectorSpec,
)
from pipelines.recipe_fields import Count, KeptShare, Layer, NotNegative, Positive, Switch, Table, Text, Word, allowed

__all__ = [
    "Compression",
    "Connector",
    "DCIFusion",
    "Fusion",
    "GatedMixtureAdapter",
    "GlobalBranch",
    "LearnableSelector",
    "LocalBranch",
    "MLPAdapter",
    "SCIFusion",
    "STIFusion",
    "SingleFusion",
    "TextGuidedSelector",
]


class _Fusion(Table):
    """What all fusions share."""

    map_pool: Count = 1
    """Side of the squares of patches whose mean is one token of every map, in the cache too."""


class SingleFusion(_Fusion):
    """One layer. The encoder's last but one when absent, as LLaVA takes it."""

    kind: Literal["single"]
    layer: Layer | None = None

    def spec(self, encoder: EncoderSpec) -> SingleSpec:
        """The fusion over this encoder's layers."""
        return SingleSpec(layer=_base(self.layer, encoder), map_pool=self.map_pool)


class STIFusion(_Fusion):
    """Sparse token integration. `pool` is how many tokens of the flattened raster become one, or [rows, columns] of the grid."""

    kind: Literal["sti"]
    base: Layer | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = None
    pool: Annotated[
        Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
        allowed("how many tokens become one, from 1 up, or [rows, columns] of the grid, such as [2, 4]"),
    ] = 8

    def spec(self, encoder: EncoderSpec) -> STISpec:
        """The fusion over this encoder's layers."""
        return STISpec(base=_base(self.base, encoder), layers=_sparse(self.layers, encoder), pool=self.pool, map_pool=self.map_pool)


class SCIFusion(_Fusion):
    """Sparse channel integration."""

    kind: Literal["sci"]
    base: Layer | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = None

    def spec(self, encoder: EncoderSpec) -> SCISpec:
        """The fusion over this encoder's layers."""
        return SCISpec(base=_base(self.base, encoder), layers=_sparse(self.layers, encoder), map_pool=self.map_pool)


class DCIFusion(_Fusion):
    """Dense channel integration. `groups` is how many equal groups, or their first and last layers."""

    kind: Literal["dci"]
    base: Layer | None = None
    groups: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[tuple[tuple[int, int], ...], Field(min_length=1)],
        allowed("how many groups, from 1 up, or the first and last layer of each, such as [[0, 3], [4, 7]]"),
    ] = 2

    def spec(self, encoder: EncoderSpec) -> DCISpec:
        """The fusion over this encoder's layers.

        Args:
            encoder: whose layers.

        Returns:
            The fusion's spec.

        Raises:
            SpecError: groups that cannot be equal.

        Source: Dense Connector's code. The groups cover the layers up to the base one; for CLIP they include it, for SigLIP they stop before it.
        Differs: the authors have SO400M alone of SigLIP; where the layers before the base one do not share out, as in towers of 12 or 24 blocks,
        the base one is included. They have neither SigLIP 2, which does as SigLIP does, nor DINOv2, which does as CLIP does.
        """
        base = _base(self.base, encoder)
        if not isinstance(self.groups, int):
            return DCISpec(base=base, groups=self.groups, map_pool=self.map_pool)
        allowed = [base + 1] if _groups_include_base(encoder.family) else [base, base + 1]
        num_layers = next((number for number in allowed if number % self.groups == 0), None)
        if num_layers is None:
            num_layers = allowed[0]
            edges = [round(number * num_layers / self.groups) for number in range(self.groups + 1)]
            unequal = [[first, last - 1] for first, last in itertools.pairwise(edges) if first < last]
            divisors = [number for number in range(1, max(allowed) + 1) if any(total % number == 0 for total in allowed)]
            raise SpecError(
                f"fusion.groups: found {self.groups}, but {encoder.model} has the {num_layers} layers 0..{num_layers - 1} to share out, which do not "
                f"divide into {self.groups} equal groups; allowed: one of {divisors}, or groups by their first and last layers, such as {unequal}"
            )
        edges = [number * num_layers // self.groups for number in range(self.groups + 1)]
        return DCISpec(base=base, groups=tuple((first, last - 1) for first, last in itertools.pairwise(edges)), map_pool=self.map_pool)


def _groups_include_base(family: EncoderFamily) -> bool:
    """Whether a family's DCI groups always cover the base layer as well.

    The authors' two encoders share their layers out evenly either way: CLIP-L has 24 layers up to its base one, SO400M has 26 before it. SigLIP 2's
    are SigLIP's. DINOv2's numbers of blocks are 12, 24 and 40: up to the base layer, itself included, they halve, as CLIP's do.
    """
    match family:
        case "clip" | "dinov2" | "dinov2_with_registers":
            return True
        case "siglip" | "siglip2":
            return False
        case _:
            assert_never(family)


def _base(layer: int | None, encoder: EncoderSpec) -> int:
    return encoder.num_blocks - 1 if layer is None else layer


def _sparse(layers: tuple[int, ...] | None, encoder: EncoderSpec) -> tuple[int, ...]:
    """The paper's 8th and 16th of CLIP-L's 25 layers (its stem counts as the first); as far up where an encoder has fewer blocks than the 24."""
    if layers is not None:
        return layers
    if encoder.num_blocks >= 24:
        return (7, 15)  # the authors take the same ones for SigLIP's 27
    return (encoder.num_blocks // 3 - 1, 2 * encoder.num_blocks // 3 - 1)


Fusion = Annotated[SingleFusion | STIFusion | SCIFusion | DCIFusion, Field(discriminator="kind")]


class MLPAdapter(Table):
    """The projector alone."""

    kind: Literal["mlp"]

    def spec(self) -> MLPSpec:
        """The adapter's spec."""
        return MLPSpec()


class GatedMixtureAdapter(Table):
    """The projector and a resampler behind a gate."""

    kind: Literal["gated_mixture"]
    attention_init: Literal["positional", "authors"] = "positional"
    noise: Literal["own", "authors", "none"] = "own"

    def spec(self) -> GatedMixtureSpec:
        """The adapter's spec."""
        return GatedMixtureSpec(attention_init=self.attention_init, noise=self.noise)


class Compression(Table):
    """Learnable queries per local view."""

    queries: Count
    attention_init: Literal["positional", "authors"] = "positional"


class TextGuidedSelector(Table):
    """Cosines with the question's text decide, without parameters."""

    kind: Literal["text_guided"]
    top_p: KeptShare = 0.95
    temperature: Positive = 1.0
    reduce: Literal["sum", "mean"] = "sum"
    noise: NotNegative = 0.1
    authors_leak: Switch = False

    def spec(self) -> TextGuidedSelectorSpec:
        """The selector's spec."""
        return TextGuidedSelectorSpec(
            top_p=self.top_p, temperature=self.temperature, reduce=self.reduce, noise=self.noise, authors_leak=self.authors_leak
        )


class LearnableSelector(Table):
    """The same by scores that learn."""

    kind: Literal["learnable"]
    top_p: KeptShare = 0.95
    temperature: Positive = 1.0
    reduce: Literal["sum", "mean"] = "sum"
    noise: NotNegative = 0.1
    width: Count = 128

    def spec(self) -> LearnableSelectorSpec:
        """The selector's spec."""
        return LearnableSelectorSpec(top_p=self.top_p, temperature=self.temperature, reduce=self.reduce, noise=self.noise, width=self.width)


class GlobalBranch(Table):
    """What happens to the global view."""

    fusion: Fusion
    adapters: Annotated[MLPAdapter | GatedMixtureAdapter, Field(discriminator="kind")]
    output_grid: Count | None = None
    """Visual tokens on a side, by interpolation behind the adapters."""


class LocalBranch(Table):
    """What happens to each local view."""

    fusion: Fusion
    compression: Compression | None = None
    """Absent, every token of a view is kept."""
    projector: Literal["shared", "own"] = "shared"
    output_grid: Count | None = None
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    newline: Switch = False
    selector: Annotated[TextGuidedSelector | LearnableSelector, Field(discriminator="kind")] | None = None

    def spec(self, encoder: EncoderSpec) -> LocalBranchSpec:
        """The branch over this encoder's layers."""
        compression, selector = self.compression, self.selector
        return LocalBranchSpec(
            fusion=self.fusion.spec(encoder),
            compression=None if compression is None else CompressionSpec(queries=compression.queries, attention_init=compression.attention_init),
            projector=self.projector,
            output_grid=self.output_grid,
            merge=self.merge,
            newline=self.newline,
            selector=None if selector is None else selector.spec(),
        )


class Connector(Table):
    """Everything between the encoder and the language model."""

    global_branch: GlobalBranch = Field(alias="global")
    local_branch: LocalBranch | None = Field(alias="local", default=None)
    separator: Text = ","
    """Its first token stands between global and local tokens; empty, nothing does."""
    standardise_inputs: Switch = True
    """Whether fused tokens are centred and scaled per channel before the projectors."""
    start: Literal["scaled", "authors"] = "scaled"
    """In which scale visual tokens start: the embeddings', or what torch's defaults give, as in the papers' code."""
    weights: Word | None = None
    """Path or URL of a connector.safetensors that training starts from, as `loupe import-weights` and every training run write it."""
