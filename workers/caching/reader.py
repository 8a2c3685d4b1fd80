"""Features for training and evaluation, from the cache or from the encoder itself, through one interface and with the same numbers.

`CachedFeatures` reads only the maps that are asked for, from known places, with checksums verified. `LiveFeatures` encodes on the spot and rounds
to the cache's precision. `SplitFeatures` is the one for global and the other for local views. Tolerance between cached and live ones, for the same
device type: at fp32 2e-5 of a map's largest value (batch shapes change the order of sums), at fp16 one rounding step more, 2**-10 of each value, at
int8 one code more for the few numbers that lie between two.
"""

import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from model.encoder import Encoder, compute_dtype, load_encoder
from model.encoder_execution import BatchSize
from model.errors import MissingMapError, first_line
from model.quantisation import PackedMap
from model.specs import Compute, FeatureSpec, MapSpec, deepest_layer
from model.views import Branch
from workers.caching.codec import FeatureCodec, StoredMap, read_calibrations
from workers.caching.disk_cache import DiskCache
from workers.caching.encode import encode_views
from workers.caching.index import FeatureIndex, map_checksum
from workers.caching.layout import BRANCHES, features_table
from workers.caching.sorted_rows import MapPlace
from workers.caching.units import load_views, num_views
from workers.dataset.samples import Sample
from workers.devices import choose_device
from workers.errors import MissingFeaturesError, StaleCacheError, StorageError
from workers.execution import cache_folder
from workers.storage import Store
from workers.storage_errors import is_damage

__all__ = ["OTHER_POLICIES", "CachedFeatures", "FeatureSource", "LiveFeatures", "SplitFeatures"]

_CANARY_TOLERANCE: Mapping[Compute, float] = {"fp32": 5e-3, "fp16": 5e-3, "bf16": 5e-2}
"""Relative error (L2) of a map, by what the encoder computes in. Rounding to fp16 costs about 3e-4, another device type less; other weights or
another preprocessing cost 1e-1 and more. In bf16 a map of ViT-B/16 is 9e-3 from the exact one, and another device has errors of its own."""

_READS_FROM_STORE = 16

_MOST_BUFFERS = 64
_SPARE_BYTES = 4 * 2**20
_REFERENCES_OF_FREE = 2
"""To a buffer that nobody else has: by the list, and by the question itself."""

OTHER_POLICIES = "go on with --set missing_features=encode (or substitute)"

_NEAR_BYTES = 64 * 2**10
"""Two maps of an image whose numbers lie so near each other are fetched in one read: less than an object store sends in the time of a request."""


