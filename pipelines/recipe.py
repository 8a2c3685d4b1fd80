"""A recipe: the whole experiment as one TOML file, checked before anything starts and turned into the specs that bear identity.

Input: a TOML file. Output: frozen specs (`DatasetSpec`, `FeatureSpec`, `ConnectorSpec`, `ScheduleSpec`). Invariant: everything in a recipe is
identity but its `[execution]` table, which suggests settings for `--set` to override and enters no spec. Unknown keys are refused, since a misspelt
one would train something else than what was asked for.
"""

import contextlib
import difflib
import itertools
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, assert_never, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, create_model, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from model.errors import SpecError
from model.metrics import MetricName
from model.specs import (
    BLOCKS,
    CONNECTOR_BLOCKS,
    AdapterSpec,
    Block,
    BranchMix,
    ChatTemplate,
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    EncoderFamily,
    EncoderSpec,
    FeatureSpec,
    FusionSpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    LoraSpec,
    MLPSpec,
    PhaseSpec,
    ScheduleSpec,
    SCISpec,
    SingleSpec,
    STISpec,
    TextGuidedSelectorSpec,
    fingerprint_if_known,
    sees_text_only,
)
from model.views import ViewSpec
from pipelines.errors import RecipeError
from pipelines.inheritance import read_recipe
from workers.dataset.spec import DatasetSpec, LegibilitySpec, LlavaJsonSourceSpec, RenderedSourceSpec, material_versions, source_label
from workers.execution import ExecutionSettings

__all__ = ["Execution", "Recipe", "RecipeFile", "load_recipe", "recipe_files"]

RECIPES_FOLDER = Path(__file__).parent / "recipes"
SCHEDULES_FOLDER = Path(__file__).parent / "schedules"

SHOWN_MISTAKES = 8
"""More than these are counted, not told: most of them follow from one misunderstanding."""


def _allowed(words: str) -> WrapValidator:
    """Whatever is wrong with a value, its one mistake says all that is allowed in the words of a recipe; pydantic's own tell types and bounds."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("not_allowed", "{allowed}", {"allowed": words}) from error

    return WrapValidator(check)


Mode = Literal["blind", "global", "local", "both"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _allowed("a finite number greater than 0")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _allowed("a finite number from 0 up")]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _allowed("a finite number from 0 up and less than 1")]
KeptShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), _allowed("a finite number greater than 0 and at most 1; 1 keeps every token")]
Part = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), _allowed("a finite number greater than 0 and less than 1")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _allowed("a finite number from 0 to 1")]
Count = Annotated[int, Field(ge=1), _allowed("a whole number from 1 up")]
Layer = Annotated[int, Field(ge=0), _allowed("a layer's number, from 0 up")]
Seed = Annotated[int, Field(ge=0, lt=2**32), _allowed("a whole number from 0 to 4294967295")]
Text = Annotated[str, _allowed("text in quotes")]
Word = Annotated[str, Field(min_length=1), _allowed("text in quotes, of at least 1 character")]
Switch = Annotated[bool, _allowed("true or false")]


def _with_tuples(value: Any) -> Any:
    """TOML's arrays as tuples: strict validation, which refuses "3" for 3, refuses a list for a tuple as well."""
    match value:
        case dict():
            return {key: _with_tuples(item) for key, item in value.items()}
        case list():
            return tuple(_with_tuples(item) for item in value)
        case _:
            return value


def _closest(found: str, allowed: list[str]) -> str:
    match = difflib.get_close_matches(found, allowed, n=1)
    return f"did you mean {match[0]!r}? " if match else ""


class Table(BaseModel):
    """A TOML table: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            allowed = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in allowed:
                    raise PydanticCustomError(
                        "unknown_key",
                        "found the unknown key {key}; {hint}allowed here: {allowed}",
                        {"key": repr(key), "hint": _closest(str(key), allowed), "allowed": ", ".join(allowed)},
                    )
        return data


class RenderedSource(Table):
    """Pictures that Loupe draws, with answers that are true by construction."""

    kind: Literal["rendered"]
    family: Literal["charts", "maps", "collages", "pages", "geometry"]
    num_images: Count


class LlavaJsonSource(Table):
    """Records in LLaVA's JSON format and a folder of images."""

    kind: Literal["llava_json"]
    records: Text
    """Path or URL of the JSON file."""
    images: Text
    """Path or URL of the folder that the records' image paths are relative to."""
    records_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$"), _allowed("64 hex digits in lower case, or nothing")] = ""
    """Digest of the JSON file. Read from the file when empty; given, a changed file is refused."""


class Legibility(Table):
    """From which glyph height on the encoder reads, measured for the encoder, in pixels of a view."""

    local_min_px: Positive = 7.0
    """What is asked for is at least this high in a local view: readable."""
    global_max_px: Positive = 5.0
    """What is asked for as small detail is at most this high in the global view: not readable."""


