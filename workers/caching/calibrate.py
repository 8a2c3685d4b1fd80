"""Stage calibrate-features: some training images of a dataset -> centres and scales of their maps' channels, and which maps int8 is good enough for.

Runs before cache-features where the precision is int8. Three of four images are measured; the fourth is stored behind what was measured, read back
and compared, since quality on the images that were measured would flatter. A map that loses more than the recipe allows is stored in fp16 instead:
the cache never becomes worse than asked for, it becomes larger. Invariant: what the cache is stored behind is a file named by its digest, and that
digest is part of the cache's identity.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from model.encoder import Encoder
from model.encoder_execution import BatchSize
from model.quality import MapQuality, recorded_db
from model.quantisation import ChannelMoments
from model.specs import CalibrationSpec, FeatureSpec, MapSpec
from model.views import Branch
from workers.caching.codec import Calibrations, FeatureCodec, calibration_path, calibrations_to_bytes
from workers.caching.encode import encode_views, load_unit_encoder
from workers.caching.units import BRANCHES, PreparedUnit, UnitJob, prepare_unit
from workers.commits import Stage
from workers.dataset.samples import Sample, read_samples
from workers.errors import CalibrationError
from workers.execution import ExecutionSettings, Progress
from workers.runtime import Cluster, encoding_cluster
from workers.storage import Store

__all__ = ["CalibratedMap", "CalibrationRecord", "calibrate_features"]

_UNIT_IMAGES = 8
_CHECKED_OF = 4
"""One image of so many checks what the others measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedMap:
    """What a calibration found of one map."""

    branch: str
    name: str
    stored_as: str
    """`int8`, or `fp16` where int8 loses more than is allowed."""
    snr_db: float
    """Of int8, on images that were not measured."""
    cosine: float
    worst_cosine: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """What calibrate-features did."""

    sha256: str
    """Of the file of centres and scales."""
    path: str
    """Relative to the root."""
    maps: tuple[CalibratedMap, ...]
    fp16_maps: tuple[str, ...]
    """Those that int8 is not good enough for, as FeatureSpec names them."""
    num_images: int
    """That were measured."""
    num_checked: int
    """That were stored and read back."""
    seconds: float


def calibrate_features(
    spec: CalibrationSpec, store: Store, execution: ExecutionSettings, progress: Progress, *, cluster: Cluster | None = None
) -> CalibrationRecord:
    """Measure centres and scales, or find them measured.

    Args:
        spec: of which maps, on how many images of which dataset.
        store: where the dataset is, and the file goes.
        execution: encoder_actors, encode_batch_views and Ray's settings count.
        progress: told in images.
        cluster: where units run; None starts Ray.

    Returns:
        The stage's record.

    Raises:
        TableError: the dataset is not built.
        EncoderError: the encoder is missing or has other weights than the spec.
        CalibrationError: too few of the images can be read.
    """
    stage = Stage.open(store, "calibrate-features", spec)
    done = stage.committed(CalibrationRecord)
    if done is not None:
        return done
    store.check_writable()
    samples = [replace(sample, turns=()) for sample in read_samples(store, spec.dataset_fingerprint, "train") if not sample.text_only]
    chosen = _chosen(samples, spec)
    with stage.attempt() as timer:
        progress.start("measuring maps on images", len(chosen), 0)
        try:
            with encoding_cluster(execution, cluster) as (running, settled, threads):
                found = _measure(spec, store, chosen, settled, threads, progress, running)
        finally:
            progress.finish()
        return stage.commit(replace(found, seconds=timer.seconds))


def _chosen(samples: Sequence[Sample], spec: CalibrationSpec) -> list[Sample]:
    """Images in an order that is a function of their bytes and the seed alone: the same ones however the dataset is sorted."""

    def place(sample: Sample) -> str:
        return hashlib.sha256(f"{spec.seed}:{sample.image_sha256}".encode()).hexdigest()

    distinct = {sample.image_sha256: sample for sample in samples}
    return sorted(distinct.values(), key=place)[: spec.num_images]


