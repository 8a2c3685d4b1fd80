"""A cache's plan, and how it is told: as tables on the terminal and in the report, and as JSON."""

import json
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

from rich.table import Table

from pipelines.costs import CacheCosts, Verdict
from pipelines.wording import bytes_text, data_console, dollars_text, duration_text, print_choices, print_table

__all__ = ["OPTION_HEADINGS", "CachePlan", "CachePlanText", "plan_text", "print_cache_plan"]

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
    view_gflop: float
    passes: float
    passes_from: str
    months: float
    hardware: str
    prepare_core_s: float
    """Seconds of one core for one image."""
    views_per_s: float
    train_images_per_s: float
    """That training takes at most on that hardware: the language model frozen, and nothing else in the way."""
    options: tuple[CacheCosts, ...]
    """The first is what the recipe says."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlanText:
    """A plan in words."""

    facts: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, ...], ...]
    """By OPTION_HEADINGS, the recipe's own first."""
    recommended: str


def plan_text(plan: CachePlan) -> CachePlanText:
    """A plan in words.

    Args:
        plan: to be told.

    Returns:
        What to show of it.
    """
    grids = ", ".join(f"{count} local: {weight:,.0f}" for count, weight in plan.local_views.items())
    reads = ", ".join(
        f"{cost.option.name} {bytes_text(round(cost.image_bytes * plan.train_images_per_s))}/s" for cost in plan.options if cost.option.holds_local
    )
    return CachePlanText(
        facts=(
            ("images", f"{plan.num_images:,} ({plan.images_from})"),
            *((("made", "already: a run finds this cache and adds nothing to it"),) if plan.is_made else ()),
            *((("not counted", plan.not_counted),) if plan.not_counted else ()),
            ("views", f"{plan.num_views:,}: 1 global each, and {grids}"),
            ("encoder", f"{plan.encoder}: {plan.view_gflop:,.3g} GFLOP a view"),
            ("hardware", plan.hardware),
            ("rates", f"{plan.prepare_core_s * 1000:,.3g} ms of a core to decode and cut an image, {plan.views_per_s:,.4g} views/s encoded"),
            ("passes", f"{plan.passes:.3g} ({plan.passes_from}), kept for {plan.months:g} month{'' if plan.months == 1 else 's'}"),
            ("training", f"at most {plan.train_images_per_s:,.3g} images/s, by its language model's products alone; it then reads {reads}"),
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
        f"{cost.break_even_passes:,.3g}" if isfinite(cost.break_even_passes) else "never",
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
