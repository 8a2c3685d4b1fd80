"""Stage calibrate-features: some training images of a dataset -> centres and scales of their maps' channels, and which maps int8 is good enough for.

Runs before cache-features where the precision is int8. Three of four images are measured; the fourth is stored behind what was measured, read back
and compared, since quality on the images that were measured would flatter. A map that loses more than the recipe allows is stored in fp16 instead:
the cache does not become worse than asked for, it becomes larger.

A map of an encoding is measured once, by whichever run asks first, and what was found stays on record beside the table: so a cache can be extended by
other datasets and maps without a number in it changing its meaning. That the images of another dataset fit the same centres and scales is checked
while they are stored. Invariant: what a cache is stored behind is a file named by its digest, and that digest is part of the cache's identity.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from model.encoder_execution import BatchSize, EncoderForward
from model.quality import MapQuality, recorded_db
from model.quantisation import ChannelCalibration, ChannelMoments
from model.specs import CalibrationRule, CalibrationSpec, FeatureSpec, MapSpec
from model.views import Branch
from workers.caching.codec import Calibrations, FeatureCodec, calibration_path, calibrations_to_bytes, read_calibration_file
from workers.caching.encode import ComputingThread, encode_views, load_unit_encoder
from workers.caching.layout import BRANCHES, encoding_folder, lock_encoding
from workers.caching.units import PreparedUnit, UnitJob, prepare_unit
from workers.commits import Stage, from_json, to_json
from workers.dataset.samples import Sample, read_images
from workers.errors import CalibrationError
from workers.execution import ExecutionSettings, Progress
from workers.runtime import Cluster, EncodingPlace, encoding_cluster
from workers.storage import Store

__all__ = ["CalibratedMap", "CalibrationRecord", "calibrate_features", "is_map_record"]

_MAP_RECORDS = "calibrations"
_UNIT_IMAGES = 8
_CHECKED_OF = 4
"""One image of so many checks what the others measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedMap:
    """What a calibration found of one map."""

    branch: str
    name: str
    sha256: str
    """Of the file of its centre and scale."""
    stored_as: str
    """`int8`, or `fp16` where int8 loses more than is allowed."""
    snr_db: float
    """Of int8, on images that were not measured."""
    cosine: float
    worst_cosine: float
    dataset_fingerprint: str
    """Whose images were measured."""
    num_images: int
    """That were measured."""
    num_checked: int
    """That were stored and read back."""


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
    num_measured: int
    """Maps that this run measured; the others were on record."""
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
    chosen = _chosen(read_images(store, spec.dataset_fingerprint, "train"), spec)
    with stage.attempt() as timer:
        lock_encoding(store, spec.encoding)
        known = {item.place(branch): _on_record(spec, store, branch, item) for branch in BRANCHES for item in spec.maps(branch)}
        missing = {place for place, found in known.items() if found is None}
        if missing:
            part = replace(
                spec,
                global_maps=tuple(item for item in spec.global_maps if item.place("global") in missing),
                local_maps=tuple(item for item in spec.local_maps if item.place("local") in missing),
            )
            progress.start("measuring maps on images", len(chosen), 0)
            try:
                with encoding_cluster(execution, cluster) as encoders:
                    _measure(part, store, chosen, encoders, progress)
            finally:
                progress.finish()
            known = {item.place(branch): _on_record(spec, store, branch, item) for branch in BRANCHES for item in spec.maps(branch)}
        maps = {place: found for place, found in known.items() if found is not None}
        assert maps.keys() == known.keys()
        tensors: dict[str, ChannelCalibration] = {}
        for place, found in maps.items():
            tensors |= read_calibration_file(store, found.sha256)
            assert place in tensors
        data, sha256 = calibrations_to_bytes(tensors)
        store.write_bytes(calibration_path(sha256), data)
        record = CalibrationRecord(
            sha256=sha256,
            path=calibration_path(sha256),
            maps=tuple(maps.values()),
            fp16_maps=tuple(place for place, found in maps.items() if found.stored_as == "fp16"),
            num_measured=len(missing),
            seconds=timer.seconds,
        )
        return stage.commit(record)


def is_map_record(path: str) -> bool:
    """Whether a path, relative to the root, is that of a `CalibratedMap` on record."""
    parts = path.split("/")
    return len(parts) == 5 and parts[0] == "features" and parts[2] == _MAP_RECORDS and path.endswith(".json")


def _record_path(spec: CalibrationSpec, branch: Branch, item: MapSpec) -> str:
    return f"{encoding_folder(spec.encoding)}/{_MAP_RECORDS}/{branch}/{item.name}.json"


def _on_record(spec: CalibrationSpec, store: Store, branch: Branch, item: MapSpec) -> CalibratedMap | None:
    """What a map of the encoding is stored behind, for good."""
    path = _record_path(spec, branch, item)
    return from_json(CalibratedMap, store.read_json(path), where=store.url(path)) if store.exists(path) else None


def _rule(spec: CalibrationSpec) -> CalibrationRule:
    assert spec.encoding.calibration is not None  # of int8 there is one
    return spec.encoding.calibration


