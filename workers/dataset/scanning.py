"""Sizes of a dataset's images before anything is built, from files that are read and not decoded: what a plan of the cache counts with.

Input: a dataset's spec. Output: sizes of some of its images, and how many there are. Invariant: which images are looked at is a function of their
names and the seed, so a plan can be repeated.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from model.errors import ImageError
from model.images import shown_size
from workers.dataset.sources import image_name, read_records
from workers.dataset.spec import RENDERED_HEIGHT_PX, RENDERED_WIDTH_PX, DatasetSpec, LlavaJsonSourceSpec, RenderedSourceSpec, source_label
from workers.errors import StorageError
from workers.quarantine import image_reason
from workers.storage import Store

__all__ = ["ScannedImages", "scan_images"]

_READS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedImages:
    """Images of a dataset, by their sizes."""

    num_images: int
    """In all."""
    sizes_px: tuple[tuple[int, int], ...]
    """Width and height of those that were looked at; of drawn pictures one stands for all of a source."""
    weights: tuple[float, ...]
    """How many images each of those stands for."""
    by_source: dict[str, float]
    """Images of each source, by its label."""
    references: tuple[str, ...]
    """Of those that were looked at and can be read, as `Store.read_reference` takes them."""
    num_looked_at: int
    num_unreadable: int
    """Of those that were looked at: they will be in the quarantine, and are not counted."""


def scan_images(dataset: DatasetSpec, most: int) -> ScannedImages:
    """Look at the sizes of a dataset's images, by their headers.

    Args:
        dataset: its spec; its records must be readable.
        most: images of a source that are looked at; where it has more, those stand for all.

    Returns:
        Their sizes.

    Raises:
        SourceError: records that cannot be read.
        StorageError: the store failed in a way that says nothing about one image.
    """
    sizes: list[tuple[int, int]] = []
    weights: list[float] = []
    by_source: dict[str, float] = {}
    references: list[str] = []
    total = looked = unreadable = 0
    for source in dataset.sources:
        if isinstance(source, RenderedSourceSpec):
            total += source.num_images
            by_source[source_label(source)] = float(source.num_images)
            sizes.append((RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX))
            weights.append(float(source.num_images))
            continue
        names = _image_names(source)
        chosen = sorted(names, key=lambda name: hashlib.sha256(f"{dataset.seed}:{name}".encode()).hexdigest())[:most]
        looks = dict(zip(chosen, _sizes(source, chosen), strict=True))
        found = [size for size in looks.values() if size is not None]
        store = Store(source.images)
        references += [store.url(name) for name, size in looks.items() if size is not None]
        looked += len(chosen)
        unreadable += len(chosen) - len(found)
        share = len(found) / max(1, len(chosen))
        total += round(len(names) * share)
        by_source[source_label(source)] = len(names) * share
        sizes += found
        weights += [len(names) * share / max(1, len(found))] * len(found)
    return ScannedImages(
        num_images=total,
        sizes_px=tuple(sizes),
        weights=tuple(weights),
        by_source=by_source,
        references=tuple(references),
        num_looked_at=looked,
        num_unreadable=unreadable,
    )


def _image_names(source: LlavaJsonSourceSpec) -> list[str]:
    """Of its records that can be images of it, each once; the others will be in the quarantine."""
    return list(dict.fromkeys(name for name in map(image_name, read_records(source)) if name is not None))


def _sizes(source: LlavaJsonSourceSpec, names: Sequence[str]) -> list[tuple[int, int] | None]:
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return list(pool.map(partial(_size, Store(source.images)), names))


def _size(store: Store, name: str) -> tuple[int, int] | None:
    """Width and height of an image as it is shown; None where it cannot be read."""
    try:
        return shown_size(store.read_bytes(name))
    except (ImageError, StorageError) as error:
        if image_reason(error) is None:
            raise
        return None
