"""Rows of the index in the order of their images: what is looked up among a million costs what it costs among a thousand.

A file of sorted rows is Parquet that any reader reads, and laid out so that nothing has to be read to use it: every column is one page per row group,
without compression, of values that all have the same width. So a column is an array in the file, which is mapped, and a look-up touches the few
pages of memory that its bisection passes. Processes of one machine share them. Rows that are not in such a file are sorted in memory, behind the same
class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workers.caching.layout import INDEX_SCHEMA
from workers.errors import MissingFeaturesError

__all__ = ["NAME_BYTES_KEY", "MapPlace", "SortedRows", "digest_array", "mapped_rows"]

DIGEST_BYTES = 32
COLUMNS_OF_A_MAP = 2
"""Its numbers, and of int8 its steps; 0 stands where there are none."""

NAME_BYTES_KEY = "loupe.file_name_bytes"
"""In a sorted file's metadata: how long the names are that its column `file` holds."""

_PREFIX_BYTES = 4
"""Parquet's plain encoding begins every value of binary type with its length."""

_HEADER_BYTES = 256
"""A page's header is shorter: with its checksum, and without statistics, some 40 bytes."""

_GROUP_ROWS = 2**22
"""Pages end below 2 GiB: these are 1.3 GB of places for twenty maps."""

_BISECTION_SHARE = 32
"""Of the rows: whoever asks for more than one in so many has all keys read in order, which is faster than jumping among them."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SortedRows:
    """Rows by ascending digest, and rows of one image by their file's name: an image's first row is the one that counts."""

    images: np.ndarray
    """uint8 [rows, 32]."""
    files: np.ndarray
    """uint8 [rows, bytes]: names, with zeros behind shorter ones."""
    row_groups: np.ndarray
    """int32 [rows]."""
    num_views: np.ndarray
    """int32 [rows]."""
    offsets: np.ndarray
    """uint8 [rows, 16 * maps]: int64, little-endian."""
    checksums: np.ndarray
    """uint8 [rows, 8 * maps]: uint64, little-endian."""

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of_table(cls, table: pa.Table, num_maps: int) -> "SortedRows":
        """Sort rows in memory.

        Args:
            table: of INDEX_SCHEMA.
            num_maps: that each row tells of.

        Raises:
            MissingFeaturesError: values do not have the width that they should have.
        """
        images = _fixed(table, "image_sha256", DIGEST_BYTES)
        files = table.column("file").combine_chunks().dictionary_encode()
        names = np.array([name.encode() for name in files.dictionary.to_pylist()] or [b""])
        codes = files.indices.to_numpy()
        keys = _keys(images)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for start in np.flatnonzero(ordered[1:] == ordered[:-1]):  # few: images with two rows
            run = slice(int(start), int(np.searchsorted(ordered, ordered[start], side="right")))
            order[run] = sorted(order[run], key=lambda row: (images[row].tobytes(), names[codes[row]]))
        return cls(
            images=images[order],
            files=names[codes[order]].view(np.uint8).reshape(len(order), names.itemsize),
            row_groups=table.column("row_group").to_numpy()[order],
            num_views=table.column("num_views").to_numpy()[order],
            offsets=_fixed(table, "offsets", 8 * COLUMNS_OF_A_MAP * num_maps)[order],
            checksums=_fixed(table, "checksums", 8 * num_maps)[order],
        )

    def to_tables(self) -> Iterator[pa.Table]:
        """As the row groups of a file that `mapped_rows` maps; the file has to be written with every column plain and in one page."""
        for start in range(0, len(self), _GROUP_ROWS):
            part = slice(start, start + _GROUP_ROWS)
            columns = [
                _binary(self.images[part], pa.binary()),
                _binary(self.files[part], pa.string()),
                pa.array(self.row_groups[part]),
                pa.array(self.num_views[part]),
                _binary(self.offsets[part], pa.binary()),
                _binary(self.checksums[part], pa.binary()),
            ]
            yield pa.table(columns, schema=INDEX_SCHEMA)

    def rows(self, images: np.ndarray) -> np.ndarray:
        """The first row of each image, -1 where it has none.

        Args:
            images: uint8 [images, 32].

        Returns:
            int64 [images].
        """
        found = np.full(len(images), -1, dtype=np.int64)
        keys = _keys(images)
        starts = self._starts(keys)
        inside = np.flatnonzero(starts < len(self))
        same = (self.images[starts[inside]] == images[inside]).all(axis=1)
        found[inside[same]] = starts[inside[same]]
        for place in inside[~same]:
            found[place] = self._search(images[place], keys[place], int(starts[place]))
        return found

    def file_names(self, rows: np.ndarray) -> list[str]:
        """The files' names of some rows."""
        return [name.decode() for name in _names(self.files[rows])]

    def all_files(self) -> list[str]:
        """Every file that it has rows of, once."""
        width = self.files.shape[1]
        held = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(self), [None, pa.py_buffer(np.ascontiguousarray(self.files))])
        return [name.rstrip(b"\0").decode() for name in held.unique().to_pylist()]

    def places(self, rows: np.ndarray, number: int) -> Iterator[MapPlace]:
        """Where a map of some images lies.

        Args:
            rows: of the images.
            number: of the map, in the order of the files' columns.
        """
        offsets = self.offsets[rows].view("<i8")[:, COLUMNS_OF_A_MAP * number : COLUMNS_OF_A_MAP * (number + 1)]
        checksums = self.checksums[rows].view("<u8")[:, number]
        columns = (self.row_groups[rows].tolist(), self.num_views[rows].tolist(), offsets.tolist(), checksums.tolist())
        for file, row_group, num_views, begin, checksum in zip(self.file_names(rows), *columns, strict=True):
            there = tuple(offset for offset in begin if offset)
            yield MapPlace(file=file, row_group=row_group, num_views=num_views, offsets=there, checksum=checksum)

    def _starts(self, keys: np.ndarray) -> np.ndarray:
        """Where each key is or would be: int64 [keys]."""
        if len(keys) * _BISECTION_SHARE > len(self):
            return np.searchsorted(_keys(self.images), keys)
        low, high = np.zeros(len(keys), dtype=np.int64), np.full(len(keys), len(self), dtype=np.int64)
        for _ in range(len(self).bit_length()):
            middle = (low + high) >> 1
            below = _keys(self.images[np.minimum(middle, len(self) - 1)]) < keys
            is_open = low < high
            low, high = np.where(is_open & below, middle + 1, low), np.where(is_open & ~below, middle, high)
        return low

    def _search(self, digest: np.ndarray, key: np.uint64, row: int) -> int:
        """Go on from a row while the first eight bytes agree."""
        wanted = digest.tobytes()
        while row < len(self) and _keys(self.images[row : row + 1])[0] == key:
            if self.images[row].tobytes() == wanted:
                return row
            row += 1
        return -1


