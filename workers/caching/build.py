"""Stage cache-features: a dataset's images -> multilayer features in a Delta table.

Ray tasks prepare views, one process per accelerator encodes and writes, this process commits. A unit's first outcome goes on record by exclusive
creation before its files are committed, so a killed, repeated or doubled run never redoes a finished unit and never disagrees with itself.
Invariant at the end: every image of the dataset is in the table once per view, or in the quarantine once. Samples without an image have no views and
no part in this.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from model.quality import MapQuality, recorded_db
from model.specs import FeatureSpec, fingerprint
from workers.caching.units import BRANCHES, UnitJob, UnitOutcome, UnitPlan, feature_bytes, features_table, num_views, plan_units, prepare_unit
from workers.commits import Stage, from_json, to_json
from workers.dataset.samples import Sample, read_samples
from workers.errors import CalibrationError, DiskSpaceError, IncompleteError
from workers.execution import ExecutionSettings, Progress
from workers.quarantine import QuarantineRow, check_budget, quarantine_table
from workers.runtime import Cluster, encoding_cluster
from workers.storage import Store
from workers.tables import Table

__all__ = ["CacheRecord", "cache_features"]

LEAST_SNR_DB = 20.0
"""Of int8, over the images that were read back: a tenth of the signal's amplitude. Calibrated maps have some 40 dB, uncalibrated ones 17."""