class AskedDataset(Table):
    """Where samples come from."""

    sources: Annotated[
        tuple[Annotated[RenderedSource | LlavaJsonSource, Field(discriminator="kind")], ...],
        Field(min_length=1),
    ]
    seed: Seed = 0
    turns_per_image: Count = 6
    legibility: Legibility = Legibility()


class Dataset(AskedDataset):
    """Where samples come from, and how they are split."""

    held_out_fraction: Part = 0.1
    """Share of the images kept for evaluation."""


class Encoder(Table):
    """The frozen vision encoder: `builtin:vision-encoder`, a folder, or a hub id."""

    model: Word


class Views(Table):
    """How views are cut. Of `max_slices`, `max_side` and `grids`, a rule has one."""

    rule: Literal["slime", "slime_paper", "anyres"] = "slime"
    max_slices: Annotated[int, Field(ge=2, le=48), _allowed("a whole number from 2 to 48")] | None = None
    max_side: Annotated[int, Field(ge=1, le=12), _allowed("a whole number from 1 to 12")] | None = None
    grids: (
        Annotated[
            Annotated[tuple[tuple[Annotated[int, Field(ge=1, le=12)], Annotated[int, Field(ge=1, le=12)]], ...], Field(min_length=1)],
            _allowed("grids of [columns, rows] of 1 to 12, such as [[1, 2], [2, 1], [2, 2]]"),
        ]
        | None
    ) = None
    global_view: Literal["squash", "pad"] | None = None
    """How the whole image becomes a square; the rule's own way when absent."""

    @model_validator(mode="after")
    def _have_what_the_rule_has(self) -> "Views":
        own = {"slime": "max_slices", "slime_paper": "max_side", "anyres": "grids"}
        for rule, name in own.items():
            if rule != self.rule and getattr(self, name) is not None:
                text = "found {name}, which rule = {rule} does not have; allowed: {own}, or rule = {other}"
                raise PydanticCustomError("told", text, {"name": name, "rule": repr(self.rule), "own": own[self.rule], "other": repr(rule)})
        return self

    def spec(self) -> ViewSpec:
        """The rule, with its defaults filled in."""
        given = {"max_slices": self.max_slices, "max_side": self.max_side, "grids": self.grids, "global_fit": self.global_view}
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        match self.rule:
            case "slime":
                return ViewSpec.slime(**known)
            case "slime_paper":
                return ViewSpec.slime_paper(**known)
            case "anyres":
                return ViewSpec.anyres(**known)
            case _:
                assert_never(self.rule)


class Features(Table):
    """How features are stored."""

    precision: Literal["fp32", "fp16"] = "fp16"


class SingleFusion(Table):
    """One layer. The encoder's last but one when absent, as LLaVA takes it."""

    kind: Literal["single"]
    layer: Layer | None = None

    def spec(self, encoder: EncoderSpec) -> SingleSpec:
        """The fusion over this encoder's layers."""
        return SingleSpec(layer=_base(self.layer, encoder))


class STIFusion(Table):
    """Sparse token integration. `pool` is how many tokens of the flattened raster become one, or [rows, columns] of the grid."""

    kind: Literal["sti"]
    base: Layer | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = None
    pool: Annotated[
        Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
        _allowed("how many tokens become one, from 1 up, or [rows, columns] of the grid, such as [2, 4]"),
    ] = 8

    def spec(self, encoder: EncoderSpec) -> STISpec:
        """The fusion over this encoder's layers."""
        return STISpec(base=_base(self.base, encoder), layers=_sparse(self.layers, encoder), pool=self.pool)


class SCIFusion(Table):
    """Sparse channel integration."""

    kind: Literal["sci"]
    base: Layer | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = None

    def spec(self, encoder: EncoderSpec) -> SCISpec:
        """The fusion over this encoder's layers."""
        return SCISpec(base=_base(self.base, encoder), layers=_sparse(self.layers, encoder))


class DCIFusion(Table):
    """Dense channel integration. `groups` is how many equal groups, or their first and last layers."""

    kind: Literal["dci"]
    base: Layer | None = None
    groups: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[tuple[tuple[int, int], ...], Field(min_length=1)],
        _allowed("how many groups, from 1 up, or the first and last layer of each, such as [[0, 3], [4, 7]]"),
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
            return DCISpec(base=base, groups=self.groups)
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
        return DCISpec(base=base, groups=tuple((first, last - 1) for first, last in itertools.pairwise(edges)))


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
    weights: Word | None = None
    """Path or URL of a connector.safetensors that training starts from, as `loupe import-weights` and every training run write it."""


