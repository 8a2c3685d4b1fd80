"""An experiment: a recipe resolved against its models into the specs of all stages, and the stages run one by one.

Input: a recipe, a store, execution settings. Output: one `StageOutcome` per stage. Invariant: all specs are made, and so checked, before any stage
starts; a stage whose record is committed is not run, and what it needs is not even imported.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never
from urllib.parse import unquote, urlsplit

from model.errors import ExportError, FoldingError, ModelError, SpecError, first_line
from model.specs import (
    CalibrationSpec,
    ChatTemplate,
    ConnectorSpec,
    EncoderSpec,
    ExportForm,
    FeatureSpec,
    LanguageModelSpec,
    UnknownDigest,
    fingerprint,
    fingerprint_if_known,
)
from model.views import plan_views
from pipelines.errors import NothingThereError, RecipeError, SettingError
from pipelines.recipe import UNCALIBRATED, LlavaJsonSource
from pipelines.recipe_files import RecipeFile
from workers.commits import StageName, to_json
from workers.dataset.spec import RENDERED_HEIGHT_PX, RENDERED_WIDTH_PX, DatasetSpec, RenderedSourceSpec, source_label
from workers.errors import DiskSpaceError, ExecutionError, RecordError, SourceError, StorageError, TrainingError
from workers.execution import ExecutionSettings, Progress
from workers.storage import Store
from workers.training.spec import TrainingSpec

if TYPE_CHECKING:
    from workers.evaluation import EvaluationSpec
    from workers.export_forms import FormExportSpec
    from workers.exporting import ExportSpec
    from workers.training.initial_weights import WeightsFile


__all__ = [
    "STAGES",
    "Experiment",
    "MissingPart",
    "ReportSpec",
    "StageOutcome",
    "StageRun",
    "check_ready",
    "feature_bytes",
    "fetches_language_model",
    "most_local_views",
    "num_drawn",
    "open_experiment",
    "run_stage",
    "shown_path",
    "stage_runs",
]

STAGES: tuple[StageName, ...] = ("build-dataset", "calibrate-features", "cache-features", "train-connector", "evaluate", "export", "report")
"""In the order in which they run."""

_PLANNED_WITH = ("num_samples", "num_train_by_source", "num_held_out")
"""Fields of a dataset's record that later stages need."""

_IMAGE_BYTES_GUESS = 300_000
"""Generous for a picture of 672 x 448 px; other sources keep their images where they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSpec:
    """Identity of a report: what it tells of, and the template that draws it."""

    recipe_name: str
    recipe_sha256: str
    dataset_fingerprint: str
    feature_fingerprint: str
    training_fingerprints: tuple[str, ...]
    evaluation_fingerprints: tuple[str, ...]
    export_fingerprint: str
    template_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutcome:
    """What a stage left behind."""

    stage: StageName
    key: str
    seed: int | None
    record: dict[str, Any]
    """The commit record as JSON."""
    reused: bool
    """Whether it was there before."""
    asked: bool = False
    """As of the stage's run."""

    @property
    def name(self) -> str:
        """For people."""
        return _stage_name(self.stage, self.seed, asked=self.asked)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRun:
    """One stage of an experiment, ready to run."""

    stage: StageName
    seed: int | None
    spec: Any
    run: Callable[[Progress], Any]
    """Runs the stage and returns its record, a dataclass."""
    asked: bool = False
    """Whether it builds or caches the dataset that is asked alone, `[evaluation.dataset]`."""

    @property
    def key(self) -> str:
        """Name of the stage's folder."""
        return fingerprint(self.spec)[:16]

    @property
    def name(self) -> str:
        """For people: the stage, with its seed where it has one."""
        return _stage_name(self.stage, self.seed, asked=self.asked)


