"""The Prefect flow: one task per stage (per seed where a stage has one), with states, retries where trying again can help, and artifacts.

Import this only after `start_flow_server`. The flow holds no data: stages keep theirs in the store, tasks return small JSON. Ray, where a stage
needs it, is started in this process by the stage.
"""

import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar, get_args
from uuid import UUID

import httpx
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from model.errors import first_line
from model.specs import ExportForm
from pipelines.cache_plan import note_cache_plan
from pipelines.interruption import InterruptibleProgress, catching_interruptions
from pipelines.progress import TeeProgress, console_progress
from pipelines.recipe_files import load_recipe
from pipelines.settings import execution_settings
from pipelines.stages import STAGES, Experiment, StageOutcome, StageRun, check_ready, fetches_language_model, open_experiment, run_stage, stage_runs
from pipelines.wording import duration_text, outcome_line
from workers.commits import StageName, to_json
from workers.errors import WorkerError
from workers.execution import Progress
from workers.storage import Store

__all__ = ["loupe_flow"]

ARTIFACT_INTERVAL_S = 10.0
NUM_RETRIES = 2
SERVER_PATIENCE_S = 120.0
Answer = TypeVar("Answer")


def _patiently(call: Callable[[], Answer]) -> Answer:
    """Ask the flow's server, and again for a while when it is away: it may be starting anew."""
    deadline_s = time.monotonic() + SERVER_PATIENCE_S
    while True:
        try:
            return call()
        except httpx.TransportError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(1.0)


class ArtifactProgress:
    """Progress as an artifact of the task run that is under way, so that the Prefect UI shows it."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._total = self._done = 0
        self._sent_s = 0.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A new artifact under the stage's key."""
        self._total, self._done, self._sent_s = total, done, time.monotonic()
        created = _patiently(lambda: create_progress_artifact(progress=self._percent(), key=self._key, description=what))
        assert isinstance(created, UUID)
        self._artifact = created

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """Count; the server hears of it at most every ten seconds."""
        del facts
        self._done += count
        if self._artifact is not None and time.monotonic() - self._sent_s >= ARTIFACT_INTERVAL_S:
            self._send()

    def finish(self) -> None:
        """Send where it ended."""
        if self._artifact is not None:
            self._send()
        self._artifact = None

    def _percent(self) -> float:
        return 100.0 * min(self._done, self._total) / self._total if self._total else 100.0

    def _send(self) -> None:
        assert self._artifact is not None
        self._sent_s = time.monotonic()
        try:
            update_progress_artifact(self._artifact, progress=self._percent())
        except httpx.HTTPError as error:
            # A picture of the progress is not worth a stage; what the server must know, it is told at the stage's end, and there it is an error.
            print(f"loupe: the flow's server does not answer ({first_line(error)}); its page shows this stage's progress no more", file=sys.stderr)
            self._artifact = None


def worth_retrying(tried: "Task[..., Any]", run: TaskRun, state: "State[Any]") -> bool:
    """Whether a failed stage may do better when tried again: a store or a cluster that was away, never a mistake in the recipe or a bug."""
    del run
    try:
        state.result(raise_on_failure=True)
    except WorkerError as error:
        if error.retryable:
            print(f"loupe: {tried.name}: {error}\nloupe: {tried.name} is tried again, at most {NUM_RETRIES} times", file=sys.stderr, flush=True)
        return error.retryable
    except Exception:  # noqa: BLE001 - whatever else it was, the flow run raises it; here only the answer counts
        return False
    return False


