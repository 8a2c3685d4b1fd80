"""What bears identity: frozen specs, and the one function that turns a spec into a fingerprint.

A spec says *what* is computed; how (workers, batch rows on a device, buckets, prices) never enters a spec. Two specs with the same fingerprint
promise the same result. Needs the standard library alone, so a node plans without loading torch.

Vocabulary of dimensions, used in every annotation: batch views layers patches width queries experts text hidden.

Layer numbering, defined here and nowhere else: 0 = embedding output, k = output of block k.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, Literal, get_args

from model.errors import CanonicalisationError, SpecError
from model.views import ViewSpec

__all__ = [
    "BLOCKS",
    "AdapterSpec",
    "Block",
    "BranchMix",
    "ChatTemplate",
    "CompressionSpec",
    "ConnectorSpec",
    "DCISpec",
    "EncoderFamily",
    "EncoderSpec",
    "ExportForm",
    "FeatureSpec",
    "FusionSpec",
    "GatedMixtureSpec",
    "GlobalBranchSpec",
    "LanguageModelSpec",
    "LearnableSelectorSpec",
    "LocalBranchSpec",
    "MLPSpec",
    "MapSpec",
    "Merge",
    "PhaseSpec",
    "SCISpec",
    "STISpec",
    "ScheduleSpec",
    "SelectorSpec",
    "SingleSpec",
    "StockForm",
    "TextGuidedSelectorSpec",
    "UnknownDigest",
    "canonical_json",
    "fingerprint",
    "fingerprint_if_known",
    "spec_differences",
]

SpecValue = None | bool | int | float | str | list[Any] | dict[str, Any]

Block = Literal["global_mlp", "local_mlp", "resampler", "gate", "compression", "newline", "selector", "language_model"]
BLOCKS: tuple[Block, ...] = get_args(Block)
"""Everything that a phase can train, in the order in which parameter groups and records list it."""

CONNECTOR_BLOCKS: tuple[Block, ...] = tuple(block for block in BLOCKS if block != "language_model")


ChatTemplate = Literal["own", "vicuna_v1", "llama3", "plain", "chatml"]
"""How questions and answers become text: `own` is the tokenizer's, the others are the files in model/templates."""


class UnknownDigest(str):
    """Stands where the digest of bytes would, when those are not on this machine; its text says what they are, such as `the weights of owner/name`.

    It has no canonical form, so nothing that holds it has a fingerprint. What is described without its bytes can be planned, and nothing else: every
    key, table and folder is named by a fingerprint.
    """

    __slots__ = ()