class Lora(Table):
    """Low-rank adapters, trained in place of the language model's weights."""

    rank: Count
    alpha: Positive
    dropout: Fraction = 0.0
    targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[Word, ...], Field(min_length=1)],
        _allowed('"all-linear", or a list of layers, such as ["q_proj", "v_proj"]'),
    ] = "all-linear"

    def spec(self) -> LoraSpec:
        """The adapters' spec."""
        return LoraSpec(rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)


class LanguageModel(Table):
    """The language model: `builtin:language-model`, `smollm2-135m-instruct`, a folder, or a hub id."""

    model: Word
    template: ChatTemplate = "own"
    """How questions and answers become text, wherever a phase names no other."""
    max_tokens: Count | None = None
    """Longest sequence in training; the model's own limit when absent."""
    lora: Lora | None = None
    """Absent, fine-tuning that trains the language model trains every weight of it."""

    def lora_spec(self) -> LoraSpec | None:
        """The adapters; None without."""
        with _at("language_model.lora"):
            return None if self.lora is None else self.lora.spec()


class Shares(Table):
    """Which share of a phase's samples sees which visual input."""

    both: Share = 0.0
    global_only: Share = Field(alias="global", default=0.0)
    local_only: Share = Field(alias="local", default=0.0)
    blind: Share = 0.0


class Phase(Table):
    """One phase of the schedule."""

    name: Text | None = None
    """When absent, the trained blocks' names; `sft` for the last phase."""
    train: Annotated[
        tuple[Literal["global_mlp", "local_mlp", "resampler", "gate", "compression", "newline", "selector", "language_model", "connector"], ...],
        Field(min_length=1),
    ]
    """Blocks; `connector` stands for all blocks of the connector."""
    branch: Mode | Shares
    """What samples see: one word for all, or a table of shares."""
    steps: Count | None = None
    epochs: Positive | None = None
    """Passes over the training images, instead of steps."""
    batch_size: Count = 32
    """Images in an optimizer step."""
    evidence_weight: NotNegative = 0.0
    """Weight of the loss that draws local tokens to the words that a question's evidence shows."""
    experts: Literal["mixture", "mlp", "resampler"] = "mixture"
    """Which of the global branch's experts count in this phase."""
    selector: Switch | None = None
    """Whether the selector drops tokens; when absent, not in alignment, and in fine-tuning where there is one."""
    sources: Annotated[tuple[Word, ...], Field(min_length=1)] | None = None
    """Which of the dataset's sources the phase sees; all when absent."""
    template: ChatTemplate | None = None
    """How questions and answers become text in this phase; the language model's when absent."""
    learning_rate: Positive
    language_model_learning_rate: Positive | None = None
    warmup_fraction: Fraction = 0.03
    max_grad_norm: Positive = 1.0

    @field_validator("train")
    @classmethod
    def _name_each_block_once(cls, train: tuple[str, ...]) -> tuple[str, ...]:
        twice = len(set(train)) != len(train) or ("connector" in train and set(train) & set(CONNECTOR_BLOCKS))
        if twice:
            raise PydanticCustomError("not_allowed", "each block once; connector stands for all blocks of the connector")
        return train

    @model_validator(mode="after")
    def _have_one_length(self) -> "Phase":
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise PydanticCustomError("told", "found {found} of steps and epochs; allowed: exactly one", {"found": found})
        return self

    @property
    def shown_name(self) -> str:
        """Its name, or what it trains."""
        return self.name or "+".join(self.train)

    def blocks(self, connector: ConnectorSpec) -> tuple[Block, ...]:
        """The blocks to train.

        Args:
            connector: whose blocks they are.

        Returns:
            Blocks in the order of BLOCKS.

        Raises:
            SpecError: a block that this connector does not have would silently train nothing.
        """
        asked: set[str] = set(self.train)
        if "connector" in asked:
            asked = (asked - {"connector"}) | set(connector.blocks)
        present = {*connector.blocks, "language_model"}
        if missing := sorted(asked - present):
            raise SpecError(
                f"train names {', '.join(missing)}, which this connector does not have; it has {', '.join(connector.blocks)}, "
                "and language_model can be trained in schedule.sft"
            )
        return tuple(block for block in BLOCKS if block in asked)

    def mix(self) -> BranchMix:
        """The shares as a spec."""
        match self.branch:
            case "both":
                return BranchMix(both=1.0)
            case "global":
                return BranchMix(global_only=1.0)
            case "local":
                return BranchMix(local_only=1.0)
            case "blind":
                return BranchMix(blind=1.0)
            case Shares() as shares:
                return BranchMix(both=shares.both, global_only=shares.global_only, local_only=shares.local_only, blind=shares.blind)
            case _:
                assert_never(self.branch)

    def source_labels(self, labels: Sequence[str]) -> tuple[str, ...]:
        """The sources that the phase names, by their labels.

        Args:
            labels: of all of the dataset's sources.

        Returns:
            In order; empty for all.

        Raises:
            SpecError: there is no such source, or more than one.
        """
        found = set()
        for name in self.sources or ():
            matching = [label for label in labels if name in (label, label.partition("/")[2])]
            if len(matching) != 1:
                raise SpecError(f"sources: found {name!r}, which names {len(matching)} of the dataset's sources; allowed: {', '.join(labels)}")
            found.add(matching[0])
        return tuple(sorted(found))

    def spec(
        self,
        connector: ConnectorSpec,
        *,
        labels: Sequence[str],
        num_train_images: Mapping[str, int] | None,
        num_train_text_only: Mapping[str, int],
        fine_tunes: bool,
    ) -> PhaseSpec:
        """The phase over this connector's blocks.

        Args:
            connector: whose blocks are trained.
            labels: of the dataset's sources.
            num_train_images: training images by source; needed for a phase that counts in epochs, None while unknown.
            num_train_text_only: training samples without an image by source; they count in phases that see them.
            fine_tunes: whether it is the last phase, schedule.sft.

        Returns:
            The phase's spec.

        Raises:
            SpecError: a block, branch or selector that the connector lacks, a block that nothing would train, or epochs of an unknown number of
                samples.
        """
        mix = self.mix()
        if self.selector and connector.selector is None:
            raise SpecError("selector is on, but the recipe has no connector.local.selector; add it, or leave selector out")
        if connector.local_branch is None and mix.shows_local:
            raise SpecError("branch uses local views, but the recipe has no [connector.local]; use 'global', or add the local branch")
        own_projector = connector.local_branch is not None and connector.local_branch.projector == "own"
        if own_projector and mix.shows_local and not mix.shows_global and "global_mlp" in self.blocks(connector):
            raise SpecError(
                "branch leaves global_mlp of train without effect: samples see local views at most, and those have a projector of their own; "
                "leave it out of train (for connector, name the other blocks), or give global or both a share of branch"
            )
        sources = self.source_labels(labels)
        if self.steps is not None:
            steps = self.steps
        elif num_train_images is None:
            raise SpecError(
                "the length is in epochs, and the number of training images is known only once the dataset is built; run `loupe build-dataset` first"
            )
        else:
            assert self.epochs is not None
            counts = [num_train_images]
            if sees_text_only(self.blocks(connector), self.template or "own"):
                counts.append(num_train_text_only)
            num_samples = sum(number for count in counts for label, number in count.items() if not sources or label in sources)
            if not num_samples:
                shown = f"the sources {', '.join(sources)}, which have" if sources else "sources with"
                raise SpecError(f"the phase sees {shown} no training image; give it others, or a smaller held_out_fraction to the dataset")
            steps = ceil(self.epochs * num_samples / self.batch_size)
        return PhaseSpec(
            name=self.shown_name,
            train=self.blocks(connector),
            branch=mix,
            steps=steps,
            batch_size=self.batch_size,
            sources=sources,
            learning_rate=self.learning_rate,
            language_model_learning_rate=self.language_model_learning_rate,
            warmup_fraction=self.warmup_fraction,
            max_grad_norm=self.max_grad_norm,
            evidence_weight=self.evidence_weight,
            experts=self.experts,
            selector=fine_tunes and connector.selector is not None and mix.shows_local if self.selector is None else self.selector,
            template=self.template or "own",
        )