def mapped_rows(data: np.ndarray, num_maps: int) -> list[SortedRows]:
    """The rows of a sorted file, none of them read.

    Args:
        data: uint8 [bytes]: the file, in memory or mapped.
        num_maps: that each row tells of.

    Returns:
        Those of each row group.

    Raises:
        MissingFeaturesError: it is not laid out as a sorted file is.
        pyarrow.ArrowInvalid: it is no Parquet file.
    """
    footer = pq.read_metadata(pa.BufferReader(pa.py_buffer(data)))
    widths = {
        "image_sha256": DIGEST_BYTES,
        "file": int((footer.metadata or {}).get(NAME_BYTES_KEY.encode(), b"0")),
        "row_group": 0,
        "num_views": 0,
        "offsets": 8 * COLUMNS_OF_A_MAP * num_maps,
        "checksums": 8 * num_maps,
    }
    names = footer.schema.to_arrow_schema().names
    if sorted(names) != sorted(widths):
        raise MissingFeaturesError(f"expected the columns {list(widths)}, found {names}")
    found = []
    for group in range(footer.num_row_groups):
        chunks = footer.row_group(group)
        columns = {name: _mapped(data, chunks.column(names.index(name)), chunks.num_rows, width) for name, width in widths.items()}
        found.append(
            SortedRows(
                images=columns["image_sha256"],
                files=columns["file"],
                row_groups=columns["row_group"],
                num_views=columns["num_views"],
                offsets=columns["offsets"],
                checksums=columns["checksums"],
            )
        )
    return found


def digest_array(images: Sequence[str]) -> np.ndarray:
    """Digests in hexadecimal as uint8 [images, 32]."""
    return np.frombuffer(bytes.fromhex("".join(images)), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _mapped(data: np.ndarray, chunk: pq.ColumnChunkMetaData, num_rows: int, width: int) -> np.ndarray:
    """A column of a row group: int32 [rows] where the width is 0, else uint8 [rows, width]."""
    stride = _PREFIX_BYTES + width
    start = chunk.data_page_offset + chunk.total_compressed_size - num_rows * stride
    header_bytes = start - chunk.data_page_offset
    if chunk.compression != "UNCOMPRESSED" or not 0 < header_bytes <= _HEADER_BYTES or start + num_rows * stride > len(data):
        raise MissingFeaturesError(f"the column {chunk.path_in_schema} is not a single plain page of {num_rows} values of {width or 4} bytes")
    page = data[start : start + num_rows * stride]
    if not width:
        return page.view("<i4")
    values = page.reshape(num_rows, stride)
    for row in (0, num_rows - 1):
        if num_rows and values[row, :_PREFIX_BYTES].view("<u4")[0] != width:
            raise MissingFeaturesError(f"the column {chunk.path_in_schema} has a value that is not {width} bytes wide")
    return values[:, _PREFIX_BYTES:]


def _keys(images: np.ndarray) -> np.ndarray:
    """The first eight bytes as numbers: uint64 [images]."""
    return np.ascontiguousarray(images[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def _names(files: np.ndarray) -> list[bytes]:
    """Without the zeros behind them."""
    names: list[bytes] = np.ascontiguousarray(files).view(f"S{files.shape[1]}").reshape(-1).tolist()
    return names


def _binary(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column of values of one width."""
    offsets = np.arange(len(values) + 1, dtype=np.int64) * values.shape[1]
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(offsets.astype("<i4")), pa.py_buffer(np.ascontiguousarray(values))])


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