def _stage_name(stage: StageName, seed: int | None, *, asked: bool) -> str:
    if asked:
        return f"{stage} (asked)"
    return stage if seed is None else f"{stage} seed {seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MissingPart:
    """Something that a recipe names and this machine does not have."""

    what: str
    """Such as `weights of openai/clip-vit-large-patch14-336`."""
    note: str
    """What follows from it."""
    records: str | None = None
    """Address of a source's records, where those are what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """A recipe resolved: every spec that does not depend on a stage's outcome."""

    file: RecipeFile
    store: Store
    execution: ExecutionSettings
    encoder: EncoderSpec
    language_model: LanguageModelSpec
    context_tokens: int
    """Longest sequence that the language model allows."""
    connector: ConnectorSpec
    dataset: DatasetSpec
    planned_features: FeatureSpec
    """What training sees; of int8 before it is calibrated."""
    asked_dataset: DatasetSpec | None = None
    """What is asked instead of the held-out images."""
    missing: tuple[MissingPart, ...] = ()
    """Only in plans: what holds an unknown digest in its place has no fingerprint, so no stage runs without it."""
    weights: "WeightsFile | None" = None
    """What training starts from; None for random weights."""
    merge_export: bool = False
    """Whether the standard export holds adapters merged into the language model."""
    _calibrated: dict[str, FeatureSpec] = field(default_factory=dict, compare=False, repr=False)
    """By root, the cache once its calibration was found done: its record is read once."""

    @property
    def caches(self) -> bool:
        """Whether features are stored before anything is trained."""
        return self.file.recipe.features.source != "live"

    @property
    def left_out(self) -> frozenset[StageName]:
        """Stages that it does not have."""
        return frozenset(("calibrate-features", "cache-features") if not self.caches else ("calibrate-features",) if self.calibration is None else ())

    @property
    def calibration(self) -> CalibrationSpec | None:
        """How maps are measured for int8, on the dataset that is trained on; None of another precision."""
        recipe = self.file.recipe
        return recipe.calibration_spec(recipe.cached_features(self.planned_features))

    @property
    def features(self) -> FeatureSpec:
        """What training sees; of int8 its calibration is an UnknownDigest until that is done."""
        calibration = self.calibration
        if calibration is None:
            return self.planned_features
        root = self.store.root
        if root not in self._calibrated:
            record = self.record("calibrate-features", calibration)
            if record is None:
                return self.planned_features
            self._calibrated[root] = replace(self.planned_features, calibration_sha256=record["sha256"], fp16_maps=tuple(record["fp16_maps"]))
        return self._calibrated[root]

    @property
    def cache(self) -> FeatureSpec:
        """What is stored of that, where anything is."""
        return self.file.recipe.cached_features(self.features)

    @property
    def asked(self) -> tuple[DatasetSpec, FeatureSpec] | None:
        """The dataset that is asked instead of the held-out images, and its cache, stored as those that are trained on."""
        if self.asked_dataset is None:
            return None
        return self.asked_dataset, replace(self.cache, dataset_fingerprint=fingerprint_if_known(self.asked_dataset))

    @property
    def data(self) -> tuple[tuple[DatasetSpec, FeatureSpec, bool], ...]:
        """Each dataset with its cache, and whether it is asked alone."""
        trained = (self.dataset, self.cache, False)
        return (trained,) if self.asked is None else (trained, (*self.asked, True))

    def record(self, stage: StageName, spec: Any) -> dict[str, Any] | None:
        """The committed record of a stage as JSON; None when it is not done, or when nobody can tell for want of a key."""
        if isinstance(fingerprint_if_known(spec), UnknownDigest):
            return None
        path = f"runs/{stage}/{fingerprint(spec)[:16]}/COMMITTED.json"
        record = self.store.read_json(path) if self.store.exists(path) else None
        if record is None:
            return None
        place = shown_path(self.store.url(path))
        if not isinstance(record, dict) or not record:
            raise RecordError(f"{place} should be a stage's record, found {record!r:.40}; remove it, and the stage is run again")
        if stage == "build-dataset" and (missing := [name for name in _PLANNED_WITH if name not in record]):
            raise RecordError(f"{place} lacks {', '.join(missing)}, with which later stages are planned; remove it, and the stage is run again")
        return record

    def check_known(self, spec: Any) -> None:
        """Refuse to look for what has no key, for it depends on bytes that are not on this machine.

        Args:
            spec: of a stage, of an experiment that was opened for a plan.

        Raises:
            NothingThereError: names what is missing.
        """
        unknown = fingerprint_if_known(spec)
        if isinstance(unknown, UnknownDigest) and unknown != UNCALIBRATED:
            raise NothingThereError(
                f"recipe {self.file.path}: what it has left in {shown_path(self.store.root)} is found by keys that depend on {unknown}, and those "
                "are not on this machine; look from a machine that has them, or put them here"
            )

    @property
    def all_drawn(self) -> bool:
        """Whether there are no other images than drawn ones, to train on or to ask."""
        return all(_all_drawn(dataset) for dataset, _, _ in self.data)

    def most_local_views(self) -> int:
        """Local views that an image has at most: those of a drawn picture, or the rule's most where other images are among the sources."""
        return max(most_local_views(dataset) for dataset, _, _ in self.data)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence: what the language model allows, or less where the recipe says so."""
        asked = self.file.recipe.language_model.max_tokens
        return self.context_tokens if asked is None else asked

    def most_local_tokens(self) -> int:
        """Visual tokens of local views that an image has at most, before any selection."""
        from model.merging import merged_order, most_local_tokens

        spec, local, num_patches = self.dataset.views, self.connector.local_branch, self.encoder.num_patches
        if local is None or not self.all_drawn:
            return most_local_tokens(spec, local, num_patches)
        plan = plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, self.encoder.view_px, spec)
        return len(merged_order(plan, local, num_patches))

    def training(self, seed: int) -> TrainingSpec:
        """What one seed trains.

        Args:
            seed: one of the recipe's.

        Returns:
            The training's spec.

        Raises:
            SpecError: the schedule counts in epochs and the dataset is not built yet.
        """
        if not self.file.recipe.uses_epochs or (built := self.record("build-dataset", self.dataset)) is None:
            return self._training(seed, None)
        text_only = {str(label): int(number) for label, number in built.get("num_train_text_only_by_source", {}).items()}
        images = {str(label): int(number) - text_only.get(str(label), 0) for label, number in built["num_train_by_source"].items()}
        return self._training(seed, images, text_only)

    def _training(self, seed: int, num_train_images: Mapping[str, int] | None, num_train_text_only: Mapping[str, int] | None = None) -> TrainingSpec:
        return TrainingSpec(
            dataset_fingerprint=fingerprint_if_known(self.dataset),
            features=self.features,
            feature_source=self.file.recipe.features.source,
            connector=self.connector,
            schedule=self.file.recipe.schedule_spec(self.connector, seed, num_train_images, num_train_text_only),
            language_model=self.language_model,
            lora=self.file.recipe.language_model.lora_spec(),
            max_tokens=self.file.recipe.language_model.max_tokens,
            initial_weights_sha256=None if self.weights is None else self.weights.sha256,
        )

    def evaluation(self, seed: int) -> "EvaluationSpec":
        """What is asked of one seed's connector."""
        return self._evaluation(self.training(seed))

    def _evaluation(self, training: TrainingSpec) -> "EvaluationSpec":
        from workers.evaluation import EvaluationSpec

        wanted = self.file.recipe.evaluation
        return EvaluationSpec(
            training_fingerprint=fingerprint_if_known(training),
            dataset_fingerprint=fingerprint_if_known(self.dataset if self.asked_dataset is None else self.asked_dataset),
            modes=wanted.modes,
            max_questions=wanted.max_questions,
            max_new_tokens=wanted.max_new_tokens,
            metrics=wanted.metrics,
        )

    def check(self) -> None:
        """Make the specs of all stages, so that a mistake shows before anything starts and not hours later.

        Raises:
            RecipeError: parts that do not fit each other.
            SettingError: settings that do not fit the recipe.
        """
        recipe, path = self.file.recipe, self.file.path
        self._check_template()
        self._check_room()
        self._check_split()
        self._check_adapters()
        for seed in recipe.seeds:
            training = self._training(seed, dict.fromkeys(recipe.source_labels, 1))
            self._evaluation(training)
        if self.connector.local_branch is None and not set(recipe.evaluation.modes) - {"local", "both"}:
            raise RecipeError(
                f"recipe {path}: evaluation.modes: found {list(recipe.evaluation.modes)}; allowed: blind and global, since the connector has no "
                "local branch"
            )
        for phase in recipe.schedule.phases:
            if phase.batch_size % self.execution.train_workers:
                workers = self.execution.train_workers
                suggested = recipe.suggested_settings.get("train_workers") == workers
                place = f"recipe {path}: execution.train_workers: found {workers}" if suggested else f"--set train_workers={workers}"
                divisors = [number for number in range(1, phase.batch_size + 1) if phase.batch_size % number == 0]
                raise SettingError(
                    f"{place}: the phase that trains {', '.join(phase.train)} has batch_size {phase.batch_size}; allowed: numbers that divide it: "
                    f"{', '.join(map(str, divisors))}"
                )

    def _check_room(self) -> None:
        """An image's visual tokens have to fit the language model beside a question and its answer."""
        most_new_tokens = self.file.recipe.evaluation.max_new_tokens
        context = self.context_tokens
        asked = self.file.recipe.language_model.max_tokens
        if asked is not None and asked > context:
            raise RecipeError(
                f"recipe {self.file.path}: language_model.max_tokens: found {asked}, but {self.language_model.model} holds {context} tokens; "
                "allowed: at most that many"
            )
        context = self.max_sequence_tokens
        num_global = self.connector.global_tokens(self.encoder.num_patches)
        num_local = self.most_local_tokens()
        if num_global + num_local + most_new_tokens >= context:
            holds = f"language model {self.language_model.model} holds" if asked is None else "language_model.max_tokens allows"
            raise RecipeError(
                f"recipe {self.file.path}: an image makes up to {num_global} global and {num_local} local visual tokens, and an answer takes up to "
                f"{most_new_tokens}, but {holds} {context} tokens in all; {self._fewer_tokens()}, or take a language model with a longer context"
            )

    def _check_template(self) -> None:
        if self.language_model.template == "plain":
            raise RecipeError(
                f"recipe {self.file.path}: language_model.template: plain leaves out what is asked, so every question would be the same; name it in "
                "the phases that align on captions, and another one here"
            )
        drawn = {source_label(source) for source in self.dataset.sources if isinstance(source, RenderedSourceSpec)}
        for phase in self.file.recipe.schedule.phases:
            seen = set(phase.source_labels(tuple(self.file.recipe.source_labels)) or self.file.recipe.source_labels)
            if phase.template == "plain" and drawn & seen and self.dataset.turns_per_image > 1:
                raise RecipeError(
                    f"recipe {self.file.path}: phase {phase.shown_name!r}: the template plain holds one caption, but drawn pictures have up to "
                    f"{self.dataset.turns_per_image} questions; set dataset.turns_per_image = 1, or give the phase another template"
                )

    def _fewer_tokens(self) -> str:
        local = self.connector.local_branch
        if local is None:
            return "give connector.global an output_grid"
        key = "compression.queries" if local.compression is not None else "output_grid"
        return f"lower connector.local.{key} or the number of local views"

    def _check_adapters(self) -> None:
        """Adapters need layers to sit on, and an export that merges them needs adapters."""
        from workers.language_models import count_adapters

        lora = self.file.recipe.language_model.lora_spec()
        if lora is not None:
            count_adapters(self.language_model.model, lora)
        elif self.merge_export:
            raise RecipeError(
                f"recipe {self.file.path}: --merge adds trained adapters to the language model's weights, but the recipe has no language_model.lora; "
                "leave --merge out: the export holds whole weights as it is"
            )

    def _check_split(self) -> None:
        """Where all pictures are drawn, their number is known, and so whether any can be expected to be held out."""
        fraction, num_images = self.dataset.held_out_fraction, num_drawn(self.dataset)
        fewest = 1 if self.asked is None else 0
        if _all_drawn(self.dataset) and not fewest <= num_images * fraction <= num_images - 1:
            raise RecipeError(
                f"recipe {self.file.path}: dataset.held_out_fraction: found {fraction:g}, which of {num_images} images holds out about "
                f"{num_images * fraction:.2g}; allowed: a fraction that leaves at least one image on either side"
            )

    def check_other_dataset(self, training: TrainingSpec) -> None:
        """Before a training run: whether the dataset that is asked alone can be asked.

        Args:
            training: about to run.

        Raises:
            EvaluationError: names what cannot be asked.
        """
        from workers.evaluation import check_other_dataset

        if self.asked is not None:
            check_other_dataset(self._evaluation(training), training, self.store, self.execution)

    def export(self) -> "ExportSpec":
        """What is exported: the first seed's connector, whichever seed did best."""
        from workers.exporting import ExportSpec

        seed = self.file.recipe.seeds[0]
        return ExportSpec(
            training_fingerprint=fingerprint_if_known(self.training(seed)),
            evaluation_fingerprint=fingerprint_if_known(self.evaluation(seed)),
            merge=self.merge_export,
        )

    def export_form(self, form: ExportForm) -> "FormExportSpec":
        """The same connector in another form."""
        from workers.export_forms import FormExportSpec

        standard = self.export()
        return FormExportSpec(training_fingerprint=standard.training_fingerprint, evaluation_fingerprint=standard.evaluation_fingerprint, form=form)

    def check_form(self, form: ExportForm) -> None:
        """Refuse a form that this recipe's export can never have, before anything is trained.

        Args:
            form: of the export.

        Raises:
            RecipeError: names what stands in the way.
        """
        if self.merge_export and form != "folder":
            raise RecipeError(
                f"recipe {self.file.path}: --merge goes with --to folder; what --to {form} writes holds adapters merged always. Leave --merge out"
            )
        try:
            match form:
                case "llava-hf" | "llava-next-hf":
                    from model.folding import check_foldable

                    check_foldable(form, self.connector, self.encoder, self.dataset.views)
                case "llava":
                    from model.released_export import check_computable

                    check_computable(self.connector, self.encoder, self.dataset.views)
                case "folder" | "loupe":
                    pass
                case _:
                    assert_never(form)
        except (FoldingError, ExportError) as error:
            raise RecipeError(f"recipe {self.file.path}: --to {form}: {error}") from error

    def report(self) -> ReportSpec:
        """What the report tells of."""
        from pipelines.report import template_sha256

        seeds = self.file.recipe.seeds
        return ReportSpec(
            recipe_name=self.file.recipe.name,
            recipe_sha256=hashlib.sha256(self.file.text.encode()).hexdigest(),
            dataset_fingerprint=fingerprint_if_known(self.dataset),
            feature_fingerprint=fingerprint_if_known(self.features),
            training_fingerprints=tuple(fingerprint_if_known(self.training(seed)) for seed in seeds),
            evaluation_fingerprints=tuple(fingerprint_if_known(self.evaluation(seed)) for seed in seeds),
            export_fingerprint=fingerprint_if_known(self.export()),
            template_sha256=template_sha256(),
        )


