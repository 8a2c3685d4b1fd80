"""What a run would do, before it does anything: sizes, tokens, parameters, bytes, steps. `--dry-run` prints it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil

from rich.table import Table

from model.errors import SpecError
from model.specs import ExportForm, FeatureSpec, UnknownDigest, fingerprint_if_known, sees_text_only
from model.views import plan_views
from pipelines.errors import RecipeError
from pipelines.schedule_tables import Phase
from pipelines.stages import (
    STAGES,
    Experiment,
    StageRun,
    check_ready,
    feature_bytes,
    most_local_views,
    num_drawn,
    shown_path,
    stage_runs,
)
from pipelines.wording import bytes_text, data_console, print_table
from workers.commits import StageName
from workers.dataset.spec import RENDERED_HEIGHT_PX, RENDERED_WIDTH_PX, DatasetSpec, RenderedSourceSpec, source_label

__all__ = ["PlanLine", "plan_lines", "print_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanLine:
    """One fact of a plan."""

    topic: str
    fact: str
    value: str


def plan_lines(experiment: Experiment, until: StageName = "report", form: ExportForm = "folder") -> Iterator[PlanLine]:
    """The facts of an experiment's plan, in the order of its stages.

    Args:
        experiment: checked, nothing started.
        until: the last stage that would run.
        form: what the export would be written as.

    Yields:
        Facts; what is known only once the dataset is built says so.
    """
    recipe, encoder = experiment.file.recipe, experiment.encoder
    images = _SourceImages.of(experiment, experiment.dataset)
    yield from _dataset_lines(images)
    yield PlanLine(
        topic="features",
        fact="encoder",
        value=f"{encoder.model}: {encoder.num_blocks} blocks of {encoder.width}, views of {encoder.view_px} px, {encoder.num_patches} patches",
    )
    yield PlanLine(topic="features", fact="views of an image", value=_views_text(experiment))
    for branch, maps in (("global", experiment.features.global_maps), ("local", experiment.features.local_maps)):
        yield PlanLine(topic="features", fact=f"{branch} maps", value=", ".join(map_spec.name for map_spec in maps) or "none")
    cache = _cache_text(experiment.cache, images) if experiment.caches else "none: every view is encoded whenever it is seen"
    if experiment.caches and experiment.cache != experiment.features:
        cache += "; local views are encoded whenever one is seen"
    yield PlanLine(topic="features", fact="cache", value=cache)
    yield from _connector_lines(experiment)
    if experiment.weights is not None:
        known = not isinstance(experiment.weights.sha256, UnknownDigest)
        digest = f" (sha256 {experiment.weights.sha256[:16]})" if known else ""
        yield PlanLine(topic="training", fact="starts from", value=f"{experiment.weights.address}{digest}")
    if not recipe.schedule.phases:
        yield PlanLine(topic="training", fact="phases", value="none: the weights are evaluated and exported as they are")
    for phase in recipe.schedule.phases:
        name = phase.name or ("sft" if phase is recipe.schedule.sft else phase.shown_name)
        yield PlanLine(topic="training", fact=name, value=f"{_length_text(phase, experiment, images)}; {_phase_text(phase, experiment)}")
    yield PlanLine(topic="training", fact="seeds", value=", ".join(str(seed) for seed in recipe.seeds))
    yield from _evaluation_lines(experiment)
    yield from _execution_lines(experiment)
    free = experiment.store.free_bytes()
    yield PlanLine(topic="root", fact=shown_path(experiment.store.root), value="no limit known" if free is None else f"{bytes_text(free)} free")
    for part in experiment.missing:
        yield PlanLine(topic="missing", fact=part.what, value=part.note)
    following: StageName = STAGES[0]
    try:
        for stage_run in stage_runs(experiment, until, form):
            later = STAGES[STAGES.index(stage_run.stage) + 1 :]
            later = tuple(stage for stage in later if stage not in experiment.left_out)
            following = later[0] if later else following
            yield PlanLine(topic="stages", fact=stage_run.name, value=_stage_text(experiment, stage_run))
    except (SpecError, RecipeError) as error:
        yield PlanLine(topic="stages", fact=f"{following} and later", value=str(error))


def _execution_lines(experiment: Experiment) -> Iterator[PlanLine]:
    """Settings that are not the default, and who set them."""
    suggested = experiment.file.recipe.suggested_settings
    for field in fields(experiment.execution):
        value = getattr(experiment.execution, field.name)
        if value != field.default:
            by = "the recipe suggests it" if field.name in suggested and suggested[field.name] == value else "--set"
            yield PlanLine(topic="execution", fact=field.name, value=f"{_setting_text(value)}  ({by})")
        elif suggested.get(field.name, value) != value:
            yield PlanLine(
                topic="execution",
                fact=field.name,
                value=f"{_setting_text(value)}  (--set; the recipe suggests {_setting_text(suggested[field.name])})",
            )


def _setting_text(value: object) -> str:
    """A setting as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _stage_text(experiment: Experiment, stage_run: StageRun) -> str:
    digest = fingerprint_if_known(stage_run.spec)
    if isinstance(digest, UnknownDigest):
        return f"key unknown without {digest}"
    done = experiment.record(stage_run.stage, stage_run.spec) is not None
    return f"{stage_run.key}  {'done' if done else 'to do'}"


