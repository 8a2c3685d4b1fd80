"""A recipe: the whole experiment as one TOML file, checked before anything starts and turned into the specs that bear identity.

Input: a TOML file. Output: frozen specs (`DatasetSpec`, `FeatureSpec`, `ConnectorSpec`, `ScheduleSpec`). Invariant: everything in a recipe is
identity but its `[execution]` table, which suggests settings for `--set` to override and enters no spec. Unknown keys are refused, since a misspelt
one would train something else than what was asked for.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, assert_never, get_args, get_origin, get_type_hints

from pydantic import Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from model.errors import SpecError
from model.metrics import MetricName
from model.specs import (
    AdapterSpec,
    CalibrationRule,
    CalibrationSpec,
    ChatTemplate,
    ConnectorSpec,
    EncoderSpec,
    FeatureOrigin,
    FeatureSpec,
    FusionSpec,
    GlobalBranchSpec,
    LoraSpec,
    PhaseSpec,
    ScheduleSpec,
    UnknownDigest,
    fingerprint_if_known,
)
from model.views import ViewSpec
from pipelines.connector_tables import Connector
from pipelines.plan_tables import Plan
from pipelines.recipe_fields import Count, Fraction, Mode, Part, Positive, Seed, Share, Switch, Table, Text, Word, allowed
from pipelines.schedule_tables import Phase, Schedule
from workers.dataset.spec import DatasetSpec, LegibilitySpec, LlavaJsonSourceSpec, RenderedSourceSpec, material_versions, source_label
from workers.execution import ExecutionSettings

__all__ = [
    "AskedDataset",
    "Dataset",
    "Encoder",
    "Evaluation",
    "Execution",
    "Features",
    "LanguageModel",
    "Legibility",
    "LlavaJsonSource",
    "Lora",
    "Recipe",
    "RenderedSource",
    "Views",
]


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
    records_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$"), allowed("64 hex digits in lower case, or nothing")] = ""
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
    max_slices: Annotated[int, Field(ge=2, le=48), allowed("a whole number from 2 to 48")] | None = None
    max_side: Annotated[int, Field(ge=1, le=12), allowed("a whole number from 1 to 12")] | None = None
    grids: (
        Annotated[
            Annotated[tuple[tuple[Annotated[int, Field(ge=1, le=12)], Annotated[int, Field(ge=1, le=12)]], ...], Field(min_length=1)],
            allowed("grids of [columns, rows] of 1 to 12, such as [[1, 2], [2, 1], [2, 2]]"),
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


UNCALIBRATED = UnknownDigest("the calibration, which runs first")
"""In the place of a calibration's digest until there is one."""


class Features(Table):
    """How features are stored."""

    precision: Literal["fp32", "fp16", "int8"] = "fp16"
    calibration_images: Annotated[int, Field(ge=4)] = 256
    """Of int8: images that its centres and scales are measured on, one of four to check them."""
    min_snr_db: Annotated[float, Field(ge=20, allow_inf_nan=False), allowed("a finite number from 20 up, below which no cache goes on")] = 30.0
    """Of int8: a map that keeps less signal over rounding is stored in fp16."""
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the encoder's weights and hidden states; bf16 is an accelerator's fast one. Maps are summed in fp32 all the same."""
    source: FeatureOrigin = "cached"
    """`live`: nothing is stored; the encoder runs in training and evaluation, on every view whenever it is seen. `global_cached`: so with local views
    alone, which are most of the bytes; those of global views are stored."""
    table: Annotated[str, Field(pattern=r"^features/[0-9a-f]{16}$"), allowed("a table's folder, such as features/0123456789abcdef")] | None = None
    """The table that features are to lie in: another one, by another encoder, rule of views or precision, is refused before any work."""

    @model_validator(mode="after")
    def _store_what_is_packed(self) -> "Features":
        if self.source == "live" and self.precision == "int8":
            text = "found source = 'live' beside precision = 'int8', which is a way to store; use precision fp16 or fp32, or leave source out"
            raise PydanticCustomError("told", text)
        if self.source == "live" and self.table is not None:
            raise PydanticCustomError("told", "found source = 'live' beside table, which names what is stored; leave one of the two out")
        return self


class Lora(Table):
    """Low-rank adapters, trained in place of the language model's weights."""

    rank: Count
    alpha: Positive
    dropout: Fraction = 0.0
    targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[Word, ...], Field(min_length=1)],
        allowed('"all-linear", or a list of layers, such as ["q_proj", "v_proj"]'),
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
        int: Annotated[int, Field(ge=0), allowed("a whole number from 0 up")],
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

    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]*$"), allowed("lower-case letters, digits and dashes, beginning with a letter or digit")]
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
    plan: Plan = Plan()
    """Prices and hardware that `loupe plan` counts with; no part of its identity."""

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
            start=self.connector.start,
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
        """The cache that the connector reads: the union of its maps per branch. Of int8, before it is calibrated."""
        return FeatureSpec(
            dataset_fingerprint=fingerprint_if_known(dataset),
            encoder=encoder,
            views=self.view_spec(),
            global_maps=tuple(dict.fromkeys(connector.global_branch.fusion.maps)),
            local_maps=tuple(dict.fromkeys(connector.local_branch.fusion.maps)) if connector.local_branch is not None else (),
            precision=self.features.precision,
            calibration=self.calibration_rule() if self.features.precision == "int8" else None,
            calibration_sha256=UNCALIBRATED if self.features.precision == "int8" else None,
            compute=self.features.compute,
        )

    def calibration_rule(self) -> CalibrationRule:
        """How maps would be measured for int8."""
        return CalibrationRule(num_images=self.features.calibration_images, min_snr_db=self.features.min_snr_db)

    def cached_features(self, features: FeatureSpec) -> FeatureSpec:
        """What is stored out of the features that training sees; all of them where nothing is.

        Args:
            features: of both branches.
        """
        return features.cached(self.features.source) or features

    def calibration_spec(self, features: FeatureSpec) -> CalibrationSpec | None:
        """How the maps of a cache are measured; None where its precision needs no measuring.

        Args:
            features: the cache.
        """
        if features.precision != "int8":
            return None
        return CalibrationSpec(
            dataset_fingerprint=features.dataset_fingerprint,
            encoding=features.encoding,
            global_maps=features.global_maps,
            local_maps=features.local_maps,
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


@contextlib.contextmanager
def _at(path: str) -> Iterator[None]:
    """Errors of specs that are made in the block are told with their place in the recipe, once: some know it, or a part of it."""
    try:
        yield
    except SpecError as error:
        text = str(error).removeprefix(f"{path.rpartition(', ')[2]}: ")
        raise SpecError(text if text.startswith(path) else f"{path}: {text}") from error