def num_drawn(dataset: DatasetSpec) -> int:
    """Pictures of a dataset that are drawn; other sources' images are not among them."""
    return sum(source.num_images for source in dataset.sources if isinstance(source, RenderedSourceSpec))


def most_local_views(dataset: DatasetSpec) -> int:
    """Local views that an image of a dataset has at most.

    Args:
        dataset: its spec.

    Returns:
        Those of a drawn picture, or the rule's most where other images are among the sources.
    """
    if _all_drawn(dataset):
        return len(plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, dataset.view_px, dataset.views).local_views)
    return dataset.views.max_local_views


def _all_drawn(dataset: DatasetSpec) -> bool:
    return all(isinstance(source, RenderedSourceSpec) for source in dataset.sources)


@cache
def _describe_encoder(name: str) -> EncoderSpec:
    from model.encoder import describe_encoder

    return describe_encoder(name)


@cache
def _context_tokens(language_model: str, templates: frozenset[ChatTemplate]) -> int:
    """A run resolves its recipe in the command and again in the flow; loading a tokenizer takes longest of it all."""
    from workers.language_models import check_usable

    return check_usable(language_model, sorted(templates))


def open_experiment(
    file: RecipeFile, store: Store, execution: ExecutionSettings, *, planning: bool = False, merge_export: bool = False
) -> Experiment:
    """Resolve a recipe: find and fingerprint its models, make all specs, check them against each other.

    Args:
        file: the checked recipe.
        store: where its results are or will be.
        execution: settings of the run.
        planning: for a plan, or to look for what is done: fetch nothing, and go on without weights, tokenizers and records that are not here, as
            far as the shapes are known. What is missing then stands in `Experiment.missing`, and what depends on it has no key, so no stage can run.
        merge_export: whether its export holds adapters merged into the language model.

    Returns:
        The experiment. Nothing was started and nothing was written.

    Raises:
        RecipeError: something in the recipe does not fit the models it names.
    """
    recipe = file.recipe
    try:
        models = _planned_models(file) if planning else _whole_models(file)
        connector = recipe.connector_spec(models.encoder)
        digests, missing_sources = _planned_sources(file) if planning else (_records_sha256(file), ())
        dataset, asked = recipe.dataset_spec(models.encoder, digests), recipe.evaluation_dataset_spec(models.encoder, digests)
        features = recipe.feature_spec(dataset, models.encoder, connector)
        weights, missing_weights = _initial_weights(file, connector, models.encoder, planning=planning)
        experiment = Experiment(
            file=file,
            store=store,
            execution=execution,
            encoder=models.encoder,
            language_model=models.language_model,
            context_tokens=models.context_tokens,
            connector=connector,
            dataset=dataset,
            planned_features=features,
            asked_dataset=asked,
            missing=(*models.missing, *missing_sources, *missing_weights),
            weights=weights,
            merge_export=merge_export,
        )
        experiment.check()
    except (ModelError, SourceError, StorageError, TrainingError) as error:
        raise RecipeError(f"recipe {file.path}: {error}") from error
    return experiment


