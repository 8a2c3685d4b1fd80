"""Figures as people read them, and one line for what a stage left behind."""

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from workers.errors import RecordError

if TYPE_CHECKING:
    from pipelines.stages import StageOutcome

__all__ = ["bytes_text", "count_text", "data_console", "dollars_text", "duration_text", "number_text", "outcome_line", "print_choices", "print_table"]


UNLIMITED_WIDTH = 100_000


class _DataConsole(Console):
    """A console that leaves a closed pipe to the command line; Rich would end the process with status 1."""

    def on_broken_pipe(self) -> None:
        """Raise again the BrokenPipeError under which this is called."""
        raise  # noqa: PLE0704 - Rich calls this while it handles one


def data_console() -> Console:
    """Standard output for tables of data: a `[word]` in a question or a description is text, not markup.

    Returns:
        A console as wide as its terminal, or as $COLUMNS says; without either, in a pipe or a file, so wide that no line is wrapped or cut.
    """
    unlimited = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit()
    return _DataConsole(markup=False, highlight=False, emoji=False, width=UNLIMITED_WIDTH if unlimited else None)


def print_table(table: Table) -> None:
    """Print a table on `data_console`, without the blanks that would fill its last column up: in a log they are most of every line.

    Args:
        table: of data.
    """
    console = data_console()
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def print_choices(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print choices beside each other's figures: a row each, or where the terminal is too narrow for that a column each.

    Args:
        headings: of the figures; the first names the choices.
        rows: a text for each heading.
    """
    across = _figures_table(headings, rows)
    console = data_console()
    fits = Measurement.get(console, console.options.update(width=UNLIMITED_WIDTH), across).maximum <= console.width
    print_table(across if fits else _figures_table([headings[0], *(row[0] for row in rows)], list(zip(headings, *rows, strict=True))[1:]))


def _figures_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def duration_text(seconds: float) -> str:
    """A duration for people: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(number: int | None) -> str:
    """Bytes for people, in powers of 1000."""
    if number is None:
        return "-"
    value = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB", "EB"):
        rounded = float(f"{value:.3g}")
        if rounded < 1000 or unit == "EB":
            return f"{rounded:.0f} {unit}" if unit == "B" or rounded >= 100 else f"{rounded:.3g} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def dollars_text(dollars: float) -> str:
    """US dollars for people: to the cent from one on, two digits below: `$1,204.50`, `$0.0031`."""
    if dollars >= 1 or not dollars:
        return f"${dollars:,.2f}"
    rounded = float(f"{dollars:.2g}")
    return f"${rounded:.{max(2, 1 - math.floor(math.log10(rounded)))}f}"


def number_text(number: float) -> str:
    """A figure for people, to three digits and never with an exponent for what is large: `0.0305`, `11.2`, `12,970`."""
    rounded = float(f"{number:.3g}")
    return f"{number:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def count_text(number: int, what: str, many: str | None = None) -> str:
    """So many of something: `1 image`, `2,000 images`.

    Args:
        number: how many.
        what: the word for one.
        many: the word for several, where it is not the same with an s.
    """
    return f"{number:,} {what if number == 1 else many or f'{what}s'}"


def outcome_line(outcome: "StageOutcome") -> str:
    """One line for the terminal: what a stage did, or that it was done, with its main figures.

    Args:
        outcome: of the stage.

    Returns:
        The line.

    Raises:
        RecordError: the record lacks one of the figures.
    """
    spent = "found done" if outcome.reused else f"done in {duration_text(float(outcome.record.get('seconds', 0.0)))}"
    try:
        return f"{outcome.name:<24} {spent:<21} {_figures(outcome)}".rstrip()
    except KeyError as error:
        raise RecordError(
            f"runs/{outcome.stage}/{outcome.key}/COMMITTED.json in the root lacks {error}; remove that file, and the stage is run again"
        ) from error


def _figures(outcome: "StageOutcome") -> str:
    record = outcome.record
    match outcome.stage:
        case "build-dataset":
            return f"{record['num_samples']} images, {record['num_turns']} questions"
        case "calibrate-features":
            number = len(record["maps"]) - len(record["fp16_maps"])
            least = min(item["snr_db"] for item in record["maps"])
            images = max(item["num_images"] + item["num_checked"] for item in record["maps"])
            return f"{images} images, int8 good enough for {number} of {len(record['maps'])} maps, {least:.0f} dB at least"
        case "cache-features":
            there = f", {record['num_held']} of {record['num_images']} images were there" if record["num_held"] else ""
            return f"{record['num_global_views'] + record['num_local_views']} views, {bytes_text(record['written_bytes'])} written{there}"
        case "train-connector":
            if not record["phases"]:
                return "no phases, the weights as they are"
            return "loss " + ", ".join(f"{phase['name']} {phase['first_loss']:.2f} to {phase['last_loss']:.2f}" for phase in record["phases"])
        case "evaluate":
            return f"{record['num_questions']} questions, {_scored(record)}: {', '.join(_shares(record))}{_left_out(record)}"
        case "export":
            error = record.get("max_abs_logit_error")  # of forms that are compared
            compared = "" if error is None else f", {record['form']}: logits within {error:.1e} of Loupe's own"
            return f"{len(record['files'])} files, {bytes_text(record['num_bytes'])}{compared}"
        case "report":
            return bytes_text(record["bytes_written"])


def _scored(record: Mapping[str, Any]) -> str:
    """The main metric; exact match goes without saying."""
    return "right" if record["metrics"][0] == "exact_match" else str(record["metrics"][0])


def _shares(record: Mapping[str, Any]) -> list[str]:
    """The main metric over all questions, by mode."""
    overall = {
        score["mode"]: score["fraction"]
        for score in record["scores"]
        if score["metric"] == record["metrics"][0] and not (score["family"] or score["detail"] or score["kind"])
    }
    return [f"{mode} {overall[mode]:.1%}" for mode in record["modes"]]


def _left_out(record: Mapping[str, Any]) -> str:
    """What was not asked because the run had seen it."""
    number = record["num_images_trained_on"]
    return f"; {number} images not asked, the run was trained on them" if number else ""