def _phase_text(phase: Phase, experiment: Experiment) -> str:
    """What a phase trains, how fast, and what its samples see."""
    recipe = experiment.file.recipe
    rate = f"{phase.learning_rate:g}"
    if phase.language_model_learning_rate is not None:
        rate += f", of the language model {phase.language_model_learning_rate:g}"
    labels = recipe.source_labels
    spec = phase.spec(
        experiment.connector,
        labels=labels,
        num_train_images=dict.fromkeys(labels, 1),
        num_train_text_only={},
        fine_tunes=phase is recipe.schedule.sft,
    )
    train = "connector" if spec.train == experiment.connector.blocks else ", ".join(spec.train)
    if set(spec.train) == {*experiment.connector.blocks, "language_model"}:
        train = "connector and language model"
    said = [f"{train} at {rate}", f"sees {spec.branch.parts}"]
    said += [f"evidence {spec.evidence_weight:g}"] if spec.evidence_weight else []
    said += ["selector on"] if spec.selector else []
    said += [f"template {phase.template}"] if phase.template else []
    said += [f"of {', '.join(phase.sources)}"] if phase.sources else []
    return "; ".join(said)


def _length_text(phase: Phase, experiment: Experiment, images: "_SourceImages") -> str:
    """How long a phase is, as far as the number of its training images is known."""
    if phase.steps is not None:
        return f"{phase.steps} steps of {phase.batch_size}, {phase.steps * phase.batch_size} images seen"
    assert phase.epochs is not None
    labels = phase.source_labels(tuple(images.by_source)) or images.by_source
    numbers = [images.by_source[label] for label in labels]
    known = [number for number in numbers if number is not None]
    template = phase.template or experiment.file.recipe.language_model.template
    seen = sees_text_only(phase.blocks(experiment.connector), template)
    num_text_only = sum(images.text_only_by_source[label] for label in labels) if seen else 0
    num_train = round((sum(known) + num_text_only) * (1 - experiment.dataset.held_out_fraction))
    steps = "" if len(known) < len(numbers) else f", about {max(1, ceil(phase.epochs * num_train / phase.batch_size))} steps"
    return f"{phase.epochs:g} epoch{'' if phase.epochs == 1 else 's'} of {phase.batch_size}{steps}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _SourceImages:
    """How many images a dataset has, as far as its records can be read."""

    dataset: DatasetSpec
    by_source: dict[str, int | None]
    """By the source's label; None where its records cannot be read."""
    text_only_by_source: dict[str, int]
    """Records without an image."""

    @classmethod
    def of(cls, experiment: Experiment, dataset: DatasetSpec) -> "_SourceImages":
        from workers.dataset.sources import is_text_only, read_records

        unreadable = {part.records for part in experiment.missing}
        numbers: dict[str, int | None] = {}
        text_only: dict[str, int] = {}
        for source in dataset.sources:
            label = source_label(source)
            numbers[label], text_only[label] = None, 0
            if isinstance(source, RenderedSourceSpec):
                numbers[label] = source.num_images
            elif source.records not in unreadable:
                alone = [is_text_only(record) for record in read_records(source)]
                numbers[label], text_only[label] = alone.count(False), alone.count(True)
        return cls(dataset=dataset, by_source=numbers, text_only_by_source=text_only)

    @property
    def num_drawn(self) -> int:
        """Pictures that are drawn."""
        return num_drawn(self.dataset)

    @property
    def num_records(self) -> int:
        """Images of records that can be read."""
        return sum(number or 0 for number in self.by_source.values()) - self.num_drawn

    @property
    def num_text_only(self) -> int:
        """Records without an image."""
        return sum(self.text_only_by_source.values())

    @property
    def num_unread(self) -> int:
        """Sources whose records cannot be read."""
        return sum(number is None for number in self.by_source.values())

    @property
    def words(self) -> str:
        """For people."""
        parts = [
            (self.num_drawn, f"{self.num_drawn} drawn"),
            (self.num_records, f"{self.num_records} records read"),
            (self.num_unread, f"those of {self.num_unread} source{'s' if self.num_unread > 1 else ''} that cannot be read"),
        ]
        return ", ".join(text for number, text in parts if number)

    @property
    def question_words(self) -> str:
        """How many questions there are, for people."""
        num_records = self.num_records + self.num_text_only
        asked = [(self.num_drawn, f"at most {self.num_drawn * self.dataset.turns_per_image}"), (num_records, "those of the records")]
        return ", ".join(text for number, text in asked if number)


