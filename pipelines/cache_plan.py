"""`loupe plan`: what a recipe's cache will take, before anything is spent on it.

Sizes come from the built dataset, from the headers of its sources' images, or from the command line; rates from a short probe of this machine, or
from the hardware that the recipe states; bytes beside the maps from a file written as the cache writes its own. `pipelines.costs` does the
arithmetic.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from model.architectures import encoder_flops
from model.errors import ImageError
from model.images import DEFAULT_LIMITS, decode_image
from model.specs import BranchMix, CalibrationRule, FeatureSpec, Precision, UnknownDigest, deepest_layer, fingerprint
from model.views import plan_views
from pipelines.cache_plan_text import CachePlan, CachePlanText, TrainRate, plan_text
from pipelines.costs import WRITTEN_BYTES_CORE_S, CacheCosts, CacheOption, Cluster, TrainMode, Work, cache_bytes, cache_costs, recommend
from pipelines.errors import NothingThereError, SettingError
from pipelines.stages import Experiment
from pipelines.wording import count_text, number_text
from workers.commits import from_json, to_json
from workers.dataset.spec import LlavaJsonSourceSpec, source_label
from workers.errors import StorageError
from workers.quarantine import image_reason
from workers.storage import Store

if TYPE_CHECKING:
    from model.views import Branch
    from workers.caching.sizing import FileOverhead
    from workers.dataset.samples import Sample
    from workers.probing import ProbedMachine

__all__ = ["ImageSizes", "PlannedCache", "cache_options", "check_given_images", "make_cache_plan", "note_cache_plan", "planned_cache"]

_SCANNED = 2000
_PROBED_IMAGES = 6

_PLAN = "plan.json"

_MOST_IMAGES = 10**12

_MODES: tuple[TrainMode, ...] = get_args(TrainMode)

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
    references: tuple[str, ...] = ()
    """Where those lie that can be looked at."""

    @property
    def mean_pixels(self) -> float:
        """Of an image."""
        pixels = sum(width_px * height_px * weight for (width_px, height_px), weight in zip(self.sizes_px, self.weights, strict=True))
        return pixels / sum(self.weights)

    @property
    def typical_px(self) -> tuple[int, int]:
        """The size that comes nearest to the mean, by pixels: what decoding all images takes is a matter of the mean."""
        mean_pixels = self.mean_pixels  # once: a dataset may have as many sizes as images
        return min(self.sizes_px, key=lambda size_px: abs(size_px[0] * size_px[1] - mean_pixels))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCache:
    """What a run expected of its cache before it began."""

    recipe: str = ""
    """Which one it was; others may use the same cache."""
    num_views: int
    total_bytes: int
    seconds: float | None
    """Wall seconds of the stage; None where another machine does the work."""
    hardware: str
    text: CachePlanText | None = None
    """The whole plan; None where another machine does the work."""


def cache_options(features: FeatureSpec, rule: CalibrationRule, *, global_alone: bool = False) -> tuple[tuple[CacheOption, FeatureSpec], ...]:
    """Ways to store a cache's maps: as the recipe says, in other precisions, and without the local views (`features.source = "global_cached"`).

    Args:
        features: what training sees.
        rule: how int8 would be calibrated.
        global_alone: whether the recipe stores the global views' maps alone.

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
        alone = [
            (replace(option, name=f"{option.name}, global view only", local_view_bytes=0, holds_local=False), stored) for option, stored in options
        ]
        own = alone[:1] if global_alone else []
        options = [*own, *options, *(pair for pair in alone if pair not in own and pair[0].precision == "int8")]
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
    from workers.caching.layout import BRANCHES
    from workers.caching.sizing import file_overhead
    from workers.probing import probe_machine

    check_given_images(images, size_px)
    features, recipe = experiment.features, experiment.file.recipe
    samples = None if images is not None else _built_samples(experiment)
    sizes = _sizes(experiment, samples, images, size_px)
    histogram = _local_views(features, sizes)
    num_local = round(sum(count * weight for count, weight in histogram.items()))
    typical_px = sizes.typical_px
    stated = None if at_hand else recipe.plan.cluster
    execution = experiment.execution
    machine = probe_machine(
        features,
        _readable(experiment.store, sizes.references),
        typical_px,
        sizes.mean_pixels,
        device=execution.device,
        cores=execution.num_cpus,
        encoder_cores=None if execution.encoder_threads is None else execution.encoder_threads * execution.encoder_actors,
        batch_views=execution.encode_batch_views,
        encodes=stated is None,
    )
    deepest = {branch: deepest_layer(features.maps(branch)) for branch in BRANCHES if features.maps(branch)}
    view_flops = {branch: encoder_flops(features.encoder, layer) for branch, layer in deepest.items()}
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
        cluster, products_flop_s, hardware = _at_hand(experiment, machine, view_flops)
    on_gpu = stated is not None or machine.device != "cpu"
    num_views = sizes.num_images + num_local
    passes, passes_from, shown = _passes(experiment, sizes, num_local / sizes.num_images)
    work = Work(
        num_images=sizes.num_images,
        num_local_views=num_local,
        prepare_core_s=machine.prepare_core_s,
        num_fetched=_num_fetched(experiment, sizes),
        file_bytes=machine.file_bytes,
        num_calibrated=min(recipe.calibration_rule().num_images, sizes.num_images),
        shown=shown,
    )
    costs = []
    options = cache_options(features, recipe.calibration_rule(), global_alone=_global_alone(experiment))
    measured = {stored.precision: file_overhead(stored, *typical_px) for _, stored in options}
    for option, stored in options:
        overhead_bytes, file_bytes = _overhead(option, measured[stored.precision])
        costs.append(
            cache_costs(
                option,
                work,
                overhead_bytes=overhead_bytes,
                file_bytes=file_bytes,
                unit_bytes=execution.unit_bytes(on_gpu=on_gpu),
                most_images=_most_images(experiment, 1 + (num_local / sizes.num_images if option.holds_local else 0), on_gpu=on_gpu),
                months=recipe.plan.months,
                cluster=cluster,
                prices=recipe.plan.prices.prices(),
                on_disk=local and stated is None,  # this machine's, which is paid for already
            )
        )
    return CachePlan(
        recipe=recipe.name,
        encoder=features.encoder.model,
        num_images=sizes.num_images,
        images_from=sizes.source,
        is_made=images is None and experiment.caches and experiment.record("cache-features", experiment.cache) is not None,
        not_counted=_not_counted(experiment),
        on_disk=stated is None and local,
        local_views={count: histogram[count] for count in sorted(histogram)},
        num_views=num_views,
        view_gflop={branch: flops / 1e9 for branch, flops in view_flops.items()},
        passes=passes,
        passes_from=passes_from,
        months=recipe.plan.months,
        hardware=hardware,
        prepare_core_s=machine.prepare_core_s,
        prepared=f"a made-up photograph of {typical_px[0]} x {typical_px[1]} px" if machine.made_up else "a few of its own",
        views_per_s=num_views / (costs[0].hours.encode * 3600),
        num_calibrated=work.num_calibrated,
        train_rates=_train_rates(experiment, products_flop_s, num_local / sizes.num_images, costs),
        options=tuple(costs),
        verdict=recommend(costs, passes),
    )