def schedule_presets() -> dict[str, Path]:
    """The schedules that come with Loupe, by name."""
    return {path.stem: path for path in sorted(SCHEDULES_FOLDER.glob("*.toml"))}


def _from_preset(schedule: dict[str, Any]) -> dict[str, Any]:
    """A schedule that names a preset, with the preset's phases as if they were written out, and changed as it says."""
    presets, name = schedule_presets(), schedule["preset"]
    if name not in presets:
        hint = _closest(str(name), list(presets)) if isinstance(name, str) else ""
        text = "preset: found {found}; {hint}allowed: {allowed}"
        raise PydanticCustomError("told", text, {"found": repr(name), "hint": hint, "allowed": ", ".join(presets)})
    if written := [key for key in ("align", "sft") if key in schedule]:
        text = (
            "found {key} beside preset = {name}, which has its own phases; change those with [schedule.change.NAME], or leave preset out. Of a "
            'recipe that this one extends, they are left out by without = ["schedule"]'
        )
        raise PydanticCustomError("told", text, {"key": written[0], "name": repr(name)})
    by_name = _preset_phases(name)
    changes = schedule.get("change", {})
    for phase_name, change in changes.items() if isinstance(changes, dict) else ():
        if phase_name not in by_name:
            text = "change: found {found}; {hint}phases of preset {name}: {allowed}"
            context = {"found": repr(phase_name), "hint": _closest(phase_name, list(by_name)), "name": repr(name), "allowed": ", ".join(by_name)}
            raise PydanticCustomError("told", text, context)
        if isinstance(change, dict):
            by_name[phase_name].update(change)
            for given, other in (("steps", "epochs"), ("epochs", "steps")):
                if given in change and other not in change:
                    by_name[phase_name].pop(other, None)
    *align, sft = by_name.values()
    repeats = tomllib.loads(presets[name].read_text(encoding="utf-8")).get("repeats", 1)
    return {"repeats": repeats, **schedule, **_with_tuples({"align": align, "sft": sft})}


