"""Property: rows of the index, sorted in memory or mapped from a file in any cut, say of every image what a dictionary says."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.caching import sorted_rows
from workers.caching.layout import INDEX_SCHEMA
from workers.caching.sorted_rows import NAME_BYTES_KEY, MapPlace, SortedRows, digest_array, mapped_rows
from workers.errors import MissingFeaturesError
from workers.storage import Store
from workers.tables import Table

MAPS = 3
# Digests of few first bytes: many begin alike, as sha256 never would.
DIGESTS = st.tuples(st.integers(0, 3), st.integers(0, 255), st.integers(0, 2)).map(lambda parts: bytes([parts[0], *[0] * 29, *parts[1:]]))
ROWS = st.lists(st.tuples(DIGESTS, st.integers(0, 9), st.integers(0, 500), st.integers(1, 40), st.integers(0, 2**62)), max_size=60)


def table_of(rows):
    offsets = [np.arange(row[4] % 1000, row[4] % 1000 + 2 * MAPS, dtype="<i8") * (np.arange(2 * MAPS) % 2 == 0) for row in rows]
    return pa.table(
        {
            "image_sha256": pa.array([row[0] for row in rows], pa.binary()),
            "file": pa.array([f"ab/{row[1]:032x}.parquet" for row in rows], pa.string()),
            "row_group": pa.array([row[2] for row in rows], pa.int32()),
            "num_views": pa.array([row[3] for row in rows], pa.int32()),
            "offsets": pa.array([offset.tobytes() for offset in offsets], pa.binary()),
            "checksums": pa.array([np.arange(row[4], row[4] + MAPS, dtype="<u8").tobytes() for row in rows], pa.binary()),
        },
        schema=INDEX_SCHEMA,
    )


def written(rows, folder, blobs=tuple(INDEX_SCHEMA.names)):
    """A sorted file of rows, mapped."""
    found = SortedRows.of_table(table_of(rows), MAPS)
    table = Table(Store(Path(folder).as_uri()), "index", INDEX_SCHEMA)
    metadata = {NAME_BYTES_KEY: str(found.files.shape[1])}
    file = table.write_file({}, "sorted.parquet", found.to_tables(), blobs=list(blobs), metadata=metadata)
    return Path(folder) / "index" / file.path


def expected(rows):
    first = {}
    for row in sorted(rows, key=lambda row: row[1]):
        first.setdefault(row[0], row)
    return first


def assert_told(parts, rows):
    wanted = expected(rows)
    strangers = [bytes([9] * 32), bytes(32), bytes([255] * 32), bytes([1, *[0] * 28, 7, 0, 0])]
    images = [*wanted, *(stranger for stranger in strangers if stranger not in wanted)]
    # A group of rows is sorted by itself and its rows stand before those of the next: the first that has an image has the row that counts.
    for asked in (images, images[:1], images[::-1]):
        digests = digest_array([image.hex() for image in asked])
        told = [None] * len(asked)
        for part in parts:
            found = part.rows(digests)
            for image in np.flatnonzero(found >= 0).tolist():
                told[image] = told[image] or [next(part.places(found[[image]], number)) for number in range(MAPS)]
        for image, places in zip(asked, told, strict=True):
            if image not in wanted:
                assert places is None
                continue
            _, file, group, views, seed = wanted[image]
            for number, place in enumerate(places):
                begin = seed % 1000 + 2 * number
                assert (place.file, place.row_group, place.num_views) == (f"ab/{file:032x}.parquet", group, views)
                assert place.offsets == ((begin,) if begin else ())
                assert place.checksum == seed + number
    assert {name for part in parts for name in part.all_files()} == {f"ab/{row[1]:032x}.parquet" for row in rows}


def is_free_of_ties(rows):
    """Two rows of one image in one file are no index's."""
    return len({(row[0], row[1]) for row in rows}) == len(rows)


@given(ROWS.filter(is_free_of_ties))
def test_in_memory(rows):
    assert_told([SortedRows.of_table(table_of(rows), MAPS)], rows)


@given(ROWS.filter(is_free_of_ties).filter(bool), st.sampled_from([1, 2, 7, 100]), st.sampled_from([0, 10**9]))
def test_mapped(rows, group_rows, bisection_share):
    """By bisection and by looking at all keys; one group of rows or many."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_rows, "_GROUP_ROWS", group_rows)
        patch.setattr(sorted_rows, "_BISECTION_SHARE", bisection_share)
        path = written(rows, folder)
        parts = mapped_rows(np.memmap(path, dtype=np.uint8, mode="r"), MAPS)
        assert sum(map(len, parts)) == len(rows)
        assert_told(parts, rows)
        assert pq.read_table(path).column("image_sha256").to_pylist() == sorted(row[0] for row in rows)  # whoever else reads it


SOME = [(bytes([number, *[0] * 31]), 1, number, 2, number) for number in range(1, 9)]


def test_a_million_rows_are_one_page_a_column(tmp_path):
    count = 30_000  # pyarrow's own pages end at 20,000 rows
    rows = [(number.to_bytes(4, "big") + bytes(28), 1, number, 1, number) for number in range(count)]
    (part,) = mapped_rows(np.memmap(written(rows, tmp_path), dtype=np.uint8, mode="r"), MAPS)
    wanted = digest_array([rows[-1][0].hex()])
    assert list(part.places(part.rows(wanted), 1)) == [
        MapPlace(file=f"ab/{1:032x}.parquet", row_group=count - 1, num_views=1, offsets=((count - 1) % 1000 + 2,), checksum=count)
    ]


@pytest.mark.parametrize("kept", [0, 1, 100, -9])
def test_a_file_that_is_cut_off_is_refused(tmp_path, kept):
    data = written(SOME, tmp_path).read_bytes()
    with pytest.raises((MissingFeaturesError, pa.ArrowException)):
        mapped_rows(np.frombuffer(data[:kept], dtype=np.uint8), MAPS)


def test_a_file_of_another_layout_is_refused(tmp_path):
    with pytest.raises(MissingFeaturesError, match=r"the column row_group is not a single plain page of 8 values of 4 bytes"):
        mapped_rows(np.memmap(written(SOME, tmp_path, ["image_sha256", "file", "offsets", "checksums"]), dtype=np.uint8, mode="r"), MAPS)
    with pytest.raises(MissingFeaturesError, match=r"the column offsets has a value that is not 32 bytes wide"):
        mapped_rows(np.memmap(written(SOME, tmp_path), dtype=np.uint8, mode="r"), 2)


def test_a_value_of_another_width_is_told(tmp_path):
    path = written(SOME, tmp_path)
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    place = bytes(data).index(SOME[0][0])
    data[place - 4] = 31
    with pytest.raises(MissingFeaturesError, match="the column image_sha256 has a value that is not 32 bytes wide"):
        mapped_rows(data, MAPS)