def _at_hand(experiment: Experiment, machine: "ProbedMachine", view_flops: "Mapping[Branch, int]") -> tuple[Cluster, float, str]:
    """This machine, how many operations a second training has of it, and what to call it."""
    assert machine.views_per_s is not None
    assert machine.products_flop_s is not None
    execution = experiment.execution
    on_cpu = machine.device == "cpu"
    # Of CPUs all cores were probed, of GPUs one: each process of ours has one of its own.
    encoding, training = (1, 1) if on_cpu else (execution.encoder_actors, execution.train_workers)
    flop_s = encoding * machine.views_per_s * view_flops[machine.branch]
    cluster = Cluster(
        devices=encoding,
        views_per_s={branch: flop_s / flops for branch, flops in view_flops.items()},
        cores=machine.cores,
        encoders=execution.encoder_actors,
        network_bytes_per_s=None,
        shares_cores=on_cpu,
    )
    kind = "this encoder" if machine.real_weights else "a stand-in of its shape, whose weights are not here"
    far = "" if experiment.store.local_path() is not None else "; its network is not known and not counted, [plan.cluster] states one"
    devices = machine.device if encoding == 1 else f"{encoding} times {machine.device}"
    writing = f", writing {WRITTEN_BYTES_CORE_S * execution.encoder_actors / 1e6:g} MB/s in between," if on_cpu else ","
    hardware = f"this machine, {devices} with {count_text(machine.cores, 'core')}{writing} probed with {kind}{far}"
    return cluster, training * machine.products_flop_s, hardware


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
            recipe=plan.recipe,
            num_views=plan.num_views if own.option.holds_local else plan.num_images,
            total_bytes=own.total_bytes,
            # Calibrating is a stage of its own.
            seconds=(own.hours.total - own.hours.calibrate) * 3600 + _START_S + (0.0 if ray_is_running() else _RAY_START_S),
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
    option, stored = cache_options(features, experiment.file.recipe.calibration_rule(), global_alone=_global_alone(experiment))[0]
    overhead_bytes, file_bytes = _overhead(option, file_overhead(stored, *sizes.typical_px))
    total_bytes, _ = cache_bytes(
        option,
        num_images=sizes.num_images,
        num_local_views=num_local,
        overhead_bytes=overhead_bytes,
        file_bytes=file_bytes,
        unit_bytes=experiment.execution.unit_bytes(on_gpu=True),
        most_images=_most_images(experiment, 1 + (num_local / sizes.num_images if option.holds_local else 0), on_gpu=True),
    )
    return PlannedCache(
        recipe=experiment.file.recipe.name,
        num_views=sizes.num_images + (num_local if option.holds_local else 0),
        total_bytes=total_bytes,
        seconds=None,
        hardware="a cluster of somebody else's",
    )