class Schedule(Table):
    """The alternating schedule: alignment phases, `repeats` times in turns, then joint fine-tuning."""

    preset: Literal["alternating", "dense_connector", "slime"] | None = None
    """A schedule that comes with Loupe, in place of `align` and `sft`."""
    change: Annotated[dict[str, dict[str, Any]], _allowed("a table for each phase, such as [schedule.change.sft]")] = Field(default_factory=dict)
    """Keys of the preset's phases that are to be other, by the phase's name."""
    align: tuple[Phase, ...] = ()
    repeats: Count = 1
    """How often the alignment phases run, one after the other: 2 turns A, B into A, B, A, B."""
    sft: Phase | None = None

    @model_validator(mode="before")
    @classmethod
    def _write_preset_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if "preset" in data:
            return _from_preset(data)
        if "change" in data:
            raise PydanticCustomError("told", "found change without preset, whose phases it would change; add preset, or write the phases themselves")
        return data

    @property
    def align_phases(self) -> tuple[Phase, ...]:
        """The alignment phases in the order they run; from the second time on, their names end in the time's number."""
        again = [phase.model_copy(update={"name": f"{phase.shown_name} {time}"}) for time in range(2, self.repeats + 1) for phase in self.align]
        return (*self.align, *again)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases in the order they run."""
        return self.align_phases if self.sft is None else (*self.align_phases, self.sft)


class Evaluation(Table):
    """What is asked of the held-out images, or of another dataset's, and how answers are scored."""

    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = ("exact_match",)
    """The first is the one that reports show."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("blind", "global", "local", "both")
    max_new_tokens: Count = 24
    """An answer ends here at the latest; longer true answers cannot be matched."""
    max_questions: Count | None = None
    """All questions when absent."""
    dataset: AskedDataset | None = None
    """Asked instead of the held-out images; all of its images are, but those that the run was trained on."""


def _setting(hint: Any) -> Any:
    """What a recipe may say of a setting of this type."""
    options = [option for option in get_args(hint) if option is not type(None)] if get_origin(hint) is not Literal and get_args(hint) else [hint]
    if get_origin(options[0]) is Literal:
        return options[0]
    return {
        int: Annotated[int, Field(ge=0), _allowed("a whole number from 0 up")],
        float: Share,
        bool: Switch,
        str: Word,
    }[options[0]]


if TYPE_CHECKING:

    class Execution(Table):
        """Suggested settings, with the names and types of `ExecutionSettings`."""
else:
    Execution = create_model(
        "Execution",
        __base__=Table,
        __doc__="Suggested settings, with the names and types of `ExecutionSettings`.",
        **{field.name: (_setting(get_type_hints(ExecutionSettings)[field.name]) | None, None) for field in fields(ExecutionSettings)},
    )


class Recipe(Table):
    """One experiment."""

    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]*$"), _allowed("lower-case letters, digits and dashes, beginning with a letter or digit")]
    description: Text = ""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Training seeds. Each is trained and evaluated; dataset and features are shared."""
    dataset: Dataset
    encoder: Encoder
    views: Views = Views()
    features: Features = Features()
    connector: Connector
    language_model: LanguageModel
    schedule: Schedule = Schedule()
    """Without phases, `connector.weights` are evaluated and exported as they are."""
    evaluation: Evaluation = Evaluation()
    execution: Execution = Execution()
    """Settings that suit this experiment; no part of its identity."""

    @field_validator("execution")
    @classmethod
    def _have_possible_settings(cls, execution: Execution) -> Execution:
        try:
            ExecutionSettings(**execution.model_dump(exclude_unset=True))
        except ValueError as error:
            raise PydanticCustomError("told", "{error}", {"error": str(error)}) from error
        return execution

    @property
    def suggested_settings(self) -> dict[str, Any]:
        """What the recipe's `[execution]` says, by setting."""
        return self.execution.model_dump(exclude_unset=True)

    @field_validator("seeds")
    @classmethod
    def _have_distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise PydanticCustomError("not_allowed", "different numbers")
        return seeds

    @model_validator(mode="after")
    def _have_weights_from_somewhere(self) -> "Recipe":
        if not self.schedule.phases and self.connector.weights is None:
            raise PydanticCustomError(
                "told",
                "schedule: found no phase; allowed: at least one, [[schedule.align]] or [schedule.sft], or connector.weights, to evaluate and export "
                "those as they are",
            )
        return self

    @property
    def uses_epochs(self) -> bool:
        """Whether a phase's length depends on the number of training images."""
        return any(phase.epochs is not None for phase in self.schedule.phases)

    @property
    def templates(self) -> frozenset[ChatTemplate]:
        """All in which conversations are written."""
        default = self.language_model.template
        return frozenset((default, *(phase.template or default for phase in self.schedule.phases)))

    def view_spec(self) -> ViewSpec:
        """How views are cut."""
        return self.views.spec()

    def connector_spec(self, encoder: EncoderSpec) -> ConnectorSpec:
        """The connector over this encoder's layers."""
        branch, local = self.connector.global_branch, self.connector.local_branch
        local_spec = None
        if local is not None:
            with _at("connector.local"):
                local_spec = local.spec(encoder)
        with _at("connector.global"):
            adapters: AdapterSpec = branch.adapters.spec()
            fusion: FusionSpec = branch.fusion.spec(encoder)
            global_spec = GlobalBranchSpec(fusion=fusion, adapters=adapters, output_grid=branch.output_grid)
        spec = ConnectorSpec(
            global_branch=global_spec,
            local_branch=local_spec,
            separator=self.connector.separator or None,
            standardise_inputs=self.connector.standardise_inputs,
        )
        spec.check_encoder(encoder)
        return spec

    def dataset_spec(self, encoder: EncoderSpec, records_sha256: dict[str, str]) -> DatasetSpec:
        """The dataset that is trained on, seen through this encoder's view size.

        Args:
            encoder: whose view size decides what can be read where.
            records_sha256: digest by the address of each JSON file that the sources name.

        Returns:
            The dataset's spec.

        Raises:
            SpecError: a JSON file has another digest than the recipe expects.
        """
        return self._dataset_spec("dataset", self.dataset, self.dataset.held_out_fraction, encoder, records_sha256)

    def evaluation_dataset_spec(self, encoder: EncoderSpec, records_sha256: dict[str, str]) -> DatasetSpec | None:
        """The dataset that is asked, all of it held out; None where the held-out images of the other one are asked.

        Args:
            encoder: as for `dataset_spec`.
            records_sha256: as for `dataset_spec`.

        Returns:
            The dataset's spec.

        Raises:
            SpecError: as for `dataset_spec`.
        """
        if self.evaluation.dataset is None:
            return None
        return self._dataset_spec("evaluation.dataset", self.evaluation.dataset, 1.0, encoder, records_sha256)

    def _dataset_spec(
        self, path: str, dataset: AskedDataset, held_out_fraction: float, encoder: EncoderSpec, records_sha256: dict[str, str]
    ) -> DatasetSpec:
        sources: list[RenderedSourceSpec | LlavaJsonSourceSpec] = []
        for source in dataset.sources:
            match source:
                case RenderedSource():
                    sources.append(RenderedSourceSpec(family=source.family, num_images=source.num_images))
                case LlavaJsonSource():
                    digest = records_sha256[source.records]
                    if source.records_sha256 not in ("", digest):
                        raise SpecError(
                            f"{path}.sources: {source.records} has the digest {digest}, the recipe expects {source.records_sha256}; "
                            "use the file the recipe was written for, or change records_sha256"
                        )
                    sources.append(LlavaJsonSourceSpec(records=source.records, images=source.images, records_sha256=digest))
                case _:
                    assert_never(source)
        legibility = dataset.legibility
        return DatasetSpec(
            sources=tuple(sources),
            seed=dataset.seed,
            held_out_fraction=held_out_fraction,
            view_px=encoder.view_px,
            views=self.view_spec(),
            legibility=LegibilitySpec(local_min_px=legibility.local_min_px, global_max_px=legibility.global_max_px),
            turns_per_image=dataset.turns_per_image,
            material=material_versions() if any(isinstance(source, RenderedSourceSpec) for source in sources) else (),
        )

    def feature_spec(self, dataset: DatasetSpec, encoder: EncoderSpec, connector: ConnectorSpec) -> FeatureSpec:
        """The cache that the connector reads: the union of its maps per branch."""
        return FeatureSpec(
            dataset_fingerprint=fingerprint_if_known(dataset),
            encoder=encoder,
            views=self.view_spec(),
            global_maps=tuple(dict.fromkeys(connector.global_branch.fusion.maps)),
            local_maps=tuple(dict.fromkeys(connector.local_branch.fusion.maps)) if connector.local_branch is not None else (),
            precision=self.features.precision,
        )

    @property
    def source_labels(self) -> tuple[str, ...]:
        """The dataset's sources as rows and phases name them."""
        return tuple(
            source_label(
                RenderedSourceSpec(family=source.family, num_images=source.num_images)
                if isinstance(source, RenderedSource)
                else LlavaJsonSourceSpec(records=source.records, images=source.images, records_sha256="0" * 64)
            )
            for source in self.dataset.sources
        )

    def schedule_spec(
        self,
        connector: ConnectorSpec,
        seed: int,
        num_train_images: Mapping[str, int] | None = None,
        num_train_text_only: Mapping[str, int] | None = None,
    ) -> ScheduleSpec:
        """The schedule of one seed.

        Args:
            connector: whose blocks the phases train.
            seed: of initialisation, order and noise.
            num_train_images: training images by their source's label, None while unknown.
            num_train_text_only: training samples without an image, likewise; None: there are none.

        Returns:
            The schedule's spec.

        Raises:
            SpecError: a phase that cannot be; the message names it.
        """

        def build(path: str, phase: Phase, *, fine_tunes: bool = False) -> PhaseSpec:
            with _at(path):
                written = phase.model_copy(update={"template": phase.template or self.language_model.template})
                return written.spec(
                    connector,
                    labels=self.source_labels,
                    num_train_images=num_train_images,
                    num_train_text_only=num_train_text_only or {},
                    fine_tunes=fine_tunes,
                )

        schedule = self.schedule

        def place(number: int) -> str:
            if schedule.preset is not None:
                return f"schedule.preset {schedule.preset!r}, phase {schedule.align[number].shown_name!r}"
            return f"schedule.align[{number}]"

        align = tuple(build(place(number % len(schedule.align)), phase) for number, phase in enumerate(schedule.align_phases))
        last = schedule.sft
        sft = None if last is None else build("schedule.sft", last.model_copy(update={"name": last.name or "sft"}), fine_tunes=True)
        return ScheduleSpec(align=align, sft=sft, seed=seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFile:
    """A checked recipe and the file it came from."""

    path: Path
    text: str
    """Its own text, and behind it that of what it extends."""
    recipe: Recipe


def recipe_files() -> dict[str, Path]:
    """The recipes that come with Loupe, by name; those in a folder, such as `components/sti`, with its name in front."""
    found = {path.relative_to(RECIPES_FOLDER).with_suffix("").as_posix(): path for path in RECIPES_FOLDER.rglob("*.toml")}
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))


