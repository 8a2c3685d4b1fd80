"""A cache's plan, and how it is told: as tables on the terminal and in the report, and as JSON."""

import json
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

from rich.table import Table

from model.views import Branch
from pipelines.costs import CacheCosts, TrainMode, Verdict
from pipelines.wording import bytes_text, count_text, data_console, dollars_text, duration_text, number_text, print_choices, print_table

__all__ = ["OPTION_HEADINGS", "CachePlan", "CachePlanText", "TrainRate", "plan_text", "print_cache_plan"]

_SHOWN: dict[TrainMode, str] = {"both": "both views", "global": "global views alone", "local": "local views alone"}

OPTION_HEADINGS = (
    "stored as",
    "an image",
    "in all",
    "objects",
    "writes",
    "reads a pass",
    "decoding",
    "encoding",
    "network",
    "time",
    "to make",
    "a month",
    "pays from pass",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRate:
    """How fast training can be at most on some hardware: the language model frozen, and nothing else in the way."""

    mode: TrainMode
    """What it shows of an image."""
    images_per_s: float
    read_bytes_per_s: dict[str, float]
    """Of the cache, by option."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """What a cache will take."""

    recipe: str
    encoder: str
    num_images: int
    images_from: str
    is_made: bool
    """Whether all of it is there already."""
    not_counted: str
    """What else the recipe caches; empty where that is all."""
    on_disk: bool
    """Whether it lies on this machine's disk, where no request is paid for and no network is in the way."""
    local_views: dict[int, float]
    """How many images have so many local views."""
    num_views: int
    view_gflop: dict[Branch, float]
    """Of one view, by the branch whose maps are wanted."""
    passes: float
    passes_from: str
    months: float
    hardware: str
    prepare_core_s: float
    """Seconds of one core for one image."""
    prepared: str
    """What images that was measured on, in words."""
    views_per_s: float
    """Of all views, in the mean over both branches."""
    num_calibrated: int
    """Images that int8 encodes once more, before."""
    train_rates: tuple[TrainRate, ...]
    """Of what the schedule's phases show."""
    options: tuple[CacheCosts, ...]
    """The first is what the recipe says."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlanText:
    """A plan in words."""

    facts: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, ...], ...]
    """By the headings, the recipe's own first."""
    recommended: str
    headings: tuple[str, ...] = OPTION_HEADINGS


def plan_text(plan: CachePlan) -> CachePlanText:
    """A plan in words.

    Args:
        plan: to be told.

    Returns:
        What to show of it.
    """
    grids = ", ".join(f"{count} local: {weight:,.0f}" for count, weight in plan.local_views.items())
    own, prepare = plan.options[0], number_text(plan.prepare_core_s * 1000)
    if len(set(plan.view_gflop.values())) == 1:
        each = f"{number_text(plan.view_gflop['global'])} GFLOP a view"
    else:
        each = " and ".join(f"{number_text(flops)} GFLOP a {branch} view" for branch, flops in plan.view_gflop.items())
    calibrate_s = 3600 * max(cost.hours.calibrate for cost in plan.options)
    fastest = max(plan.train_rates, key=lambda rate: rate.images_per_s)
    shown = [cost.option.name for cost in plan.options if cost.option.holds_local or cost is own]
    reads = ", ".join(f"{name} {bytes_text(round(max(rate.read_bytes_per_s[name] for rate in plan.train_rates)))}/s" for name in shown)
    shows = "" if len(plan.train_rates) == 1 else f", in phases that show {_SHOWN[fastest.mode]}"
    return CachePlanText(
        facts=(
            ("images", f"{plan.num_images:,} ({plan.images_from})"),
            *((("made", "already: a run finds this cache and adds nothing to it"),) if plan.is_made else ()),
            *((("not counted", plan.not_counted),) if plan.not_counted else ()),
            ("views", f"{plan.num_views:,}: 1 global each, and {grids}"),
            ("encoder", f"{plan.encoder}: {each}"),
            ("hardware", plan.hardware),
            ("rates", f"{prepare} ms of a core to decode and cut an image ({plan.prepared}), {number_text(plan.views_per_s)} views/s encoded"),
            ("passes", f"{number_text(plan.passes)} ({plan.passes_from}), kept for {plan.months:g} month{'' if plan.months == 1 else 's'}"),
            ("encoding anew", f"{dollars_text(own.live_pass_usd)} for a pass without a cache"),
            ("calibration", f"of int8, on {count_text(plan.num_calibrated, 'image')}: {duration_text(calibrate_s)}, in its time"),
            (
                "training",
                f"at most {number_text(fastest.images_per_s)} images/s{shows}, by its language model's products alone; it reads at most {reads}",
            ),
        ),
        options=tuple(_option_row(cost, on_disk=plan.on_disk) for cost in plan.options),
        recommended=f"{plan.verdict.choice}. {plan.verdict.reason[0].upper()}{plan.verdict.reason[1:]}.",
    )


def _option_row(cost: CacheCosts, *, on_disk: bool) -> tuple[str, ...]:
    hours = cost.hours
    network = "-" if hours.network is None else duration_text(hours.network * 3600)
    return (
        cost.option.name,
        bytes_text(round(cost.image_bytes)),
        bytes_text(cost.total_bytes),
        f"{cost.num_objects:,}",
        "-" if on_disk else f"{cost.num_puts:,}",
        "-" if on_disk else f"{cost.num_gets_pass:,}",
        *(duration_text(spent * 3600) for spent in (hours.prepare, hours.encode)),
        network,
        duration_text(hours.total * 3600),
        dollars_text(cost.compute_usd),
        dollars_text(cost.storage_usd_month),
        number_text(cost.break_even_passes) if isfinite(cost.break_even_passes) else "never",
    )


def print_cache_plan(plan: CachePlan, *, as_json: bool) -> None:
    """Print a plan.

    Args:
        plan: what to print.
        as_json: JSON in place of tables.
    """
    if as_json:
        data_console().print(json.dumps(_plain(asdict(plan)), indent=2), soft_wrap=True)
        return
    text, console = plan_text(plan), data_console()
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column("fact", no_wrap=True)
    facts.add_column("value", overflow="fold")
    for fact in text.facts:
        facts.add_row(*fact)
    console.print(f"{plan.recipe}: what its cache takes", style="italic")
    print_table(facts)
    print_choices(OPTION_HEADINGS, text.options)
    console.print(f"Recommended: {text.recommended}", soft_wrap=True)


def _plain(value: Any) -> Any:
    """JSON values: what is infinite is null."""
    match value:
        case float():
            return value if abs(value) != inf else None
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
