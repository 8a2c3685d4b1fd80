"""What a feature cache costs, before it is made: bytes, objects, hours by bottleneck, dollars, and from which number of training passes on it pays.

Input: how many views there are, how many bytes each takes, prices and hardware; plain numbers. Output: what each way to store the maps costs, and a
recommendation with its reason. Invariant: nothing here measures or reads; the same numbers give the same plan, so every figure can be recomputed by
hand.

Storing wide features costs more than computing them: a view of CLIP-L/14-336 takes 8e-6 dollars to encode in fp32, and its three fp16 maps 8e-5
dollars a month to keep on object storage. A cache pays by small maps, by a short life, and by many passes over it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from model.views import Branch
from pipelines.wording import dollars_text, number_text
from workers.s3_clients import PART_BYTES

__all__ = [
    "WRITTEN_BYTES_CORE_S",
    "Bottleneck",
    "CacheCosts",
    "CacheOption",
    "Cluster",
    "Hours",
    "Prices",
    "TrainMode",
    "Verdict",
    "Work",
    "cache_bytes",
    "cache_costs",
    "recommend",
]

Bottleneck = Literal["decoding", "encoding", "network"]
TrainMode = Literal["both", "global", "local"]
"""What training shows of an image."""

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
    views_per_s: Mapping[Branch, float]
    """Of all devices, in the forward pass alone, by the branch whose maps are wanted: it ends at the deepest of them."""
    cores: int
    encoders: int
    """Processes that encode, and write what they encoded."""
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
class Work:
    """What is to be cached, however it is stored."""

    num_images: int
    """Each with one global view."""
    num_local_views: int
    """Of all of them."""
    prepare_core_s: float
    """Seconds of one core to decode and cut one image, in the mean."""
    num_fetched: float
    """Images that lie in an object store, where reading one is a request."""
    file_bytes: float
    """Of an image's file, in the mean."""
    num_calibrated: int
    """Images that int8 encodes once more, before all others, to measure its centres and scales."""
    shown: Mapping[TrainMode, float]
    """How often a training pass shows every image, by what it shows of it: in all as many views as the images have."""

    def views(self, mode: TrainMode) -> dict[Branch, int]:
        """Views of all images that a mode shows, by branch."""
        found: dict[Branch, int] = {"global": self.num_images} if mode != "local" else {}
        return found | ({"local": self.num_local_views} if mode != "global" and self.num_local_views else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Hours:
    """How long each resource is busy; the cache takes as long as the one that takes longest, or as those that share cores together."""

    prepare: float
    encode: float
    write: float
    """By cores that encode as well and do not encode meanwhile; 0 where others write beside."""
    network: float | None
    """Reading images and writing features; None where nobody says how fast it is, and where there is none."""
    calibrate: float
    """Before all that: what int8 is measured on."""
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
    work: Work,
    *,
    overhead_bytes: float,
    file_bytes: float,
    unit_bytes: int,
    most_images: int,
    months: float,
    cluster: Cluster,
    prices: Prices,
    on_disk: bool,
) -> CacheCosts:
    """The costs of one option.

    Args:
        option: how maps are stored.
        work: what is cached.
        overhead_bytes: of the files, for one image: headers, footers, the columns beside the maps.
        file_bytes: of the files, for one unit: what each has whatever is in it.
        unit_bytes: of features that a unit holds, about.
        most_images: of a unit, whatever their features weigh.
        months: for which it is kept.
        cluster: what encodes.
        prices: in US dollars.
        on_disk: whether it lies on a disk of the user's, which is paid for already and asks for nothing.

    Returns:
        Its costs.
    """
    total, units = cache_bytes(
        option,
        num_images=work.num_images,
        num_local_views=work.num_local_views,
        overhead_bytes=overhead_bytes,
        file_bytes=file_bytes,
        unit_bytes=unit_bytes,
        most_images=most_images,
    )
    held = work.views("both" if option.holds_local else "global")
    objects = max(1, units) * len(held)
    calibrate = work.num_calibrated / max(1, work.num_images) if option.precision == "int8" else 0.0
    hours = _hours(work, held, total, cluster, calibrate)
    compute = _compute_usd(hours, cluster, prices)
    asked = work.num_fetched / 1000 * prices.get_thousand  # for the images, whenever they are encoded
    live = per_pass = gets = 0.0
    for mode, times in work.shown.items():
        shown = work.views(mode)
        live += times * (_compute_usd(_hours(work, shown, 0, cluster), cluster, prices) + asked)
        gets += times * work.num_images * len(shown.keys() & held.keys())  # the index, which says where they lie, is read once a run
        if left_out := {branch: number for branch, number in shown.items() if branch not in held}:
            per_pass += times * (_compute_usd(_hours(work, left_out, 0, cluster), cluster, prices) + asked)
    per_pass += 0.0 if on_disk else gets / 1000 * prices.get_thousand
    each = total / objects
    # A larger object goes in parts, begun and completed by a request each; each one has a file of the index, and each unit its record.
    puts = objects * (1 if each <= PART_BYTES else math.ceil(each / PART_BYTES) + 2) + objects + units
    storage = 0.0 if on_disk else total / _GB * prices.storage_gb_month
    once = compute + asked * (1 + calibrate) + storage * months + (0.0 if on_disk else puts / 1000 * prices.put_thousand)
    saved = live - per_pass
    return CacheCosts(
        option=option,
        total_bytes=total,
        image_bytes=total / max(1, work.num_images),
        num_objects=objects,
        num_puts=puts,
        num_gets_pass=round(gets),
        hours=hours,
        compute_usd=compute,
        storage_usd_month=storage,
        once_usd=once,
        pass_usd=per_pass,
        live_pass_usd=live,
        break_even_passes=once / saved if saved > 0 else math.inf,
    )


