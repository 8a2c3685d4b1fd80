"""What a feature cache costs, before it is made: bytes, objects, hours by bottleneck, dollars, and from which number of training passes on it pays.

Input: how many views there are, how many bytes each takes, prices and hardware; plain numbers. Output: what each way to store the maps costs, and a
recommendation with its reason. Invariant: nothing here measures or reads; the same numbers give the same plan, so every figure can be recomputed by
hand.

Storing wide features costs more than computing them: a view of CLIP-L/14-336 takes 8e-6 dollars to encode in fp32, and its three fp16 maps 8e-5
dollars a month to keep on object storage. A cache pays by small maps, by a short life, and by many passes over it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.wording import dollars_text
from workers.s3_clients import PART_BYTES

__all__ = [
    "WRITTEN_BYTES_CORE_S",
    "Bottleneck",
    "CacheCosts",
    "CacheOption",
    "Cluster",
    "Hours",
    "Prices",
    "Verdict",
    "cache_bytes",
    "cache_costs",
    "recommend",
]

Bottleneck = Literal["decoding", "encoding", "network"]

_GB = 1e9
_HOUR_S = 3600.0
WRITTEN_BYTES_CORE_S = 1.3e8
"""Of features that a core cuts into images, hashes and writes in a second: 67 MB in 0.4 to 0.7 s on the cores that caches were planned on."""
_NO_DIFFERENCE = 0.01
"""Of the costs: a probe of a machine does not repeat itself more exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """US dollars. The defaults are of a large cloud's list in 2026: standard object storage in one region, one H100 by the hour, a CPU core."""

    storage_gb_month: float = 0.023
    put_thousand: float = 0.005
    get_thousand: float = 0.0004
    device_hour: float = 3.0
    core_hour: float = 0.04


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What encodes. Rates are of the whole cluster."""

    devices: int
    views_per_s: float
    """Of all devices, in the forward pass alone."""
    cores: int
    network_bytes_per_s: float | None
    """To the store; None where nobody says, or the store is this machine's disk."""
    shares_cores: bool
    """Whether devices are those same cores: then preparing, encoding and writing take turns, and do not overlap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOption:
    """One way to store the maps."""

    name: str
    precision: Literal["fp32", "fp16", "int8"]
    global_view_bytes: int
    local_view_bytes: int
    """0 where the option leaves local views to be encoded in training."""
    holds_local: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Hours:
    """How long each resource is busy; the cache takes as long as the one that takes longest, or as those that share cores together."""

    prepare: float
    encode: float
    network: float | None
    """None where nobody says how fast it is, and where there is none."""
    total: float
    bottleneck: Bottleneck


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCosts:
    """What one option costs."""

    option: CacheOption
    total_bytes: int
    image_bytes: float
    """Mean over images."""
    num_objects: int
    num_puts: int
    """Requests that write it."""
    num_gets_pass: int
    """Requests of one training pass over it."""
    hours: Hours
    compute_usd: float
    """Of making it once."""
    storage_usd_month: float
    once_usd: float
    """Of making it, and keeping it for as long as is planned."""
    pass_usd: float
    """Of the requests of one training pass over it, and of encoding what it leaves out."""
    live_pass_usd: float
    """Of one training pass that encodes everything itself."""
    break_even_passes: float
    """Training passes from which on it is cheaper than encoding in every pass; infinite where it never is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What to do, and why."""

    choice: str
    """An option's name, or `do not cache`."""
    reason: str