_DISK_MARGIN = 1.05
"""File overhead, the Delta log and a file that is being replaced."""


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
    """Images of the dataset: cached plus quarantined."""
    num_cached: int
    num_quarantined: int
    quarantined_by_reason: dict[str, int]
    num_global_views: int
    num_local_views: int
    num_units: int
    feature_bytes: int
    """Size of the table's files."""
    quality: dict[str, dict[str, float]]
    """By branch and map, as `local/layer_7`: `snr_db`, `cosine` and `worst_cosine` of what is stored, on the first image of every unit."""
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
        CalibrationError: int8 keeps much less of these images than of those that were measured.
        IncompleteError: the books do not balance.
    """
    stage = Stage.open(store, "cache-features", spec)
    done = stage.committed(CacheRecord)
    if done is not None:
        return done
    store.check_writable()
    samples = [replace(sample, turns=()) for sample in read_samples(store, spec.dataset_fingerprint) if not sample.text_only]
    with stage.attempt() as timer:
        plan = plan_units(stage, spec, samples, execution.feature_unit_bytes)
        table = features_table(store, spec)
        table.ensure()
        quarantine_table(store).ensure()
        outcomes = _read_outcomes(stage)
        _commit_outcomes(stage, table, list(outcomes.values()))
        missing = [unit for unit in plan.units if unit.number not in outcomes]
        if missing:
            _check_disk(store, feature_bytes(spec, [sample for unit in missing for sample in samples[unit.start : unit.stop]]))
            jobs = [UnitJob(spec=spec, root=store.root, number=unit.number, samples=tuple(samples[unit.start : unit.stop])) for unit in missing]
            num_done = len(samples) - sum(len(job.samples) for job in jobs)
            progress.start("encoding images", len(samples), num_done)
            try:
                for outcome in _encode(stage, table, samples, outcomes, jobs, execution, cluster):
                    progress.advance(
                        outcome.num_images + len(outcome.quarantined),
                        views_per_second=round(outcome.num_views / max(outcome.encode_seconds, 1e-9), 1),
                        quarantined=sum(len(known.quarantined) for known in outcomes.values()),
                    )
            finally:
                progress.finish()
        record = _balance(stage, spec, samples, plan, table, outcomes)
        return stage.commit(replace(record, seconds=timer.seconds))


def _check_disk(store: Store, planned: int) -> None:
    free = store.free_bytes()
    if free is not None and planned * _DISK_MARGIN > free:
        raise DiskSpaceError(
            f"the features need {planned / 2**30:.2f} GiB, but {store.root} has {free / 2**30:.2f} GiB free. Free some space, choose another --root, "
            "or cache fewer maps or images."
        )


def _outcome_path(stage: Stage, number: int) -> str:
    return stage.path(f"units/unit-{number:06d}.json")


def _read_outcomes(stage: Stage) -> dict[int, UnitOutcome]:
    paths = stage.store.list(stage.path("units"))
    read = [from_json(UnitOutcome, stage.store.read_json(path), where=stage.store.url(path)) for path in paths]
    return {outcome.number: outcome for outcome in read}


def _commit_outcomes(stage: Stage, table: Table, outcomes: Sequence[UnitOutcome]) -> None:
    """Commit what is on record. Refusals first: a unit in the features table has all its rows everywhere."""
    quarantine = [file for outcome in outcomes for file in outcome.quarantine_files]
    if quarantine:
        quarantine_table(stage.store).commit(quarantine)
    files = [file for outcome in outcomes for file in outcome.files]
    if files:
        table.commit(files)


def _encode(
    stage: Stage,
    table: Table,
    samples: Sequence[Sample],
    outcomes: dict[int, UnitOutcome],
    jobs: Sequence[UnitJob],
    execution: ExecutionSettings,
    cluster: Cluster | None,
) -> Iterator[UnitOutcome]:
    """Run units, put each outcome on record, commit it, add it to `outcomes` and tell it."""
    expected = Counter(sample.source for sample in samples)
    for fresh in _run(jobs, execution, cluster):
        quarantined: dict[str, list[QuarantineRow]] = {}
        for outcome in (*outcomes.values(), fresh):
            for row in outcome.quarantined:
                quarantined.setdefault(row.source, []).append(row)
        # Before the outcome is on record: after a repair the unit that broke the budget runs again.
        check_budget(quarantined, expected, execution.max_quarantined_fraction)
        _check_quality(jobs[0].spec, _quality((*outcomes.values(), fresh)))
        path = _outcome_path(stage, fresh.number)
        outcome = fresh
        if not stage.store.create_json(path, to_json(fresh)):
            outcome = from_json(type(fresh), stage.store.read_json(path), where=stage.store.url(path))
        _commit_outcomes(stage, table, [outcome])
        outcomes[outcome.number] = outcome
        yield outcome


def _quality(outcomes: Iterable[UnitOutcome]) -> dict[str, MapQuality]:
    """How true the maps are so far, by branch and map."""
    found: dict[str, MapQuality] = {}
    for outcome in outcomes:
        for place, quality in outcome.quality.items():
            found[place] = found.get(place, MapQuality()) + quality
    return found


def _check_quality(spec: FeatureSpec, found: dict[str, MapQuality]) -> None:
    """Stop a cache of int8 that becomes much worse than its calibration promised: then its images are others than those that were measured."""
    for branch, item in [(one, item) for one in BRANCHES for item in spec.maps(one)]:
        place = f"{branch}/{item.name}"
        quality = found.get(place, MapQuality())
        if spec.stored_as(branch, item) == "int8" and quality.num_tokens and quality.snr_db < LEAST_SNR_DB:
            raise CalibrationError(
                f"cache-features: the map {place} is stored with {quality.snr_db:.1f} dB of signal over rounding, below {LEAST_SNR_DB:g} on "
                f"{quality.num_tokens} tokens: these images are unlike those that the calibration measured. Raise features.calibration_images, so "
                "that it sees more of them, or store with features.precision = 'fp16'."
            )


def _run(jobs: Sequence[UnitJob], execution: ExecutionSettings, cluster: Cluster | None) -> Iterator[UnitOutcome]:
    # torch takes seconds to import on a busy machine, Ray to start: side by side.
    importing = threading.Thread(target=__import__, args=("workers.caching.encode",))
    importing.start()
    with encoding_cluster(execution, cluster) as (running, settled, threads):
        importing.join()
        from workers.caching.encode import make_unit_encoder

        factory = make_unit_encoder(spec=jobs[0].spec, execution=settled, threads=threads)
        in_flight = settled.encoded_units_in_flight
        yield from running.pipeline(prepare_unit, factory, jobs, finishers=settled.encoder_actors, in_flight=in_flight)


def _balance(
    stage: Stage, spec: FeatureSpec, samples: Sequence[Sample], plan: UnitPlan, table: Table, outcomes: dict[int, UnitOutcome]
) -> CacheRecord:
    """Prove that nothing is missing and nothing is there twice, from the tables themselves."""
    rows = [row for outcome in outcomes.values() for row in outcome.quarantined]
    refused = {row.bytes_sha256 for row in rows}
    cached = [sample for sample in samples if sample.image_sha256 not in refused]
    counts = {}
    size = 0
    for branch in BRANCHES:
        files = table.files({"branch": branch})
        counts[branch] = sum(file.num_rows for file in files)
        size += sum(file.size_bytes for file in files)
        expected = sum(num_views(spec, sample, branch) for sample in cached)
        if counts[branch] != expected:
            raise IncompleteError(
                f"{stage.store.url(table.path)}: expected {expected} {branch} views of {len(cached)} images ({len(refused)} of {len(samples)} are in "
                f"quarantine), the table holds {counts[branch]}"
            )
    in_quarantine = sum(file.num_rows for file in quarantine_table(stage.store).files({"stage": stage.name, "key": stage.key}))
    if in_quarantine != len(rows) or len(refused) != len(rows) or len(outcomes) != len(plan.units):
        raise IncompleteError(
            f"cache {stage.key}: {len(outcomes)} of {len(plan.units)} units are done with {len(rows)} refusals of {len(refused)} images, "
            f"the quarantine holds {in_quarantine}"
        )
    encode_seconds = sum(outcome.encode_seconds for outcome in outcomes.values())
    return CacheRecord(
        feature_fingerprint=fingerprint(spec),
        dataset_fingerprint=spec.dataset_fingerprint,
        encoder=spec.encoder.model,
        global_maps=tuple(item.name for item in spec.global_maps),
        local_maps=tuple(item.name for item in spec.local_maps),
        precision=spec.precision,
        num_images=len(samples),
        num_cached=len(cached),
        num_quarantined=len(rows),
        quarantined_by_reason=dict(sorted(Counter(row.reason for row in rows).items())),
        num_global_views=counts["global"],
        num_local_views=counts["local"],
        num_units=len(plan.units),
        feature_bytes=size,
        quality={
            place: {"snr_db": recorded_db(found), "cosine": found.cosine, "worst_cosine": found.worst_cosine}
            for place, found in _quality(outcomes.values()).items()
        },
        prepare_seconds=sum(outcome.prepare_seconds for outcome in outcomes.values()),
        encode_seconds=encode_seconds,
        write_seconds=sum(outcome.write_seconds for outcome in outcomes.values()),
        views_per_second=sum(counts.values()) / max(encode_seconds, 1e-9),
        seconds=0.0,
    )