def _hours(work: Work, views: Mapping[Branch, int], written_bytes: int, cluster: Cluster, calibrated: float = 0.0) -> Hours:
    """Of encoding some views of all images and of writing so many bytes; a share of the images is encoded once more, before."""
    prepare = work.num_images * work.prepare_core_s / cluster.cores / _HOUR_S
    encode = sum(number / cluster.views_per_s[branch] for branch, number in views.items()) / _HOUR_S
    write = written_bytes / (WRITTEN_BYTES_CORE_S * cluster.encoders) / _HOUR_S if cluster.shares_cores else 0.0
    rate = cluster.network_bytes_per_s
    fetch = 0.0 if rate is None else work.num_fetched * work.file_bytes / rate / _HOUR_S
    network = None if rate is None else fetch + written_bytes / rate / _HOUR_S
    busy: dict[Bottleneck, float] = {"decoding": prepare, "encoding": encode, "network": network or 0.0}
    together = prepare + encode + write if cluster.shares_cores else max(prepare, encode)
    calibrate = calibrated * max(prepare + encode if cluster.shares_cores else max(prepare, encode), fetch)
    return Hours(
        prepare=prepare,
        encode=encode,
        write=write,
        network=network,
        calibrate=calibrate,
        total=max(together, network or 0.0) + calibrate,
        bottleneck=max(busy, key=lambda resource: busy[resource]),
    )


def _compute_usd(hours: Hours, cluster: Cluster, prices: Prices) -> float:
    """Devices are paid for as long as it takes, also where they wait for decoding or for the network; devices that are cores, as cores."""
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
    cheapest = min(range(len(costs)), key=totals.__getitem__)
    shown = f"{number_text(passes)} training passes"
    if live < totals[cheapest]:
        first = min(costs, key=lambda cost: cost.break_even_passes)
        pays = (
            f"{first.option.name} pays from {number_text(first.break_even_passes)} passes on"
            if math.isfinite(first.break_even_passes)
            else "none ever pays"
        )
        return Verdict(
            choice="do not cache",
            reason=f"{shown} that encode everything themselves cost {dollars_text(live)}, the cheapest cache ({costs[cheapest].option.name}) "
            f"{dollars_text(totals[cheapest])}; {pays}",
        )
    best = next(place for place, total in enumerate(totals) if total <= min(totals[cheapest] * (1 + _NO_DIFFERENCE), live))
    told = [f"{cost.option.name} {dollars_text(total)}" for cost, total in zip(costs, totals, strict=True)]
    others = "".join(f"{', ' if place else '; '}{text}" for place, text in enumerate(told[:best] + told[best + 1 :]))
    return Verdict(
        choice=f"cache {costs[best].option.name}",
        reason=f"with {shown} it costs {dollars_text(totals[best])} in all, encoding in every pass {dollars_text(live)}{others}",
    )