EncoderFamily = Literal["clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers"]
"""Whose architecture an encoder has. SigLIP 2 at a fixed resolution is `siglip`, by its own config; `siglip2` is the NaFlex one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapSpec:
    """A named, parameter-free reduction of the encoder's hidden states: one layer, or the mean of several.

    Raises:
        SpecError: no layers, a negative one, or layers out of order.
    """

    layers: tuple[int, ...]
    """Hidden-state indices, ascending. One index is the layer itself; several are their mean, accumulated in fp32."""

    def __post_init__(self) -> None:
        if not self.layers or self.layers[0] < 0 or any(a >= b for a, b in pairwise(self.layers)):
            raise SpecError(f"a map needs ascending layer numbers from 0 up, found {list(self.layers)}")

    @property
    def name(self) -> str:
        """Column name in the tables: `layer_7`, `mean_0_11` for a contiguous run, `mean_0.4.8` else."""
        first, last = self.layers[0], self.layers[-1]
        if len(self.layers) == 1:
            return f"layer_{first}"
        if last - first + 1 == len(self.layers):
            return f"mean_{first}_{last}"
        return "mean_" + ".".join(str(layer) for layer in self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """A frozen vision encoder: which weights, and the shape of what comes out."""

    model: str
    """Folder or hub id: where it is loaded from. Part of the identity too, so the same weights in another place are another encoder."""
    weights_sha256: str
    family: EncoderFamily
    view_px: int
    patch_px: int
    width: int
    num_blocks: int
    prefix_tokens: int
    """Tokens before the patches, removed from every map: 1 (CLS) for CLIP and DINOv2, registers besides where there are some, 0 for SigLIP."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_heads: int
    mlp_width: int
    activation: str
    norm_eps: float

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The mean as a colour of 0 to 255, rounded down as LLaVA's code does: what a padded global view is filled up with."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return red, green, blue

    @property
    def grid(self) -> int:
        """Patches on a side. Pixels behind the last whole patch are seen by none: 6 of SigLIP-SO400M/14's 384."""
        return self.view_px // self.patch_px

    @property
    def num_patches(self) -> int:
        """Patches in a view."""
        return self.grid**2


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """Identity of a feature cache: the same spec gives the same rows, another spec another table."""

    dataset_fingerprint: str
    encoder: EncoderSpec
    views: ViewSpec
    global_maps: tuple[MapSpec, ...]
    local_maps: tuple[MapSpec, ...]
    precision: Literal["fp32", "fp16"] = "fp16"
    resampling: Literal["bicubic"] = "bicubic"
    format_version: int = 1

    def maps(self, branch: Literal["global", "local"]) -> tuple[MapSpec, ...]:
        """The maps stored for the views of a branch."""
        return self.global_maps if branch == "global" else self.local_maps

    def __post_init__(self) -> None:
        for branch, maps in (("global", self.global_maps), ("local", self.local_maps)):
            for map_spec in maps:
                if map_spec.layers[-1] > self.encoder.num_blocks:
                    raise SpecError(
                        f"the {branch} map {map_spec.name} needs layer {map_spec.layers[-1]}, but {self.encoder.model} has layers "
                        f"0..{self.encoder.num_blocks}; choose layers within"
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleSpec:
    """One layer, as LLaVA does it."""

    kind: Literal["single"] = "single"
    layer: int

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in channel order."""
        return (MapSpec(layers=(self.layer,)),)

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view.

        Args:
            num_patches: patches in a view.
        """
        return num_patches


@dataclass(frozen=True, kw_only=True, slots=True)
class STISpec:
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

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in token order."""
        return tuple(MapSpec(layers=(layer,)) for layer in (self.base, *self.layers))

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view: the base layer's and the pooled ones.

        Args:
            num_patches: patches in a view.
        """
        if isinstance(self.pool, int):
            return num_patches + len(self.layers) * (num_patches // self.pool)
        rows, columns = self.pool
        return num_patches + len(self.layers) * (num_patches // (rows * columns))


@dataclass(frozen=True, kw_only=True, slots=True)
class SCISpec:
    """Sparse channel integration: the base layer and others side by side in the channel dimension.

    Source: Dense Connector section 3.1, eq. 2. Differs from the paper, equals the code: the base layer comes first.
    """

    kind: Literal["sci"] = "sci"
    base: int
    layers: tuple[int, ...]

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in channel order."""
        return tuple(MapSpec(layers=(layer,)) for layer in (self.base, *self.layers))

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1 + len(self.layers)

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view.

        Args:
            num_patches: patches in a view.
        """
        return num_patches


@dataclass(frozen=True, kw_only=True, slots=True)
class DCISpec:
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

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in channel order."""
        return (MapSpec(layers=(self.base,)), *(MapSpec(layers=tuple(range(first, last + 1))) for first, last in self.groups))

    @property
    def num_wide(self) -> int:
        """Maps side by side in a fused token."""
        return 1 + len(self.groups)

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of a fused view.

        Args:
            num_patches: patches in a view.
        """
        return num_patches


FusionSpec = SingleSpec | STISpec | SCISpec | DCISpec


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
    their code. `none`: no noise."""


AdapterSpec = MLPSpec | GatedMixtureSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionSpec:
    """Learnable queries that compress the tokens of one local view.

    Source: SliME section 2.3.
    """

    queries: int
    """A square number: the queries form a grid over the view."""
    attention_init: Literal["positional", "authors"] = "positional"

    def __post_init__(self) -> None:
        if self.queries < 1 or round(self.queries**0.5) ** 2 != self.queries:
            raise SpecError(f"compression.queries must be a square number, found {self.queries}; 16 and 144 are usual")


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

ExportForm = Literal["folder", "llava", "llava-hf", "llava-next-hf", "loupe"]
"""What an export is written as. `folder`: what `loupe ask` reads. `llava`: the authors' `mm_projector.bin` and its kin. `llava-hf`, `llava-next-hf`:
transformers' own LLaVA and LLaVA-NeXT. `loupe`: a transformers model of Loupe's own classes."""

StockForm = Literal["llava-hf", "llava-next-hf"]
"""Forms that need no code of Loupe's."""


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
            if isinstance(fusion, STISpec):
                _check_pool(fusion, encoder, branch)
            if spec.output_grid is not None and spec.output_grid > encoder.grid:
                raise SpecError(
                    f"connector.{branch}.output_grid: found {spec.output_grid}, but a view of {encoder.model} has {encoder.grid} x {encoder.grid} "
                    f"tokens; allowed: 1 to {encoder.grid}"
                )

    def __post_init__(self) -> None:
        branch, local = self.global_branch, self.local_branch
        if isinstance(branch.fusion, STISpec) and isinstance(branch.adapters, GatedMixtureSpec):
            raise SpecError("connector.global: sti has no square token grid, which gated_mixture's resampler needs; use mlp, sci or dci")
        if local is not None and local.projector == "shared" and local.fusion.num_wide != branch.fusion.num_wide:
            raise SpecError(
                f"connector.local.projector is shared, but tokens of the global branch are {branch.fusion.num_wide} maps wide and those of the local "
                f"one {local.fusion.num_wide}; set projector = 'own' or make the fusions alike"
            )


def _check_pool(fusion: STISpec, encoder: EncoderSpec, branch: str) -> None:
    grid = encoder.grid
    if isinstance(fusion.pool, int):
        if fusion.pool > encoder.num_patches:
            raise SpecError(
                f"connector.{branch}.fusion.pool: found {fusion.pool}, but a view of {encoder.model} has {encoder.num_patches} tokens; use fewer"
            )
    elif any(grid % side for side in fusion.pool):
        divisors = [side for side in range(1, grid + 1) if grid % side == 0]
        raise SpecError(
            f"connector.{branch}.fusion.pool: found {list(fusion.pool)}, which does not divide the {grid} x {grid} tokens of {encoder.model}; "
            f"allowed: two out of {divisors}, or one number for the authors' pooling of the flattened raster"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelSpec:
    """Which language model, told by its bytes."""

    model: str
    """Folder, hub id or name: where it is loaded from. Part of the identity too."""
    weights_sha256: str
    """sha256 (hex) over the names and bytes of weights, config, tokenizer and chat template."""
    template: ChatTemplate = "own"
    """In which questions are asked of it: in evaluation, of the export, and in every phase that names no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Low-rank adapters that fine-tuning trains in place of the language model: W x becomes W x + (alpha / rank) B A x, with W left as it is.

    Source: LoRA (arXiv 2106.09685); LLaVA's recipe has rank 128, alpha 256, dropout 0.05 on every linear layer but the head.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed in training. Which ones is a function of (seed, position in the run, layer), so a resumed run and
    one on other workers drop the same."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The linear layers that get one: every one but the head, or those that end in these names (`q_proj`)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"language_model.lora.rank must be at least 1, found {self.rank}; leave lora out to fine-tune every weight")
        if not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise SpecError(
                f"language_model.lora: found alpha {self.alpha:g} and dropout {self.dropout:g}; allowed: a finite alpha above 0, a dropout from 0 up "
                "and below 1"
            )
        names = () if isinstance(self.targets, str) else self.targets
        if self.targets != "all-linear" and (not names or len(set(names)) != len(names) or not all(names)):
            raise SpecError(f"language_model.lora.targets: found {self.targets!r}; allowed: 'all-linear', or names of layers, each once")


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchMix:
    """Which share of a phase's samples sees which visual input. Shares sum to 1."""

    both: float = 0.0
    global_only: float = 0.0
    local_only: float = 0.0
    blind: float = 0.0

    @property
    def words(self) -> str:
        """The shares as a recipe calls them, for messages."""
        return f"both {self.both:g}, global {self.global_only:g}, local {self.local_only:g}, blind {self.blind:g}"

    @property
    def shows_global(self) -> bool:
        """Whether some samples see their global view."""
        return self.both + self.global_only > 0

    @property
    def shows_local(self) -> bool:
        """Whether some samples see their local views."""
        return self.both + self.local_only > 0

    def __post_init__(self) -> None:
        shares = (self.both, self.global_only, self.local_only, self.blind)
        if min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-9:
            raise SpecError(f"branch: found the shares {self.words}, in sum {sum(shares):g}; allowed: shares of 0 or more that sum to 1")


def sees_text_only(train: Sequence[Block], template: ChatTemplate) -> bool:
    """Whether samples without an image take part in a phase.

    Args:
        train: the blocks that the phase trains.
        template: in which its conversations are written.

    Returns:
        Only if the language model is trained, since no token of such a sample comes from the connector, and its gradient would be nothing; and not in
        `plain`, which leaves out what is asked.

    Differs: LLaVA's trainer puts a black image through encoder and connector for such a sample and takes none of its tokens. Here it is a blind one.
    """
    return "language_model" in train and template != "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSpec:
    """One phase of the schedule: which blocks train, on which input, for how long, how fast.

    Source: SliME section 2.3 and its launch scripts; cosine decay with warm-up per phase, AdamW without weight decay.
    """

    name: str
    train: tuple[Block, ...]
    branch: BranchMix
    steps: int
    batch_size: int
    """Samples (conversations) in an optimizer step, over all ranks."""
    learning_rate: float
    language_model_learning_rate: float | None = None
    """The language model's own rate where it trains; `learning_rate` when absent."""
    warmup_fraction: float = 0.03
    max_grad_norm: float = 1.0
    evidence_weight: float = 0.0
    """Weight of the evidence loss beside the answers': local tokens where evidence stands are drawn to the words that it shows. 0 leaves it out.

    Differs: neither paper has it. Answers alone do not ground a small language model within minutes; this does (see README, Measured)."""
    experts: Literal["mixture", "mlp", "resampler"] = "mixture"
    """Which of the global branch's experts count: SliME trains the first alone, then the second alone, and the gate only in fine-tuning."""
    selector: bool = False
    """Whether the connector's selector drops local tokens. SliME's alignment keeps them all, its fine-tuning does not."""
    sources: tuple[str, ...] = ()
    """Which of the dataset's sources the phase sees, by their labels; empty means all. Both papers align on captions, fine-tune on
    instructions."""
    template: ChatTemplate = "own"
    """In which the phase's conversations are written: the authors align on `plain` captions and fine-tune on `vicuna_v1` or `llama3`."""

    @property
    def sees_text_only(self) -> bool:
        """Whether samples without an image take part; see the function of that name."""
        return sees_text_only(self.train, self.template)

    def sees(self, source: str, *, text_only: bool) -> bool:
        """Whether a sample takes part in the phase.

        Args:
            source: label of the source that it is from.
            text_only: whether it has no image.

        Returns:
            Whether it does.
        """
        return (not self.sources or source in self.sources) and (self.sees_text_only or not text_only)

    @property
    def reached(self) -> tuple[Block, ...]:
        """The blocks that some sample's loss depends on, whichever the connector has.

        Either expert ends in `global_mlp`, and so do the local views where they share it; whether they do, this spec cannot know.
        """
        mix = self.branch
        by_block: dict[Block, bool] = {
            "global_mlp": mix.shows_global or mix.shows_local,
            "local_mlp": mix.shows_local,
            "resampler": mix.shows_global and self.experts != "mlp",
            "gate": mix.shows_global and self.experts == "mixture",
            "compression": mix.shows_local,
            "newline": mix.shows_local,
            "selector": mix.shows_local and self.selector,
            "language_model": True,
        }
        return tuple(block for block in BLOCKS if by_block[block])

    def __post_init__(self) -> None:
        if not self.train or len(set(self.train)) != len(self.train) or set(self.train) - set(BLOCKS):
            raise SpecError(f"phase {self.name!r}: train must name each block once, out of {list(BLOCKS)}; found {list(self.train)}")
        if ("gate" in self.train and self.experts != "mixture") or ("resampler" in self.train and self.experts == "mlp"):
            raise SpecError(f"phase {self.name!r}: experts = {self.experts!r} leaves a block of {list(self.train)} without effect; use 'mixture'")
        if idle := [block for block in self.train if block not in self.reached]:
            raise SpecError(
                f"phase {self.name!r}: branch (found {self.branch.words}) leaves {', '.join(idle)} of train without effect; allowed: "
                "resampler and gate with a share of global or both, compression, local_mlp and newline of local or both, selector of these where "
                "the phase's selector is on, global_mlp with any. "
                "Leave it out of train (in place of connector, name the other blocks), or change branch"
            )
        if self.selector and not self.branch.shows_local:
            raise SpecError(
                f"phase {self.name!r}: selector is on, but branch shows no local views, of which it drops some; leave it out, or give local or "
                "both a share of branch"
            )
        if self.experts != "mixture" and not self.branch.shows_global:
            raise SpecError(
                f"phase {self.name!r}: found experts = {self.experts!r}, but branch shows no global view, for which there are experts; leave it "
                "out, or give global or both a share of branch"
            )
        if self.language_model_learning_rate is not None and "language_model" not in self.train:
            raise SpecError(
                f"phase {self.name!r}: found language_model_learning_rate {self.language_model_learning_rate:g}, but train is "
                f"{list(self.train)}; allowed: a rate only where language_model trains. Leave it out, or use learning_rate"
            )
        if self.evidence_weight > 0 and not self.branch.shows_local:
            raise SpecError(
                f"phase {self.name!r}: found evidence_weight {self.evidence_weight:g}, but branch shows no local views, on which it works; "
                "allowed: 0. Leave it out, or give local or both a share of branch"
            )
        if list(self.sources) != sorted(set(self.sources)):
            raise SpecError(f"phase {self.name!r}: sources must be in order and each once, found {list(self.sources)}")
        if self.template == "plain" and self.branch.blind > 0:
            raise SpecError(
                f"phase {self.name!r}: template plain leaves out what is asked, so samples without their image (found {self.branch.words}) would "
                "hold nothing to answer from; allowed: no share of blind, or another template"
            )
        if not 0 <= self.evidence_weight < float("inf"):
            raise SpecError(f"phase {self.name!r}: evidence_weight must be 0 or more, found {self.evidence_weight}")
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0 or not 0 <= self.warmup_fraction < 1 or self.max_grad_norm <= 0:
            raise SpecError(
                f"phase {self.name!r}: steps, batch_size, learning_rate and max_grad_norm must be positive, warmup_fraction in [0, 1); found {self}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpec:
    """The alternating schedule: alignment phases over one engine, then fine-tuning on a fresh one. Without phases nothing is trained."""

    align: tuple[PhaseSpec, ...]
    sft: PhaseSpec | None
    seed: int = 0

    def __post_init__(self) -> None:
        for phase in self.align:
            if "language_model" in phase.train:
                raise SpecError(f"align phase {phase.name!r} trains the language model; only sft may")
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise SpecError(f"phases need different names, found {names}; give each a name")

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """All phases in the order they run."""
        return self.align if self.sft is None else (*self.align, self.sft)


def _canonical(value: Any, path: str) -> SpecValue:
    if isinstance(value, UnknownDigest):
        raise CanonicalisationError(f"{path}: {value} are not on this machine, so what depends on them has no key; put them there")
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _canonical(getattr(value, field.name), f"{path}.{field.name}") for field in fields(value)}
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not isfinite(value):
                raise CanonicalisationError(f"{path}: {value} has no canonical form; use a finite number")
            return value
        case tuple() | list():
            return [_canonical(item, f"{path}[{position}]") for position, item in enumerate(value)]
        case dict():
            if bad := [key for key in value if not isinstance(key, str)]:
                raise CanonicalisationError(f"{path}: keys must be strings, found {bad[0]!r}")
            return {key: _canonical(item, f"{path}.{key}") for key, item in value.items()}
        case _:
            raise CanonicalisationError(f"{path}: {type(value).__name__} has no canonical form; a spec holds numbers, strings, tuples and specs only")


def canonical_json(spec: Any) -> str:
    """The one JSON text of a spec: keys sorted, no spaces, floats by shortest repr.

    Args:
        spec: a spec dataclass, or dicts, lists and scalars.

    Returns:
        JSON text in ASCII.

    Raises:
        CanonicalisationError: something in it has no canonical form; the message names its path.
    """
    return json.dumps(_canonical(spec, type(spec).__name__), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def fingerprint(spec: Any) -> str:
    """sha256 (hex) over the canonical JSON of a spec and the spec's type name. Paths use its first 16 characters.

    Args:
        spec: a spec dataclass instance (any frozen dataclass whose name ends in Spec).

    Returns:
        64 hex digits.

    Raises:
        CanonicalisationError: it is no spec, or something in it has no canonical form.
    """
    if not is_dataclass(spec) or isinstance(spec, type) or not type(spec).__name__.endswith("Spec"):
        raise CanonicalisationError(f"only specs have a fingerprint, found {type(spec).__name__}")
    return hashlib.sha256(f"{type(spec).__name__}:{canonical_json(spec)}".encode()).hexdigest()


def fingerprint_if_known(spec: Any) -> str:
    """The fingerprint of a spec, for a plan of what cannot be run yet.

    Args:
        spec: as `fingerprint` takes it.

    Returns:
        64 hex digits, or the first UnknownDigest that the spec holds, again one.

    Raises:
        CanonicalisationError: as for `fingerprint`, but for unknown digests.
    """
    unknown = _first_unknown(spec)
    return fingerprint(spec) if unknown is None else unknown


def _first_unknown(value: Any) -> UnknownDigest | None:
    if isinstance(value, UnknownDigest):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in fields(value)]
    else:
        items = list(value) if isinstance(value, tuple | list) else []
    return next((unknown for item in items if (unknown := _first_unknown(item)) is not None), None)


def spec_differences(stored: SpecValue, asked: SpecValue, path: str = "") -> list[str]:
    """Field-by-field differences between two canonical values, one line each, for refusals that teach.

    Args:
        stored: what is on record, parsed from JSON.
        asked: what is wanted now, parsed from JSON.
        path: prefix of the field path.

    Returns:
        Lines; none when the values are equal.
    """
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for key in sorted(stored.keys() | asked.keys()):
            here = f"{path}.{key}" if path else key
            if key not in stored:
                lines.append(f"{here}: not recorded, asked {json.dumps(asked[key])}")
            elif key not in asked:
                lines.append(f"{here}: recorded {json.dumps(stored[key])}, not asked")
            else:
                lines.extend(spec_differences(stored[key], asked[key], here))
        return lines
    if stored != asked:
        return [f"{path or 'value'}: recorded {json.dumps(stored)}, asked {json.dumps(asked)}"]
    return []
