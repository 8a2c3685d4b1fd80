"""What a run would do, before it does anything: sizes, tokens, parameters, bytes, steps. `--dry-run` prints it."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from model.errors import SpecError
from model.views import plan_views
from pipelines.errors import RecipeError
from pipelines.stages import Experiment, check_ready, feature_bytes, num_drawn, shown_path, stage_runs
from pipelines.wording import bytes_text, data_console
from workers.commits import StageName
from workers.dataset.spec import RENDERED_HEIGHT_PX, RENDERED_WIDTH_PX, DatasetSpec, RenderedSourceSpec

__all__ = ["PlanLine", "plan_lines", "print_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanLine:
    """One fact of a plan."""

    topic: str
    fact: str
    value: str


def plan_lines(experiment: Experiment, until: StageName = "report") -> Iterator[PlanLine]:
    """The facts of an experiment's plan, in the order of its stages.

    Args:
        experiment: checked, nothing started.
        until: the last stage that would run.

    Yields:
        Facts; what is known only once the dataset is built says so.
    """
    recipe, encoder = experiment.file.recipe, experiment.encoder
    num_records, num_text_only = _num_records(experiment.dataset)
    yield from _dataset_lines(experiment, num_records, num_text_only)
    yield PlanLine(
        topic="features",
        fact="encoder",
        value=f"{encoder.model}: {encoder.num_blocks} blocks of {encoder.width}, views of {encoder.view_px} px, {encoder.num_patches} patches",
    )
    yield PlanLine(topic="features", fact="views of an image", value=_views_text(experiment))
    for branch, maps in (("global", experiment.features.global_maps), ("local", experiment.features.local_maps)):
        yield PlanLine(topic="features", fact=f"{branch} maps", value=", ".join(map_spec.name for map_spec in maps) or "none")
    up_to = "up to " if num_records else ""
    value = f"{up_to}{bytes_text(feature_bytes(experiment.dataset, experiment.features, num_records))} as {experiment.features.precision}"
    yield PlanLine(topic="features", fact="cache", value=value)
    yield from _connector_lines(experiment)
    for phase in recipe.schedule.phases:
        length = f"{phase.steps} steps" if phase.steps is not None else f"{phase.epochs:g} epochs"
        seen = "" if phase.steps is None else f", {phase.steps * phase.batch_size} images seen"
        yield PlanLine(topic="training", fact=phase.shown_name, value=f"{length} of {phase.batch_size}{seen}, rate {phase.learning_rate:g}")
    yield PlanLine(topic="training", fact="seeds", value=", ".join(str(seed) for seed in recipe.seeds))
    yield from _evaluation_lines(experiment)
    free = experiment.store.free_bytes()
    yield PlanLine(topic="root", fact=shown_path(experiment.store.root), value="no limit known" if free is None else f"{bytes_text(free)} free")
    try:
        for stage_run in stage_runs(experiment, until):
            done = experiment.record(stage_run.stage, stage_run.spec) is not None
            yield PlanLine(topic="stages", fact=stage_run.name, value=f"{stage_run.key}  {'done' if done else 'to do'}")
    except (SpecError, RecipeError) as error:
        yield PlanLine(topic="stages", fact="later ones", value=str(error))


def _num_records(dataset: DatasetSpec) -> tuple[int, int]:
    """Records of the sources that have records: those that name an image, and those that do not."""
    from workers.dataset.sources import is_text_only, read_records

    num_records = num_text_only = 0
    for source in dataset.sources:
        if not isinstance(source, RenderedSourceSpec):
            text_only = [is_text_only(record) for record in read_records(source)]
            num_records, num_text_only = num_records + text_only.count(False), num_text_only + text_only.count(True)
    return num_records, num_text_only


def _dataset_lines(experiment: Experiment, num_records: int, num_text_only: int) -> Iterator[PlanLine]:
    dataset = experiment.dataset
    yield PlanLine(topic="dataset", fact="images", value=_images_text(dataset, num_records))
    if num_text_only:
        value = f"{num_text_only} records without an image: seen by phases that train the language model, neither cached nor asked"
        yield PlanLine(topic="dataset", fact="text only", value=value)
    num_samples = num_drawn(dataset) + num_records + num_text_only
    held_out = round(num_samples * dataset.held_out_fraction)
    yield PlanLine(topic="dataset", fact="split", value=f"about {num_samples - held_out} train, {held_out} held out")
    yield PlanLine(topic="dataset", fact="questions", value=_questions_text(dataset, num_records + num_text_only))


def _images_text(dataset: DatasetSpec, num_records: int) -> str:
    drawn = num_drawn(dataset)
    return ", ".join(text for number, text in [(drawn, f"{drawn} drawn"), (num_records, f"{num_records} records read")] if number)


def _questions_text(dataset: DatasetSpec, num_records: int) -> str:
    drawn = num_drawn(dataset)
    parts = [(drawn, f"at most {drawn * dataset.turns_per_image}"), (num_records, "those of the records")]
    return ", ".join(text for number, text in parts if number)


def _evaluation_lines(experiment: Experiment) -> Iterator[PlanLine]:
    wanted = experiment.file.recipe.evaluation
    yield PlanLine(topic="evaluation", fact="modes", value=", ".join(wanted.modes))
    yield PlanLine(topic="evaluation", fact="metrics", value=", ".join(wanted.metrics))
    if experiment.asked is None:
        return
    dataset, features = experiment.asked
    num_records, _ = _num_records(dataset)
    yield PlanLine(topic="evaluation", fact="images", value=f"{_images_text(dataset, num_records)}, of a dataset of its own")
    yield PlanLine(topic="evaluation", fact="questions", value=_questions_text(dataset, num_records))
    up_to = "up to " if num_records else ""
    yield PlanLine(
        topic="evaluation", fact="cache", value=f"{up_to}{bytes_text(feature_bytes(dataset, features, num_records))} as {features.precision}"
    )


def _views_text(experiment: Experiment) -> str:
    if not experiment.all_drawn:
        return f"1 global + 2 to {experiment.most_local_views()} local, by its shape and size"
    views = plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, experiment.encoder.view_px, experiment.dataset.views)
    return f"1 global + {views.columns} x {views.rows} local ({RENDERED_WIDTH_PX} x {RENDERED_HEIGHT_PX} px)"


def _connector_lines(experiment: Experiment) -> Iterator[PlanLine]:
    from model.connector import build_connector
    from workers.language_models import language_model_hidden

    connector = build_connector(
        experiment.connector, experiment.encoder, hidden=language_model_hidden(experiment.language_model.model), embedding_rms=1.0, seed=0
    )
    counts: dict[str, int] = {}
    for name, parameter in connector.named_parameters():
        block = name.split(".")[0]
        counts[block] = counts.get(block, 0) + parameter.numel()
    yield PlanLine(topic="connector", fact="parameters", value=", ".join(f"{block} {count:,}" for block, count in counts.items()))
    global_tokens = connector.tokens_per_global_view
    local_tokens = experiment.most_local_tokens()
    up_to = "" if experiment.all_drawn else "up to "
    yield PlanLine(topic="connector", fact="visual tokens", value=f"{global_tokens} global + {up_to}{local_tokens} local")
    yield PlanLine(topic="connector", fact="language model", value=experiment.language_model.model)


def print_plan(experiment: Experiment, until: StageName = "report") -> None:
    """Print the plan, once nothing is seen that would keep it from being carried out.

    Args:
        experiment: checked, nothing started.
        until: the last stage that would run.

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
    for line in plan_lines(experiment, until):
        table.add_row(line.topic if line.topic != topic else "", line.fact, line.value)
        topic = line.topic
    console.print(table)
    print("Nothing was started and nothing was written.")
