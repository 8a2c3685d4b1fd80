"""How large a cache's files will be, to the byte that is not in a map: measured by writing a small file as the cache writes its own.

Headers, footers, checksums and the columns beside the maps weigh about 4 kB an image, which is nothing beside 25 MB of CLIP-L's maps and 4 % of int8
maps of the demo; so they are measured and not guessed.
"""

import hashlib
import tempfile
from dataclasses import dataclass, replace

from model.specs import FeatureSpec
from model.views import Branch
from workers.caching.codec import FeatureCodec
from workers.caching.encode import row_groups
from workers.caching.layout import BRANCHES, features_table, file_metadata, map_fields, map_set, map_sets
from workers.caching.units import num_views
from workers.dataset.samples import ImageRef, Sample
from workers.storage import Store

__all__ = ["FileOverhead", "file_overhead"]

_FEW, _MORE = 4, 12
"""Images of the two files whose difference tells what one image adds."""

_WIDTH = 4
"""Channels of the maps in those files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileOverhead:
    """Bytes of a branch's files beside the maps."""

    file_bytes: float
    """Of every file."""
    image_bytes: float
    """Of every image in it."""


def file_overhead(spec: FeatureSpec, width_px: int, height_px: int) -> dict[Branch, FileOverhead]:
    """Measure the overhead of a cache's files.

    Args:
        spec: of the cache; its calibration need not be known.
        width_px: of a typical image.
        height_px: of the same.

    Returns:
        By branch; branches without maps are left out.
    """
    unknown = "0" * 64  # digests that are not known yet are as long as those that are
    encoder = replace(spec.encoder, weights_sha256=unknown, width=_WIDTH)  # what is not in a map does not depend on how large the map is
    spec = replace(spec, dataset_fingerprint=unknown, encoder=encoder)
    found: dict[Branch, FileOverhead] = {}
    with tempfile.TemporaryDirectory(prefix="loupe-sizing-") as folder:
        store = Store(folder)
        for branch in BRANCHES:
            if spec.maps(branch):
                few, more = (_overhead(store, spec, branch, count, width_px, height_px) for count in (_FEW, _MORE))
                each = (more - few) / (_MORE - _FEW)
                found[branch] = FileOverhead(file_bytes=few - _FEW * each, image_bytes=each)
    return found


def _overhead(store: Store, spec: FeatureSpec, branch: Branch, count: int, width_px: int, height_px: int) -> int:
    """Bytes of a file of so many images that are not in a map."""
    samples = [_sample(number, width_px, height_px) for number in range(count)]
    views = [num_views(spec, sample, branch) for sample in samples]
    codec = FeatureCodec(spec, {})
    stored = {item.name: codec.empty(branch, item, sum(views)) for item in spec.maps(branch)}
    starts = [sum(views[:place]) for place in range(count)]
    rows = [(sample, start, start + number) for sample, start, number in zip(samples, starts, views, strict=True)]
    table = features_table(store, spec)
    size = 0
    for maps in map_sets(spec.maps(branch)):
        blobs = [field.name for item in maps for field in map_fields(spec, branch, item)]
        groups = row_groups(spec, branch, maps, rows, stored)
        partition = {"branch": branch, "maps": map_set(maps)}
        size += table.write_file(partition, f"{count}.parquet", groups, blobs=blobs, metadata=file_metadata(spec.encoding)).size_bytes
    return size - sum(views) * spec.view_bytes(branch)


def _sample(number: int, width_px: int, height_px: int) -> Sample:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    image = ImageRef(sha256=digest, path=f"images/{digest}", width_px=width_px, height_px=height_px)
    return Sample(sample_id=digest, index=number, image=image, family="", source="", split="train", licence="", detail_score=0.0, turns=())
