"""Where every image's maps lie in a table's files: what makes a million images open in a second and one image one read.

Input: the rows that encoding processes wrote beside their files. Output: which images have which maps, and for one image the places of its numbers.
Invariant: a row tells of a file that was whole before the row was written; an image that two runs encoded at once has two rows, of which everybody
takes the one whose file comes first by name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from workers.caching.units import HeldMaps
from workers.errors import MissingFeaturesError, StorageError
from workers.storage import Store
from workers.storage_errors import is_damage, translated
from workers.tables import Table, TableFile

__all__ = ["FeatureIndex", "MapPlace", "compact_index", "file_checksums", "index_rows", "map_checksum", "rows_of_file", "write_index_rows"]

_DIGEST_BYTES = 32
_COLUMNS_OF_A_MAP = 2
"""Its numbers, and of int8 its steps; 0 stands where there are none."""

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
    offsets = np.zeros((len(images), len(maps), _COLUMNS_OF_A_MAP), dtype="<i8")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MapPlace:
    """Where one map of one image lies."""

    file: str
    """Relative to the table."""
    row_group: int
    num_views: int
    offsets: tuple[int, ...]
    """In the file: of its numbers, and of its steps where it has some."""
    checksum: int


class _Portion:
    """The rows of one branch and portion of maps, found by the images' first eight bytes.

    Args:
        table: the index's rows.
        maps: names, in the order of the files' columns.
    """

    def __init__(self, table: pa.Table, maps: Sequence[str]) -> None:
        self.place = {name: place for place, name in enumerate(maps)}
        self._images = _fixed(table, "image_sha256", _DIGEST_BYTES)
        keys = _keys(self._images)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        self._offsets = _fixed(table, "offsets", 8 * _COLUMNS_OF_A_MAP * len(maps)).view("<i8")
        self._checksums = _fixed(table, "checksums", 8 * len(maps)).view("<u8")
        self._row_groups = table.column("row_group").to_numpy()
        self._num_views = table.column("num_views").to_numpy()
        files = table.column("file").combine_chunks().dictionary_encode()
        self._file_names: list[str] = files.dictionary.to_pylist()
        self._files = files.indices.to_numpy()
        # Of an image's rows, the one whose file comes first by name comes first.
        for start in np.flatnonzero(self._sorted[1:] == self._sorted[:-1]):
            run = slice(int(start), int(np.searchsorted(self._sorted, self._sorted[start], side="right")))
            self._order[run] = sorted(self._order[run], key=lambda row: (self._images[row].tobytes(), self._file_names[self._files[row]]))

    def rows(self, images: np.ndarray) -> np.ndarray:
        """The row of each image, -1 where it has none.

        Args:
            images: uint8 [images, 32].
        """
        keys = _keys(images)
        found = np.searchsorted(self._sorted, keys)
        rows = np.full(len(images), -1, dtype=np.int64)
        inside = np.flatnonzero(found < len(self._sorted))
        candidates = self._order[found[inside]]
        same = (self._images[candidates] == images[inside]).all(axis=1)
        rows[inside[same]] = candidates[same]
        for place in inside[~same]:
            rows[place] = self._search(images[place], keys[place], int(found[place]))
        return rows

    def _search(self, digest: np.ndarray, key: np.uint64, place: int) -> int:
        """Go on from a place while the first eight bytes agree."""
        wanted = digest.tobytes()
        while place < len(self._sorted) and self._sorted[place] == key:
            row = int(self._order[place])
            if self._images[row].tobytes() == wanted:
                return row
            place += 1
        return -1

    def map_places(self, rows: np.ndarray, name: str) -> Iterator[MapPlace]:
        """Where a map of some images lies.

        Args:
            rows: of the images.
            name: of the map.
        """
        place = self.place[name]
        columns = (
            self._files[rows],
            self._row_groups[rows],
            self._num_views[rows],
            self._offsets[rows, _COLUMNS_OF_A_MAP * place : _COLUMNS_OF_A_MAP * (place + 1)],
            self._checksums[rows, place],
        )
        for file, row_group, num_views, offsets, checksum in zip(*(column.tolist() for column in columns), strict=True):
            there = tuple(offset for offset in offsets if offset)
            yield MapPlace(file=self._file_names[file], row_group=row_group, num_views=num_views, offsets=there, checksum=checksum)

    def files(self) -> list[str]:
        """The files that it has rows of."""
        return self._file_names


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
                tables = list(pool.map(partial(_read, table), parts[branch, maps]))
                self._portions[branch].append(_Portion(pa.concat_tables(tables), maps_in(maps)))

    def held(self, asked: Iterable[tuple[Branch, MapSpec]], images: Sequence[str]) -> HeldMaps:
        """Which images have which maps.

        Args:
            asked: maps with their branch.
            images: digests.

        Returns:
            By place, as `local/layer_7`: bool [images].
        """
        asked = list(asked)
        digests = _digests(images)
        found = {item.place(branch): np.zeros(len(images), dtype=np.bool_) for branch, item in asked}
        for branch in {branch for branch, _ in asked}:
            for portion in self._portions[branch]:
                there = portion.rows(digests) >= 0
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
        digests = _digests(images)
        found: list[list[MapPlace | None]] = [[None] * len(names) for _ in images]
        for portion in self._portions[branch]:
            held = [(number, name) for number, name in enumerate(names) if name in portion.place]
            if not held:
                continue
            rows = portion.rows(digests)
            there = np.flatnonzero(rows >= 0)
            for number, name in held:
                for image, place in zip(there.tolist(), portion.map_places(rows[there], name), strict=True):
                    found[image][number] = found[image][number] or place  # the first portion has the most of what is wanted
        whole = ([place for place in places if place is not None] for places in found)
        return [places if len(places) == len(names) else None for places in whole]

    def files(self) -> set[str]:
        """The files that it tells of."""
        return {name for portions in self._portions.values() for portion in portions for name in portion.files()}


def compact_index(store: Store, spec: FeatureSpec) -> None:
    """Put the index's many small files together, where there are many.

    Args:
        store: where it lies.
        spec: whose encoding's index is meant.
    """
    table = index_table(store, spec.encoding)
    counts = Counter(tuple(sorted(file.partition.items())) for file in table.files())
    for partition, count in counts.items():
        if count > _COMPACT_ABOVE:
            table.compact(dict(partition))


def _digests(images: Sequence[str]) -> np.ndarray:
    """uint8 [images, 32]."""
    return np.frombuffer(bytes.fromhex("".join(images)), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)


def _keys(images: np.ndarray) -> np.ndarray:
    """The first eight bytes as numbers: uint64 [images]."""
    return np.ascontiguousarray(images[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def _read(table: Table, file: TableFile) -> pa.Table:
    try:
        found = table.read_file(file)
    except StorageError as error:
        if not is_damage(error):
            raise
        raise MissingFeaturesError(
            f"{table.file_url(file)} of the index is damaged or gone ({first_line(error)}). "
            "Run `loupe verify` with --repair, which makes the index anew out of the files that it tells of."
        ) from error
    return found.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)


def _fixed(table: pa.Table, name: str, width: int) -> np.ndarray:
    """A column of values of one width as uint8 [rows, width]."""
    parts = [np.zeros((0, width), dtype=np.uint8)]
    for chunk in table.column(name).chunks:
        offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if len(chunk) and (np.diff(offsets) != width).any():
            raise MissingFeaturesError(
                f"the index of features has values of {name} that are not {width} bytes wide: it is damaged or of another version"
            )
        if len(chunk):
            parts.append(np.frombuffer(chunk.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]].reshape(-1, width))
    return parts[1] if len(parts) == 2 else np.concatenate(parts)
