"""Whether a cache is what its record says: every row there once, every byte as it was written, and a sample as its encoder gives it.

Input: a spec whose cache is finished. Output: what was looked at and what is wrong with it. Files are read whole, each by one task; Arrow verifies
the checksums of their pages, and those of their maps are held against the index. Nothing is written.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from model.errors import ImageError, first_line
from model.specs import FeatureSpec
from model.views import Branch
from workers.caching.index import FeatureIndex, FileJob, file_checksums
from workers.caching.layout import BRANCHES, features_table, maps_in
from workers.caching.units import num_views
from workers.dataset.samples import Sample, read_images
from workers.errors import MissingFeaturesError, StaleCacheError, StorageError
from workers.execution import ExecutionSettings, Progress
from workers.quarantine import image_reason, read_quarantine
from workers.runtime import Cluster, stream_tasks
from workers.storage import Store
from workers.storage_errors import is_damage
from workers.tables import TableFile

__all__ = ["CacheVerification", "verify_cache"]

_MOST_TOLD = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheVerification:
    """What a look at a cache found."""

    num_images: int
    """Distinct ones of the dataset."""
    num_cached: int
    """With every map, in files that can be read."""
    num_quarantined: int
    num_files: int
    """That hold a map of these images, and those of other datasets' in the same table."""
    num_read: int
    """Of those, read whole."""
    num_bytes: int
    """Of what was read."""
    num_encoded: int
    """Encoded again and compared."""
    not_encoded: tuple[str, ...]
    """Why others that were chosen for it could not be: their sources are gone, or were changed since. What is cached of them may well be true."""
    num_twice: int
    """Images that two runs cached at once: they have another row, which nobody reads."""
    faults: tuple[str, ...]
    """What is wrong, the first of it; none where all is well."""
    num_faults: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileContent:
    """What a file holds."""

    file: TableFile
    checksums: tuple[tuple[str, int, tuple[int, ...]], ...]
    """Per row group: the image, its number of views, each map's checksum in the order of the columns."""
    fault: str | None
    """Why it cannot be read."""


def verify_cache(
    spec: FeatureSpec,
    store: Store,
    execution: ExecutionSettings,
    progress: Progress,
    *,
    stage_key: str,
    seed: int,
    num_encoded: int = 8,
    cluster: Cluster | None = None,
) -> CacheVerification:
    """Look whether a cache is whole and true.

    Args:
        spec: of the cache.
        store: where it lies.
        execution: the device and Ray's settings count.
        progress: told in files.
        stage_key: of the cache-features run, for its quarantine.
        seed: which images are encoded again.
        num_encoded: how many.
        cluster: where files are read; None starts Ray.

    Returns:
        What was found.

    Raises:
        TableError: the dataset is not built.
        MissingFeaturesError: the index is damaged, so that nothing can be told.
        StorageError: the store is away.
    """
    images = read_images(store, spec.dataset_fingerprint)
    refused = {row.bytes_sha256 for row in read_quarantine(store, "cache-features", stage_key)}
    expected = {sample.image_sha256: sample for sample in images if sample.image_sha256 not in refused}
    index = FeatureIndex(store, spec)
    faults: list[str] = []
    held = index.held(spec.branch_maps, list(expected))
    whole = set(expected)
    for place, there in held.items():
        lacking = [image for image, has in zip(expected, there.tolist(), strict=True) if not has]
        whole -= set(lacking)
        if lacking:
            faults.append(f"the map {place} of {len(lacking)} images is missing, first of {lacking[0][:12]}")
    table = features_table(store, spec)
    known = {file.path: file for file in table.files()}
    wanted = index.files()
    if faults and (unnamed := [path for path, file in known.items() if path not in wanted and _may_hold(spec, file)]):
        faults.append(
            f"{len(unnamed)} of the table's {len(known)} files are not in the index, first {unnamed[0]}: they may hold what is missing, and "
            "--repair makes the index anew from what they hold"
        )
    # Others' files, of a run under way or killed between its two commits, are no fault of this cache.
    lost = wanted - known.keys()
    unread = set(index.images_in(lost, spec.branch_maps, list(expected)))
    wanted -= lost - unread
    faults += [f"{path} is in the index and not in the table" for path in sorted(unread)]
    jobs = [FileJob(root=store.root, folder=table.path, file=known[path]) for path in sorted(wanted & known.keys())]
    seen: set[tuple[str, str, str]] = set()
    twice: set[str] = set()
    progress.start("reading files", len(jobs), 0)
    try:
        for found in stream_tasks(_read_file, jobs, execution, cluster) if jobs else ():  # Ray takes seconds to start
            content = found if found.fault is None else _read_file(FileJob(root=store.root, folder=table.path, file=found.file))  # not on one word
            if content.fault is not None:
                unread.add(content.file.path)
                faults.append(content.fault)
            faults += _differences(spec, index, content, expected)
            for image, _, _ in content.checksums:
                row = (image, content.file.partition["branch"], content.file.partition["maps"])
                if row in seen:
                    twice.add(image)
                seen.add(row)
            progress.advance(1, faults=len(faults))
    finally:
        progress.finish()
    whole -= set().union(*index.images_in(unread, spec.branch_maps, sorted(whole)).values())
    chosen = sorted(whole)
    random.Random(seed).shuffle(chosen)
    compared, not_encoded = 0, []
    if not faults:  # what is damaged need not be compared
        for sample, error in _encoded_again(spec, store, execution.device, [expected[image] for image in islice(chosen, num_encoded)]):
            if isinstance(error, (ImageError, StorageError)):
                not_encoded.append(f"image {sample.image_sha256[:12]} ({sample.sample_id}): {first_line(error)}")
                continue
            compared += 1
            if error is not None:
                faults.append(first_line(error))
    return CacheVerification(
        num_images=len(images),
        num_cached=len(whole),
        num_quarantined=len(images) - len(expected),
        num_files=len(wanted),
        num_read=len(wanted - unread),
        num_bytes=sum(job.file.size_bytes for job in jobs if job.file.path not in unread),
        num_encoded=compared,
        not_encoded=tuple(not_encoded),
        num_twice=len(twice),
        faults=tuple(faults[:_MOST_TOLD]),
        num_faults=len(faults),
    )


