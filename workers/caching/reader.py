"""Features for training and evaluation, from the cache or from the encoder itself, through one interface and with the same numbers.

`CachedFeatures` reads only the maps that are asked for, from known places, with checksums verified. `LiveFeatures` encodes
on the spot and rounds to the cache's precision. Tolerance between the two, for the same device type: at fp32 2e-5 of a map's largest value
(batch shapes change the order of sums), at fp16 one rounding step more, 2**-10 of each value, at int8 one code more for the few numbers that lie
between two.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from model.encoder import Encoder, compute_dtype, load_encoder
from model.errors import MissingMapError, first_line
from model.quantisation import PackedMap
from model.specs import FeatureSpec, MapSpec, deepest_layer
from model.views import Branch
from workers.caching.codec import FeatureCodec, read_calibrations
from workers.caching.encode import choose_device, encode_views
from workers.caching.index import FeatureIndex, MapPlace, map_checksum
from workers.caching.layout import BRANCHES, features_table
from workers.caching.units import load_views, num_views
from workers.dataset.samples import Sample
from workers.errors import MissingFeaturesError, StaleCacheError, StorageError
from workers.storage import Store
from workers.storage_errors import is_damage

__all__ = ["CachedFeatures", "FeatureSource", "ImageFeatures", "LiveFeatures"]

_CANARY_TOLERANCE = 5e-3
"""Relative error (L2) of a map. Rounding to fp16 costs about 3e-4, another device type less; other weights or another preprocessing cost 1e-1."""

_NEAR_BYTES = 64 * 2**10
"""Two maps of an image whose numbers lie so near each other are fetched in one read: less than an object store sends in the time of a request."""


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """The maps of one image's views, in the order that was asked for, as they are stored; a branch that was not asked for is not there."""

    maps: Mapping[Branch, tuple[PackedMap, ...]]
    """Each [views, tokens, width]: one global view, or the local ones row by row."""

    @property
    def global_maps(self) -> Float[Tensor, "global_maps global_tokens width"] | None:
        """In fp32, all of as many tokens; None when not asked for."""
        return torch.cat([item.dense() for item in self.maps["global"]]) if "global" in self.maps else None

    @property
    def local_maps(self) -> Float[Tensor, "views local_maps local_tokens width"] | None:
        """In fp32, all of as many tokens; None when not asked for."""
        return torch.stack([item.dense() for item in self.maps["local"]], dim=1) if "local" in self.maps else None