def _local_views(features: FeatureSpec, sizes: ImageSizes) -> dict[int, float]:
    """How many images have so many local views."""
    histogram: defaultdict[int, float] = defaultdict(float)
    for (width_px, height_px), weight in zip(sizes.sizes_px, sizes.weights, strict=True):
        grid = plan_views(width_px, height_px, features.encoder.view_px, features.views)
        histogram[grid.rows * grid.columns if features.local_maps else 0] += weight
    return dict(histogram)


def _train_rates(experiment: Experiment, flop_s: float, local_views: float, costs: Sequence[CacheCosts]) -> tuple[TrainRate, ...]:
    """Of what phases show.

    An image's conversation goes forward and back through a language model that is frozen: two operations for each parameter and token, both ways.
    """
    from workers.language_models import planned_shape

    connector, num_patches = experiment.connector, experiment.encoder.num_patches
    of_local = 0.0 if connector.local_branch is None else local_views * connector.local_branch.view_tokens(num_patches)
    of_global = connector.global_tokens(num_patches)
    num_parameters = planned_shape(experiment.language_model.model).num_parameters
    mixes = [_shares(phase.mix()) for phase in experiment.file.recipe.schedule.phases]
    shown = [mode for mode in _MODES if any(shares[mode] > 0 for shares in mixes)]
    rates = []
    for mode in shown or _MODES:
        tokens = (of_global if mode != "local" else 0) + (of_local if mode != "global" else 0) + _TEXT_TOKENS
        images_per_s = flop_s / (4 * num_parameters * tokens)
        read = {
            cost.option.name: images_per_s
            * ((cost.option.global_view_bytes if mode != "local" else 0) + (local_views * cost.option.local_view_bytes if mode != "global" else 0))
            for cost in costs
        }
        rates.append(TrainRate(mode=mode, images_per_s=images_per_s, read_bytes_per_s=read))
    return tuple(rates)


def _shares(mix: BranchMix) -> dict[TrainMode, float]:
    """Which share of a phase's samples is shown what; blind ones are shown nothing."""
    return {"both": mix.both, "global": mix.global_only, "local": mix.local_only}