def cache_bytes(
    option: CacheOption, *, num_images: int, num_local_views: int, overhead_bytes: float, file_bytes: float, unit_bytes: int, most_images: int
) -> tuple[int, int]:
    """How much an option stores.

    Args:
        option: how maps are stored.
        num_images: that are cached, each with one global view.
        num_local_views: of all of them.
        overhead_bytes: of the files, for one image: headers, footers, the columns beside the maps.
        file_bytes: of the files, for one unit: what each has whatever is in it.
        unit_bytes: of features that a unit holds, about.
        most_images: of a unit, whatever their features weigh.

    Returns:
        Bytes in all, and units.
    """
    maps = num_images * option.global_view_bytes + (num_local_views if option.holds_local else 0) * option.local_view_bytes
    unit_images = min(most_images, unit_bytes // max(1, maps // max(1, num_images)))  # as workers.caching.units cuts them
    units = math.ceil(num_images / max(1, unit_images))
    return round(maps + num_images * overhead_bytes + units * file_bytes), units


def cache_costs(
    option: CacheOption,
    *,
    num_images: int,
    num_local_views: int,
    prepare_core_s: float,
    overhead_bytes: float,
    file_bytes: float,
    unit_bytes: int,
    most_images: int,
    months: float,
    cluster: Cluster,
    prices: Prices,
) -> CacheCosts:
    """The costs of one option.

    Args:
        option: how maps are stored.
        num_images: that are cached, each with one global view.
        num_local_views: of all of them.
        prepare_core_s: seconds of one core to read, decode and cut one image.
        overhead_bytes: of the files, for one image: headers, footers, the columns beside the maps.
        file_bytes: of the files, for one unit: what each has whatever is in it.
        unit_bytes: of features that a unit holds, about.
        most_images: of a unit, whatever their features weigh.
        months: for which it is kept.
        cluster: what encodes.
        prices: in US dollars.

    Returns:
        Its costs.
    """
    held_local = num_local_views if option.holds_local else 0
    branches = 2 if held_local else 1
    total, units = cache_bytes(
        option,
        num_images=num_images,
        num_local_views=num_local_views,
        overhead_bytes=overhead_bytes,
        file_bytes=file_bytes,
        unit_bytes=unit_bytes,
        most_images=most_images,
    )
    objects = max(1, units) * branches
    hours = _hours(num_images, num_images + held_local, prepare_core_s, total, cluster)
    compute = _compute_usd(num_images, num_images + held_local, prepare_core_s, total, cluster, prices)
    live = _compute_usd(num_images, num_images + num_local_views, prepare_core_s, 0, cluster, prices)
    left_out = 0.0 if option.holds_local or not num_local_views else _compute_usd(num_images, num_local_views, prepare_core_s, 0, cluster, prices)
    gets = num_images * branches  # the index, which says where they lie, is read once a run
    per_pass = gets / 1000 * prices.get_thousand + left_out
    each = total / objects
    # A larger object goes in parts, begun and completed by a request each; each one has a file of the index, and each unit its record.
    puts = objects * (1 if each <= PART_BYTES else math.ceil(each / PART_BYTES) + 2) + objects + units
    storage = total / _GB * prices.storage_gb_month
    once = compute + puts / 1000 * prices.put_thousand + storage * months
    saved = live - per_pass
    return CacheCosts(
        option=option,
        total_bytes=total,
        image_bytes=total / max(1, num_images),
        num_objects=objects,
        num_puts=puts,
        num_gets_pass=gets,
        hours=hours,
        compute_usd=compute,
        storage_usd_month=storage,
        once_usd=once,
        pass_usd=per_pass,
        live_pass_usd=live,
        break_even_passes=once / saved if saved > 0 else math.inf,
    )


def _hours(num_images: int, num_views: int, prepare_core_s: float, total_bytes: int, cluster: Cluster) -> Hours:
    prepare = num_images * prepare_core_s / cluster.cores / _HOUR_S
    encode = num_views / cluster.views_per_s / _HOUR_S
    network = None if cluster.network_bytes_per_s is None else total_bytes / cluster.network_bytes_per_s / _HOUR_S
    write = total_bytes / WRITTEN_BYTES_CORE_S / _HOUR_S
    together = prepare + encode + write if cluster.shares_cores else max(prepare, encode)
    busy: dict[Bottleneck, float] = {"decoding": prepare, "encoding": encode, "network": network or 0.0}
    slowest = max(busy, key=lambda resource: busy[resource])
    return Hours(prepare=prepare, encode=encode, network=network, total=max(together, network or 0.0), bottleneck=slowest)


def _compute_usd(num_images: int, num_views: int, prepare_core_s: float, total_bytes: int, cluster: Cluster, prices: Prices) -> float:
    """Of preparing images, encoding views and storing so many bytes once.

    Devices are paid for as long as it takes, also where they wait for decoding or for the network; devices that are cores, as cores.
    """
    hours = _hours(num_images, num_views, prepare_core_s, total_bytes, cluster)
    if cluster.shares_cores:
        return hours.total * cluster.cores * prices.core_hour
    return hours.total * cluster.devices * prices.device_hour + hours.prepare * cluster.cores * prices.core_hour


def recommend(costs: Sequence[CacheCosts], passes: float) -> Verdict:
    """What is cheapest for so many training passes.

    Args:
        costs: of the options that a recipe can choose, at least one; the first is what this one says.
        passes: training passes that are planned.

    Returns:
        The cheapest option, or not to cache; where nothing is cheaper than what the recipe says by a hundredth at least, that.
    """
    live = passes * costs[0].live_pass_usd
    totals = [cost.once_usd + passes * cost.pass_usd for cost in costs]
    best = next(place for place, total in enumerate(totals) if total <= min(totals) * (1 + _NO_DIFFERENCE))
    shown = f"{passes:.3g} training passes"
    if live < totals[best]:
        first = min(costs, key=lambda cost: cost.break_even_passes)
        pays = (
            f"{first.option.name} pays from {first.break_even_passes:,.1f} passes on" if math.isfinite(first.break_even_passes) else "none ever pays"
        )
        return Verdict(
            choice="do not cache",
            reason=f"{shown} that encode everything themselves cost {dollars_text(live)}, the cheapest cache ({costs[best].option.name}) "
            f"{dollars_text(totals[best])}; {pays}",
        )
    told = [f"{cost.option.name} {dollars_text(total)}" for cost, total in zip(costs, totals, strict=True)]
    others = "".join(f"{', ' if place else '; '}{text}" for place, text in enumerate(told[:best] + told[best + 1 :]))
    return Verdict(
        choice=f"cache {costs[best].option.name}",
        reason=f"with {shown} it costs {dollars_text(totals[best])} in all, encoding in every pass {dollars_text(live)}{others}",
    )
