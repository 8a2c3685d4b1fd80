"""Stage cache-features: a dataset's images -> multilayer features in a Delta table.

Ray tasks prepare views, one process per accelerator encodes and writes, this process commits. A unit's first outcome goes on record by exclusive
creation before its files are committed, so a killed, repeated or doubled run never redoes a finished unit and never disagrees with itself.
That images are gone is not believed of one process alone, nor for good: they are looked for again, and where an outage is over another plan is made.
All datasets and maps of an encoding share a table: images that are there with every map are left as they are, and of others only what they lack is
computed. Invariant at the end: every image of the dataset has every map, or is in the quarantine once. Samples without an image have no views and no
part in this.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from model.quality import MapQuality, recorded_db
from model.specs import FeatureSpec, fingerprint
from workers.caching.index import FeatureIndex, compact_index
from workers.caching.layout import BRANCHES, features_table, index_table, lock_encoding
from workers.caching.units import (
    HeldMaps,
    PreparedUnit,
    UnitJob,
    UnitOutcome,
    UnitPlan,
    UnitSize,
    feature_bytes,
    forget_plan,
    num_views,
    plan_units,
    prepare_unit,
    read_outcome,
    unit_job,
)
from workers.commits import Stage, to_json
from workers.dataset.samples import Sample, read_images
from workers.errors import CalibrationError, DiskSpaceError, IncompleteError, StoreUnavailableError
from workers.execution import ExecutionSettings, Progress
from workers.quarantine import QuarantineRow, can_be_read_now, check_budget, look_again, quarantine_table, store_reason
from workers.runtime import Cluster, encodes_on_gpu, encoding_cluster
from workers.storage import Store

__all__ = ["CacheRecord", "cache_features"]

_FEW_IMAGES, _LEAST_SNR_DB, _SNR_SLACK_DB = 16, 20.0, 3.0
"""A map of int8 is held against what the recipe asks for, less half of the rounding's power, once so many images were read back while it is stored:
which maps are stored so was decided by other images, and a blank one keeps 25 dB where others keep 40. Before that, against a tenth of the signal's
amplitude: uncalibrated maps have 17 dB."""

_READS_AT_ONCE = 16
_COMMIT_UNITS, _COMMIT_EVERY_S = 16, 10.0
_COMMIT_SHARE = 0.05
"""Of a run's time: a commit takes 3 us for every file that a table holds, 0.4 s for those of a million images in units of 64 MiB, so that commits of
as many units each would take time that grows with the square of the images."""

_DISK_MARGIN = 1.05
"""File overhead, the Delta log and a file that is being replaced."""

_WRITTEN_AT_ONCE = 2
"""Units of an encoder at most, since a cluster calls it from two threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRecord:
    """What cache-features did."""

    feature_fingerprint: str
    dataset_fingerprint: str
    encoder: str
    global_maps: tuple[str, ...]
    local_maps: tuple[str, ...]
    precision: str
    num_images: int
    """Distinct ones of the dataset: cached plus quarantined."""
    num_cached: int
    num_held: int
    """Of those, how many had every map before: of another run's making, or of this one's before it planned anew."""
    num_quarantined: int
    quarantined_by_reason: dict[str, int]
    num_global_views: int
    num_local_views: int
    num_units: int
    feature_bytes: int
    """Of these maps of these images, whoever wrote them."""
    written_bytes: int
    """Size of the files that were written for this."""
    quality: dict[str, dict[str, float]]
    """By branch and map, as `local/layer_7`: `snr_db`, `cosine` and `worst_cosine` of what was written, on the first image of every unit."""
    prepare_seconds: float
    """Summed over tasks; they run beside the encoding."""
    encode_seconds: float
    write_seconds: float
    views_per_second: float
    """Of the encoders, while they compute."""
    seconds: float


