"""`loupe show`: what a recipe has left in a root, as tables on the terminal. Reads only."""

from collections import Counter
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from model.errors import SpecError
from model.specs import fingerprint
from pipelines.errors import NothingThereError, RecipeError
from pipelines.stages import Experiment, stage_runs
from pipelines.wording import bytes_text, data_console, duration_text

__all__ = ["show_recipe"]

NUM_SHOWN_SAMPLES = 5


def _facts_table(title: str, facts: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("fact")
    table.add_column("value", overflow="fold")
    for fact, value in facts:
        table.add_row(fact, value)
    return table


def _record_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A record's plain fields; bytes and seconds for people."""
    facts = []
    for name, value in record.items():
        if name.endswith("_bytes") or name.startswith("bytes_"):
            facts.append((name, bytes_text(int(value))))
        elif name == "seconds" or name.endswith("_seconds"):
            facts.append((name, duration_text(float(value))))
        elif isinstance(value, str | int | float | bool):
            facts.append((name, str(value)))
        elif isinstance(value, dict) and value and all(isinstance(item, str | int | float) for item in value.values()):
            facts.append((name, ", ".join(f"{key} {item}" for key, item in value.items())))
    return facts


def show_recipe(what: Literal["dataset", "cache", "run"], experiment: Experiment) -> None:
    """Print what there is of a recipe.

    Args:
        what: the dataset, the cache, or all stages.
        experiment: the resolved recipe and its root.

    Raises:
        NothingThereError: the dataset or cache is not built.
    """
    console = data_console()
    match what:
        case "dataset":
            _show_dataset(experiment, console)
        case "cache":
            record = experiment.record("cache-features", experiment.features)
            if record is None:
                raise _missing(experiment, "cached features", "cache-features")
            console.print(_facts_table(f"features {fingerprint(experiment.features)[:16]}", _record_facts(record)))
            console.print(f"table: {experiment.store.url('features')}/{fingerprint(experiment.features)[:16]}", soft_wrap=True)
        case "run":
            _show_run(experiment, console)


def _missing(experiment: Experiment, what: str, command: str) -> NothingThereError:
    name = experiment.file.recipe.name
    return NothingThereError(
        f"{experiment.store.root} holds no {what} of recipe {name!r}; `loupe {command} {name}` makes it there, or give another --root"
    )


def _show_dataset(experiment: Experiment, console: Console) -> None:
    from workers.dataset.samples import read_samples

    record = experiment.record("build-dataset", experiment.dataset)
    if record is None:
        raise _missing(experiment, "dataset", "build-dataset")
    key = fingerprint(experiment.dataset)
    console.print(_facts_table(f"dataset {key[:16]}", _record_facts(record)))
    samples = read_samples(experiment.store, key)
    counts = Counter((sample.family, sample.split) for sample in samples)
    table = Table(title="\nimages", title_justify="left", box=None, pad_edge=False)
    for heading in ("family", "train", "held out", "questions"):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for family in sorted({sample.family for sample in samples}):
        num_turns = sum(len(sample.turns) for sample in samples if sample.family == family)
        table.add_row(family, str(counts[family, "train"]), str(counts[family, "held_out"]), str(num_turns))
    console.print(table)
    table = Table(title="\nsome questions", title_justify="left", box=None, pad_edge=False)
    for heading in ("image", "question", "answer", "detail"):
        table.add_column(heading, overflow="fold")
    for sample in samples[:: max(1, len(samples) // NUM_SHOWN_SAMPLES)][:NUM_SHOWN_SAMPLES]:
        turn = sample.turns[0]
        table.add_row(sample.image_path, turn.question, turn.answer, turn.detail)
    console.print(table)


def _show_run(experiment: Experiment, console: Console) -> None:
    table = Table(title=f"{experiment.file.recipe.name} in {experiment.store.root}", title_justify="left", box=None, pad_edge=False)
    for heading in ("stage", "key", "state", "time", "folder"):
        table.add_column(heading, overflow="fold")
    try:
        for stage_run in stage_runs(experiment):
            record = experiment.record(stage_run.stage, stage_run.spec)
            folder = f"runs/{stage_run.stage}/{stage_run.key}"
            if record is not None:
                state, spent = "done", duration_text(float(record.get("seconds", 0.0)))
            else:
                state, spent = ("begun" if experiment.store.exists(f"{folder}/spec.json") else "to do"), ""
            table.add_row(stage_run.name, stage_run.key, state, spent, folder)
    except (SpecError, RecipeError) as error:
        table.add_row("later stages", "", str(error), "", "")
    console.print(table)