@runtime_checkable
class FeatureSource(Protocol):
    """Gives the features of images, wherever they come from."""

    @property
    def num_encoded_live(self) -> int:
        """Images so far whose features were not where they should be, and were computed."""

    def fetch(self, images: Mapping[Branch, Sequence[Sample]]) -> dict[Branch, dict[str, PackedMap]]:
        """Maps of images' views, as they are stored.

        Args:
            images: by branch, those whose views of it are wanted; an image may stand there twice.

        Returns:
            Of every branch that has images, by name, each map [views, tokens, width]: the views of the first image, then those of the second, ...
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class _Maps:
    """Which maps a reader gives, by branch."""

    by_branch: dict[Branch, tuple[MapSpec, ...]]

    @classmethod
    def chosen(cls, spec: FeatureSpec, global_maps: Sequence[MapSpec] | None, local_maps: Sequence[MapSpec] | None) -> "_Maps":
        chosen: dict[Branch, tuple[MapSpec, ...]] = {}
        asked: dict[Branch, Sequence[MapSpec] | None] = {"global": global_maps, "local": local_maps}
        for branch, maps in asked.items():
            chosen[branch] = spec.maps(branch) if maps is None else tuple(maps)
            if missing := [item.name for item in chosen[branch] if item not in spec.maps(branch)]:
                held = [item.name for item in spec.maps(branch)]
                raise MissingMapError(f"the features hold the {branch} maps {held}, but {missing} are needed; add them to the recipe's features")
        return cls(by_branch=chosen)

    def wanted(self, images: Mapping[Branch, Sequence[Sample]]) -> dict[Branch, Sequence[Sample]]:
        wanted = {branch: images[branch] for branch in BRANCHES if images.get(branch)}
        for branch in wanted:
            if not self.by_branch[branch]:
                raise MissingMapError(f"{branch} features are wanted, but the features hold no {branch} maps; add some to the recipe")
        return wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Where an image's views of a branch belong among those of a batch."""

    branch: Branch
    views: slice
    places: list[MapPlace] | None
    """Of its maps; None where one is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ImageRead:
    """An image that a batch needs."""

    sample: Sample
    spans: list[_Span]


class LiveFeatures:
    """Encodes images on the spot, rounded to the precision that the cache would store.

    Args:
        store: where images are.
        spec: which encoder, views and maps.
        device: `auto`, `cpu`, `cuda` or a torch device.
        global_maps: a choice out of the spec's, in the wanted order; None is all.
        local_maps: the same for local views.
        batch_views: views in one forward pass; None is automatic.
    """

    num_encoded_live = 0
    """Nothing is missing where nothing is stored."""

    def __init__(
        self,
        store: Store,
        spec: FeatureSpec,
        device: str = "cpu",
        *,
        global_maps: Sequence[MapSpec] | None = None,
        local_maps: Sequence[MapSpec] | None = None,
        batch_views: int | None = None,
    ) -> None:
        self._store = store
        self._spec = spec
        self._device = str(choose_device(device))
        self._maps = _Maps.chosen(spec, global_maps, local_maps)
        self._batch_views = batch_views
        self._encoder: tuple[Encoder, BatchSize] | None = None
        self._codec = FeatureCodec(spec, read_calibrations(store, spec))

    def fetch(self, images: Mapping[Branch, Sequence[Sample]]) -> dict[Branch, dict[str, PackedMap]]:
        """As FeatureSource.fetch.

        Args:
            images: by branch, those whose views of it are wanted; an image may stand there twice.

        Returns:
            Of every branch that has images, its maps by name.

        Raises:
            EncoderError: the encoder cannot be loaded.
            MissingFeaturesError: a value is not finite at the spec's precision.
            ImageError: an image is not the one that the dataset was built from.
        """
        found: dict[Branch, dict[str, PackedMap]] = {}
        for branch, samples in self._maps.wanted(images).items():
            views = [load_views(self._spec, sample, self._store, branch) for sample in samples]
            maps = self._maps.by_branch[branch]
            encoder, batch_size = self._loaded()
            encoded = encode_views(encoder, np.concatenate(views), branch, maps, self._codec, batch_size)
            if not encoded.finite.all():
                raise MissingFeaturesError(f"a {branch} map is not finite at {self._spec.precision}; a cache would have refused that image")
            found[branch] = {item.name: self._codec.packed(branch, item, encoded.maps[item.name]) for item in maps}
        return found

    def _loaded(self) -> tuple[Encoder, BatchSize]:
        if self._encoder is None:
            deepest = max(map(deepest_layer, self._maps.by_branch.values()))
            encoder = load_encoder(self._spec.encoder, deepest, self._device, compute_dtype(self._spec.compute, self._device))
            self._encoder = encoder, BatchSize(encoder, self._batch_views)
        return self._encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A map of an image: where it lies, and where it is to go."""

    place: MapPlace
    name: str
    room: StoredMap


def _reads_from_folder() -> int:
    """Two for each core, since some wait for the disk.

    On two cores 160 images of 4.5 MB come from the page cache at 2,390 MB/s one by one, at 3,380 with 4 reads at once and at 2,760 with 8; from the
    disk 4 and 8 do as well.
    """
    return max(4, min(_READS_FROM_STORE, 2 * (os.cpu_count() or 1)))