def _written_place(location: tuple[int | str, ...], data: Any) -> tuple[int | str, ...]:
    """Where a preset's phase was changed in the file, for a place within that phase."""
    schedule = data.get("schedule") if isinstance(data, dict) else None
    if not isinstance(schedule, dict) or "preset" not in schedule or location[:1] != ("schedule",):
        return location
    match location[1:]:
        case ("sft", *rest):
            number, inside = -1, rest
        case ("align", int(number), *rest):
            inside = rest
        case _:
            return location
    phase = tuple(_preset_phases(schedule["preset"]))[number]
    return ("schedule", "change", phase, *inside)


def _preset_phases(name: str) -> dict[str, dict[str, Any]]:
    """The phases of a preset by their names, in order; the last one fine-tunes."""
    preset = tomllib.loads(schedule_presets()[name].read_text(encoding="utf-8"))
    return {phase.get("name", "sft"): phase for phase in (*preset["align"], preset["sft"])}


def _field_path(location: tuple[int | str, ...], data: Any, *, names_missing_key: bool) -> str:
    """Dotted path in the file. Pydantic's location also names union members, which stand nowhere in the file; those are left out."""
    path = ""
    here = data
    location = _written_place(location, data)
    for position, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
            here = here[part] if isinstance(here, list) and part < len(here) else None
        elif isinstance(here, dict) and part in here:
            path += f".{part}"
            here = here[part]
        elif names_missing_key and position == len(location) - 1:
            path += f".{part}"
    return path.lstrip(".") or "top level"


