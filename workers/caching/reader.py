"""Features for training and evaluation, from the cache or from the encoder itself, through one interface and with the same numbers.

`CachedFeatures` reads only the maps that are asked for, one row group per image and branch, with page checksums verified. `LiveFeatures` encodes
on the spot and rounds to the cache's precision. Tolerance between the two, for the same device type: at fp32 2e-5 of a map's largest value
(batch shapes change the order of sums), at fp16 one rounding step more, 2**-10 of each value, at int8 one code more for the few numbers that lie
between two.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from torch import Tensor

from model.encoder import Encoder, compute_dtype, load_encoder
from model.errors import MissingMapError, first_line
from model.specs import FeatureSpec, MapSpec
from model.views import Branch
from workers.caching.codec import FeatureCodec, StoredMap, read_calibrations
from workers.caching.encode import as_features, choose_device, encode_views
from workers.caching.units import BRANCHES, features_table, load_views, map_fields, num_views
from workers.dataset.samples import Sample
from workers.errors import MissingFeaturesError, ObjectNotFoundError, StaleCacheError, StorageError
from workers.storage import Store, translated
from workers.tables import TableFile

__all__ = ["CachedFeatures", "FeatureSource", "ImageFeatures", "LiveFeatures"]

_OPEN_FILES = 64
_CANARY_TOLERANCE = 5e-3
"""Relative error (L2) of a map. Rounding to fp16 costs about 3e-4, another device type less; other weights or another preprocessing cost 1e-1."""


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """The maps of one image's views, in the order that was asked for."""

    global_maps: Float[Tensor, "global_maps global_tokens width"] | None
    """fp32; None when not asked for."""
    local_maps: Float[Tensor, "views local_maps local_tokens width"] | None
    """fp32, views row by row; None when not asked for."""


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


def _image_features(found: dict[Branch, Tensor]) -> ImageFeatures:
    return ImageFeatures(global_maps=found["global"][0] if "global" in found else None, local_maps=found.get("local"))


def _is_damage(error: StorageError) -> bool:
    """Whether a file of the cache is gone or holds something else, as far as can be told; a store that is away or refuses us says nothing of it.

    Arrow reports damage without a number of the operating system; what has one (too many open files) is not the file's fault.
    """
    return isinstance(error, ObjectNotFoundError) or (type(error) is StorageError and getattr(error.__cause__, "errno", None) is None)


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
        found: list[dict[Branch, Tensor]] = [{} for _ in images]
        for branch in wanted:
            views = [load_views(self._spec, sample, self._store, branch) for sample in images]
            if not views:
                continue
            maps = self._maps.by_branch[branch]
            encoder = self._loaded()
            encoded = encode_views(encoder, np.concatenate(views), branch, maps, self._codec, self._batch_views)
            if not encoded.finite.all():
                raise MissingFeaturesError(f"a {branch} map is not finite at {self._spec.precision}; a cache would have refused that image")
            features = as_features(encoded.maps, branch, maps, self._codec)
            for place, part in enumerate(features.split([len(item) for item in views])):
                found[place][branch] = part
        return [_image_features(item) for item in found]

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            deepest = max(layer for maps in self._maps.by_branch.values() for item in maps for layer in item.layers)
            self._encoder = load_encoder(self._spec.encoder, deepest, self._device, compute_dtype(self._spec.compute, self._device))
        return self._encoder


