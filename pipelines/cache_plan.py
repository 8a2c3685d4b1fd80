"""`loupe plan`: what a recipe's cache will take, before anything is spent on it.

Sizes come from the built dataset, from the headers of its sources' images, or from the command line; rates from a short probe of this machine, or
from the hardware that the recipe states; bytes beside the maps from a file written as the cache writes its own. `pipelines.costs` does the
arithmetic.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from model.architectures import encoder_flops
from model.errors import ImageError
from model.images import DEFAULT_LIMITS, decode_image
from model.specs import CalibrationRule, FeatureSpec, Precision, UnknownDigest, fingerprint
from model.views import plan_views
from pipelines.cache_plan_text import CachePlan, CachePlanText, plan_text
from pipelines.costs import WRITTEN_BYTES_CORE_S, CacheOption, Cluster, cache_bytes, cache_costs, recommend
from pipelines.errors import NothingThereError, SettingError
from pipelines.stages import Experiment
from pipelines.wording import count_text
from workers.commits import from_json, to_json
from workers.dataset.spec import LlavaJsonSourceSpec
from workers.errors import StorageError
from workers.quarantine import image_reason
from workers.storage import Store

if TYPE_CHECKING:
    from model.views import Branch
    from workers.caching.sizing import FileOverhead
    from workers.dataset.samples import Sample

__all__ = ["ImageSizes", "PlannedCache", "cache_options", "check_given_images", "make_cache_plan", "note_cache_plan", "planned_cache"]

_SCANNED = 2000
_PROBED_IMAGES = 6

_PLAN = "plan.json"

_MOST_IMAGES = 10**12

_TEXT_TOKENS = 150
"""Of a conversation beside its image."""

_START_S = 8.0
"""Until the first view is encoded: processes start, torch is imported, the encoder loaded. Two cores take 9 to 13 seconds, in which they decode the
first units."""
_RAY_START_S = 8.0
"""More where Ray has to start as well: 8 to 10 on two cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSizes:
    """Images to be cached, by their sizes."""

    num_images: int
    sizes_px: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    """How many images each size stands for."""
    by_source: dict[str, float]
    """Images of each of the dataset's sources; empty where that is not known."""
    source: str
    """For people: where they come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCache:
    """What a run expected of its cache before it began."""

    num_views: int
    total_bytes: int
    seconds: float | None
    """Wall seconds of the stage; None where another machine does the work."""
    hardware: str
    text: CachePlanText | None = None
    """The whole plan; None where another machine does the work."""


def cache_options(features: FeatureSpec, rule: CalibrationRule) -> tuple[tuple[CacheOption, FeatureSpec], ...]:
    """Ways to store a cache's maps: as the recipe says, in other precisions, and without the local views.

    Args:
        features: the recipe's cache.
        rule: how int8 would be calibrated.

    Returns:
        Each with the cache that it would be; the recipe's own first.
    """
    known: tuple[Precision, ...] = ("int8", "fp16", "fp32")
    wanted: list[Precision] = [features.precision, *(precision for precision in known if precision != features.precision)]
    options = []
    for precision in wanted:
        packed_as = {"calibration": rule, "calibration_sha256": UnknownDigest("none"), "fp16_maps": features.fp16_maps}
        plain_as = {"calibration": None, "calibration_sha256": None, "fp16_maps": ()}
        stored = replace(features, precision=precision, **(packed_as if precision == "int8" else plain_as))
        option = CacheOption(
            name=precision, precision=precision, global_view_bytes=stored.view_bytes("global"), local_view_bytes=stored.view_bytes("local")
        )
        options.append((option, stored))
    if features.global_maps and features.local_maps:
        packed, stored = next(pair for pair in options if pair[0].precision == "int8")
        options.append((replace(packed, name="int8, global view only", local_view_bytes=0, holds_local=False), stored))
    return tuple(options)


def make_cache_plan(experiment: Experiment, *, images: int | None = None, size_px: tuple[int, int] | None = None, at_hand: bool = False) -> CachePlan:
    """Plan a recipe's cache. That of an `[evaluation.dataset]` is not counted, and the plan says so.

    Args:
        experiment: to be planned.
        images: so many, in place of the dataset's.
        size_px: their width and height.
        at_hand: for this machine, whatever hardware the recipe states.

    Returns:
        The plan.

    Raises:
        NothingThereError: there are no images to count, and none were given.
        SettingError: a number of images without a size, or one that cannot be.
    """
    from workers.caching.sizing import file_overhead
    from workers.probing import probe_machine

    check_given_images(images, size_px)
    features, recipe = experiment.features, experiment.file.recipe
    samples = None if images is not None else _built_samples(experiment)
    sizes = _sizes(experiment, samples, images, size_px)
    histogram = _local_views(features, sizes)
    num_local = round(sum(count * weight for count, weight in histogram.items()))
    typical = _typical(sizes)
    stated = None if at_hand else recipe.plan.cluster
    machine = probe_machine(
        features,
        _readable(experiment.store, samples or []),
        typical,
        device=experiment.execution.device,
        cores=experiment.execution.num_cpus,
        batch_views=experiment.execution.encode_batch_views,
        encodes=stated is None,
    )
    deepest = features.deepest_layer
    view_flops = encoder_flops(features.encoder, deepest)
    prices = recipe.plan.prices.prices()
    local = experiment.store.local_path() is not None
    if stated is not None:
        cluster = stated.cluster(view_flops, features.compute)
        products_flop_s = stated.devices * stated.peak_train_tflops(features.compute) * 1e12 * stated.device_share
        hardware = (
            f"{count_text(stated.devices, 'device')} of {stated.peak_tflops(features.compute):g} TFLOP/s in {features.compute} at "
            f"{stated.device_share:.0%}, {count_text(stated.cores, 'core')}, {stated.network_gbit_s:g} Gbit/s at {stated.network_share:.0%}; "
            "decoding as probed here"
        )
    else:
        assert machine.views_per_s is not None
        on_cpu = machine.device == "cpu"
        # Of CPUs all cores were probed, of GPUs one: each process of ours has one of its own.
        encoding, training = (1, 1) if on_cpu else (experiment.execution.encoder_actors, experiment.execution.train_workers)
        products_flop_s = training * machine.views_per_s * view_flops
        cluster = Cluster(
            devices=encoding,
            views_per_s=encoding * machine.views_per_s,
            cores=machine.cores,
            network_bytes_per_s=None,
            shares_cores=on_cpu,
        )
        kind = "this encoder" if machine.real_weights else "a stand-in of its shape, whose weights are not here"
        far = "" if local else "; its network is not known and not counted, [plan.cluster] states one"
        devices = machine.device if encoding == 1 else f"{encoding} times {machine.device}"
        writing = f", writing {WRITTEN_BYTES_CORE_S / 1e6:g} MB/s in between," if on_cpu else ","
        hardware = f"this machine, {devices} with {count_text(machine.cores, 'core')}{writing} probed with {kind}{far}"
        if local:  # this machine's disk is paid for already
            prices = replace(prices, storage_gb_month=0.0, put_thousand=0.0, get_thousand=0.0)
    on_gpu = stated is not None or machine.device != "cpu"
    costs = []
    options = cache_options(features, recipe.calibration_rule())
    measured = {stored.precision: file_overhead(stored, *typical) for _, stored in options}
    for option, stored in options:
        overhead_bytes, file_bytes = _overhead(option, measured[stored.precision])
        costs.append(
            cache_costs(
                option,
                num_images=sizes.num_images,
                num_local_views=num_local,
                prepare_core_s=machine.prepare_core_s,
                overhead_bytes=overhead_bytes,
                file_bytes=file_bytes,
                unit_bytes=experiment.execution.unit_bytes(on_gpu=on_gpu),
                most_images=_most_images(experiment, 1 + (num_local / sizes.num_images if option.holds_local else 0), on_gpu=on_gpu),
                months=recipe.plan.months,
                cluster=cluster,
                prices=prices,
            )
        )
    passes, passes_from = _passes(experiment, sizes, num_local / sizes.num_images)
    return CachePlan(
        recipe=recipe.name,
        encoder=features.encoder.model,
        num_images=sizes.num_images,
        images_from=sizes.source,
        is_made=images is None and experiment.caches and experiment.record("cache-features", features) is not None,
        not_counted=_not_counted(experiment),
        on_disk=stated is None and local,
        local_views={count: histogram[count] for count in sorted(histogram)},
        num_views=sizes.num_images + num_local,
        view_gflop=view_flops / 1e9,
        passes=passes,
        passes_from=passes_from,
        months=recipe.plan.months,
        hardware=hardware,
        prepare_core_s=machine.prepare_core_s,
        views_per_s=cluster.views_per_s,
        train_images_per_s=products_flop_s / _train_flops(experiment, num_local / sizes.num_images),
        options=tuple(costs),
        # What leaves local views out is shown for comparison: a recipe cannot choose it.
        verdict=recommend([cost for cost in costs if cost.option.holds_local], passes),
    )


def note_cache_plan(experiment: Experiment) -> None:
    """Put on record what the cache is expected to take, unless it is begun: the report holds it against what it took.

    Args:
        experiment: about to cache; its dataset is built.
    """
    from workers.runtime import ray_is_running

    folder = _run_folder(experiment)
    if any(experiment.store.exists(f"{folder}/{name}") for name in ("units.json", "COMMITTED.json", _PLAN)):
        return
    if "RAY_ADDRESS" in os.environ:
        planned = _plan_bytes(experiment)
    else:
        plan = make_cache_plan(experiment, at_hand=True)
        own = plan.options[0]
        planned = PlannedCache(
            num_views=plan.num_views,
            total_bytes=own.total_bytes,
            seconds=own.hours.total * 3600 + _START_S + (0.0 if ray_is_running() else _RAY_START_S),
            hardware=plan.hardware,
            text=plan_text(plan),
        )
    experiment.store.create_json(f"{folder}/{_PLAN}", to_json(planned))


def _plan_bytes(experiment: Experiment) -> PlannedCache:
    """Of a cache that another cluster makes: this machine says nothing of how fast that is, and may not even be able to run the encoder."""
    from workers.caching.sizing import file_overhead

    features = experiment.features
    sizes = _sizes(experiment, _built_samples(experiment), None, None)
    num_local = round(sum(count * weight for count, weight in _local_views(features, sizes).items()))
    option, stored = cache_options(features, experiment.file.recipe.calibration_rule())[0]
    overhead_bytes, file_bytes = _overhead(option, file_overhead(stored, *_typical(sizes)))
    total_bytes, _ = cache_bytes(
        option,
        num_images=sizes.num_images,
        num_local_views=num_local,
        overhead_bytes=overhead_bytes,
        file_bytes=file_bytes,
        unit_bytes=experiment.execution.unit_bytes(on_gpu=True),
        most_images=_most_images(experiment, 1 + num_local / sizes.num_images, on_gpu=True),
    )
    return PlannedCache(num_views=sizes.num_images + num_local, total_bytes=total_bytes, seconds=None, hardware="a cluster of somebody else's")


def _local_views(features: FeatureSpec, sizes: ImageSizes) -> dict[int, float]:
    """How many images have so many local views."""
    histogram: defaultdict[int, float] = defaultdict(float)
    for (width_px, height_px), weight in zip(sizes.sizes_px, sizes.weights, strict=True):
        grid = plan_views(width_px, height_px, features.encoder.view_px, features.views)
        histogram[grid.rows * grid.columns if features.local_maps else 0] += weight
    return dict(histogram)


def _train_flops(experiment: Experiment, local_views: float) -> float:
    """Of an image's conversation forward and back through a language model that is frozen: two for each of its parameters and tokens, both ways."""
    from workers.language_models import planned_shape

    connector, num_patches = experiment.connector, experiment.encoder.num_patches
    local = 0.0 if connector.local_branch is None else local_views * connector.local_branch.view_tokens(num_patches)
    tokens = connector.global_tokens(num_patches) + local + _TEXT_TOKENS
    return 4.0 * planned_shape(experiment.language_model.model).num_parameters * tokens