def _measure(
    spec: CalibrationSpec,
    store: Store,
    chosen: Sequence[Sample],
    execution: ExecutionSettings,
    threads: int | None,
    progress: Progress,
    cluster: Cluster,
) -> CalibrationRecord:
    plain = FeatureSpec(
        dataset_fingerprint=spec.dataset_fingerprint,
        encoder=spec.encoder,
        views=spec.views,
        global_maps=spec.global_maps,
        local_maps=spec.local_maps,
        precision="fp32",
        resampling=spec.resampling,
    )
    maps = [(branch, item) for branch in BRANCHES for item in plain.maps(branch)]
    measured = [sample for place, sample in enumerate(chosen) if place % _CHECKED_OF != _CHECKED_OF - 1]
    checked = [sample for place, sample in enumerate(chosen) if place % _CHECKED_OF == _CHECKED_OF - 1]
    in_flight = execution.encoded_units_in_flight

    def run(samples: Sequence[Sample], calibrations: Calibrations | None) -> list[_Measured]:
        parts = [samples[start : start + _UNIT_IMAGES] for start in range(0, len(samples), _UNIT_IMAGES)]
        jobs = [UnitJob(spec=plain, root=store.root, number=number, samples=tuple(part)) for number, part in enumerate(parts)]
        make = _make_measurer(spec=plain, execution=execution, threads=threads, calibrations=calibrations)
        found = []
        for result in cluster.pipeline(prepare_unit, make, jobs, finishers=execution.encoder_actors, in_flight=in_flight):
            found.append(result)
            progress.advance(len(jobs[result.number].samples))
        # Sums in the order of the images and not of their arrival, so that a repeated run gives the same bytes.
        return sorted(found, key=lambda result: result.number)

    moments = {place: ChannelMoments(spec.encoder.width) for place in (f"{branch}/{item.name}" for branch, item in maps)}
    measured_units = run(measured, None)
    for unit in measured_units:
        for place, part in unit.moments.items():
            moments[place].merge(part)
    quality = dict.fromkeys(moments, MapQuality())
    checked_units: list[_Measured] = []
    calibrations = {place: part.calibration() for place, part in moments.items()}
    if all(part.num_tokens for part in moments.values()):
        checked_units = run(checked, calibrations)
    for unit in checked_units:
        for place, found in unit.quality.items():
            quality[place] += found
    if not all(found.num_tokens for found in quality.values()):
        num_read = sum(unit.num_images for unit in (*measured_units, *checked_units))
        raise CalibrationError(
            f"calibrate-features: {num_read} of {len(chosen)} images can be read and encoded into finite numbers, too few to measure maps on some "
            "and to check them on others; look at the images, raise features.calibration_images, or store with features.precision = 'fp16'"
        )
    verdicts = tuple(_verdict(branch, item, quality[f"{branch}/{item.name}"], spec.min_snr_db) for branch, item in maps)
    data, sha256 = calibrations_to_bytes(calibrations)
    store.write_bytes(calibration_path(sha256), data)
    return CalibrationRecord(
        sha256=sha256,
        path=calibration_path(sha256),
        maps=verdicts,
        fp16_maps=tuple(f"{found.branch}/{found.name}" for found in verdicts if found.stored_as == "fp16"),
        num_images=sum(unit.num_images for unit in measured_units),
        num_checked=sum(unit.num_images for unit in checked_units),
        seconds=0.0,
    )


def _verdict(branch: Branch, item: MapSpec, quality: MapQuality, min_snr_db: float) -> CalibratedMap:
    return CalibratedMap(
        branch=branch,
        name=item.name,
        stored_as="int8" if quality.snr_db >= min_snr_db else "fp16",
        snr_db=recorded_db(quality),
        cosine=quality.cosine,
        worst_cosine=quality.worst_cosine,
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What one unit's images gave."""

    number: int
    num_images: int
    moments: dict[str, ChannelMoments]
    quality: dict[str, MapQuality]


class _Measurer:
    """Encodes units; without calibrations it measures them, with them it stores, reads back and compares."""

    def __init__(self, spec: FeatureSpec, execution: ExecutionSettings, threads: int | None, calibrations: Calibrations | None) -> None:
        self._spec, self._execution, self._threads = spec, execution, threads
        self._codec: FeatureCodec | None = None
        if calibrations is not None:
            self._codec = FeatureCodec(replace(spec, precision="int8", calibration_sha256="measured here"), calibrations)
        self._encoder: Encoder | None = None
        self._batch_size: BatchSize

    def __call__(self, prepared: PreparedUnit) -> _Measured:
        """Encode one unit."""
        if self._encoder is None:
            self._encoder = load_unit_encoder(self._spec, self._execution, self._threads)
            self._batch_size = BatchSize(self._encoder, self._execution.encode_batch_views)
        moments: dict[str, ChannelMoments] = {}
        quality: dict[str, MapQuality] = {}
        for branch in BRANCHES:
            views, maps = prepared.views(branch), self._spec.maps(branch)
            if self._codec is not None:
                encoded = encode_views(self._encoder, views, branch, maps, self._codec, self._batch_size.views, num_compared=len(views))
                quality |= {f"{branch}/{name}": found for name, found in encoded.quality.items()}
                continue
            found = self._batch_size.backing_off(partial(_moments, self._encoder, views, maps))
            moments |= {f"{branch}/{name}": part for name, part in found.items()}
        return _Measured(number=prepared.job.number, num_images=len(prepared.samples), moments=moments, quality=quality)


def _moments(encoder: Encoder, views: np.ndarray, maps: Sequence[MapSpec], batch_views: int) -> dict[str, ChannelMoments]:
    """Of each map's channels over all views whose numbers are finite."""
    moments: dict[str, ChannelMoments] = {}
    for start in range(0, len(views), batch_views):
        for name, tokens in encoder(torch.from_numpy(views[start : start + batch_views]), list(maps)).items():
            finite = tokens[torch.isfinite(tokens).flatten(1).all(dim=1)]
            moments.setdefault(name, ChannelMoments(tokens.shape[-1])).update(finite)
    return moments


@dataclass(frozen=True, kw_only=True)
class _make_measurer:  # noqa: N801 - used as a function; a class, so that it can be sent to another process
    """Makes a _Measurer in the process that will use it."""

    spec: FeatureSpec
    execution: ExecutionSettings
    threads: int | None
    calibrations: Calibrations | None

    def __call__(self) -> Callable[[PreparedUnit], _Measured]:
        """A fresh measurer."""
        return _Measurer(self.spec, self.execution, self.threads, self.calibrations)