def _artifact_key(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _record_rows(outcome: StageOutcome) -> list[dict[str, str]]:
    """A record's numbers and words as table rows; what is nested deeper stays in the store."""
    rows = [{"fact": "key", "value": outcome.key}, {"fact": "done before", "value": "yes" if outcome.reused else "no"}]
    for name, value in outcome.record.items():
        if isinstance(value, str | int | float | bool):
            rows.append({"fact": name, "value": str(value)})
        elif isinstance(value, dict) and all(isinstance(item, str | int | float | bool) for item in value.values()):
            rows.extend({"fact": f"{name}: {key}", "value": str(item)} for key, item in value.items())
    return rows


def _stage_task(experiment: Experiment, stage_run: StageRun) -> "Callable[[], StageOutcome]":
    """A Prefect task around one stage."""

    @task(
        name=stage_run.name,
        task_run_name=f"{stage_run.name} {stage_run.key}",
        retries=NUM_RETRIES,
        retry_delay_seconds=exponential_backoff(backoff_factor=5),
        retry_jitter_factor=0.5,
        retry_condition_fn=worth_retrying,
        cache_policy=NO_CACHE,  # the store's commit records are the cache
        persist_result=False,
    )
    def stage() -> StageOutcome:
        key = _artifact_key(experiment.file.recipe.name, stage_run.name)
        progress: Progress = TeeProgress(console_progress(), ArtifactProgress(f"{key}-progress"))
        with catching_interruptions() as interruption:
            if stage_run.stage == "cache-features" and not stage_run.asked:
                note_cache_plan(experiment)
            outcome = run_stage(experiment, stage_run, InterruptibleProgress(progress, interruption))
            interruption.check()
        rows, description = _record_rows(outcome), f"{stage_run.name}: {experiment.store.root}"
        _patiently(lambda: create_table_artifact(key=key, table=rows, description=description))
        return outcome

    return stage


def _summary(experiment: Experiment, outcomes: list[StageOutcome]) -> str:
    """The run on one screen, as markdown."""
    lines = [f"# {experiment.file.recipe.name}", "", experiment.file.recipe.description, "", f"Root: `{experiment.store.root}`", ""]
    lines += ["| stage | seed | key | done before | time |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        seed = "" if outcome.seed is None else str(outcome.seed)
        spent = duration_text(float(outcome.record.get("seconds", 0.0)))
        stage = f"{outcome.stage} (asked)" if outcome.asked else outcome.stage
        lines.append(f"| {stage} | {seed} | `{outcome.key}` | {'yes' if outcome.reused else 'no'} | {spent} |")
    return "\n".join(lines)


# Prefect keeps the error of a failed flow run, as a pickle unless told otherwise.
@flow(name="loupe", flow_run_name="{recipe}", persist_result=False, result_serializer="json", validate_parameters=True)
def loupe_flow(
    recipe: str,
    root: str = "loupe-data",
    settings: dict[str, str] | None = None,
    until: str = "report",
    form: str = "folder",
    merge: bool = False,
) -> list[dict[str, Any]]:
    """Run a recipe from its sources to its report; stages that are done are found done.

    Args:
        recipe: name of a recipe that comes with Loupe, or the path of a TOML file.
        root: where everything durable lies, as a URL or a path.
        settings: execution settings by name, as text.
        until: the last stage to run.
        form: what the export is written as.
        merge: export adapters merged into the language model.

    Returns:
        The outcomes of the stages, as JSON.
    """
    file = load_recipe(recipe)
    experiment = open_experiment(file, Store(root), execution_settings(settings or {}, file.recipe), merge_export=merge)
    check_ready(experiment)
    wanted = next(name for name in get_args(ExportForm) if name == form)
    experiment.check_form(wanted)
    last = STAGES[STAGES.index(until)]
    if fetches_language_model(experiment, last):
        _fetch_language_model(experiment.language_model.model)
    outcomes = run_experiment(experiment, last, wanted)
    return [to_json(outcome) for outcome in outcomes]


def _fetch_language_model(name: str) -> None:
    from workers.language_models import language_model_folder

    print(f"language model {name}: being fetched and converted, once", flush=True)
    began_s = time.monotonic()
    folder = language_model_folder(name)
    print(f"language model {name}: in {folder} after {duration_text(time.monotonic() - began_s)}", flush=True)


def run_experiment(experiment: Experiment, until: StageName, form: ExportForm = "folder") -> list[StageOutcome]:
    """Run the stages of an experiment as tasks of the flow run that is under way, and print one line for each.

    Args:
        experiment: to run.
        until: the last stage.
        form: what the export is written as.

    Returns:
        What the stages left behind.
    """
    outcomes = []
    for stage_run in stage_runs(experiment, until, form):
        outcome = _stage_task(experiment, stage_run)()
        outcomes.append(outcome)
        print(outcome_line(outcome), flush=True)
    summary = _summary(experiment, outcomes)
    _patiently(lambda: create_markdown_artifact(key=_artifact_key(experiment.file.recipe.name, "summary"), markdown=summary))
    return outcomes
