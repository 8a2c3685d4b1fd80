"""What bears identity: frozen specs, and the one function that turns a spec into a fingerprint.

A spec says *what* is computed; how (workers, batch rows on a device, buckets, prices) never enters a spec. Two specs with the same fingerprint
promise the same result. Needs the standard library alone, so a node plans without loading torch.

Vocabulary of dimensions, used in every annotation: batch views layers patches width queries experts text hidden.

Layer numbering, defined here and nowhere else: 0 = embedding output, k = output of block k.
"""

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, Literal

from model.errors import CanonicalisationError, SpecError
from model.views import ViewSpec

__all__ = [
    "BLOCKS",
    "AdapterSpec",
    "Block",
    "BranchMix",
    "CompressionSpec",
    "ConnectorSpec",
    "DCISpec",
    "EncoderFamily",
    "EncoderSpec",
    "FeatureSpec",
    "FusionSpec",
    "GatedMixtureSpec",
    "GlobalBranchSpec",
    "LanguageModelSpec",
    "LocalBranchSpec",
    "MLPSpec",
    "MapSpec",
    "PhaseSpec",
    "SCISpec",
    "STISpec",
    "ScheduleSpec",
    "SingleSpec",
    "UnknownDigest",
    "canonical_json",
    "fingerprint",
    "fingerprint_if_known",
    "spec_differences",
]

SpecValue = None | bool | int | float | str | list[Any] | dict[str, Any]

Block = Literal["global_mlp", "local_mlp", "resampler", "gate", "compression", "language_model"]
BLOCKS: tuple[Block, ...] = ("global_mlp", "local_mlp", "resampler", "gate", "compression", "language_model")
"""Everything that a phase can train, in the order in which parameter groups and records list it."""

CONNECTOR_BLOCKS: tuple[Block, ...] = tuple(block for block in BLOCKS if block != "language_model")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class STISpec:
    """Sparse token integration: the base layer's tokens, then pooled tokens of other layers.

    Source: Dense Connector (arXiv 2405.13800) section 3.1 and the authors' code: 1-D average pool over the flattened raster.
    """

    kind: Literal["sti"] = "sti"
    base: int
    layers: tuple[int, ...]
    pool: int = 8

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """The maps this fusion reads, in token order."""
        return tuple(MapSpec(layers=(layer,)) for layer in (self.base, *self.layers))


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


FusionSpec = SingleSpec | STISpec | SCISpec | DCISpec


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPSpec:
    """The two-layer GELU projector alone."""

    kind: Literal["mlp"] = "mlp"


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedMixtureSpec:
    """Two experts behind a per-token gate: the MLP, and the same MLP behind a resampler.

    Source: SliME section 2.2. Differs from the authors' code, equals the paper: the noise has a matrix of its own.
    """

    kind: Literal["gated_mixture"] = "gated_mixture"
    attention_init: Literal["positional", "authors"] = "positional"
    """`positional`: each query starts by looking at its own place in the grid. `authors`: random projections, which learn places from 558K images."""
    noise: bool = True
    """Gaussian noise on the gate's logits in training."""


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
class GlobalBranchSpec:
    """What happens to the global view's maps: fusion, then adapters into the language model's width."""

    fusion: FusionSpec
    adapters: AdapterSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalBranchSpec:
    """What happens to each local view's maps: fusion, compression, projection."""

    fusion: FusionSpec
    compression: CompressionSpec
    projector: Literal["shared", "own"] = "shared"
    """`shared`: the global branch's MLP, as SliME does; needs equal fused widths. `own`: a block `local_mlp`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorSpec:
    """Everything between the encoder's maps and the language model's input embeddings."""

    global_branch: GlobalBranchSpec
    local_branch: LocalBranchSpec | None
    separator: str = ","
    """Its first token's input embedding stands between global and local tokens."""
    standardise_inputs: bool = True
    """Fused tokens are centred and scaled per channel, by numbers measured once on training images. An affine map in front of a linear layer, so it
    folds exactly into it. Differs from both papers, which train long enough not to need it."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The connector's blocks that exist under this spec, in the order of BLOCKS."""
        present: set[Block] = {"global_mlp"}
        if isinstance(self.global_branch.adapters, GatedMixtureSpec):
            present |= {"resampler", "gate"}
        if self.local_branch is not None:
            present.add("compression")
            if self.local_branch.projector == "own":
                present.add("local_mlp")
        return tuple(block for block in BLOCKS if block in present)

    def __post_init__(self) -> None:
        for name, branch in (("global", self.global_branch), ("local", self.local_branch)):
            if isinstance(branch, LocalBranchSpec) and isinstance(branch.fusion, STISpec):
                raise SpecError(
                    "connector.local.fusion cannot be sti: its pooled tokens have no place in the grid that compression reads; use sci or dci"
                )
            if isinstance(branch, GlobalBranchSpec) and isinstance(branch.fusion, STISpec) and isinstance(branch.adapters, GatedMixtureSpec):
                raise SpecError(f"connector.{name}: sti has no square token grid, which gated_mixture's resampler needs; use mlp, sci or dci")
        local = self.local_branch
        if local is not None and local.projector == "shared" and len(local.fusion.maps) != len(self.global_branch.fusion.maps):
            raise SpecError(
                f"connector.local.projector is shared, but the global branch fuses {len(self.global_branch.fusion.maps)} maps and the local one "
                f"{len(local.fusion.maps)}: widths differ; set projector = 'own' or make the fusions alike"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelSpec:
    """Which language model, told by its bytes."""

    model: str
    """Folder, hub id or name: where it is loaded from. Part of the identity too."""
    weights_sha256: str
    """sha256 (hex) over the names and bytes of weights, config, tokenizer and chat template."""


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
                "resampler and gate with a share of global or both, compression and local_mlp of local or both, global_mlp with any of these. "
                "Leave it out of train (in place of connector, name the other blocks), or change branch"
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
        if not 0 <= self.evidence_weight < float("inf"):
            raise SpecError(f"phase {self.name!r}: evidence_weight must be 0 or more, found {self.evidence_weight}")
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0 or not 0 <= self.warmup_fraction < 1 or self.max_grad_norm <= 0:
            raise SpecError(
                f"phase {self.name!r}: steps, batch_size, learning_rate and max_grad_norm must be positive, warmup_fraction in [0, 1); found {self}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpec:
    """The alternating schedule: alignment phases over one engine, then fine-tuning on a fresh one."""

    align: tuple[PhaseSpec, ...]
    sft: PhaseSpec | None
    seed: int = 0

    def __post_init__(self) -> None:
        for phase in self.align:
            if "language_model" in phase.train:
                raise SpecError(f"align phase {phase.name!r} trains the language model; only sft may")
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) != len(names):
            raise SpecError(f"phases need different names and at least one phase, found {names}")

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