@dataclass(frozen=True, kw_only=True, slots=True)
class _Models:
    """The models that a recipe names."""

    encoder: EncoderSpec
    language_model: LanguageModelSpec
    context_tokens: int
    missing: tuple[MissingPart, ...] = ()


def _whole_models(file: RecipeFile) -> _Models:
    """With all their files, fetched if need be."""
    from workers.language_models import describe_language_model

    recipe, wanted = file.recipe, file.recipe.language_model
    return _Models(
        encoder=_describe_encoder(recipe.encoder.model),
        language_model=describe_language_model(wanted.model, wanted.template),
        context_tokens=_context_tokens(wanted.model, recipe.templates),
    )


def _planned_models(file: RecipeFile) -> _Models:
    """With what of them is here."""
    from model.encoder import plan_encoder
    from workers.language_models import PACKAGED, plan_language_model

    encoder = plan_encoder(file.recipe.encoder.model)
    wanted = file.recipe.language_model
    language = plan_language_model(wanted.model, wanted.template, sorted(file.recipe.templates))
    missing = []
    if isinstance(encoder.weights_sha256, UnknownDigest):
        missing.append(MissingPart(what=f"weights of {encoder.model}", note=_absent(encoder.model)))
    for part in language.missing:
        unchecked = part == "tokenizer" and "own" in file.recipe.templates and wanted.model not in PACKAGED
        then = "; whether its chat template, which the recipe takes, gives a loss mask is seen only then" if unchecked else ""
        missing.append(MissingPart(what=f"{part} of {language.spec.model}", note=f"{_absent(language.spec.model)}{then}"))
    return _Models(encoder=encoder, language_model=language.spec, context_tokens=language.context_tokens, missing=tuple(missing))


