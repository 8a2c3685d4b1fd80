"""`loupe show`: what a recipe has left in a root, on the terminal. Reads only."""

import shlex
from collections import Counter
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from model.errors import SpecError
from model.quality import EXACT_DB
from model.specs import UnknownDigest, fingerprint, fingerprint_if_known
from pipelines.errors import NothingThereError, RecipeError
from pipelines.recipe_files import RecipeFile, recipe_files
from pipelines.stages import Experiment, shown_path, stage_runs
from pipelines.wording import bytes_text, data_console, duration_text, print_table
from workers.caching.layout import encoding_folder
from workers.dataset.spec import DatasetSpec

__all__ = ["show_recipe"]

NUM_SHOWN_SAMPLES = 5
_ASKED = " ([evaluation.dataset], asked alone)"


def show_recipe(what: Literal["dataset", "cache", "run"], experiment: Experiment, root: str | None = None) -> None:
    """Print what there is of a recipe.

    Args:
        what: the dataset, the cache, or all stages.
        experiment: the resolved recipe and its root.
        root: as the user gave it, for commands that are printed; None is the experiment's own.

    Raises:
        NothingThereError: the dataset or cache is not built, or its key is unknown here.
        RecordError: a record is damaged.
    """
    console = data_console()
    match what:
        case "dataset":
            for dataset, _, asked in experiment.data:
                _show_dataset(experiment, dataset, root, console, asked=asked)
        case "cache":
            if not experiment.caches:
                raise NothingThereError(f"recipe {experiment.file.path}: features.source is live, so there is no cache to show")
            for _, features, asked in experiment.data:
                record = experiment.record("cache-features", features)
                if record is None:
                    experiment.check_known(features)
                    raise _missing(experiment, root, "cached features", "cache-features")
                _print_facts(f"features {fingerprint(features)[:16]}{_ASKED if asked else ''}", record, console)
                if record.get("quality"):
                    _print_quality(record)
                console.print(f"table: {_place(experiment, encoding_folder(features.encoding))}", soft_wrap=True)
        case "run":
            _show_run(experiment, console)


def _place(experiment: Experiment, path: str) -> str:
    """Where something lies, by its path below the root or its own URL, as it can be pasted."""
    return shown_path(experiment.store.reference_url(path))


def _missing(experiment: Experiment, root: str | None, what: str, command: str) -> NothingThereError:
    place = _place(experiment, "")
    word = _recipe_word(experiment.file)
    typed = shlex.join(["loupe", command, word, "--root", place if root is None else root])
    return NothingThereError(f"{place} holds no {what} of recipe {word!r}; `{typed}` makes it there, or give another --root")


def _recipe_word(file: RecipeFile) -> str:
    """How a recipe is named on the command line: one that comes with Loupe by its name, any other by its path."""
    return next((name for name, path in recipe_files().items() if path == file.path), str(file.path))


def _print_facts(title: str, record: dict[str, Any], console: Console) -> None:
    console.print(title, style="italic")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("fact", no_wrap=True)
    table.add_column("value", overflow="fold")
    for fact, value in _record_facts(record):
        table.add_row(fact, value)
    print_table(table)


def _record_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A record's plain fields; names, bytes and seconds for people."""
    facts = []
    for name, value in record.items():
        fact = name.removeprefix("num_").replace("_", " ")
        match value:
            case bool() | str():
                facts.append((fact, str(value)))
            case int() | float() if name.endswith("_bytes") or name.startswith("bytes_"):
                facts.append((fact, bytes_text(int(value))))
            case int() | float() if name == "seconds" or name.endswith("_seconds"):
                facts.append((fact, duration_text(float(value))))
            case int():
                facts.append((fact, str(value)))
            case float():
                facts.append((fact, f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"))
            case dict() if value and all(isinstance(item, str | int | float) for item in value.values()):
                facts.append((fact, ", ".join(f"{key} {item}" for key, item in value.items())))
            case _:
                pass  # a list or a table of figures; the report shows those
    return facts


def _print_quality(record: dict[str, Any]) -> None:
    """How true the stored maps are to what was computed."""
    table = Table(box=None, pad_edge=False)
    table.add_column("map", overflow="fold")
    for heading in ("signal over rounding", "cosine", "worst token's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, found in record["quality"].items():
        exact = found["snr_db"] >= EXACT_DB
        table.add_row(place, "exact" if exact else f"{found['snr_db']:.1f} dB", f"{found['cosine']:.6f}", f"{found['worst_cosine']:.6f}")
    print_table(table)


def _show_dataset(experiment: Experiment, dataset: DatasetSpec, root: str | None, console: Console, *, asked: bool) -> None:
    from workers.dataset.samples import read_samples

    record = experiment.record("build-dataset", dataset)
    if record is None:
        experiment.check_known(dataset)
        raise _missing(experiment, root, "dataset", "build-dataset")
    key = fingerprint(dataset)
    _print_facts(f"dataset {key[:16]}{_ASKED if asked else ''}", record, console)
    samples = read_samples(experiment.store, key)
    counts = Counter((sample.family, sample.split) for sample in samples)
    table = Table(box=None, pad_edge=False)
    table.add_column("family", overflow="fold")
    for heading in ("train", "held out", "questions"):
        table.add_column(heading, justify="right", no_wrap=True)
    for family in sorted({sample.family for sample in samples}):
        num_turns = sum(len(sample.turns) for sample in samples if sample.family == family)
        table.add_row(family, str(counts[family, "train"]), str(counts[family, "held_out"]), str(num_turns))
    console.print("\nsamples", style="italic")
    print_table(table)
    console.print("\nsome questions, each below its image", style="italic")
    for sample in samples[:: max(1, len(samples) // NUM_SHOWN_SAMPLES)][:NUM_SHOWN_SAMPLES]:
        turn = sample.turns[0]
        # Not in a table: a path in a column is broken into lines, and could not be pasted into `loupe ask`.
        console.print("text only" if sample.image is None else shlex.quote(_place(experiment, sample.image.path)), soft_wrap=True)
        console.print(f"    {_one_line(turn.question)}  {_one_line(turn.answer)}  ({turn.detail})", soft_wrap=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_run(experiment: Experiment, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "key", "state", "time"):
        table.add_column(heading, overflow="fold")
    fault: Exception | None = None
    try:
        for stage_run in stage_runs(experiment):
            experiment.check_known(stage_run.spec)
            if isinstance(fingerprint_if_known(stage_run.spec), UnknownDigest):
                table.add_row(stage_run.name, "", "to do", "")  # behind a calibration that is to do
                continue
            record = experiment.record(stage_run.stage, stage_run.spec)
            if record is not None:
                seconds = record.get("seconds")
                state, spent = "done", duration_text(float(seconds)) if isinstance(seconds, int | float) else ""
            else:
                begun = experiment.store.exists(f"runs/{stage_run.stage}/{stage_run.key}/spec.json")
                state, spent = ("begun" if begun else "to do"), ""
            table.add_row(stage_run.name, stage_run.key, state, spent)
    except (SpecError, RecipeError, NothingThereError) as error:
        fault = error
    console.print(f"{experiment.file.recipe.name} in {_place(experiment, '')}", style="italic", soft_wrap=True)
    print_table(table)
    if fault is not None:
        console.print(f"later stages: {fault}")