def _dataset_lines(images: _SourceImages) -> Iterator[PlanLine]:
    yield PlanLine(topic="dataset", fact="images", value=images.words)
    if images.num_text_only:
        value = f"{images.num_text_only} records without an image: seen by phases that train the language model, neither cached nor asked"
        yield PlanLine(topic="dataset", fact="text only", value=value)
    if not (total := images.num_drawn + images.num_records + images.num_text_only):
        return
    held_out = round(total * images.dataset.held_out_fraction)
    yield PlanLine(topic="dataset", fact="split", value=f"about {total - held_out} train, {held_out} held out")
    yield PlanLine(topic="dataset", fact="questions", value=images.question_words)


def _evaluation_lines(experiment: Experiment) -> Iterator[PlanLine]:
    wanted = experiment.file.recipe.evaluation
    yield PlanLine(topic="evaluation", fact="modes", value=", ".join(wanted.modes))
    yield PlanLine(topic="evaluation", fact="metrics", value=", ".join(wanted.metrics))
    if experiment.asked is None:
        return
    dataset, features = experiment.asked
    images = _SourceImages.of(experiment, dataset)
    yield PlanLine(topic="evaluation", fact="images", value=f"{images.words}, of a dataset of its own")
    if images.question_words:
        yield PlanLine(topic="evaluation", fact="questions", value=images.question_words)
    if experiment.caches:
        yield PlanLine(topic="evaluation", fact="cache", value=_cache_text(features, images))


def _cache_text(features: FeatureSpec, images: _SourceImages) -> str:
    up_to = "" if all(isinstance(source, RenderedSourceSpec) for source in images.dataset.sources) else "up to "
    each = features.view_bytes("global") + most_local_views(images.dataset) * features.view_bytes("local")
    total = f"{up_to}{bytes_text(feature_bytes(images.dataset, features, images.num_records))} as {features.precision}"
    parts = [total] if images.num_drawn + images.num_records else []
    if images.num_unread:
        parts.append("those of the records that cannot be read")
    return f"{', and '.join(parts)}; {up_to}{bytes_text(each)} an image"


def _views_text(experiment: Experiment) -> str:
    if experiment.connector.local_branch is None:
        return "1 global"
    if not experiment.all_drawn:
        fewest = min(columns * rows for columns, rows in experiment.dataset.views.candidate_grids)
        return f"1 global + {fewest} to {experiment.most_local_views()} local, by its shape and size"
    views = plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, experiment.encoder.view_px, experiment.dataset.views)
    return f"1 global + {views.columns} x {views.rows} local ({RENDERED_WIDTH_PX} x {RENDERED_HEIGHT_PX} px)"


def _connector_lines(experiment: Experiment) -> Iterator[PlanLine]:
    from pipelines.path import image_facts, parameter_facts, path_facts, planned_connector
    from workers.language_models import planned_shape

    shape = planned_shape(experiment.language_model.model)
    connector = planned_connector(experiment, shape)
    local_tokens = experiment.most_local_tokens()
    up_to = "" if experiment.all_drawn else "up to "
    local = f" + {up_to}{local_tokens} local" if experiment.connector.local_branch is not None else ""
    yield PlanLine(topic="connector", fact="visual tokens", value=f"{connector.tokens_per_global_view} global{local}")
    yield PlanLine(topic="connector", fact="language model", value=experiment.language_model.model)
    by_topic = {
        "path": path_facts(experiment, connector, shape),
        "image": image_facts(experiment, connector),
        "parameters": parameter_facts(experiment, connector, shape),
    }
    for topic, facts in by_topic.items():
        for fact, value in facts:
            yield PlanLine(topic=topic, fact=fact, value=value)


def print_plan(experiment: Experiment, until: StageName = "report", form: ExportForm = "folder") -> None:
    """Print the plan, once nothing is seen that would keep it from being carried out.

    Args:
        experiment: checked, nothing started.
        until: the last stage that would run.
        form: what the export would be written as.

    Raises:
        WorkerError: as for `check_ready`.
    """
    check_ready(experiment, write=False)
    console = data_console()
    console.print(f"{experiment.file.recipe.name}: {experiment.file.recipe.description}", style="italic")
    table = Table(box=None, pad_edge=False)
    for heading in ("topic", "fact", "value"):
        table.add_column(heading, overflow="fold")
    topic = ""
    for line in plan_lines(experiment, until, form):
        table.add_row(line.topic if line.topic != topic else "", line.fact, line.value)
        topic = line.topic
    print_table(table)
    print("Nothing was started and nothing was written.")