def _absent(model: str) -> str:
    from workers.language_models import PACKAGED

    if Path(model).expanduser().is_dir():
        return "not in that folder; the run itself needs them there"
    if model in PACKAGED:
        return "not here, and a plan fetches nothing; the run itself fetches and converts their package"
    return "not here, and a plan fetches nothing; the run itself fetches them from the hub"


def _planned_sources(file: RecipeFile) -> tuple[dict[str, str], tuple[MissingPart, ...]]:
    """Digests of the sources' records as far as they can be read or are given, by address; and what is missing."""
    from workers.dataset.sources import plan_llava_json

    digests: dict[str, str] = {}
    missing = []
    for source in _llava_sources(file):
        planned = plan_llava_json(source.records, source.images, source.records_sha256)
        digests[source.records] = planned.spec.records_sha256
        if planned.unreadable is not None:
            note = f"cannot be read, so their images are unknown and the plan counts none of them ({planned.unreadable})"
            missing.append(MissingPart(what=f"records {source.records}", note=note, records=source.records))
        if not planned.has_images:
            missing.append(MissingPart(what=f"images {source.images}", note="no such folder here; the run itself needs it"))
    return digests, tuple(missing)


def _llava_sources(file: RecipeFile) -> list[LlavaJsonSource]:
    """Those of the training dataset, and of the one that is asked."""
    datasets = [dataset for dataset in (file.recipe.dataset, file.recipe.evaluation.dataset) if dataset is not None]
    return [source for dataset in datasets for source in dataset.sources if isinstance(source, LlavaJsonSource)]


