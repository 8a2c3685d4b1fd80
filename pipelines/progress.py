"""How far a stage is, for people: a bar on a terminal, one plain line every ten seconds in a log file.

Both implement `workers.execution.Progress`. They write to standard error, so that standard output holds results alone.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pipelines.wording import duration_text
from workers.execution import Progress

__all__ = ["BarProgress", "LineProgress", "TeeProgress", "console_progress", "facts_text"]

LINE_INTERVAL_S = 10.0


@runtime_checkable
class TextStream(Protocol):
    """What lines are written to."""

    def write(self, text: str, /) -> object:
        """Write."""

    def flush(self) -> object:
        """Let it be seen now."""

    def isatty(self) -> bool:
        """Whether a person is watching."""


def facts_text(facts: dict[str, float | int | str]) -> str:
    """Facts on one line: `loss=1.234  step=20`."""
    return "  ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in facts.items())


class BarProgress:
    """A bar per piece of work, for terminals."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Draw a bar that begins at what was done before."""
        self.finish()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[facts]}"),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done, facts="")

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """Move the bar."""
        if self._bar is None or self._task is None:
            return
        if facts:
            self._bar.update(self._task, advance=count, facts=facts_text(facts))
        else:
            self._bar.update(self._task, advance=count)

    def finish(self) -> None:
        """Leave the bar standing as it is."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


class LineProgress:
    """Plain lines, for log files: the first, the last, and between them at most one every ten seconds.

    Rates and the time left are counted from the first piece of work that is done. What lies before it, processes that start and models that are
    loaded, happens once: by it the first of 550 training steps would leave six hours of what takes ten minutes.
    """

    def __init__(self, stream: TextStream, *, interval_s: float = LINE_INTERVAL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._what = ""
        self._total = self._done = self._done_at_first = 0
        self._began_s = self._first_s = self._printed_s = 0.0
        self._printed_done: int | None = None
        self._facts: dict[str, float | int | str] = {}

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Say what begins."""
        with self._lock:
            self._what, self._total, self._done, self._done_at_first = what, total, done, done
            self._began_s = self._first_s = self._printed_s = self._clock()
            self._facts, self._printed_done = {}, None
            before = f", {done} done before" if done else ""
            print(f"{what}: {total} to do{before}", file=self._stream, flush=True)

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """Count, and print a line when the last one is old enough."""
        with self._lock:
            self._done += count
            if self._first_s == self._began_s:
                self._first_s, self._done_at_first = self._clock(), self._done
            self._facts.update(facts)
            if self._clock() - self._printed_s >= self._interval_s:
                self._print_line()

    def finish(self) -> None:
        """Print where it ended."""
        with self._lock:
            if self._what and self._printed_done != self._done:
                self._print_line()
            self._what = ""

    def _print_line(self) -> None:
        now_s = self._clock()
        elapsed_s = now_s - self._began_s
        fraction = self._done / self._total if self._total else 1.0
        parts = [f"{self._what}: {self._done}/{self._total} ({fraction:.0%})", duration_text(elapsed_s)]
        counted_s = now_s - self._first_s
        rate = (self._done - self._done_at_first) / counted_s if counted_s > 0 else 0.0
        if rate > 0:
            parts.append(f"{rate:.3g}/s")
            if self._done < self._total:
                parts.append(f"{duration_text((self._total - self._done) / rate)} left")
        if self._facts:
            parts.append(facts_text(self._facts))
        print(", ".join(parts), file=self._stream, flush=True)
        self._printed_s, self._printed_done = now_s, self._done


class TeeProgress:
    """Tells several."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.start(what, total, done)

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.advance(count, **facts)

    def finish(self) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.finish()


def console_progress() -> Progress:
    """A bar where standard error is a terminal, else lines."""
    return BarProgress(Console(stderr=True)) if sys.stderr.isatty() else LineProgress(sys.stderr)