def _describe(error: ErrorDetails, data: Any) -> str:
    path = _field_path(error["loc"], data, names_missing_key=error["type"] == "missing")
    message = error["msg"]
    match error["type"]:
        case "missing":
            return f"{path}: found nothing; this key is required"
        case "unknown_key" | "told":
            return f"{path}: {message}"
        case "union_tag_not_found":
            return f"{path}: found no 'kind'; allowed kinds: {error['ctx']['discriminator'] and _kinds(error)}"
        case "union_tag_invalid":
            allowed = [tag.strip().strip("'") for tag in error["ctx"]["expected_tags"].split(",")]
            tag = error["ctx"]["tag"]
            return f"{path}.kind: found {tag!r}; {_closest(tag, allowed)}allowed: {', '.join(allowed)}"
        case "literal_error":
            allowed = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            hint = _closest(error["input"], allowed) if isinstance(error["input"], str) else ""
            return f"{path}: found {error['input']!r}; {hint}allowed: {', '.join(allowed)}"
        case "tuple_type" | "model_type" | "model_attributes_type" | "too_short":
            message = _shape(error["type"], path)
    return f"{path}: found {json.dumps(error['input'], default=str)}; allowed: {message}"


_LIST_EXAMPLES = {
    "sources": '[{ kind = "rendered", family = "charts", num_images = 240 }]',
    "layers": "[2, 5]",
    "grids": "[[1, 2], [2, 1], [2, 2]]",
    "train": '["global_mlp"]',
    "metrics": '["exact_match", "anls"]',
    "modes": '["blind", "both"]',
    "seeds": "[0, 1]",
}