def cache_features(
    spec: FeatureSpec, store: Store, execution: ExecutionSettings, progress: Progress, *, cluster: Cluster | None = None
) -> CacheRecord:
    """Cache a dataset's features, or finish a cache that was interrupted, or find it done.

    Args:
        spec: which dataset, encoder, views and maps.
        store: where the dataset is and the cache goes.
        execution: encoder_actors, encode_batch_views, feature_unit_bytes and Ray's settings count.
        progress: told in images.
        cluster: where units run; None starts Ray.

    Returns:
        The stage's record.

    Raises:
        TableError: the dataset is not built.
        DiskSpaceError: the features do not fit.
        EncoderError: the encoder is missing or has other weights than the spec.
        ErrorBudgetError: too many images of a source were refused.
        StoreUnavailableError: the store is away, or a machine of the cluster does not see images that this process reads.
        CalibrationError: int8 keeps much less of these images than of those that were measured.
        IncompleteError: the books do not balance.
    """
    stage = Stage.open(store, "cache-features", spec)
    done = stage.committed(CacheRecord)
    if done is not None:
        return done
    store.check_writable()
    images = read_images(store, spec.dataset_fingerprint)
    with stage.attempt() as timer:
        lock_encoding(store, spec.encoding)
        books = _Books(store, spec)
        books.ensure()
        make_plan = partial(plan_units, stage, spec, images, lambda: _held(store, spec, images), partial(_unit_size, execution))
        plan = make_plan()
        outcomes = _resumed(stage, plan, books)
        if can_be_read_now(store, _refusals(outcomes)):
            forget_plan(stage)
            plan, outcomes = make_plan(), {}
        while missing := [unit for unit in plan.units if unit.number not in outcomes]:
            jobs = [unit_job(spec, store.root, unit, images) for unit in missing]
            _check_disk(store, [feature_bytes(job.spec, job.samples) for job in jobs], execution)
            progress.start("encoding images", len(images), len(images) - sum(len(job.samples) for job in jobs))
            try:
                for outcome in _encode(stage, spec, books, images, outcomes, jobs, execution, cluster):
                    progress.advance(
                        outcome.num_images + len(outcome.quarantined),
                        views_per_second=round(outcome.num_views / max(outcome.encode_seconds, 1e-9), 1),
                        quarantined=sum(len(known.quarantined) for known in outcomes.values()),
                    )
            except (KeyboardInterrupt, SystemExit):  # Ray answers SIGTERM with the latter where it was started by this stage
                books.commit()  # what is done is in the tables, for whoever looks before the next run
                raise
            finally:
                progress.finish()
            if not can_be_read_now(store, _refusals(outcomes)):
                break
            # An outage that this process met as well, and that has ended since. What can be read now is computed in this run.
            forget_plan(stage)
            plan, outcomes = make_plan(), {}
        compact_index(store, spec)
        record = _balance(stage, spec, images, plan, outcomes)
        return stage.commit(replace(record, seconds=timer.seconds))


def _unit_size(execution: ExecutionSettings) -> UnitSize:
    on_gpu = encodes_on_gpu(execution)
    return UnitSize(feature_bytes=execution.unit_bytes(on_gpu=on_gpu), pixel_bytes=execution.unit_pixel_bytes(on_gpu=on_gpu))


def _held(store: Store, spec: FeatureSpec, images: Sequence[Sample]) -> HeldMaps:
    """Which maps of the images the table has."""
    return FeatureIndex(store, spec).held(spec.branch_maps, [sample.image_sha256 for sample in images])


def _check_disk(store: Store, unit_bytes: Sequence[int], execution: ExecutionSettings) -> None:
    """Refuse units that do not fit the root, or the folder that their files pass through on the way to an object store.

    That folder is looked at on this machine alone; the encoders of somebody else's cluster have others.
    """
    planned, free = sum(unit_bytes), store.free_bytes()
    if free is not None and planned * _DISK_MARGIN > free:
        raise DiskSpaceError(
            f"the features need {planned / 2**30:.2f} GiB, but {store.root} has {free / 2**30:.2f} GiB free. Free some space, choose another --root, "
            "or cache fewer maps or images."
        )
    staged = min(planned, max(unit_bytes) * execution.encoder_actors * _WRITTEN_AT_ONCE)
    free = None if "RAY_ADDRESS" in os.environ else store.free_staging_bytes()
    if free is not None and staged * _DISK_MARGIN > free:
        raise DiskSpaceError(
            f"features on their way to {store.root} need up to {staged / 2**30:.2f} GiB in {tempfile.gettempdir()}, which has {free / 2**30:.2f} GiB "
            "free. Free some space there, or name another folder by TMPDIR."
        )