def _chosen(images: Sequence[Sample], spec: CalibrationSpec) -> list[Sample]:
    """Images in an order that is a function of their bytes and the seed alone: the same ones however the dataset is sorted."""

    def place(sample: Sample) -> str:
        return hashlib.sha256(f"{_rule(spec).seed}:{sample.image_sha256}".encode()).hexdigest()

    return sorted(images, key=place)[: _rule(spec).num_images]


def _measure(
    spec: CalibrationSpec,
    store: Store,
    chosen: Sequence[Sample],
    encoders: EncodingPlace,
    progress: Progress,
) -> None:
    """Measure maps and put each on record; where another run was faster, its finding stands."""
    plain = FeatureSpec(
        dataset_fingerprint=spec.dataset_fingerprint,
        encoder=spec.encoding.encoder,
        views=spec.encoding.views,
        global_maps=spec.global_maps,
        local_maps=spec.local_maps,
        precision="fp32",
        compute=spec.encoding.compute,
        resampling=spec.encoding.resampling,
    )
    maps = plain.branch_maps
    measured = [sample for place, sample in enumerate(chosen) if place % _CHECKED_OF != _CHECKED_OF - 1]
    checked = [sample for place, sample in enumerate(chosen) if place % _CHECKED_OF == _CHECKED_OF - 1]
    execution = encoders.execution

    def run(samples: Sequence[Sample], calibrations: Calibrations | None) -> list[_Measured]:
        parts = [samples[start : start + _UNIT_IMAGES] for start in range(0, len(samples), _UNIT_IMAGES)]
        jobs = [
            UnitJob(spec=plain, root=store.root, number=number, samples=tuple(part), threads=encoders.prepare_threads)
            for number, part in enumerate(parts)
        ]
        found = []
        for result in encoders.cluster.pipeline(
            prepare_unit,
            _make_measurer(spec=plain, execution=execution, threads=encoders.encoder_threads, calibrations=calibrations),
            jobs,
            finishers=execution.encoder_actors,
            in_flight=execution.encoded_units_in_flight,
            prepare_cpus=encoders.prepare_cpus,
        ):
            found.append(result)
            progress.advance(len(jobs[result.number].samples))
        # Sums in the order of the images and not of their arrival, so that a repeated run gives the same bytes.
        return sorted(found, key=lambda result: result.number)

    moments = {item.place(branch): ChannelMoments(spec.encoding.encoder.width) for branch, item in maps}
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
    for branch, item in maps:
        place = item.place(branch)
        judged = quality[place]
        data, sha256 = calibrations_to_bytes({place: calibrations[place]})
        store.write_bytes(calibration_path(sha256), data)
        verdict = CalibratedMap(
            branch=branch,
            name=item.name,
            sha256=sha256,
            stored_as="int8" if judged.snr_db >= _rule(spec).min_snr_db else "fp16",
            snr_db=recorded_db(judged),
            cosine=judged.cosine,
            worst_cosine=judged.worst_cosine,
            dataset_fingerprint=spec.dataset_fingerprint,
            num_images=sum(unit.num_images for unit in measured_units),
            num_checked=sum(unit.num_images for unit in checked_units),
        )
        store.create_json(_record_path(spec, branch, item), to_json(verdict))


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
            rule = CalibrationRule(num_images=4, min_snr_db=0.0)  # of no effect: the codec looks at centres and scales alone
            self._codec = FeatureCodec(replace(spec, precision="int8", calibration=rule, calibration_sha256="measured here"), calibrations)
        self._computing = ComputingThread(self._load)

    def _load(self) -> tuple[EncoderForward, BatchSize]:
        encoder = load_unit_encoder(self._spec, self._execution, self._threads)
        return EncoderForward(encoder, compiled=False, recorded=False), BatchSize(encoder, self._execution.encode_batch_views)

    def __call__(self, prepared: PreparedUnit) -> _Measured:
        """Encode one unit. May be called from two threads."""
        return self._computing.run(partial(self._measure, prepared))

    def _measure(self, prepared: PreparedUnit, loaded: tuple[EncoderForward, BatchSize]) -> _Measured:
        forward, batch_size = loaded
        moments: dict[str, ChannelMoments] = {}
        quality: dict[str, MapQuality] = {}
        for branch in BRANCHES:
            views, maps = prepared.views(branch), self._spec.maps(branch)
            if self._codec is not None:
                encoded = encode_views(forward.encoder, views, branch, maps, self._codec, batch_size, num_compared=len(views))
                quality |= {item.place(branch): encoded.quality[item.name] for item in maps}
                continue
            found = batch_size.backing_off(partial(_moments, forward, views, maps))
            moments |= {item.place(branch): found[item.name] for item in maps if item.name in found}
        return _Measured(number=prepared.job.number, num_images=len(prepared.samples), moments=moments, quality=quality)


def _moments(forward: EncoderForward, views: np.ndarray, maps: Sequence[MapSpec], batch_views: int) -> dict[str, ChannelMoments]:
    """Of each map's channels over all views whose numbers are finite."""
    moments: dict[str, ChannelMoments] = {}
    for start in range(0, len(views), batch_views):
        for name, tokens in forward(torch.from_numpy(views[start : start + batch_views]), list(maps)).items():
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
