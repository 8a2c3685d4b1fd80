"""The report page: what it shows, as plain data, and how it is drawn: one HTML file with inline SVG, no script, no request to anywhere.

Input: a `ReportPage`. Output: HTML text. Nothing here reads a store, so the page is tested from data alone.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from pipelines.wording import bytes_text, duration_text

__all__ = [
    "AccuracyCell",
    "AccuracyRow",
    "Curve",
    "DatasetRow",
    "MetricRow",
    "PageSample",
    "PageTurn",
    "PhaseCurves",
    "PlannedRow",
    "ReportPage",
    "StageRow",
    "data_uri",
    "render_page",
]

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = "report.html.j2"

MODE_WORDS = {"blind": "blind", "global": "global only", "local": "local only", "both": "both views"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRow:
    """One family of the dataset."""

    family: str
    num_train: int
    num_held_out: int
    num_turns: int
    num_small_turns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRow:
    """What one stage took and left."""

    name: str
    key: str
    seconds: float
    num_bytes: int | None
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRow:
    """What was expected of the cache, and what it was."""

    what: str
    planned: str
    found: str
    difference: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedOptions:
    """What was counted before the cache was made."""

    facts: tuple[tuple[str, str], ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Ways to store the maps, by the headings; the recipe's own first."""
    recommended: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The loss of one phase under one seed."""

    seed: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCurves:
    """One phase of the schedule, all seeds."""

    phase: str
    trained: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyCell:
    """What one metric says of one group of questions in one mode."""

    points: tuple[float, ...]
    """By seed: the sum of the scores, which is how many were answered right where there is only right and wrong."""
    num_asked: tuple[int, ...]
    ends: tuple[tuple[float, float], ...]
    """By seed: the 95 % interval."""

    @property
    def by_seed(self) -> tuple[float, ...]:
        """Mean score, by seed."""
        return tuple(points / asked for points, asked in zip(self.points, self.num_asked, strict=True) if asked)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where nothing was asked."""
        return sum(self.by_seed) / len(self.by_seed) if self.by_seed else None

    @property
    def spread(self) -> float | None:
        """Half the distance between the worst and the best seed; None for a single one."""
        return (max(self.by_seed) - min(self.by_seed)) / 2 if len(self.by_seed) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean over seeds: the mean of their ends, as wide as one seed's, since the questions are the same for each."""
        if self.mean is None:
            return None
        return sum(low for low, _ in self.ends) / len(self.ends), sum(high for _, high in self.ends) / len(self.ends)


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyRow:
    """One line of the accuracy table."""

    label: str
    group: str
    """`overall`, `detail` or `family`."""
    num_questions: int
    majority: float | None
    """Share right by always giving the commonest training answer to the question's kind."""
    cells: dict[str, AccuracyCell]
    """By mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRow:
    """All questions by one more metric, or by one figure of it."""

    label: str
    rule: str
    """What it counts, in words."""
    num_questions: int | None
    cells: dict[str, tuple[float, float, float]]
    """By mode: mean over the seeds, and the ends of its 95 % interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageTurn:
    """One question with what the model said."""

    question: str
    truth: str
    detail: str
    answers: tuple[tuple[str, str, float | None], ...]
    """Mode, answer, its score by the main metric: 1 is right, 0 is wrong; None where the metric says nothing about the question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageSample:
    """One held-out picture with its views."""

    sample_id: str
    family: str
    image_uri: str
    width_px: int
    height_px: int
    grid: tuple[tuple[float, float, float, float], ...]
    """What each local view shows: left, top, right, bottom in image pixels, clipped to the image."""
    evidence: tuple[float, float, float, float] | None
    global_uri: str
    answer_uri: str
    """The local view that holds the answer."""
    answer_view: int
    turns: tuple[PageTurn, ...]
    """At least one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPage:
    """Everything the page shows."""

    title: str
    description: str
    headline: tuple[tuple[str, str], ...]
    """Big numbers with their label."""
    facts: tuple[tuple[str, str], ...]
    dataset: tuple[DatasetRow, ...]
    quarantine: tuple[tuple[str, str, int], ...]
    """Stage, reason, number."""
    phases: tuple[PhaseCurves, ...]
    modes: tuple[str, ...]
    accuracy: tuple[AccuracyRow, ...]
    metric: str
    """The main one, which `accuracy` shows."""
    metric_is_share: bool
    """Whether it knows right and wrong alone."""
    rule: str
    """What it counts, in words."""
    more_metrics: tuple[MetricRow, ...]
    asked: str
    """Which pictures were asked about, in words."""
    samples: tuple[PageSample, ...]
    stages: tuple[StageRow, ...]
    cache_plan: tuple[PlannedRow, ...]
    """Of the cache; empty where nothing was planned or nothing cached."""
    cache_options: PlannedOptions | None
    """None where another machine made it, or an older version planned it."""
    ask_command: str
    recipe_text: str
    seeds: tuple[int, ...]