def _resumed(stage: Stage, plan: UnitPlan, books: "_Books") -> dict[int, UnitOutcome]:
    """The outcomes of a plan that are on record, entered in the books; and refusals of no others are left there."""
    refused, own = quarantine_table(stage.store), {"stage": stage.name, "key": stage.key}
    # Listed before the outcomes are, each of which is on record before it is in the books: a driver beside this one adds to both.
    held = refused.files(own)
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:  # one by one, ten thousand units take minutes from an object store
        known = pool.map(partial(read_outcome, stage.store), stage.store.list(stage.path("units")))
        outcomes = {outcome.number: outcome for outcome in known if outcome.plan == plan.name}
    named = {file.path for outcome in outcomes.values() for file in outcome.quarantine_files}
    if any(file.path not in named for file in held):
        # Of a plan that there was before, whose units were cut otherwise: whoever removed its outcomes left them, or its driver went on.
        refused.replace([], own)
    books.enter_again(outcomes.values())
    books.commit()
    return outcomes


def _refusals(outcomes: Mapping[int, UnitOutcome]) -> list[QuarantineRow]:
    return [row for outcome in outcomes.values() for row in outcome.quarantined]


class _Books:
    """The tables that outcomes are entered in, several at a time: with a commit for every unit, the logs would soon weigh more than the index.

    What is on record and not yet committed is committed by the next run.

    Args:
        store: where the tables lie.
        spec: of the cache.
    """

    def __init__(self, store: Store, spec: FeatureSpec) -> None:
        # Refusals first and features last: what is in the features table has all its rows everywhere.
        self._tables = (quarantine_table(store), index_table(store, spec.encoding), features_table(store, spec))
        self._pending: list[UnitOutcome] = []
        self._last = time.monotonic()
        self._least_s = 0.0
        """Until the next commit."""

    def ensure(self) -> None:
        """Make the tables, and the columns that they lack."""
        for table in self._tables:
            table.ensure()

    def enter(self, outcomes: Iterable[UnitOutcome]) -> None:
        """Take in outcomes that are on record."""
        self._pending += outcomes
        waited_s = time.monotonic() - self._last
        if waited_s >= self._least_s and (len(self._pending) >= _COMMIT_UNITS or waited_s > _COMMIT_EVERY_S):
            self.commit()

    def enter_again(self, outcomes: Iterable[UnitOutcome]) -> None:
        """Take in outcomes of an earlier run. Where the features are in their table the index has their rows, put together with others' by now."""
        held = {file.path for file in self._tables[-1].files()}
        for outcome in outcomes:
            is_entered = bool(outcome.files) and held.issuperset(file.path for file in outcome.files)
            self._pending.append(replace(outcome, index_files=()) if is_entered else outcome)

    def commit(self) -> None:
        """Put all that is pending into the tables."""
        files = [[file for outcome in self._pending for file in getattr(outcome, kind)] for kind in ("quarantine_files", "index_files", "files")]
        began = time.monotonic()
        for table, added in zip(self._tables, files, strict=True):
            if added:
                table.commit(added)
        self._pending, self._last = [], time.monotonic()
        self._least_s = (self._last - began) / _COMMIT_SHARE


