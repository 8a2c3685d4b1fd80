"""Where every image's maps lie in a table's files: what makes a million images open in a second and one image one read.

Input: the rows that encoding processes wrote beside their files. Output: which images have which maps, and for one image the places of its numbers.
Invariant: a row tells of a file that was whole before the row was written; an image that two runs encoded at once has two rows, of which everybody
takes the one whose file comes first by name.
"""

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from model.errors import first_line
from model.specs import FeatureSpec, MapSpec
from model.views import Branch
from workers.caching.layout import BRANCHES, INDEX_SCHEMA, index_table, maps_in
from workers.caching.sorted_rows import COLUMNS_OF_A_MAP, NAME_BYTES_KEY, MapPlace, SortedRows, digest_array, mapped_rows
from workers.caching.units import HeldMaps
from workers.errors import MissingFeaturesError, StorageError
from workers.execution import cache_folder
from workers.storage import Store
from workers.storage_errors import is_damage, translated
from workers.tables import Table, TableFile

__all__ = [
    "FeatureIndex",
    "FileJob",
    "compact_index",
    "file_checksums",
    "index_rows",
    "map_checksum",
    "rows_of_file",
    "write_index_rows",
    "write_sorted_rows",
]

_SORTED = "sorted-"
"""So begin the names of files that `mapped_rows` maps."""

_UNUSED_S = 30 * 24 * 3600.0
"""Copies of objects that nobody has opened for so long are removed."""

_FILES_AT_ONCE = 16
_COMPACT_ABOVE = 32
"""Small files of a partition: opening them one by one takes 2 ms each from a folder and 20 from an object store."""


def map_checksum(arrays: Iterable[np.ndarray]) -> int:
    """xxh3 (64 bits) over a map's columns of some views, which reads 10 GB/s where the pages' CRC32 reads 3.

    Args:
        arrays: contiguous, in the order of the columns.
    """
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(array.data.cast("B") if array.size else b"")
    return int(digest.intdigest())