def _most_images(experiment: Experiment, views: float, *, on_gpu: bool) -> int:
    """Images of a unit, by what their views weigh as they travel."""
    return int(experiment.execution.unit_pixel_bytes(on_gpu=on_gpu) // (views * 3 * experiment.encoder.view_px**2))


def _overhead(option: CacheOption, measured: "Mapping[Branch, FileOverhead]") -> tuple[float, float]:
    """Bytes beside the maps, for an image and for a unit."""
    parts = [part for branch, part in measured.items() if option.holds_local or branch == "global"]
    return sum(part.image_bytes for part in parts), sum(part.file_bytes for part in parts)


def _readable(store: Store, samples: "Sequence[Sample]") -> list[bytes]:
    """A few images' files, spread over all; those that cannot be used are the quarantine's business, and the others tell how long decoding takes."""
    found = []
    for sample in samples[:: max(1, len(samples) // _PROBED_IMAGES)][:_PROBED_IMAGES]:
        try:
            data = store.read_reference(sample.image_path)
            decode_image(data)
        except (ImageError, StorageError) as error:
            if image_reason(error) is None:
                raise
            continue
        found.append(data)
    return found


def planned_cache(experiment: Experiment) -> PlannedCache | None:
    """What was on record before the cache was begun, if anything was.

    Args:
        experiment: whose cache.
    """
    path = f"{_run_folder(experiment)}/{_PLAN}"
    return from_json(PlannedCache, experiment.store.read_json(path)) if experiment.store.exists(path) else None


def _run_folder(experiment: Experiment) -> str:
    return f"runs/cache-features/{fingerprint(experiment.features)[:16]}"


def _not_counted(experiment: Experiment) -> str:
    """What the recipe caches besides."""
    return "" if experiment.file.recipe.evaluation.dataset is None else "the images of [evaluation.dataset], which are cached as well"


def _typical(sizes: ImageSizes) -> tuple[int, int]:
    """The size in the middle, by pixels: half of the images have fewer."""
    ordered = sorted(zip(sizes.sizes_px, sizes.weights, strict=True), key=lambda pair: pair[0][0] * pair[0][1])
    left = sum(sizes.weights) / 2
    for size_px, weight in ordered:
        left -= weight
        if left <= 0:
            return size_px
    return ordered[-1][0]


def check_given_images(images: int | None, size_px: tuple[int, int] | None) -> None:
    """Look whether there can be so many images of a size, before anything else is looked at.

    Args:
        images: their number.
        size_px: their width and height.

    Raises:
        SettingError: one without the other, or one that cannot be.
    """
    if (images is None) != (size_px is None):
        raise SettingError("plan: --images and --size go together, such as --images 1200000 --size 1024x768; give both or neither")
    if images is not None and size_px is not None:
        if not 1 <= images <= _MOST_IMAGES:
            raise SettingError(
                f"plan --images: found {images if abs(images) < 10**15 else 'a number of more than 15 digits'}; allowed: 1 to {_MOST_IMAGES:,}"
            )
        found, limits = f"plan --size: found {size_px[0]}x{size_px[1]}", DEFAULT_LIMITS
        if size_px[0] * size_px[1] > limits.max_pixels:
            raise SettingError(f"{found}; images of more than {limits.max_pixels:,} pixels are refused")
        if max(size_px) > limits.max_aspect * min(size_px):
            raise SettingError(f"{found}; images of which one side is more than {limits.max_aspect:g} times the other are refused")


def _sizes(experiment: Experiment, samples: "list[Sample] | None", images: int | None, size_px: tuple[int, int] | None) -> ImageSizes:
    if images is not None and size_px is not None:
        return ImageSizes(num_images=images, sizes_px=(size_px,), weights=(float(images),), by_source={}, source="as given")
    if samples is not None:
        if not samples:
            raise NothingThereError("plan: the built dataset is text alone, of which nothing is cached")
        found = Counter((sample.width_px, sample.height_px) for sample in samples)
        return ImageSizes(
            num_images=len(samples),
            sizes_px=tuple(found),
            weights=tuple(float(number) for number in found.values()),
            by_source={label: float(number) for label, number in Counter(sample.source for sample in samples).items()},
            source="the built dataset",
        )
    trained = {source.records for source in experiment.dataset.sources if isinstance(source, LlavaJsonSourceSpec)}
    if unreadable := [part.what for part in experiment.missing if part.records in trained]:
        raise NothingThereError(
            f"plan: {', '.join(unreadable)} cannot be read, so there are no images to count; give --images N --size WxH, or put them there"
        )
    from workers.dataset.scanning import scan_images

    scanned = scan_images(experiment.dataset, _SCANNED)
    if not scanned.num_images:
        raise NothingThereError("plan: none of the dataset's images can be read; give --images N --size WxH, or put them there")
    looked = f"headers of {scanned.num_looked_at} images" if scanned.num_looked_at else "pictures to be drawn"
    return ImageSizes(
        num_images=scanned.num_images,
        sizes_px=scanned.sizes_px,
        weights=scanned.weights,
        by_source=scanned.by_source,
        source=f"{looked}{f', {scanned.num_unreadable} of them unreadable' if scanned.num_unreadable else ''}",
    )


def _built_samples(experiment: Experiment) -> "list[Sample] | None":
    """One for each image, where the dataset is built."""
    if experiment.record("build-dataset", experiment.dataset) is None:
        return None
    from workers.dataset.samples import read_images

    return read_images(experiment.store, fingerprint(experiment.dataset))


def _passes(experiment: Experiment, sizes: ImageSizes, local_views: float) -> tuple[float, str]:
    """Training passes over the cache, and where the number comes from: a phase that sees global views alone of half the images is no whole pass."""
    recipe = experiment.file.recipe
    if recipe.plan.passes is not None:
        return recipe.plan.passes, "plan.passes"
    labels = recipe.source_labels
    train = sizes.num_images * (1 - experiment.dataset.held_out_fraction)
    seen_views = 0.0
    for phase in recipe.schedule.phases:
        named = phase.source_labels(labels) or labels
        # Of images that were given by their number alone, every source has as many.
        share = sum(sizes.by_source.get(label, 0.0) for label in named) / sizes.num_images if sizes.by_source else len(named) / len(labels)
        images = phase.epochs * train * share if phase.epochs is not None else (phase.steps or 0) * phase.batch_size
        mix = phase.mix()
        shows_global, shows_local = mix.both + mix.global_only, mix.both + mix.local_only
        seen_views += images * (shows_global + shows_local * local_views)
    each, seeds = seen_views / (sizes.num_images * (1 + local_views)), len(recipe.seeds)
    shown = f"views that the schedule sees over those of the cache, {each:.3g}{f' for each of {seeds} seeds' if seeds > 1 else ''}"
    return each * seeds, shown