class _Buffers:
    """Memory for batches, used again when nobody has the last batch any more.

    The kernel clears what it gives: 58 MB are read in 11 ms into memory that was there, in 16 into new.
    """

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], /, dtype: Any) -> np.ndarray:
        """As numpy.empty."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            buffer = self._free(num_bytes)
            # Every array and tensor over a buffer holds a reference to it.
            room: np.ndarray = buffer[:num_bytes].view(dtype).reshape(shape)
        return room

    def _free(self, num_bytes: int) -> np.ndarray:
        for place in range(len(self._held)):
            is_free = sys.getrefcount(self._held[place]) == _REFERENCES_OF_FREE
            if is_free and num_bytes <= len(self._held[place]) <= 2 * num_bytes + _SPARE_BYTES:
                self._held.append(self._held.pop(place))
                return self._held[-1]
        fresh = np.empty(num_bytes + min(num_bytes // 8, _SPARE_BYTES), dtype=np.uint8)  # the next batch may have a few views more
        self._held.append(fresh)
        while len(self._held) > _MOST_BUFFERS:
            self._held.pop(0)  # whoever has it keeps it
        return fresh


_Rooms = dict[Branch, dict[str, StoredMap]]
"""Where the maps of a batch are read to: by branch and name, all views one behind the other."""


class CachedFeatures:
    """Reads images' features from the cache: of each image only the wanted maps, in as few reads as they lie in, many at a time.

    Args:
        store: where the cache is.
        spec: of the cache.
        global_maps: a choice out of the spec's, in the wanted order; None is all. Only these columns are read.
        local_maps: the same for local views.
        policy: what to do about an image that is missing or damaged: `fail`; `encode` it live; or `substitute`, which fails too and leaves it to
            whoever makes batches to ask for another one.
        device: for `encode` and the canary.
        batch_views: views in one forward pass of those; None is automatic.
        reads_in_flight: at once; None is 16 from an object store, and from a folder two for each core, 4 to 16.
        disk_cache_bytes: what was read from an object store is kept on this machine up to so many bytes, in `cache_folder()`; 0 keeps nothing.

    Raises:
        MissingMapError: a map that the cache does not hold.
        MissingFeaturesError: the cache does not exist, or its index is damaged.
    """

    num_encoded_live: int
    """As of FeatureSource: by the policy `encode`."""

    def __init__(
        self,
        store: Store,
        spec: FeatureSpec,
        *,
        global_maps: Sequence[MapSpec] | None = None,
        local_maps: Sequence[MapSpec] | None = None,
        policy: Literal["fail", "encode", "substitute"] = "fail",
        device: str = "cpu",
        batch_views: int | None = None,
        reads_in_flight: int | None = None,
        disk_cache_bytes: int = 0,
    ) -> None:
        self._store = store
        self._spec = spec
        self._maps = _Maps.chosen(spec, global_maps, local_maps)
        self._policy = policy
        self._live = LiveFeatures(store, spec, device, global_maps=global_maps, local_maps=local_maps, batch_views=batch_views)
        self._codec = FeatureCodec(spec, read_calibrations(store, spec))
        self._folder = features_table(store, spec).path
        self._buffers = _Buffers()
        self._reads_in_flight = reads_in_flight or (_READS_FROM_STORE if store.local_path() is None else _reads_from_folder())
        self._pool = ThreadPoolExecutor(self._reads_in_flight, thread_name_prefix="loupe-read")
        self._disk = DiskCache(cache_folder() / "features", disk_cache_bytes) if disk_cache_bytes and store.local_path() is None else None
        self.num_encoded_live = 0
        self._index = FeatureIndex(store, spec, self._maps.by_branch)
        if not len(self._index):
            raise MissingFeaturesError(
                f"{store.url(self._folder)} holds no features of these maps. Expected the table that cache-features writes; run it first."
            )

    def fetch(self, images: Mapping[Branch, Sequence[Sample]]) -> dict[Branch, dict[str, PackedMap]]:
        """As FeatureSource.fetch.

        Args:
            images: by branch, those whose views of it are wanted; an image may stand there twice.

        Returns:
            Of every branch that has images, its maps by name.

        Raises:
            MissingFeaturesError: an image is missing or damaged, and the policy is not `encode`; the error names both it and its branch.
            StorageError: the store is away, or refuses us.
        """
        rooms: _Rooms = {}
        reads: dict[str, _ImageRead] = {}
        for branch, samples in self._maps.wanted(images).items():
            stops = list(accumulate(num_views(self._spec, sample, branch) for sample in samples))
            # Read to where a batch needs it: a copy less, and memory of many megabytes at once comes in huge pages.
            maps = self._maps.by_branch[branch]
            rooms[branch] = {item.name: self._codec.empty(branch, item, stops[-1], self._buffers.empty) for item in maps}
            located = self._index.places(branch, list(rooms[branch]), [sample.image_sha256 for sample in samples])
            for sample, places, start, stop in zip(samples, located, [0, *stops], stops, strict=False):
                read = reads.setdefault(sample.image_sha256, _ImageRead(sample=sample, spans=[]))
                read.spans.append(_Span(branch=branch, views=slice(start, stop), places=places))
        pending = list(reads.values())
        share = max(1, math.ceil(len(pending) / self._reads_in_flight))
        parts = [pending[first : first + share] for first in range(0, len(pending), share)]
        for part in list(self._pool.map(partial(self._read_all, rooms=rooms), parts)):
            for read, error in part:
                if self._policy != "encode":
                    raise error
                self.num_encoded_live += 1
                self._encode(read.sample, read.spans, rooms)
        return {
            branch: {item.name: self._codec.packed(branch, item, found[item.name]) for item in self._maps.by_branch[branch]}
            for branch, found in rooms.items()
        }

    def _encode(self, sample: Sample, spans: Sequence[_Span], rooms: _Rooms) -> None:
        """Compute what cannot be read."""
        fresh = self._live.fetch({span.branch: [sample] for span in spans})
        for span in spans:
            for name, packed in fresh[span.branch].items():
                room = rooms[span.branch][name][span.views]
                room.values[:] = packed.values.numpy()
                if room.steps is not None and packed.steps is not None:
                    room.steps[:] = packed.steps.numpy()

    def gives(self, branch: Branch) -> bool:
        """Whether it reads any map of a branch."""
        return bool(self._maps.by_branch[branch])

    def holds(self, samples: Sequence[Sample]) -> list[bool]:
        """Whether every branch of the spec has what is asked for of each sample's image; of text alone nothing is expected.

        Args:
            samples: any number; a million take a second.
        """
        shown = [sample for sample in samples if not sample.text_only]
        asked = [(branch, item) for branch in BRANCHES for item in self._maps.by_branch[branch]]
        held = self._index.held(asked, [sample.image_sha256 for sample in shown])
        whole = iter(np.logical_and.reduce(list(held.values())).tolist() if shown else ())
        return [sample.text_only or next(whole) for sample in samples]

    def verify(self, samples: Sequence[Sample], num_images: int = 2) -> None:
        """Encode a few cached images again and compare: proves that the cache still is what its encoder gives.

        Args:
            samples: to choose from, evenly; those without an image, or that the cache does not hold, are skipped, and by the policy `substitute`
                damaged ones.
            num_images: how many.

        Raises:
            StaleCacheError: a map differs by more than rounding explains.
        """
        held = [sample for sample, there in zip(samples, self.holds(samples), strict=True) if there and not sample.text_only]
        chosen = held[:: max(1, len(held) // num_images)][:num_images]
        allowed = _CANARY_TOLERANCE[self._spec.compute]
        for sample in chosen:
            asked = {branch: [sample] for branch in BRANCHES if self._maps.by_branch[branch]}
            try:
                cached = self.fetch(asked)
            except MissingFeaturesError:
                if self._policy == "substitute":
                    continue
                raise
            fresh = self._live.fetch(asked)
            for branch, maps in fresh.items():
                for name, packed in maps.items():
                    stored, now = cached[branch][name].dense(), packed.dense()
                    error = float((stored - now).norm() / now.norm().clamp_min(1e-12))
                    if not error <= allowed:  # also when it is not a number
                        raise StaleCacheError(
                            f"{self._store.url(self._folder)}: the {branch} map {name} of image {sample.image_sha256[:12]} "
                            f"differs from what {self._spec.encoder.model} gives now by {error:.2e} (allowed {allowed:.0e}). The cache "
                            "does not belong to this encoder or preprocessing any more; cache again under another root."
                        )

    def _read_all(self, reads: Sequence[_ImageRead], rooms: _Rooms) -> list[tuple[_ImageRead, MissingFeaturesError]]:
        """Images to where they belong, one after the other; those that are missing, with what is wrong."""
        missing = []
        for read in reads:
            try:
                for span in read.spans:
                    self._read(read.sample, span, rooms[span.branch])
            except MissingFeaturesError as error:
                missing.append((read, error))
        return missing

    def _read(self, sample: Sample, span: _Span, rooms: Mapping[str, StoredMap]) -> None:
        """One image's maps of a branch to where they belong, checked against their checksums."""
        expected = span.views.stop - span.views.start
        if span.places is None:
            raise MissingFeaturesError(
                f"{self._store.url(self._folder)} holds no {span.branch} features of image {sample.image_sha256[:12]} ({sample.sample_id}); "
                f"it may be in quarantine. Finish cache-features, leave the image out, or {OTHER_POLICIES}.",
                sample.image_sha256,
                span.branch,
            )
        by_file: dict[str, list[_Part]] = {}
        for place, (name, room) in zip(span.places, rooms.items(), strict=True):
            part = _Part(place=place, name=name, room=room[span.views])
            if place.num_views != expected or len(place.offsets) != len(part.room.arrays):
                raise self._damaged(place, sample, span.branch, f"expected {expected} views, the index has {place.num_views}")
            by_file.setdefault(place.file, []).append(part)
        for parts in by_file.values():
            self._read_parts(sample, span.branch, parts)

    def _read_parts(self, sample: Sample, branch: Branch, parts: Sequence[_Part]) -> None:
        """Maps of an image's branch that lie in one file."""
        place = parts[0].place
        path = f"{self._folder}/{place.file}"
        reads = _joined(parts)
        url = self._store.url(path) if self._disk is not None else ""
        if self._disk is not None and all(self._disk.read_into(url, start, buffers) for start, buffers in reads) and not _wrong(parts):
            return
        try:
            for start, buffers in reads:
                self._store.read_into(path, start, buffers)
        except StorageError as error:
            if not is_damage(error):
                raise
            raise self._damaged(place, sample, branch, f"cannot be read: {first_line(error)}") from error
        if wrong := _wrong(parts):
            raise self._damaged(place, sample, branch, f"the bytes of map {wrong[0]} are not those that were written")
        if self._disk is not None:
            for start, buffers in reads:
                self._disk.write(url, start, buffers)

    def _damaged(self, place: MapPlace, sample: Sample, branch: Branch, what: str) -> MissingFeaturesError:
        return MissingFeaturesError(
            f"{self._store.url(f'{self._folder}/{place.file}')}, row group {place.row_group} (image {sample.image_sha256[:12]}) is damaged: {what}. "
            f"Run `loupe verify` with --repair and then the run again, or {OTHER_POLICIES}.",
            sample.image_sha256,
            branch,
        )