def _list_example(path: str, key: str) -> str:
    """Sources are tables in a dataset and labels in a phase."""
    return '["charts"]' if key == "sources" and path.startswith("schedule") else _LIST_EXAMPLES[key]


def _shape(error_type: str, path: str) -> str:
    """How the list or table that belongs at a path is written."""
    key = path.rpartition(".")[2]
    if path.startswith("schedule.") and key.startswith("align"):
        return "any number of tables, each written [[schedule.align]]"
    match error_type:
        case "tuple_type":
            return f"a list, such as {_list_example(path, key)}"
        case "too_short":
            return f"a list of at least 1, such as {_list_example(path, key)}"
        case _:
            return "a table, written { key = value, ... }" if "[" in path else f"a table, written [{path}]"


def _kinds(error: ErrorDetails) -> str:
    """The kinds of the union at an error's place, for tables that name none."""
    match error["loc"][-1]:
        case "fusion":
            return "single, sti, sci, dci"
        case "adapters":
            return "mlp, gated_mixture"
        case "selector":
            return "text_guided, learnable"
        case _:
            return "rendered, llava_json"


def _own_mistakes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without those that only follow from others.

    Such are a list that a refused element left too short, and what a value would have to be to be another of the types that may stand there.
    """

    def follows(detail: ErrorDetails) -> bool:
        match detail["type"]:
            case "too_short":
                return any(len(other["loc"]) > len(detail["loc"]) and other["loc"][: len(detail["loc"])] == detail["loc"] for other in errors)
            case "model_type":  # a word where a table may stand too
                return any(other["type"] == "literal_error" and other["loc"][:-1] == detail["loc"][:-1] for other in errors)
            case "literal_error":  # a table where a word may stand too
                beside = detail["loc"][:-1]
                return isinstance(detail["input"], dict) and any(other is not detail and other["loc"][: len(beside)] == beside for other in errors)
            case _:
                return False

    return [detail for detail in errors if not follows(detail)]


@contextlib.contextmanager
def _at(path: str) -> Iterator[None]:
    """Errors of specs that are made in the block are told with their place in the recipe."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _refuse(path: Path, lines: list[str]) -> RecipeError:
    if len(lines) == 1:
        return RecipeError(f"recipe {path}: {lines[0]}")
    first = f", the first {SHOWN_MISTAKES}" if len(lines) > SHOWN_MISTAKES else ""
    return RecipeError(f"recipe {path} has {len(lines)} mistakes{first}:" + "".join(f"\n  {line}" for line in lines[:SHOWN_MISTAKES]))


def _recipe_path(name_or_path: str) -> Path:
    """Where the recipe lies that a word names.

    Args:
        name_or_path: the name of a recipe that comes with Loupe, or a path; `~` is the home folder.

    Returns:
        A file that is there.

    Raises:
        RecipeError: there is no such recipe, or it is a folder.
    """
    shipped = recipe_files()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path, there, folder = Path(name_or_path), False, False
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a name that no file can have, or the home folder of nobody
        path = path.expanduser()
        there, folder = path.is_file(), path.is_dir()
    if there:
        return path
    advice = f"Give the path of a TOML file, or one of: {', '.join(shipped)}."
    if folder:
        raise RecipeError(f"found the folder {path}, but a recipe is a TOML file. {advice}")
    looks_like_path = "/" in name_or_path or name_or_path.endswith(".toml")
    what = f"no file {path}" if looks_like_path else f"no recipe named {name_or_path!r}"
    raise RecipeError(f"found {what}; {_closest(name_or_path, list(shipped))}{advice}")


def load_recipe(name_or_path: str) -> RecipeFile:
    """Read and check a recipe.

    Args:
        name_or_path: the name of a recipe that comes with Loupe, or the path of a TOML file.

    Returns:
        The recipe with its file.

    Raises:
        RecipeError: no such file, no TOML, or something in it, or in what it extends, that is not allowed. The message names file, field, what was
            found and what is allowed.
    """
    path = _recipe_path(name_or_path)
    read = read_recipe(path, _recipe_path)
    text, data = read.text, read.data
    try:
        recipe = Recipe.model_validate(_with_tuples(data))
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(detail, data) for detail in _own_mistakes(error.errors())))
        raise _refuse(path, lines) from error
    return RecipeFile(path=path, text=text, recipe=recipe)