def _encode(
    stage: Stage,
    spec: FeatureSpec,
    books: _Books,
    images: Sequence[Sample],
    outcomes: dict[int, UnitOutcome],
    jobs: Sequence[UnitJob],
    execution: ExecutionSettings,
    cluster: Cluster | None,
) -> Iterator[UnitOutcome]:
    """Run units, put each outcome on record, enter it in the books, add it to `outcomes` and tell it."""
    expected = Counter(sample.source for sample in images)
    quarantined: dict[str, list[QuarantineRow]] = {}
    quality: dict[str, MapQuality] = {}
    for known in outcomes.values():
        _add(quarantined, quality, known)
    for fresh in _run(spec, jobs, execution, cluster):
        _check_withheld(stage.store, fresh)
        _add(quarantined, quality, fresh)
        # Before the outcome is on record: after a repair the unit that broke the budget runs again.
        check_budget(quarantined, expected, execution.max_quarantined_fraction)
        _check_quality(spec, quality, len(outcomes) + 1)
        path = stage.path(f"units/unit-{fresh.number:06d}.json")
        outcome = fresh if stage.store.create_json(path, to_json(fresh)) else read_outcome(stage.store, path)
        if outcome.plan != fresh.plan:  # of a driver that goes on with a plan that was forgotten
            stage.store.write_json(path, to_json(fresh))
            outcome = fresh
        books.enter([outcome])
        outcomes[outcome.number] = outcome
        yield outcome
    books.commit()


def _check_withheld(store: Store, fresh: UnitOutcome) -> None:
    """Have images refused for good only where they cannot be read here either: a machine that lost a mount finds none, and says so fast.

    The dataset's build has read each of them. The run ends at once, and whoever tries again does so after a while: units that such a machine is given
    again would be back as fast.
    """
    for row, error in look_again(store, fresh.quarantined):
        if error is None:
            raise StoreUnavailableError(
                f"image {row.item}: the process that prepared unit {fresh.number} found it refused ({row.reason}: {row.detail}), but here it can be "
                "read. Expected every machine of the cluster to see the images; one has lost a mount or a permission, if only for a while. Run "
                "again, finished units are kept; where that does not help, look at the mounts of each machine."
            )
        if store_reason(error) is None:
            raise error


def _add(quarantined: dict[str, list[QuarantineRow]], quality: dict[str, MapQuality], outcome: UnitOutcome) -> None:
    for row in outcome.quarantined:
        quarantined.setdefault(row.source, []).append(row)
    for place, found in outcome.quality.items():
        quality[place] = quality.get(place, MapQuality()) + found