def index_rows(file: TableFile, footer: pq.FileMetaData, images: Sequence[tuple[str, int]], checksums: Sequence[Sequence[int]]) -> pa.Table:
    """The index's rows of a file.

    Args:
        file: of features.
        footer: of it; every chunk of a blob column is one page without compression, so its numbers are the chunk's last bytes.
        images: per row group the image and its number of views.
        checksums: per row group that of each map, as `map_checksum` gives it, in the order of the file's columns.
    """
    maps, schema = maps_in(file.partition["maps"]), footer.schema.to_arrow_schema()
    offsets = np.zeros((len(images), len(maps), COLUMNS_OF_A_MAP), dtype="<i8")
    for group, (_, views) in enumerate(images):
        chunks = footer.row_group(group)
        for place, name in enumerate(maps):
            for number, column in enumerate(_columns_of(name, schema.names)):
                chunk = chunks.column(schema.names.index(column))
                num_bytes = views * schema.field(column).type.byte_width
                offsets[group, place, number] = chunk.data_page_offset + chunk.total_compressed_size - num_bytes
    return pa.table(
        {
            "image_sha256": pa.array([bytes.fromhex(image) for image, _ in images], pa.binary()),
            "file": pa.array([file.path] * len(images), pa.string()),
            "row_group": pa.array(range(len(images)), pa.int32()),
            "num_views": pa.array([views for _, views in images], pa.int32()),
            "offsets": pa.array([row.tobytes() for row in offsets], pa.binary()),
            "checksums": pa.array([np.array(row, dtype="<u8").tobytes() for row in checksums], pa.binary()),
        },
        schema=INDEX_SCHEMA,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FileJob:
    """A file of features to be read whole, as it travels to a task."""

    root: str
    folder: str
    file: TableFile

    def fault(self, error: Exception) -> str:
        """What is wrong with it, in a line that names it once."""
        named = f"cannot read {Store(self.root).url(f'{self.folder}/{self.file.path}')}: "
        return f"{self.file.path}: {first_line(error).removeprefix(named)}"


def rows_of_file(store: Store, folder: str, file: TableFile) -> pa.Table:
    """The index's rows of a file, told from the file alone and read whole, with its pages' checksums verified.

    Args:
        store: where it lies.
        folder: of its table.
        file: which.

    Raises:
        MissingFeaturesError: a row group is of several images, or its views are not in order.
        StorageError: it cannot be read, or a page does not match its checksum.
    """
    found = list(file_checksums(store, folder, file))
    footer = _opened(store, folder, file).metadata
    return index_rows(file, footer, [(image, views) for image, views, _ in found], [checksums for _, _, checksums in found])


def write_index_rows(table: Table, partition: Mapping[str, str], name: str, rows: pa.Table) -> TableFile:
    """Write a file of the index; it belongs to the index only once it is committed.

    Args:
        table: the index.
        partition: of the files that the rows tell of.
        name: the file's.
        rows: as `index_rows` gives them.
    """
    return table.write_file(partition, name, [rows], blobs=["image_sha256", "offsets", "checksums"])


def write_sorted_rows(table: Table, partition: Mapping[str, str], key: str, rows: pa.Table) -> TableFile:
    """Write a file of the index that readers open without reading it; it belongs to the index only once it is committed.

    Args:
        table: the index.
        partition: of the files that the rows tell of.
        key: the file's name is made of it.
        rows: as `index_rows` gives them, in any order.

    Raises:
        MissingFeaturesError: the rows are damaged.
    """
    ordered = SortedRows.of_table(rows, len(maps_in(partition["maps"])))
    names = {len(name) for name in ordered.all_files()}
    if len(names) > 1:
        raise MissingFeaturesError(f"the index has names of files of {min(names)} to {max(names)} characters, expected all of one length")
    metadata = {NAME_BYTES_KEY: str(ordered.files.shape[1])}
    return table.write_file(partition, f"{_SORTED}{key}.parquet", ordered.to_tables(), blobs=INDEX_SCHEMA.names, metadata=metadata)


def _opened(store: Store, folder: str, file: TableFile) -> pq.ParquetFile:
    return Table(store, folder, pa.schema([]), tuple(file.partition)).open_file(file)


def _columns_of(name: str, columns: Sequence[str]) -> list[str]:
    """A map's columns: its numbers, and of int8 its steps."""
    return [column for column in (name, f"{name}__steps") if column in columns]


def file_checksums(store: Store, folder: str, file: TableFile) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """What a file of features holds, told from the file alone and read whole, with its pages' checksums verified.

    Args:
        store: where it lies.
        folder: of its table.
        file: which.

    Yields:
        Per row group: the image, its number of views, and the checksum of each map in the order of the columns.

    Raises:
        MissingFeaturesError: a row group is of several images, or its views are not in order.
        StorageError: it cannot be read, or a page does not match its checksum.
    """
    names = maps_in(file.partition["maps"])
    with translated("read", store.url(f"{folder}/{file.path}")):
        opened = _opened(store, folder, file)
        for group in range(opened.num_row_groups):
            rows = opened.read_row_group(group, use_threads=False)
            images, views = rows.column("image_sha256").to_pylist(), rows.column("view_index").to_pylist()
            if len(set(images)) != 1 or views != list(range(views[0], views[0] + len(views))):
                raise MissingFeaturesError(
                    f"row group {group}: expected the views of one image in order, found {len(set(images))} images, views {views}"
                )
            checksums = []
            for name in names:
                columns = [rows.column(column).combine_chunks() for column in _columns_of(name, rows.column_names)]
                checksums.append(map_checksum([_blob(column) for column in columns]))
            yield images[0], len(images), tuple(checksums)


def _blob(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The bytes of a column of opaque values."""
    width = column.type.byte_width
    return np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * width : (column.offset + len(column)) * width]


class _Portion:
    """The rows of one branch and portion of maps, out of several files of the index.

    Args:
        parts: sorted each by itself.
        maps: names, in the order of the files' columns.
    """

    def __init__(self, parts: Sequence[SortedRows], maps: Sequence[str]) -> None:
        self.place = {name: place for place, name in enumerate(maps)}
        self._parts = parts

    def find(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each image's row is that counts.

        Args:
            images: uint8 [images, 32].

        Returns:
            Of each its part, -1 where it has none, and its row there: int64 [images] both.
        """
        parts, rows = np.full(len(images), -1, dtype=np.int64), np.zeros(len(images), dtype=np.int64)
        for number, part in enumerate(self._parts):
            found = part.rows(images)
            for twice in np.flatnonzero((found >= 0) & (parts >= 0)):  # few: images that two runs encoded at once
                mine, theirs = part.file_names(found[[twice]]), self._parts[parts[twice]].file_names(rows[[twice]])
                found[twice] = found[twice] if mine < theirs else -1
            parts[found >= 0] = number
            rows[found >= 0] = found[found >= 0]
        return parts, rows

    def map_places(self, found: tuple[np.ndarray, np.ndarray], name: str) -> Iterator[tuple[int, MapPlace]]:
        """Where a map of some images lies.

        Args:
            found: as `find` gives it.
            name: of the map.

        Yields:
            An image's number, and the place.
        """
        parts, rows = found
        for number, part in enumerate(self._parts):
            images = np.flatnonzero(parts == number)
            if len(images):
                yield from zip(images.tolist(), part.places(rows[images], self.place[name]), strict=True)

    def files(self) -> set[str]:
        """The files that it has rows of."""
        return {name for part in self._parts for name in part.all_files()}

    def __len__(self) -> int:
        return sum(map(len, self._parts))


class FeatureIndex:
    """Which images have which maps, and where: opened once, asked any number of times.

    Args:
        store: where the features lie.
        spec: whose encoding's table is meant.
        wanted: maps by branch; None is all of the spec's.

    Raises:
        MissingFeaturesError: a file of the index is damaged or gone.
        StorageError: the store is away.
    """

    def __init__(self, store: Store, spec: FeatureSpec, wanted: Mapping[Branch, Sequence[MapSpec]] | None = None) -> None:
        names = {branch: {item.name for item in (spec.maps(branch) if wanted is None else wanted[branch])} for branch in BRANCHES}
        table = index_table(store, spec.encoding)
        parts: dict[tuple[Branch, str], list[TableFile]] = {}
        for file in table.files():
            branch: Branch = "global" if file.partition["branch"] == "global" else "local"
            if names[branch].intersection(maps_in(file.partition["maps"])):
                parts.setdefault((branch, file.partition["maps"]), []).append(file)
        self._portions: dict[Branch, list[_Portion]] = {branch: [] for branch in BRANCHES}
        # Those with the most of what is wanted first: fewer reads for an image.
        order = sorted(parts, key=lambda part: (-len(names[part[0]].intersection(maps_in(part[1]))), part[1]))
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for branch, maps in order:
                self._portions[branch].append(_Portion(_sorted_parts(table, parts[branch, maps], len(maps_in(maps)), pool), maps_in(maps)))

    def __len__(self) -> int:
        """Rows: images by branch and portion of maps."""
        return sum(len(portion) for portions in self._portions.values() for portion in portions)

    def held(self, asked: Iterable[tuple[Branch, MapSpec]], images: Sequence[str]) -> HeldMaps:
        """Which images have which maps.

        Args:
            asked: maps with their branch.
            images: digests.

        Returns:
            By place, as `local/layer_7`: bool [images].
        """
        asked = list(asked)
        digests = digest_array(images)
        found = {item.place(branch): np.zeros(len(images), dtype=np.bool_) for branch, item in asked}
        for branch in {branch for branch, _ in asked}:
            for portion in self._portions[branch]:
                there = portion.find(digests)[0] >= 0
                for asked_branch, item in asked:
                    if asked_branch == branch and item.name in portion.place:
                        found[item.place(branch)] |= there
        return found

    def places(self, branch: Branch, names: Sequence[str], images: Sequence[str]) -> list[list[MapPlace] | None]:
        """Where the maps of images lie.

        Args:
            branch: of the maps.
            names: of the maps.
            images: digests. Many at once take 10 us each, one alone 100.

        Returns:
            Per image a place for every map, or None when one is not there.
        """
        digests = digest_array(images)
        found: list[list[MapPlace | None]] = [[None] * len(names) for _ in images]
        for portion in self._portions[branch]:
            held = [(number, name) for number, name in enumerate(names) if name in portion.place]
            if not held:
                continue
            rows = portion.find(digests)
            for number, name in held:
                for image, place in portion.map_places(rows, name):
                    found[image][number] = found[image][number] or place  # the first portion has the most of what is wanted
        whole = ([place for place in places if place is not None] for places in found)
        return [places if len(places) == len(names) else None for places in whole]

    def images_in(self, files: AbstractSet[str], asked: Iterable[tuple[Branch, MapSpec]], images: Sequence[str]) -> dict[str, set[str]]:
        """Which images lie in some files.

        Args:
            files: which.
            asked: maps with their branch; an image lies where one of these maps of it is read from.
            images: digests.

        Returns:
            By file, of those in which an image lies.
        """
        names: dict[Branch, list[str]] = {}
        for branch, item in asked:
            names.setdefault(branch, []).append(item.name)
        found: dict[str, set[str]] = {}
        for branch in names if files else ():
            for image, places in zip(images, self.places(branch, names[branch], images), strict=True):
                for place in places or ():
                    if place.file in files:
                        found.setdefault(place.file, set()).add(image)
        return found

    def files(self) -> set[str]:
        """The files that it tells of: also those of other datasets."""
        return {name for portions in self._portions.values() for portion in portions for name in portion.files()}


def compact_index(store: Store, spec: FeatureSpec) -> None:
    """Put the index's many small files together, where there are many: a reader opens one that is sorted without reading it.

    Args:
        store: where it lies.
        spec: whose encoding's index is meant.

    Raises:
        MissingFeaturesError: a file of the index is damaged or gone.
        StorageError: the store is away.
    """
    table = index_table(store, spec.encoding)
    counts = Counter(tuple(sorted(file.partition.items())) for file in table.files())
    for partition, count in counts.items():
        if count > _COMPACT_ABOVE:
            table.merge(dict(partition), partial(_merged, table))


def _merged(table: Table, files: Sequence[TableFile]) -> TableFile:
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        rows = _distinct(pa.concat_tables(pool.map(partial(_read, table), files)))
    digest = hashlib.sha256("".join(file.path for file in files).encode()).hexdigest()
    return write_sorted_rows(table, files[0].partition, digest[:32], rows)


def _distinct(rows: pa.Table) -> pa.Table:
    """Rows without those that say the same once more, as of a unit that two drivers entered, one of them before the last merging."""
    numbered = rows.select(["image_sha256", "file", "row_group"]).append_column("number", pa.array(np.arange(len(rows))))
    first = numbered.group_by(["image_sha256", "file", "row_group"]).aggregate([("number", "min")])["number_min"]
    return rows if len(first) == len(rows) else rows.take(first)


def _sorted_parts(table: Table, files: Sequence[TableFile], num_maps: int, pool: ThreadPoolExecutor) -> list[SortedRows]:
    """The rows of some files of a partition: sorted files as they are, all others together."""
    parts, loose = [], []
    for file in files:
        if _name_of(file).startswith(_SORTED):
            parts += _mapped(table, file, num_maps)
        else:
            loose.append(file)
    if loose:
        parts.append(SortedRows.of_table(pa.concat_tables(pool.map(partial(_read, table), loose)), num_maps))
    return parts


def _mapped(table: Table, file: TableFile, num_maps: int) -> list[SortedRows]:
    local = table.store.local_path(f"{table.path}/{file.path}")
    try:
        with translated("read", table.file_url(file)):
            data = _local_copy(table, file) if local is None else np.memmap(local, dtype=np.uint8, mode="r")
            return mapped_rows(data, num_maps)
    except (ValueError, MissingFeaturesError, StorageError) as error:
        if isinstance(error, StorageError) and not is_damage(error):
            raise
        raise _damaged(table, file, error) from error


def _local_copy(table: Table, file: TableFile) -> np.ndarray:
    """An object's bytes, mapped from this machine's copy, which is made once: such a file is never written again."""
    url = table.file_url(file)
    path = cache_folder() / "index" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.parquet"
    with contextlib.suppress(OSError):
        if path.stat().st_size == file.size_bytes:
            os.utime(path)
            return np.memmap(path, dtype=np.uint8, mode="r")
    data = table.store.read_bytes(f"{table.path}/{file.path}")
    with translated("read", url):  # once, and then never again: whether every page is what was written
        pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
    with contextlib.suppress(OSError, StorageError):  # a machine without room for it has it in memory
        Store(path.parent.absolute().as_uri()).write_bytes(path.name, data, sync=False)
        for old in path.parent.iterdir():
            if time.time() - old.stat().st_mtime > _UNUSED_S:
                old.unlink(missing_ok=True)
    return np.frombuffer(data, dtype=np.uint8)


def _name_of(file: TableFile) -> str:
    return file.path.rpartition("/")[2]


def _damaged(table: Table, file: TableFile, error: Exception) -> MissingFeaturesError:
    return MissingFeaturesError(
        f"{table.file_url(file)} of the index is damaged or gone ({first_line(error)}). "
        "Run `loupe verify` with --repair, which makes the index anew out of the files that it tells of."
    )


def _read(table: Table, file: TableFile) -> pa.Table:
    try:
        found = table.read_file(file)
    except StorageError as error:
        if not is_damage(error):
            raise
        raise _damaged(table, file, error) from error
    return found.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