def _initial_weights(
    file: RecipeFile, connector: ConnectorSpec, encoder: EncoderSpec, *, planning: bool
) -> tuple["WeightsFile | None", tuple[MissingPart, ...]]:
    """Weights that the recipe starts from and that fit it, if it names any; a plan goes on without them."""
    from workers.language_models import planned_shape
    from workers.training.initial_weights import WeightsFile, check_weights, open_weights

    address = file.recipe.connector.weights
    if address is None:
        return None, ()
    try:
        weights, tensors = open_weights(address)
    except StorageError as error:
        if planning:
            unread = WeightsFile(address=address, sha256=UnknownDigest(f"the weights {address}"))
            return unread, (MissingPart(what=f"weights {address}", note=f"cannot be read, so they are unchecked ({first_line(error)})"),)
        raise RecipeError(
            f"recipe {file.path}: connector.weights: {address} cannot be read ({first_line(error)}); give the path or URL of a "
            "connector.safetensors, as `loupe import-weights` and every training run write it"
        ) from error
    check_weights(tensors, address, connector, encoder, planned_shape(file.recipe.language_model.model).hidden)
    return weights, ()


def _records_sha256(file: RecipeFile) -> dict[str, str]:
    sources = _llava_sources(file)
    if not sources:
        return {}
    from workers.dataset.sources import describe_llava_json

    return {source.records: describe_llava_json(source.records, source.images).records_sha256 for source in sources}


def stage_runs(experiment: Experiment, until: StageName = "report", form: ExportForm = "folder") -> Iterator[StageRun]:
    """The stages of an experiment in order, up to and including one.

    Specs of later stages are made only once the earlier ones are done, since a schedule in epochs needs the built dataset.

    Args:
        experiment: whose stages.
        until: the last one.
        form: what the export is written as; the standard one is left out where it is another.

    Yields:
        Stages ready to run.
    """
    store, execution, seeds = experiment.store, experiment.execution, experiment.file.recipe.seeds
    last = STAGES.index(until)
    for dataset, _, asked in experiment.data:
        yield _build_run(experiment, dataset, asked=asked)

    built = experiment.record("build-dataset", experiment.dataset)
    if built is not None:
        _check_built(experiment, built, evaluates=last >= STAGES.index("evaluate") and experiment.asked is None)

    if last >= STAGES.index("calibrate-features") and (calibration := experiment.calibration) is not None:
        yield _calibrate_run(experiment, calibration)
    if last >= STAGES.index("cache-features") and experiment.caches:
        for _, features, asked in experiment.data:
            yield _cache_run(experiment, features, asked=asked)
    if last >= STAGES.index("train-connector"):
        for seed in seeds:
            yield _train_run(experiment, seed)
    if last >= STAGES.index("evaluate"):
        for seed in seeds:
            yield _evaluate_run(experiment, seed)
    if last >= STAGES.index("export") and form != "folder":
        yield _form_run(experiment, form)
    elif last >= STAGES.index("export"):

        def export_(progress: Progress) -> Any:
            from workers.exporting import export

            return export(experiment.export(), experiment.training(seeds[0]), store, execution, progress)

        yield StageRun(stage="export", seed=None, spec=experiment.export(), run=export_)
    if last >= STAGES.index("report"):

        def report_(progress: Progress) -> Any:
            from pipelines.report import write_report

            return write_report(experiment, progress)

        yield StageRun(stage="report", seed=None, spec=experiment.report(), run=report_)


