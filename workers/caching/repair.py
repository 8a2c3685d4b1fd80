"""A cache made whole again out of what is left of it: the index anew from the files, damaged files dropped, and what they held to be computed.

Input: a spec whose table is there. Output: an index that tells of every whole file and of no other, and of every run that lost images a stage that is
to be done again: it plans anew and computes those alone. What a file is worth is told by the checksums of its own pages. May be interrupted anywhere
and begun again. Not beside a run that writes to the same table: its images could be computed twice.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from model.specs import FeatureSpec, fingerprint
from workers.caching.index import FeatureIndex, FileJob, rows_of_file, write_sorted_rows
from workers.caching.layout import encoding_folder, features_table, index_table
from workers.caching.units import forget_plan
from workers.commits import Stage
from workers.dataset.samples import read_images
from workers.errors import MissingFeaturesError, StorageError, TableError
from workers.execution import ExecutionSettings, Progress
from workers.quarantine import can_be_read_now, read_quarantine
from workers.runtime import Cluster, stream_tasks
from workers.storage import Store
from workers.storage_errors import is_damage
from workers.sweeping import cache_runs
from workers.tables import TableFile

__all__ = ["CacheRepair", "repair_cache"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRepair:
    """What was done to a cache."""

    num_files: int
    """That the table held; read whole, all of them."""
    dropped: tuple[str, ...]
    """Files that were damaged or gone, each with what was wrong; they are no part of the table any more."""
    reopened: tuple[str, ...]
    """Keys of the cache-features runs that lack images now, or refused some that can be read now; run again, they compute those."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileRows:
    """What the index has to say of a file."""

    file: TableFile
    rows: pa.Table | None
    fault: str | None
    """Why there are none."""


def repair_cache(spec: FeatureSpec, store: Store, execution: ExecutionSettings, progress: Progress, *, cluster: Cluster | None = None) -> CacheRepair:
    """Make a cache's index anew from its files, and let go of those that are damaged.

    Args:
        spec: of the cache; its whole table is repaired, other datasets' images in it too.
        store: where it lies.
        execution: Ray's settings count.
        progress: told in files.
        cluster: where files are read; None starts Ray.

    Returns:
        What was done.

    Raises:
        TableError: the table itself cannot be read, so that nothing says which files are its own.
        StorageError: the store is away.
    """
    store.check_writable()
    table = features_table(store, spec)
    jobs = [FileJob(root=store.root, folder=table.path, file=file) for file in table.files()]
    if not jobs and not index_table(store, spec.encoding).files():
        raise TableError(f"{store.url(table.path)} holds no files of features, so there is nothing to repair; run cache-features")
    parts: dict[tuple[tuple[str, str], ...], list[pa.Table]] = {}
    damaged: list[_FileRows] = []
    progress.start("reading files", len(jobs), 0)
    try:
        for told in stream_tasks(_read_rows, jobs, execution, cluster):
            # What goes for good is looked at once more, here: a machine of the cluster may lack the folder that the root lies in.
            found = told if told.rows is not None else _read_rows(FileJob(root=store.root, folder=table.path, file=told.file))
            if found.rows is None:
                damaged.append(found)
            else:
                parts.setdefault(tuple(sorted(found.file.partition.items())), []).append(found.rows)
            progress.advance(1, damaged=len(damaged))
    finally:
        progress.finish()
    # The index first: what it does not name is read by nobody. Then the table, then the runs that count on what is gone.
    _write_index(store, spec, parts)
    table.drop([found.file for found in damaged])
    return CacheRepair(num_files=len(jobs), dropped=tuple(sorted(found.fault or "" for found in damaged)), reopened=tuple(_reopen(store, spec)))


def _read_rows(job: FileJob) -> _FileRows:
    """A pure function of the job; may run twice."""
    try:
        return _FileRows(file=job.file, rows=rows_of_file(Store(job.root), job.folder, job.file), fault=None)
    except (StorageError, MissingFeaturesError) as error:
        if isinstance(error, StorageError) and not is_damage(error):
            raise
        return _FileRows(file=job.file, rows=None, fault=job.fault(error))


def _write_index(store: Store, spec: FeatureSpec, parts: Mapping[tuple[tuple[str, str], ...], list[pa.Table]]) -> None:
    index = index_table(store, spec.encoding)
    try:
        index.ensure()
    except TableError:  # not even its log can be read; all that it says is told by the files
        for path in store.list(index.path):
            store.delete(path)
        index = index_table(store, spec.encoding)
        index.ensure()
    key = uuid.uuid4().hex  # a name of its own: a transaction may not remove and add one path
    index.replace([write_sorted_rows(index, dict(partition), key, pa.concat_tables(rows)) for partition, rows in parts.items()])


def _reopen(store: Store, spec: FeatureSpec) -> list[str]:
    """Have the runs that lack images done again, or whose images are there again: with a plan, outcomes and refusals of their own anew."""
    reopened = []
    for other in cache_runs(store):
        if encoding_folder(other.encoding) != encoding_folder(spec.encoding):
            continue
        stage = Stage.open(store, "cache-features", other)
        rows = read_quarantine(store, stage.name, stage.key)
        refused = {row.bytes_sha256 for row in rows}
        images = [sample.image_sha256 for sample in read_images(store, other.dataset_fingerprint)]
        kept = [image for image in images if image not in refused]
        held = FeatureIndex(store, other).held(other.branch_maps, kept)
        if all(there.all() for there in held.values()) and not can_be_read_now(store, rows):
            continue
        # The commit record goes last: until then the next repair finds the run here again.
        forget_plan(stage)
        stage.reopen()
        reopened.append(fingerprint(other)[:16])
    return sorted(reopened)