@runtime_checkable
class FeatureSource(Protocol):
    """Gives the features of images, wherever they come from."""

    def fetch(self, images: Sequence[Sample], *, want_global: bool, want_local: bool) -> list[ImageFeatures]:
        """Features of some images.

        Args:
            images: which; an image may stand there twice.
            want_global: whether the global view's maps are wanted.
            want_local: whether the local views' maps are wanted.

        Returns:
            One per image, in their order.
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

    def wanted(self, *, want_global: bool, want_local: bool) -> tuple[Branch, ...]:
        wants: dict[Branch, bool] = {"global": want_global, "local": want_local}
        wanted = tuple(branch for branch in BRANCHES if wants[branch])
        for branch in wanted:
            if not self.by_branch[branch]:
                raise MissingMapError(f"{branch} features are wanted, but the features hold no {branch} maps; add some to the recipe")
        return wanted


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
        self._device = choose_device(device)
        self._maps = _Maps.chosen(spec, global_maps, local_maps)
        self._batch_views = batch_views
        self._encoder: Encoder | None = None
        self._codec = FeatureCodec(spec, read_calibrations(store, spec))

    def fetch(self, images: Sequence[Sample], *, want_global: bool, want_local: bool) -> list[ImageFeatures]:
        """As FeatureSource.fetch.

        Args:
            images: which; an image may stand there twice.
            want_global: whether the global view's maps are wanted.
            want_local: whether the local views' maps are wanted.

        Returns:
            One per image, in their order.

        Raises:
            EncoderError: the encoder cannot be loaded.
            MissingFeaturesError: a value is not finite at the spec's precision.
            ImageError: an image is not the one that the dataset was built from.
        """
        wanted = self._maps.wanted(want_global=want_global, want_local=want_local)
        found: list[dict[Branch, tuple[PackedMap, ...]]] = [{} for _ in images]
        for branch in wanted:
            views = [load_views(self._spec, sample, self._store, branch) for sample in images]
            if not views:
                continue
            maps = self._maps.by_branch[branch]
            encoder = self._loaded()
            encoded = encode_views(encoder, np.concatenate(views), branch, maps, self._codec, self._batch_views)
            if not encoded.finite.all():
                raise MissingFeaturesError(f"a {branch} map is not finite at {self._spec.precision}; a cache would have refused that image")
            stops = np.cumsum([len(item) for item in views])
            for place, (stop, part) in enumerate(zip(stops, views, strict=True)):
                mine = slice(int(stop) - len(part), int(stop))
                found[place][branch] = tuple(self._codec.packed(branch, item, encoded.maps[item.name][mine]) for item in maps)
        return [ImageFeatures(maps=item) for item in found]

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            deepest = max(map(deepest_layer, self._maps.by_branch.values()))
            self._encoder = load_encoder(self._spec.encoder, deepest, self._device, compute_dtype(self._spec.compute, self._device))
        return self._encoder


class CachedFeatures:
    """Reads images' features from the cache: of each image only the wanted maps, in as few reads as they lie in, many at a time.

    Args:
        store: where the cache is.
        spec: of the cache.
        global_maps: a choice out of the spec's, in the wanted order; None is all. Only these columns are read.
        local_maps: the same for local views.
        policy: what to do about an image that is missing or damaged: `fail`, or `encode` it live.
        device: for `encode` and the canary.
        reads_in_flight: at once.

    Raises:
        MissingMapError: a map that the cache does not hold.
        MissingFeaturesError: the cache does not exist, or its index is damaged.
    """

    num_encoded_live: int
    """Images that the policy `encode` had to encode so far."""

    def __init__(
        self,
        store: Store,
        spec: FeatureSpec,
        *,
        global_maps: Sequence[MapSpec] | None = None,
        local_maps: Sequence[MapSpec] | None = None,
        policy: Literal["fail", "encode"] = "fail",
        device: str = "cpu",
        reads_in_flight: int = 16,
    ) -> None:
        self._store = store
        self._spec = spec
        self._maps = _Maps.chosen(spec, global_maps, local_maps)
        self._policy = policy
        self._live = LiveFeatures(store, spec, device, global_maps=global_maps, local_maps=local_maps)
        self._codec = FeatureCodec(spec, read_calibrations(store, spec))
        self._folder = features_table(store, spec).path
        self._pool = ThreadPoolExecutor(reads_in_flight, thread_name_prefix="loupe-read")
        self.num_encoded_live = 0
        self._index = FeatureIndex(store, spec, self._maps.by_branch)
        if not self._index.files():
            raise MissingFeaturesError(
                f"{store.url(self._folder)} holds no features of these maps. Expected the table that cache-features writes; run it first."
            )

    def fetch(self, images: Sequence[Sample], *, want_global: bool, want_local: bool) -> list[ImageFeatures]:
        """As FeatureSource.fetch.

        Args:
            images: which; an image may stand there twice.
            want_global: whether the global view's maps are wanted.
            want_local: whether the local views' maps are wanted.

        Returns:
            One per image, in their order.

        Raises:
            MissingFeaturesError: an image is missing or damaged, and the policy is `fail`.
            StorageError: the store is away, or refuses us.
        """
        wanted = self._maps.wanted(want_global=want_global, want_local=want_local)
        reads = [self._pool.submit(self._read, sample, wanted) for sample in images]
        results = []
        for sample, read in zip(images, reads, strict=True):
            try:
                results.append(read.result())
            except MissingFeaturesError:
                if self._policy == "fail":
                    for other in reads:
                        other.cancel()
                    raise
                self.num_encoded_live += 1
                results += self._live.fetch([sample], want_global=want_global, want_local=want_local)
        return results

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
            samples: to choose from, evenly; those without an image, or that the cache does not hold, are skipped.
            num_images: how many.

        Raises:
            StaleCacheError: a map differs by more than rounding explains.
        """
        held = [sample for sample, there in zip(samples, self.holds(samples), strict=True) if there and not sample.text_only]
        chosen = held[:: max(1, len(held) // num_images)][:num_images]
        wants = {f"want_{branch}": bool(self._maps.by_branch[branch]) for branch in BRANCHES}
        live = self._live.fetch(chosen, want_global=wants["want_global"], want_local=wants["want_local"])
        for sample, fresh in zip(chosen, live, strict=True):
            cached = self.fetch([sample], want_global=wants["want_global"], want_local=wants["want_local"])[0]
            for branch, maps, axis in (("global", self._maps.by_branch["global"], 0), ("local", self._maps.by_branch["local"], 1)):
                ours, theirs = getattr(cached, f"{branch}_maps"), getattr(fresh, f"{branch}_maps")
                if ours is None:
                    continue
                for place, item in enumerate(maps):
                    stored, now = ours.select(axis, place), theirs.select(axis, place)
                    error = float((stored - now).norm() / now.norm().clamp_min(1e-12))
                    if not error <= _CANARY_TOLERANCE:  # also when it is not a number
                        raise StaleCacheError(
                            f"{self._store.url(self._folder)}: the {branch} map {item.name} of image {sample.image_sha256[:12]} "
                            f"differs from what {self._spec.encoder.model} gives now by {error:.2e} (allowed {_CANARY_TOLERANCE:.0e}). The cache "
                            "does not belong to this encoder or preprocessing any more; cache again under another root."
                        )

    def _read(self, sample: Sample, wanted: Sequence[Branch]) -> ImageFeatures:
        """One image's maps, checked against their checksums."""
        found: dict[Branch, tuple[PackedMap, ...]] = {}
        for branch in wanted:
            maps, expected = self._maps.by_branch[branch], num_views(self._spec, sample, branch)
            places = self._index.places(branch, maps, sample.image_sha256)
            if places is None:
                raise MissingFeaturesError(
                    f"{self._store.url(self._folder)} holds no {branch} features of image {sample.image_sha256[:12]} ({sample.sample_id}); "
                    "it may be in quarantine. Finish cache-features, leave the image out, or read with the policy `encode`."
                )
            rooms = [self._codec.empty(branch, item, expected) for item in maps]
            by_file: dict[str, list[tuple[int, np.ndarray]]] = {}
            for place, room in zip(places, rooms, strict=True):
                if place.num_views != expected or len(place.offsets) != len(room.arrays):
                    raise MissingFeaturesError(self._damaged(place, sample, f"expected {expected} views, the index has {place.num_views}"))
                by_file.setdefault(place.file, []).extend(zip(place.offsets, room.arrays, strict=True))
            for file, parts in by_file.items():
                try:
                    _fill(self._store, f"{self._folder}/{file}", parts)
                except StorageError as error:
                    if not is_damage(error):
                        raise
                    place = next(place for place in places if place.file == file)
                    raise MissingFeaturesError(self._damaged(place, sample, f"cannot be read: {first_line(error)}")) from error
            for place, room, item in zip(places, rooms, maps, strict=True):
                if map_checksum(room.arrays) != place.checksum:
                    raise MissingFeaturesError(self._damaged(place, sample, f"the bytes of map {item.name} are not those that were written"))
            found[branch] = tuple(self._codec.packed(branch, item, room) for item, room in zip(maps, rooms, strict=True))
        return ImageFeatures(maps=found)

    def _damaged(self, place: MapPlace, sample: Sample, what: str) -> str:
        return (
            f"{self._store.url(f'{self._folder}/{place.file}')}, row group {place.row_group} (image {sample.image_sha256[:12]}) is damaged: {what}. "
            "Remove the cache and cache again, or read with the policy `encode`."
        )


def _fill(store: Store, path: str, parts: Sequence[tuple[int, np.ndarray]]) -> None:
    """Read arrays from places in an object, near ones together."""
    reads: list[list[tuple[int, np.ndarray]]] = []
    for offset, array in sorted(parts, key=lambda part: part[0]):
        last = reads[-1][-1] if reads else None
        if last is not None and 0 <= offset - (last[0] + last[1].nbytes) <= _NEAR_BYTES:
            reads[-1].append((offset, array))
        else:
            reads.append([(offset, array)])
    for read in reads:
        start, (last_offset, last_array) = read[0][0], read[-1]
        gaps = [offset - (before + array.nbytes) for (before, array), (offset, _) in pairwise(read)]
        buffers = [read[0][1].reshape(-1).view(np.uint8)]
        for gap, (_, array) in zip(gaps, read[1:], strict=True):
            buffers += [np.empty(gap, dtype=np.uint8), array.reshape(-1).view(np.uint8)]
        assert sum(len(buffer) for buffer in buffers) == last_offset + last_array.nbytes - start
        store.read_into(path, start, buffers)