class CachedFeatures:
    """Reads images' features from the cache.

    Args:
        store: where the cache is.
        spec: of the cache.
        global_maps: a choice out of the spec's, in the wanted order; None is all. Only these columns are read.
        local_maps: the same for local views.
        policy: what to do about an image that is missing or damaged: `fail`, or `encode` it live.
        device: for `encode` and the canary.

    Raises:
        MissingMapError: a map that the cache does not hold.
        MissingFeaturesError: the cache does not exist.
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
    ) -> None:
        self._store = store
        self._spec = spec
        self._maps = _Maps.chosen(spec, global_maps, local_maps)
        self._policy = policy
        self._live = LiveFeatures(store, spec, device, global_maps=global_maps, local_maps=local_maps)
        self._codec = FeatureCodec(spec, read_calibrations(store, spec))
        self._table = features_table(store, spec)
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self.num_encoded_live = 0
        files = self._table.files()
        if not files:
            raise MissingFeaturesError(
                f"{store.url(self._table.path)} holds no features. Expected the table that cache-features writes; run it first."
            )
        self._index: dict[Branch, dict[str, tuple[TableFile, int]]] = {"global": {}, "local": {}}
        for file in files:
            self._index_file(file)

    def _index_file(self, file: TableFile) -> None:
        index = self._index["global" if file.partition["branch"] == "global" else "local"]
        try:
            with translated("read", self._table.file_url(file)):
                opened = self._file(file)
                images = opened.read(columns=["image_sha256"]).column(0).to_pylist()
                row = 0
                for group in range(opened.num_row_groups):
                    index[images[row]] = (file, group)
                    row += opened.metadata.row_group(group).num_rows
        except StorageError as error:
            if not _is_damage(error):
                raise
            if self._policy == "fail":
                raise MissingFeaturesError(
                    f"{self._table.file_url(file)} is damaged or gone ({first_line(error)}). "
                    "Remove the cache's runs folder and table and cache again, or read with the policy `encode`."
                ) from error

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
        results = []
        for sample in images:
            try:
                results.append(_image_features({branch: self._read(sample, branch) for branch in wanted}))
            except MissingFeaturesError:
                if self._policy == "fail":
                    raise
                self.num_encoded_live += 1
                results += self._live.fetch([sample], want_global=want_global, want_local=want_local)
        return results

    def holds(self, sample: Sample) -> bool:
        """Whether every branch of the spec has rows of this sample's image; of text alone nothing is expected."""
        return sample.text_only or all(sample.image_sha256 in self._index[branch] for branch in BRANCHES if self._spec.maps(branch))

    def verify(self, samples: Sequence[Sample], num_images: int = 2) -> None:
        """Encode a few cached images again and compare: proves that the cache still is what its encoder gives.

        Args:
            samples: to choose from, evenly; those without an image, or that the cache does not hold, are skipped.
            num_images: how many.

        Raises:
            StaleCacheError: a map differs by more than rounding explains.
        """
        held = [sample for sample in samples if not sample.text_only and self.holds(sample)]
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
                            f"{self._store.url(self._table.path)}: the {branch} map {item.name} of image {sample.image_sha256[:12]} "
                            f"differs from what {self._spec.encoder.model} gives now by {error:.2e} (allowed {_CANARY_TOLERANCE:.0e}). The cache "
                            "does not belong to this encoder or preprocessing any more; cache again under another root."
                        )

    def _read(self, sample: Sample, branch: Branch) -> Tensor:
        place = self._index[branch].get(sample.image_sha256)
        if place is None:
            raise MissingFeaturesError(
                f"{self._store.url(self._table.path)} holds no {branch} features of image {sample.image_sha256[:12]} ({sample.sample_id}); "
                "it may be in quarantine. Finish cache-features, leave the image out, or read with the policy `encode`."
            )
        file, group = place
        maps = self._maps.by_branch[branch]
        spec = self._spec
        try:
            with translated("read", self._table.file_url(file)):
                columns = [field.name for item in maps for field in map_fields(spec, branch, item)]
                rows = self._file(file).read_row_group(group, columns=["image_sha256", *columns], use_threads=False)
        except StorageError as error:
            self._open.pop(file.path, None)
            if not _is_damage(error):
                raise
            raise MissingFeaturesError(
                f"{self._table.file_url(file)}, row group {group} (image {sample.image_sha256[:12]}) cannot be read: "
                f"{first_line(error)}. Remove the cache and cache again, or read with the policy `encode`."
            ) from error
        expected = num_views(spec, sample, branch)
        if rows.num_rows != expected or set(rows.column("image_sha256").to_pylist()) != {sample.image_sha256}:
            raise MissingFeaturesError(
                f"{file.path}, row group {group}: expected {expected} views of image {sample.image_sha256[:12]}; the file is damaged"
            )
        stored = {}
        for item in maps:
            room = self._codec.empty(branch, item, expected)
            arrays = [_column(rows, field.name, like) for field, like in zip(map_fields(spec, branch, item), (room.values, room.steps), strict=False)]
            stored[item.name] = StoredMap(values=arrays[0], steps=arrays[1] if len(arrays) > 1 else None)
        return as_features(stored, branch, maps, self._codec)

    def _file(self, file: TableFile) -> pq.ParquetFile:
        if file.path in self._open:
            self._open.move_to_end(file.path)
        else:
            self._open[file.path] = self._table.open_file(file)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[file.path]


def _column(rows: pa.Table, name: str, like: np.ndarray | None) -> np.ndarray:
    """A column of opaque bytes as an array of the shape and type of another; no copy."""
    assert like is not None
    blob = rows.column(name).combine_chunks()
    width = blob.type.byte_width
    return np.frombuffer(blob.buffers()[1], dtype=like.dtype, offset=blob.offset * width, count=like.size).reshape(like.shape)