def _check_built(experiment: Experiment, built: Mapping[str, Any], *, evaluates: bool) -> None:
    """Whether the dataset has the images that later stages need; text alone is neither cached nor asked about."""
    num_text_only = built.get("num_text_only", 0)
    num_images = built["num_samples"] - num_text_only
    if not num_images:
        raise RecipeError(
            f"recipe {experiment.file.path}: dataset.sources: found {built['num_samples']} samples without an image and none with one, so there is "
            "nothing that a connector could learn; allowed: sources of which at least some records name an image"
        )
    num_train_text_only = sum(built.get("num_train_text_only_by_source", {}).values())
    if evaluates and built["num_held_out"] == num_text_only - num_train_text_only:
        raise RecipeError(
            f"recipe {experiment.file.path}: dataset.held_out_fraction: found {experiment.dataset.held_out_fraction}, which holds out none of the "
            f"{num_images} images, so there is nothing to evaluate on; allowed: a larger fraction, or more images"
        )


def _form_run(experiment: Experiment, form: ExportForm) -> StageRun:
    spec = experiment.export_form(form)

    def export_(progress: Progress) -> Any:
        from workers.export_forms import export_form

        return export_form(spec, experiment.training(experiment.file.recipe.seeds[0]), experiment.store, experiment.execution, progress)

    return StageRun(stage="export", seed=None, spec=spec, run=export_)


def _build_run(experiment: Experiment, dataset: DatasetSpec, *, asked: bool) -> StageRun:
    def build(progress: Progress) -> Any:
        from workers.dataset.build import build_dataset

        return build_dataset(dataset, experiment.store, experiment.execution, progress)

    return StageRun(stage="build-dataset", seed=None, spec=dataset, run=build, asked=asked)


def _calibrate_run(experiment: Experiment, calibration: CalibrationSpec) -> StageRun:
    def calibrate(progress: Progress) -> Any:
        from workers.caching.calibrate import calibrate_features

        return calibrate_features(calibration, experiment.store, experiment.execution, progress)

    return StageRun(stage="calibrate-features", seed=None, spec=calibration, run=calibrate)


def _cache_run(experiment: Experiment, features: FeatureSpec, *, asked: bool) -> StageRun:
    def cache_(progress: Progress) -> Any:
        from workers.caching.build import cache_features

        return cache_features(features, experiment.store, experiment.execution, progress)

    return StageRun(stage="cache-features", seed=None, spec=features, run=cache_, asked=asked)


def _train_run(experiment: Experiment, seed: int) -> StageRun:
    spec = experiment.training(seed)

    def train(progress: Progress) -> Any:
        from workers.training.initial_weights import keep_weights
        from workers.training.run import train_connector

        experiment.check_other_dataset(spec)
        if experiment.weights is not None:
            keep_weights(experiment.store, experiment.weights)
        return train_connector(spec, experiment.store, experiment.execution, progress)

    return StageRun(stage="train-connector", seed=seed, spec=spec, run=train)


def _evaluate_run(experiment: Experiment, seed: int) -> StageRun:
    spec = experiment.evaluation(seed)

    def evaluate_(progress: Progress) -> Any:
        from workers.evaluation import evaluate

        return evaluate(spec, experiment.training(seed), experiment.store, experiment.execution, progress)

    return StageRun(stage="evaluate", seed=seed, spec=spec, run=evaluate_)


def run_stage(experiment: Experiment, stage_run: StageRun, progress: Progress) -> StageOutcome:
    """Run a stage, or find it done.

    Args:
        experiment: it belongs to.
        stage_run: which.
        progress: told how far it is.

    Returns:
        Its outcome.

    Raises:
        CanonicalisationError: the experiment was opened for a plan, and the stage depends on what is missing.
    """
    key = stage_run.key
    there = experiment.record(stage_run.stage, stage_run.spec)
    is_cache = stage_run.stage == "cache-features" and not stage_run.asked
    if is_cache and there is None:
        _note(experiment, stage_run, finished=False)
    record = there if there is not None else to_json(stage_run.run(progress))
    if is_cache:
        _note(experiment, stage_run, finished=True)
    return StageOutcome(stage=stage_run.stage, key=key, seed=stage_run.seed, record=record, reused=there is not None, asked=stage_run.asked)


