"""What a run would do, before it does anything: sizes, tokens, parameters, bytes, steps. `--dry-run` prints it."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from model.errors import SpecError
from model.views import plan_views
from pipelines.errors import RecipeError
from pipelines.recipe import RenderedSource
from pipelines.stages import Experiment, rendered_feature_bytes, stage_runs
from pipelines.wording import bytes_text, data_console
from workers.dataset.spec import RENDERED_HEIGHT_PX, RENDERED_WIDTH_PX

__all__ = ["PlanLine", "plan_lines", "print_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanLine:
    """One fact of a plan."""

    topic: str
    fact: str
    value: str


def plan_lines(experiment: Experiment) -> Iterator[PlanLine]:
    """The facts of an experiment's plan, in the order of its stages.

    Args:
        experiment: checked, nothing started.

    Yields:
        Facts; what is known only once the dataset is built says so.
    """
    recipe, encoder = experiment.file.recipe, experiment.encoder
    rendered = [source for source in recipe.dataset.sources if isinstance(source, RenderedSource)]
    foreign = len(recipe.dataset.sources) - len(rendered)
    num_images = sum(source.num_images for source in rendered)
    more = f", and {foreign} source(s) whose size is read when they are built" if foreign else ""
    yield PlanLine(topic="dataset", fact="images", value=f"{num_images}{more}")
    held_out = round(num_images * recipe.dataset.held_out_fraction)
    yield PlanLine(topic="dataset", fact="split", value=f"about {num_images - held_out} train, {held_out} held out")
    yield PlanLine(topic="dataset", fact="questions", value=f"at most {num_images * recipe.dataset.turns_per_image}")
    views = plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, encoder.view_px, experiment.dataset.views)
    yield PlanLine(
        topic="features",
        fact="encoder",
        value=f"{encoder.model}: {encoder.num_blocks} blocks of {encoder.width}, views of {encoder.view_px} px, {encoder.num_patches} patches",
    )
    yield PlanLine(
        topic="features",
        fact="views of an image",
        value=f"1 global + {views.columns} x {views.rows} local ({RENDERED_WIDTH_PX} x {RENDERED_HEIGHT_PX} px)",
    )
    for branch, maps in (("global", experiment.features.global_maps), ("local", experiment.features.local_maps)):
        yield PlanLine(topic="features", fact=f"{branch} maps", value=", ".join(map_spec.name for map_spec in maps) or "none")
    cache_bytes = bytes_text(rendered_feature_bytes(experiment))
    yield PlanLine(topic="features", fact="cache", value=f"{cache_bytes} as {experiment.features.precision}{' and more' if foreign else ''}")
    yield from _connector_lines(experiment, len(views.local_views))
    for phase in recipe.schedule.phases:
        length = f"{phase.steps} steps" if phase.steps is not None else f"{phase.epochs:g} epochs"
        seen = "" if phase.steps is None else f", {phase.steps * phase.batch_size} images seen"
        yield PlanLine(
            topic="training", fact=phase.name or "+".join(phase.train), value=f"{length} of {phase.batch_size}{seen}, rate {phase.learning_rate:g}"
        )
    yield PlanLine(topic="training", fact="seeds", value=", ".join(str(seed) for seed in recipe.seeds))
    free = experiment.store.free_bytes()
    yield PlanLine(topic="root", fact=experiment.store.root, value="no limit known" if free is None else f"{bytes_text(free)} free")
    try:
        for stage_run in stage_runs(experiment):
            done = experiment.record(stage_run.stage, stage_run.spec) is not None
            yield PlanLine(topic="stages", fact=stage_run.name, value=f"{stage_run.key}  {'done' if done else 'to do'}")
    except (SpecError, RecipeError) as error:
        yield PlanLine(topic="stages", fact="later ones", value=str(error))


def _connector_lines(experiment: Experiment, num_local_views: int) -> Iterator[PlanLine]:
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
    local_tokens = connector.tokens_per_local_view * num_local_views if experiment.connector.local_branch is not None else 0
    yield PlanLine(topic="connector", fact="visual tokens", value=f"{global_tokens} global + {local_tokens} local")
    yield PlanLine(topic="connector", fact="language model", value=experiment.language_model.model)


def print_plan(experiment: Experiment) -> None:
    """Print the plan.

    Args:
        experiment: checked, nothing started.
    """
    console = data_console()
    console.print(f"{experiment.file.recipe.name}: {experiment.file.recipe.description}", style="italic")
    table = Table(box=None, pad_edge=False)
    for heading in ("topic", "fact", "value"):
        table.add_column(heading, overflow="fold")
    topic = ""
    for line in plan_lines(experiment):
        table.add_row(line.topic if line.topic != topic else "", line.fact, line.value)
        topic = line.topic
    console.print(table)
    print("Nothing was started and nothing was written.")