def _num_fetched(experiment: Experiment, sizes: ImageSizes) -> float:
    """Images that lie in an object store: drawn ones in the root, others where their source says."""
    sources = experiment.dataset.sources
    # Of images that were given by their number alone, every source has as many.
    counts = {
        source_label(source): sizes.by_source.get(source_label(source), 0.0) if sizes.by_source else sizes.num_images / len(sources)
        for source in sources
    }
    stores = {source_label(source): Store(source.images) if isinstance(source, LlavaJsonSourceSpec) else experiment.store for source in sources}
    return sum(number for label, number in counts.items() if stores[label].local_path() is None)


def _most_images(experiment: Experiment, views: float, *, on_gpu: bool) -> int:
    """Images of a unit, by what their views weigh as they travel."""
    return int(experiment.execution.unit_pixel_bytes(on_gpu=on_gpu) // (views * 3 * experiment.encoder.view_px**2))


def _overhead(option: CacheOption, measured: "Mapping[Branch, FileOverhead]") -> tuple[float, float]:
    """Bytes beside the maps, for an image and for a unit."""
    parts = [part for branch, part in measured.items() if option.holds_local or branch == "global"]
    return sum(part.image_bytes for part in parts), sum(part.file_bytes for part in parts)


def _readable(store: Store, references: Sequence[str]) -> list[bytes]:
    """A few images' files, spread over all; those that cannot be used are the quarantine's business, and the others tell how long decoding takes."""
    found = []
    for reference in references[:: max(1, len(references) // _PROBED_IMAGES)][:_PROBED_IMAGES]:
        try:
            data = store.read_reference(reference)
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
    return f"runs/cache-features/{fingerprint(experiment.cache)[:16]}"


def _global_alone(experiment: Experiment) -> bool:
    return experiment.cache != experiment.features


def _not_counted(experiment: Experiment) -> str:
    """What the recipe caches besides."""
    return "" if experiment.file.recipe.evaluation.dataset is None else "the images of [evaluation.dataset], which are cached as well"


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
            references=tuple(sample.image_path for sample in samples),
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
        references=scanned.references,
        source=f"{looked}{f', {scanned.num_unreadable} of them unreadable' if scanned.num_unreadable else ''}",
    )


def _built_samples(experiment: Experiment) -> "list[Sample] | None":
    """One for each image, where the dataset is built."""
    if experiment.record("build-dataset", experiment.dataset) is None:
        return None
    from workers.dataset.samples import read_images

    return read_images(experiment.store, fingerprint(experiment.dataset))


def _passes(experiment: Experiment, sizes: ImageSizes, local_views: float) -> tuple[float, str, dict[TrainMode, float]]:
    """Training passes over all views, where the number comes from, and how often one of them shows every image in each mode.

    A phase that sees global views alone of half the images is no whole pass.
    """
    recipe = experiment.file.recipe
    if recipe.plan.passes is not None:
        return recipe.plan.passes, "plan.passes", {"both": 1.0}
    labels = recipe.source_labels
    train = sizes.num_images * (1 - experiment.dataset.held_out_fraction)
    seen = dict.fromkeys(_MODES, 0.0)
    for phase in recipe.schedule.phases:
        named = phase.source_labels(labels) or labels
        # Of images that were given by their number alone, every source has as many.
        share = sum(sizes.by_source.get(label, 0.0) for label in named) / sizes.num_images if sizes.by_source else len(named) / len(labels)
        images = phase.epochs * train * share if phase.epochs is not None else (phase.steps or 0) * phase.batch_size
        for mode, part in _shares(phase.mix()).items():
            seen[mode] += images * part / sizes.num_images
    views: dict[TrainMode, float] = {"both": 1 + local_views, "global": 1.0, "local": local_views}
    each, seeds = sum(seen[mode] * views[mode] for mode in seen) / (1 + local_views), len(recipe.seeds)
    told = f"views that the schedule sees over those of the cache, {number_text(each)}{f' for each of {seeds} seeds' if seeds > 1 else ''}"
    return each * seeds, told, {mode: times / each for mode, times in seen.items()} if each else {"both": 1.0}