def _note(experiment: Experiment, stage_run: StageRun, *, finished: bool) -> None:
    from workers.sweeping import note_recipe

    note_recipe(experiment.store, experiment.file.recipe.name, stage_run.spec, finished=finished)


def shown_path(url: str) -> str:
    """A URL as a person would type it: file URLs as paths."""
    return unquote(urlsplit(url).path) if url.startswith("file://") else url


def feature_bytes(dataset: DatasetSpec, features: FeatureSpec, num_records: int = 0) -> int:
    """Bytes of the cached features of all pictures of a dataset that are drawn, and of as many others at most.

    Args:
        dataset: whose sources.
        features: which views and maps.
        num_records: other images, counted with the most views that the rule gives.

    Returns:
        Bytes.
    """
    drawn = plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, features.encoder.view_px, features.views)
    num_local_views = num_drawn(dataset) * len(drawn.local_views) + num_records * features.views.max_local_views
    return (num_drawn(dataset) + num_records) * features.view_bytes("global") + num_local_views * features.view_bytes("local")


def check_ready(experiment: Experiment, *, write: bool = True) -> None:
    """Refuse to start what cannot end: a root that cannot be written, too little space, packages or a GPU that are missing.

    Args:
        experiment: about to run.
        write: prove that the root can be written by writing; else look, as far as looking tells.

    Raises:
        StorageError: the root cannot be written.
        ExecutionError: the settings ask for a GPU, and this machine, which is to do the work, has none.
        DiskSpaceError: dataset and cache together need more than is free.
        SpecChangedError: the recipe names another feature table than its features would lie in.
        LanguageModelPrepareError: the language model has to be converted, and what that takes is not installed.
    """
    from workers.language_models import check_convertible

    if write:
        experiment.store.check_writable()
    else:
        experiment.store.check_place()
    _check_device(experiment.execution)
    folder, encoding = experiment.file.recipe.features.table, experiment.planned_features.encoding
    if folder is not None and not isinstance(fingerprint_if_known(encoding), UnknownDigest):
        from workers.caching.layout import check_table

        check_table(experiment.store, folder, encoding)
    check_convertible(experiment.language_model.model)
    free = experiment.store.free_bytes()
    # Once something is there, free space says less than needed space asks; caching itself then asks for what is still missing.
    if free is None or experiment.record("build-dataset", experiment.dataset) is not None:
        return
    needed = sum(
        (feature_bytes(dataset, features) if experiment.caches else 0) + num_drawn(dataset) * _IMAGE_BYTES_GUESS
        for dataset, features, _ in experiment.data
    )
    if needed > free:
        raise DiskSpaceError(
            f"{experiment.store.root}: this recipe needs up to {needed / 1e9:.1f} GB for images and features, and {free / 1e9:.1f} GB are free. "
            "Free some space, choose another --root, or lower dataset.sources[].num_images."
        )


def fetches_language_model(experiment: Experiment, until: StageName) -> bool:
    """Whether a run will come to need a language model that has to be fetched and converted first.

    Args:
        experiment: about to run.
        until: its last stage.

    Returns:
        Whether to do it now: a registry that is away should end a run in its first seconds, not when images are built and features cached.
    """
    from workers.language_models import is_prepared

    if is_prepared(experiment.language_model.model) or STAGES.index(until) < STAGES.index("train-connector"):
        return False
    try:
        runs = [run for run in stage_runs(experiment, until) if run.stage in ("train-connector", "evaluate", "export")]
    except SpecError:  # a schedule in epochs, and no dataset yet
        return True
    return any(experiment.record(run.stage, run.spec) is None for run in runs)


def _check_device(execution: ExecutionSettings) -> None:
    """A cluster's GPUs are counted when it is there; those of this machine can be counted now.

    Ray counts GPUs by their driver. Where torch cannot use them, every process that encodes would fail, when the dataset is built.
    """
    from workers.runtime import encodes_on_gpu

    if "RAY_ADDRESS" in os.environ or not encodes_on_gpu(execution):
        return
    import torch

    if torch.cuda.is_available():
        return
    allowed = "device=cpu or device=auto"
    if encodes_on_gpu(replace(execution, device="auto")):
        allowed = f"device=cpu. There is a GPU: is its driver too old for torch {torch.__version__}, or is this torch a build for CPUs?"
    raise ExecutionError(f"--set device={execution.device}: torch sees no GPU on this machine; allowed here: {allowed}")
