"""Everything between an encoder's maps and a language model's input embeddings, and the blocks that it trains in."""

from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

from model.errors import SpecError
from model.specs._features import EncoderSpec, check_map_pool
from model.specs._fusions import FusionSpec, STISpec
from model.views import most_square_grid

__all__ = [
    "BLOCKS",
    "CONNECTOR_BLOCKS",
    "AdapterSpec",
    "Block",
    "CompressionSpec",
    "ConnectorSpec",
    "GatedMixtureSpec",
    "GlobalBranchSpec",
    "LearnableSelectorSpec",
    "LocalBranchSpec",
    "MLPSpec",
    "Merge",
    "SelectorSpec",
    "Start",
    "TextGuidedSelectorSpec",
]

Block = Literal["global_mlp", "local_mlp", "resampler", "gate", "compression", "newline", "selector", "language_model"]

BLOCKS: tuple[Block, ...] = get_args(Block)
"""Everything that a phase can train, in the order in which parameter groups and records list it."""

CONNECTOR_BLOCKS: tuple[Block, ...] = tuple(block for block in BLOCKS if block != "language_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPSpec:
    """The two-layer GELU projector alone."""

    kind: Literal["mlp"] = "mlp"


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedMixtureSpec:
    """Two experts behind a per-token gate: the MLP, and the same MLP behind a resampler.

    Source: SliME section 2.2. The authors' code takes the gate's own matrix for the noise, the paper another one: `noise` says which.
    """

    kind: Literal["gated_mixture"] = "gated_mixture"
    attention_init: Literal["positional", "authors"] = "positional"
    """`positional`: each query starts by looking at its own place in the grid. `authors`: random projections, which learn places from 558K images."""
    noise: Literal["own", "authors", "none"] = "own"
    """Gaussian noise on the gate's logits in training. `own`: scaled by a matrix of its own, as in the paper. `authors`: by the gate's matrix, as in
    their code. `none`: no noise. Differs: only in phases that train the gate, while theirs is in all training; a gate at rest only blurs."""


AdapterSpec = MLPSpec | GatedMixtureSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionSpec:
    """Learnable queries that compress the tokens of one local view.

    Source: SliME section 2.3. Differs: their queries are a square number.

    Raises:
        SpecError: no queries.
    """

    queries: int
    """How many. They form a grid over the view, see `grid`."""
    attention_init: Literal["positional", "authors"] = "positional"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the queries, as close to a square as their number allows: 12 x 12 of 144, 4 x 5 of 20, one row of a prime number."""
        return most_square_grid(self.queries)

    @property
    def is_square(self) -> bool:
        """Whether the queries form a square, as SliME's do."""
        rows, columns = self.grid
        return rows == columns

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise SpecError(f"compression.queries must be at least 1, found {self.queries}; 16 and 144 are usual")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextGuidedSelectorSpec:
    """Drops local tokens that have little to do with the question, without parameters and without a gradient.

    A token's score is its cosine with the text's input embeddings, summed or averaged over the text; softmax over the image's local tokens; the
    likeliest are kept until their sum exceeds `top_p`, the one that exceeds it included, in their old order.

    Source: SliME section 2.3 and the authors' code. Differs: the text is the prompt alone. Their code looks at the answer as well, which at inference
    is not there; `authors_leak` asks for that.

    Raises:
        SpecError: a share, temperature or deviation that cannot be.
    """

    kind: Literal["text_guided"] = "text_guided"
    top_p: float = 0.95
    """Share of the probability to keep; 1 keeps every token."""
    temperature: float = 1.0
    reduce: Literal["sum", "mean"] = "sum"
    """Over the text: `sum` as in the authors' code, which sharpens the softmax as the text grows; `mean` as in the paper."""
    noise: float = 0.1
    """Standard deviation of the Gaussian noise on the scores in training."""
    authors_leak: bool = False
    """Let the answer take part in the choice in training, to reproduce the authors' code. A leak: what is kept then tells of the answer."""

    def __post_init__(self) -> None:
        _check_selector(self.top_p, self.temperature, self.noise)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnableSelectorSpec:
    """The same choice by scores that learn: both sides go through a small matrix each, and the softmax weighs what is kept.

    Source: SliME's code has a trainable selector whose scores reach the loss through indices alone, so it cannot learn. Differs: a straight-through
    gradient; kept tokens are what they were, and the gradient is that of attention to them weighed by their probability. It starts near the cosine.

    Raises:
        SpecError: as for `TextGuidedSelectorSpec`, or a width below 1.
    """

    kind: Literal["learnable"] = "learnable"
    top_p: float = 0.95
    temperature: float = 1.0
    reduce: Literal["sum", "mean"] = "sum"
    noise: float = 0.1
    width: int = 128
    """Channels in which tokens and text are compared."""

    def __post_init__(self) -> None:
        _check_selector(self.top_p, self.temperature, self.noise)
        if self.width < 1:
            raise SpecError(f"selector.width must be at least 1, found {self.width}")


def _check_selector(top_p: float, temperature: float, noise: float) -> None:
    if not (0 < top_p <= 1 and 0 < temperature < float("inf") and 0 <= noise < float("inf")):
        raise SpecError(
            f"selector: found top_p {top_p:g}, temperature {temperature:g}, noise {noise:g}; allowed: top_p above 0 and at most 1 (1 keeps every "
            "token), a temperature above 0, a deviation of the noise from 0 up"
        )


SelectorSpec = TextGuidedSelectorSpec | LearnableSelectorSpec

Merge = Literal["flat", "spatial", "spatial_unpad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBranchSpec:
    """What happens to the global view's maps: fusion, then adapters into the language model's width."""

    fusion: FusionSpec
    adapters: AdapterSpec
    output_grid: int | None = None
    """Visual tokens on a side, reached by bilinear interpolation behind the adapters; None leaves the encoder's grid.

    Source: the efficient variant of Dense Connector, section 3.3 (24 x 24 to 12 x 12); the authors released no code for it."""

    def __post_init__(self) -> None:
        _check_output_grid(self.output_grid, self.fusion, "global")


def _check_output_grid(output_grid: int | None, fusion: FusionSpec, branch: str) -> None:
    if output_grid is None:
        return
    if output_grid < 1:
        raise SpecError(f"connector.{branch}.output_grid must be at least 1, found {output_grid}")
    if isinstance(fusion, STISpec):
        raise SpecError(f"connector.{branch}: output_grid resizes a square grid of tokens, which sti does not give; use single, sci or dci")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalBranchSpec:
    """What happens to the local views' maps: fusion, compression, projection, merging, selection.

    Raises:
        SpecError: parts that do not fit each other.
    """

    fusion: FusionSpec
    compression: CompressionSpec | None
    """None keeps every token of a view, as AnyRes tiling does."""
    projector: Literal["shared", "own"] = "shared"
    """`shared`: the global branch's MLP, as SliME does; needs equal fused widths. `own`: a block `local_mlp`."""
    output_grid: int | None = None
    """As `GlobalBranchSpec.output_grid`, for every local view; only without compression."""
    merge: Merge = "flat"
    """How the views' tokens follow each other. `flat`: view by view. `spatial`: line by line over the whole picture. `spatial_unpad`: the same
    without the lines and columns that show padding, which LLaVA-NeXT removes."""
    newline: bool = False
    """A learned token at every line's end, block `newline`; only with a spatial merge."""
    selector: SelectorSpec | None = None

    def __post_init__(self) -> None:
        _check_output_grid(self.output_grid, self.fusion, "local")
        if self.compression is not None and isinstance(self.fusion, STISpec):
            raise SpecError(
                "connector.local.fusion cannot be sti: its pooled tokens have no place in the grid that compression reads; use sci or dci"
            )
        if self.compression is not None and self.output_grid is not None:
            raise SpecError("connector.local: compression already sets the number of tokens of a view, so output_grid has no place; leave one out")
        if self.merge != "flat" and isinstance(self.fusion, STISpec):
            raise SpecError(f"connector.local.merge is {self.merge}, but sti gives no square grid of tokens; use flat, or single, sci or dci")
        if self.merge == "spatial_unpad" and self.compression is not None and not self.compression.is_square:
            rows, columns = self.compression.grid
            raise SpecError(
                f"connector.local.merge is spatial_unpad, which counts lines and columns alike, but {self.compression.queries} queries form a grid "
                f"of {rows} x {columns}; use a square number of queries, or spatial or flat"
            )
        if self.newline and self.merge == "flat":
            raise SpecError("connector.local.newline ends the lines of a picture, which merge = 'flat' does not have; use spatial or spatial_unpad")

    def view_tokens(self, num_patches: int) -> int:
        """Visual tokens of one local view.

        Args:
            num_patches: patches in a view.
        """
        if self.compression is not None:
            return self.compression.queries
        if self.output_grid is not None:
            return self.output_grid**2
        return self.fusion.num_tokens(num_patches)

    def view_grid(self, num_patches: int) -> tuple[int, int]:
        """Rows and columns of those of a local view's tokens that have a place in it; of STI's these are the base layer's, which come first.

        Args:
            num_patches: patches in a view, a square number.
        """
        if self.compression is not None:
            return self.compression.grid
        side = self.output_grid or isqrt(self.fusion.map_tokens(num_patches))
        return side, side


Start = Literal["scaled", "authors"]
"""In which scale visual tokens start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorSpec:
    """Everything between the encoder's maps and the language model's input embeddings.

    Raises:
        SpecError: branches that do not fit each other.
    """

    global_branch: GlobalBranchSpec
    local_branch: LocalBranchSpec | None
    separator: str | None = ","
    """Its first token's input embedding stands between global and local tokens; None leaves it out."""
    standardise_inputs: bool = True
    """Fused tokens are centred and scaled per channel, by numbers measured once on training images. An affine map in front of a linear layer, so it
    folds exactly into it. Differs from both papers, which train long enough not to need it."""
    start: Start = "scaled"
    """Of projectors and newline that no file gives. `scaled`: visual tokens start in the scale of the language model's input embeddings, kept outside
    of the weights, so that a learning rate means the same whatever that scale. `authors`: torch's default linear layers and a newline of deviation
    1 / sqrt(hidden), in no other scale, as both papers' code starts."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The connector's blocks that exist under this spec, in the order of BLOCKS."""
        present: set[Block] = {"global_mlp"}
        if isinstance(self.global_branch.adapters, GatedMixtureSpec):
            present |= {"resampler", "gate"}
        local = self.local_branch
        if local is not None:
            has: dict[Block, bool] = {
                "compression": local.compression is not None,
                "local_mlp": local.projector == "own",
                "newline": local.newline,
                "selector": isinstance(local.selector, LearnableSelectorSpec),
            }
            present |= {block for block, there in has.items() if there}
        return tuple(block for block in BLOCKS if block in present)

    @property
    def selector(self) -> SelectorSpec | None:
        """What drops local tokens; None where nothing does."""
        return None if self.local_branch is None else self.local_branch.selector

    @property
    def projects_alike(self) -> bool:
        """Whether tokens of both branches are fused alike and go straight into one and the same projector."""
        local = self.local_branch
        return (
            local is not None
            and local.projector == "shared"
            and local.compression is None
            and local.fusion == self.global_branch.fusion
            and isinstance(self.global_branch.adapters, MLPSpec)
        )

    def global_tokens(self, num_patches: int) -> int:
        """Visual tokens of a global view.

        Args:
            num_patches: patches in a view.
        """
        output_grid = self.global_branch.output_grid
        return self.global_branch.fusion.num_tokens(num_patches) if output_grid is None else output_grid**2

    def check_encoder(self, encoder: EncoderSpec) -> None:
        """Refuse what does not fit an encoder: layers that it lacks, pools and grids that its grid does not hold.

        Args:
            encoder: whose maps the connector reads.

        Raises:
            SpecError: names the field, what was found and what is allowed.
        """
        for branch, spec in (("global", self.global_branch), ("local", self.local_branch)):
            if spec is None:
                continue
            for map_spec in spec.fusion.maps:
                if map_spec.layers[-1] > encoder.num_blocks:
                    raise SpecError(
                        f"connector.{branch}.fusion needs layer {map_spec.layers[-1]}, but {encoder.model} has layers 0..{encoder.num_blocks}; "
                        "choose layers within"
                    )
            fusion = spec.fusion
            check_map_pool(f"connector.{branch}.fusion.map_pool", fusion.map_pool, encoder)
            grid = encoder.grid // fusion.map_pool
            if isinstance(fusion, STISpec):
                _check_pool(fusion, grid, encoder, branch)
            if spec.output_grid is not None and spec.output_grid > grid:
                raise SpecError(
                    f"connector.{branch}.output_grid: found {spec.output_grid}, but a map of {encoder.model} has {grid} x {grid} tokens here; "
                    f"allowed: 1 to {grid}"
                )

    def __post_init__(self) -> None:
        branch, local = self.global_branch, self.local_branch
        if isinstance(branch.fusion, STISpec) and isinstance(branch.adapters, GatedMixtureSpec):
            raise SpecError("connector.global: sti has no square token grid, which gated_mixture's resampler needs; use mlp, sci or dci")
        if local is not None and local.projector == "shared" and local.fusion.num_wide != branch.fusion.num_wide:
            raise SpecError(
                f"connector.local.projector is shared, but a token of the global branch is made of {branch.fusion.num_wide} map(s) and one of the "
                f"local branch of {local.fusion.num_wide}; set projector = 'own' or make the fusions alike"
            )


def _check_pool(fusion: STISpec, grid: int, encoder: EncoderSpec, branch: str) -> None:
    if isinstance(fusion.pool, int):
        if fusion.pool > grid**2:
            raise SpecError(f"connector.{branch}.fusion.pool: found {fusion.pool}, but a map of {encoder.model} has {grid**2} tokens here; use fewer")
    elif any(grid % side for side in fusion.pool):
        divisors = [side for side in range(1, grid + 1) if grid % side == 0]
        raise SpecError(
            f"connector.{branch}.fusion.pool: found {list(fusion.pool)}, which does not divide the {grid} x {grid} tokens of {encoder.model}; "
            f"allowed: two out of {divisors}, or one number for the authors' pooling of the flattened raster"
        )