def data_uri(data: bytes, mime: str) -> str:
    """Bytes as a URI that needs no request."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


# -- the loss plots, as geometry for the template

_PLOT_WIDTH, _PLOT_HEIGHT = 320.0, 180.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 12.0, 30.0


def _ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round values that cover a range, the last at or above its end."""
    if high <= low:
        return [low, low + 1.0]
    raw = (high - low) / number
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * magnitude >= raw)
    first = math.ceil(low / step - 1e-9) * step
    return [first + step * place for place in range(math.ceil((high - first) / step - 1e-9) + 1)]


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Running mean over a share of the points, so that a noisy loss shows its way."""
    half = max(0, round(len(values) * share / 2))
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _thinned(values: Sequence[Any], limit: int = 240) -> list[Any]:
    """Evenly spaced ones, the last included: a plot of 320 px shows no more."""
    if len(values) <= limit:
        return list(values)
    places = sorted({round(place * (len(values) - 1) / (limit - 1)) for place in range(limit)})
    return [values[place] for place in places]


def plot_geometry(phase: PhaseCurves) -> dict[str, Any]:
    """Lines, ticks and their places for one phase's plot."""
    raw = [loss for curve in phase.curves for loss in curve.losses]
    steps = [step for curve in phase.curves for step in curve.steps]
    y_ticks = _ticks(0.0, max(raw) if raw else 1.0)
    low, high = 0.0, y_ticks[-1]
    last = max(steps, default=1)

    def x(step: float) -> float:
        return _LEFT + (_PLOT_WIDTH - _LEFT - _RIGHT) * step / max(1, last)

    def y(loss: float) -> float:
        return _PLOT_HEIGHT - _BOTTOM - (_PLOT_HEIGHT - _TOP - _BOTTOM) * (loss - low) / (high - low)

    def points(curve: Curve, losses: Sequence[float]) -> str:
        return " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in _thinned(list(zip(curve.steps, losses, strict=True))))

    lines = [
        {"seed": curve.seed, "raw": points(curve, curve.losses), "smooth": points(curve, smoothed(curve.losses))}
        for curve in phase.curves
        if curve.steps
    ]
    first = [sum(part) / len(part) for curve in phase.curves if (part := curve.losses[: max(1, len(curve.losses) // 10)])]
    final = [sum(part) / len(part) for curve in phase.curves if (part := curve.losses[-max(1, len(curve.losses) // 10) :])]
    return {
        "width": _PLOT_WIDTH,
        "height": _PLOT_HEIGHT,
        "left": _LEFT,
        "right": _PLOT_WIDTH - _RIGHT,
        "bottom": _PLOT_HEIGHT - _BOTTOM,
        "x_ticks": [{"at": round(x(tick), 1), "text": f"{tick:g}"} for tick in _ticks(0, last) if tick <= last],
        "y_ticks": [{"at": round(y(tick), 1), "text": f"{tick:g}"} for tick in y_ticks],
        "lines": lines,
        "first": sum(first) / len(first) if first else None,
        "final": sum(final) / len(final) if final else None,
        "num_steps": last,
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def render_page(page: ReportPage) -> str:
    """Draw the page.

    Args:
        page: what it shows.

    Returns:
        One HTML document that needs nothing else.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, points=_points, duration=duration_text, bytes=bytes_text)
    totals = DatasetRow(
        family="all",
        num_train=sum(row.num_train for row in page.dataset),
        num_held_out=sum(row.num_held_out for row in page.dataset),
        num_turns=sum(row.num_turns for row in page.dataset),
        num_small_turns=sum(row.num_small_turns for row in page.dataset),
    )
    bars = [row for row in page.accuracy if row.group in ("overall", "detail")]
    return environment.get_template(TEMPLATE).render(
        page=page,
        totals=totals,
        bars=bars,
        plots=[(phase, plot_geometry(phase)) for phase in page.phases],
        mode_words=MODE_WORDS,
        seconds=sum(row.seconds for row in page.stages),
        num_bytes=sum(row.num_bytes or 0 for row in page.stages),
    )