def _check_quality(spec: FeatureSpec, found: Mapping[str, MapQuality], num_images: int) -> None:
    """Stop a cache of int8 that becomes worse than the recipe allows: then its images are others than those that the calibration measured."""
    if spec.calibration is None:
        return
    asked_db = spec.calibration.min_snr_db - _SNR_SLACK_DB
    least_db = asked_db if num_images >= _FEW_IMAGES else min(asked_db, _LEAST_SNR_DB)
    for branch, item in spec.branch_maps:
        place = item.place(branch)
        quality = found.get(place, MapQuality())
        if spec.stored_as(branch, item) == "int8" and quality.num_tokens and quality.snr_db < least_db:
            raise CalibrationError(
                f"cache-features: the map {place} is stored with {quality.snr_db:.1f} dB of signal over rounding, below {least_db:g} on "
                f"{quality.num_tokens} tokens: these images are unlike those that the calibration measured. Raise features.calibration_images, so "
                "that it sees more of them, allow less by features.min_snr_db, or store with features.precision = 'fp16'."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _UnitEncoderFactory:
    """Makes a UnitEncoder in the process that will use it, and imports torch there alone: an import takes a core for seconds."""

    spec: FeatureSpec
    root: str
    execution: ExecutionSettings
    threads: int | None

    def __call__(self) -> Callable[[PreparedUnit], UnitOutcome]:
        """A fresh encoder."""
        from workers.caching.encode import UnitEncoder

        return UnitEncoder(self.spec, self.root, self.execution, self.threads)


def _run(spec: FeatureSpec, jobs: Sequence[UnitJob], execution: ExecutionSettings, cluster: Cluster | None) -> Iterator[UnitOutcome]:
    with encoding_cluster(execution, cluster) as place:
        settled = place.execution
        yield from place.cluster.pipeline(
            prepare_unit,
            _UnitEncoderFactory(spec=spec, root=jobs[0].root, execution=settled, threads=place.encoder_threads),
            (replace(job, threads=place.prepare_threads) for job in jobs),
            finishers=settled.encoder_actors,
            in_flight=settled.encoded_units_in_flight,
            prepare_cpus=place.prepare_cpus,
        )


def _balance(stage: Stage, spec: FeatureSpec, images: Sequence[Sample], plan: UnitPlan, outcomes: dict[int, UnitOutcome]) -> CacheRecord:
    """Prove that nothing is missing, from the tables themselves."""
    store = stage.store
    rows = _refusals(outcomes)
    refused = {row.bytes_sha256 for row in rows}
    in_quarantine = sum(file.num_rows for file in quarantine_table(store).files({"stage": stage.name, "key": stage.key}))
    if in_quarantine != len(rows) or len(refused) != len(rows) or len(outcomes) != len(plan.units):
        raise IncompleteError(
            f"cache {stage.key}: {len(outcomes)} of {len(plan.units)} units are done with {len(rows)} refusals of {len(refused)} images, "
            f"the quarantine holds {in_quarantine}"
        )
    cached = [sample for sample in images if sample.image_sha256 not in refused]
    index = FeatureIndex(store, spec)
    table = features_table(store, spec)
    held = index.held(spec.branch_maps, [sample.image_sha256 for sample in cached])
    # Of another dataset's images there may be such files for a while: its run is between its two commits, or was killed there.
    unnamed = index.files() - {file.path for file in table.files()}
    lost = sorted(index.images_in(unnamed, spec.branch_maps, [sample.image_sha256 for sample in cached]))
    if lost:
        raise IncompleteError(
            f"{store.url(table.path)}: the index tells of {len(lost)} files that the table does not hold, with images of this dataset; first "
            f"{lost[0]}. Run `loupe verify --repair`, which makes the index anew out of the files that the table holds, and then again."
        )
    for place, there in held.items():
        if not there.all():
            raise IncompleteError(
                f"{store.url(table.path)}: expected the map {place} of {len(cached)} images ({len(refused)} of {len(images)} are in quarantine), "
                f"the table holds it of {int(there.sum())}"
            )
    quality: dict[str, MapQuality] = {}
    for outcome in outcomes.values():
        _add({}, quality, outcome)
    counts = {branch: sum(num_views(spec, sample, branch) for sample in cached) for branch in BRANCHES}
    encode_seconds = sum(outcome.encode_seconds for outcome in outcomes.values())
    return CacheRecord(
        feature_fingerprint=fingerprint(spec),
        dataset_fingerprint=spec.dataset_fingerprint,
        encoder=spec.encoder.model,
        global_maps=tuple(item.name for item in spec.global_maps),
        local_maps=tuple(item.name for item in spec.local_maps),
        precision=spec.precision,
        num_images=len(images),
        num_cached=len(cached),
        num_held=plan.num_held,
        num_quarantined=len(rows),
        quarantined_by_reason=dict(sorted(Counter(row.reason for row in rows).items())),
        num_global_views=counts["global"],
        num_local_views=counts["local"],
        num_units=len(plan.units),
        feature_bytes=feature_bytes(spec, cached),
        written_bytes=sum(file.size_bytes for outcome in outcomes.values() for file in outcome.files),
        quality={
            place: {"snr_db": recorded_db(found), "cosine": found.cosine, "worst_cosine": found.worst_cosine} for place, found in quality.items()
        },
        prepare_seconds=sum(outcome.prepare_seconds for outcome in outcomes.values()),
        encode_seconds=encode_seconds,
        write_seconds=sum(outcome.write_seconds for outcome in outcomes.values()),
        views_per_second=sum(outcome.num_views for outcome in outcomes.values()) / max(encode_seconds, 1e-9),
        seconds=0.0,
    )
