"""Progress in a log file: the first line, the last, and between them at most one every ten seconds."""

import io

from rich.console import Console

from pipelines.progress import BarProgress, LineProgress, TeeProgress, console_progress
from pipelines.wording import bytes_text, count_text, dollars_text, duration_text


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_lines_are_few_and_say_what_matters() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, clock=clock)
    progress.start("encoding images", total=400, done=100)
    for _ in range(300):
        clock.now_s += 0.125
        progress.advance(loss=1.23456)
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "encoding images: 400 to do, 100 done before"
    assert 3 <= len(lines) <= 5
    assert lines[1].startswith("encoding images: 180/400 (45%), 10 s, 8/s, 28 s left, loss=1.235")
    assert lines[-1].startswith("encoding images: 400/400 (100%), 38 s")
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_time_left_is_not_told_by_what_happens_once() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, clock=clock)
    progress.start("training", total=100)
    clock.now_s += 40.0  # processes start, a model is loaded
    for _ in range(21):
        progress.advance()
        clock.now_s += 1.0
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[1] == "training: 1/100 (1%), 40 s"
    assert lines[2] == "training: 11/100 (11%), 50 s, 1/s, 1 min 29 s left"
    assert lines[-1] == "training: 21/100 (21%), 1 min 00 s, 1/s, 1 min 19 s left"


def test_work_that_is_all_done_divides_by_nothing() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, clock=Clock())
    progress.start("nothing", total=0)
    progress.finish()
    progress.finish()
    assert stream.getvalue().splitlines() == ["nothing: 0 to do", "nothing: 0/0 (100%), 0 s"]


def test_a_file_gets_lines_and_a_terminal_gets_a_bar(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(console_progress(), LineProgress)
    monkeypatch.setattr("sys.stderr", Terminal())
    assert isinstance(console_progress(), BarProgress)


def test_the_bar_shows_work_and_facts() -> None:
    stream = io.StringIO()
    bar = BarProgress(Console(file=stream, force_terminal=True, width=120))
    bar.advance()  # before any start: nothing to draw
    bar.start("training", total=10, done=4)
    bar.advance(3, loss=0.5)
    bar.finish()
    assert "7/10" in stream.getvalue()
    assert "loss=0.5" in stream.getvalue()


def test_tee_tells_everybody() -> None:
    first, second = io.StringIO(), io.StringIO()
    tee = TeeProgress(LineProgress(first, clock=Clock()), LineProgress(second, clock=Clock()))
    tee.start("x", 1)
    tee.advance()
    tee.finish()
    assert first.getvalue() == second.getvalue() != ""


def test_durations_read_well() -> None:
    assert [duration_text(s) for s in (0.4, 59.4, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 05 min"]


def test_figures_read_well() -> None:
    assert [dollars_text(value) for value in (0.0, 0.00314, 0.0996, 0.42, 0.999, 1.0, 1204.5)] == [
        "$0.00",
        "$0.0031",
        "$0.10",
        "$0.42",
        "$1.00",
        "$1.00",
        "$1,204.50",
    ]
    assert [bytes_text(number) for number in (999, 1000, 5_900_000_000_000_000)] == ["999 B", "1 kB", "5.9 PB"]
    assert [count_text(1, "image"), count_text(2000, "image"), count_text(2, "copy", "copies")] == ["1 image", "2,000 images", "2 copies"]