class SplitFeatures:
    """Features of one branch's views from the cache, those of the other's from the encoder, whenever they are seen.

    Args:
        cached: holds the maps of one branch alone.
        live: gives those of the other one.
    """

    def __init__(self, cached: CachedFeatures, live: LiveFeatures) -> None:
        self.cached = cached
        self._live = live

    @property
    def num_encoded_live(self) -> int:
        """Images so far whose features should have been in the cache, and were computed."""
        return self.cached.num_encoded_live

    def fetch(self, images: Mapping[Branch, Sequence[Sample]]) -> dict[Branch, dict[str, PackedMap]]:
        """As FeatureSource.fetch.

        Args:
            images: by branch, those whose views of it are wanted; an image may stand there twice.

        Returns:
            Of every branch that has images, its maps by name.

        Raises:
            MissingFeaturesError: as of CachedFeatures.fetch; or a value of a view that was encoded is not finite.
            StorageError: the store is away, or refuses us.
        """
        stored = {branch: samples for branch, samples in images.items() if self.cached.gives(branch)}
        others = {branch: samples for branch, samples in images.items() if branch not in stored}
        found = self.cached.fetch(stored) | self._live.fetch(others)  # what is missing is found before anything is encoded
        return {branch: found[branch] for branch in BRANCHES if branch in found}


def _wrong(parts: Sequence[_Part]) -> list[str]:
    """Maps whose bytes are not those that were written."""
    return [part.name for part in parts if map_checksum(part.room.arrays) != part.place.checksum]


def _joined(parts: Sequence[_Part]) -> list[tuple[int, list[np.ndarray]]]:
    """Reads that fill the parts, near ones together: where each begins, and its buffers one behind the other."""
    places = [(offset, array) for part in parts for offset, array in zip(part.place.offsets, part.room.arrays, strict=True)]
    reads: list[tuple[int, list[np.ndarray]]] = []
    behind = 0
    for offset, array in sorted(places, key=lambda place: place[0]):
        gap = offset - behind
        if not reads or not 0 <= gap <= _NEAR_BYTES:
            reads.append((offset, []))
        elif gap:
            reads[-1][1].append(np.empty(gap, dtype=np.uint8))
        reads[-1][1].append(array.reshape(-1).view(np.uint8))
        behind = offset + array.nbytes
    return reads