def _may_hold(spec: FeatureSpec, file: TableFile) -> bool:
    """Whether a file holds a map of the spec's at all: a table is shared by others."""
    held = maps_in(file.partition["maps"])
    return any(branch == file.partition["branch"] and item.name in held for branch in BRANCHES for item in spec.maps(branch))


def _encoded_again(spec: FeatureSpec, store: Store, device: str, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Exception | None]]:
    """Each sample with what comparing its features with its encoder's gives: nothing, what is wrong with them, or why it cannot be done."""
    if not samples:
        return
    from workers.caching.reader import CachedFeatures

    features = CachedFeatures(store, spec, device=device)
    for sample in samples:
        try:
            features.verify([sample], num_images=1)
        except (StaleCacheError, MissingFeaturesError) as error:
            yield sample, error
        except (ImageError, StorageError) as error:
            if image_reason(error) is None:
                raise
            yield sample, error
        else:
            yield sample, None


def _read_file(job: FileJob) -> _FileContent:
    """A pure function of the job; may run twice."""
    store = Store(job.root)
    try:
        found = tuple(file_checksums(store, job.folder, job.file))
    except (StorageError, MissingFeaturesError) as error:
        if isinstance(error, StorageError) and not is_damage(error):
            raise
        return _FileContent(file=job.file, checksums=(), fault=job.fault(error))
    return _FileContent(file=job.file, checksums=found, fault=None)


def _differences(spec: FeatureSpec, index: FeatureIndex, content: _FileContent, expected: Mapping[str, Sample]) -> list[str]:
    """What a file holds that the index does not say, or says otherwise. Other datasets' images in it are compared too."""
    branch: Branch = "global" if content.file.partition["branch"] == "global" else "local"
    names = maps_in(content.file.partition["maps"])
    maps = [item for item in spec.maps(branch) if item.name in names]
    faults = []
    located = index.places(branch, [item.name for item in maps], [image for image, _, _ in content.checksums])
    for group, ((image, views, checksums), places) in enumerate(zip(content.checksums, located, strict=True)):
        where = f"{content.file.path}, row group {group} (image {image[:12]})"
        if places is None:
            faults.append(f"{where}: the index has no such image")
            continue
        for item, place in zip(maps, places, strict=True):
            if place.file != content.file.path:
                continue  # the image lies elsewhere too, and is read from there
            if (place.row_group, place.num_views) != (group, views):
                faults.append(f"{where}: the index says row group {place.row_group} with {place.num_views} views, the file has {views}")
            elif place.checksum != checksums[names.index(item.name)]:
                faults.append(f"{where}: the bytes of map {item.name} are not those that were written")
        sample = expected.get(image)
        if sample is not None and num_views(spec, sample, branch) != views:
            faults.append(f"{where}: expected {num_views(spec, sample, branch)} views, found {views}")
    return faults
