"""What the Delta tables promise, in every kind of store."""

import multiprocessing
import time

import pyarrow as pa
import pytest

from workers.errors import TableError
from workers.storage import Store
from workers.tables import Table, read_partition

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("blob", pa.binary(4), metadata={"map": "layer_1"})])


def table_at(root, path="things"):
    return Table(Store(root), path, SCHEMA, ("kind",))


def rows(*numbers):
    return pa.Table.from_pylist([{"id": number, "blob": number.to_bytes(4, "big")} for number in numbers], schema=SCHEMA)


def test_only_committed_files_exist_and_each_once(store_root):
    table = table_at(store_root)
    assert table.files() == []
    assert table.read() is None
    table.ensure()
    table.ensure()
    first = table.write_file({"kind": "a"}, "one.parquet", [rows(1), rows(2, 3)], blobs=["blob"])
    second = table.write_file({"kind": "b"}, "two.parquet", [rows(4)], blobs=["blob"])
    assert table.files() == []
    assert table.commit([first]) == 1
    assert table.commit([first, second]) == 1
    assert table.commit([first, second]) == 0
    assert [file.path for file in table.files()] == ["kind=a/one.parquet", "kind=b/two.parquet"]
    assert [file.num_rows for file in table.files({"kind": "a"})] == [3]
    assert read_partition(Store(store_root), "things", {"kind": "a"}).column("id").to_pylist() == [1, 2, 3]
    assert read_partition(Store(store_root), "things", {"kind": "c"}) is None
    assert table.read(columns=["id"]).column_names == ["id"]


def test_a_blind_commit_of_the_same_path_stays_one_file(store_root, monkeypatch):
    """Two drivers that both found the file missing: the log's rule (path is identity) keeps one."""
    table = table_at(store_root)
    table.ensure()
    file = table.write_file({"kind": "a"}, "one.parquet", [rows(1)], blobs=["blob"])
    table.commit([file])
    with monkeypatch.context() as patch:
        patch.setattr(Table, "_held_paths", lambda self, table: set())
        assert table.commit([file]) == 1
    assert len(table.files()) == 1
    assert table.read().num_rows == 1


def test_row_groups_checksums_and_blobs_are_as_asked(store_root):
    table = table_at(store_root)
    file = table.write_file({"kind": "a"}, "one.parquet", [rows(1), rows(2, 3)], blobs=["blob"], metadata={"k": "v"})
    opened = table.open_file(file)
    assert [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)] == [1, 2]
    blob = opened.metadata.row_group(0).column(1)
    assert (blob.compression, blob.has_dictionary_page, blob.statistics) == ("UNCOMPRESSED", False, None)
    assert opened.metadata.row_group(0).column(0).statistics is not None
    assert opened.schema_arrow.field("blob").metadata[b"map"] == b"layer_1"
    assert opened.schema_arrow.metadata[b"k"] == b"v"


def test_an_empty_file_is_a_file(store_root):
    table = table_at(store_root)
    table.ensure()
    table.commit([table.write_file({"kind": "a"}, "none.parquet", [SCHEMA.empty_table()], blobs=["blob"])])
    assert [file.num_rows for file in table.files()] == [0]
    assert table.read().num_rows == 0
    with pytest.raises(TableError, match="at least one"):
        table.write_file({"kind": "a"}, "nothing.parquet", [])


def test_other_columns_are_refused(store_root):
    table_at(store_root).ensure()
    with pytest.raises(TableError, match="made by another version"):
        Table(Store(store_root), "things", pa.schema([("other", pa.int64())]), ("kind",)).ensure()
    with pytest.raises(TableError, match="partition values"):
        table_at(store_root).write_file({"kind": "a/b"}, "x.parquet", [rows(1)])


def test_duckdb_polars_and_arrow_read_the_table(store_root):
    import deltalake
    import duckdb
    import polars as pl

    table = table_at(store_root)
    table.ensure()
    table.commit(
        [table.write_file({"kind": kind}, "one.parquet", [rows(*numbers)], blobs=["blob"]) for kind, numbers in (("a", (1, 2)), ("b", (3,)))]
    )
    options = table.store.delta_options
    frame = pl.scan_delta(table.uri, storage_options=options or None).filter(pl.col("kind") == "a").sort("id").collect()
    assert frame["id"].to_list() == [1, 2]
    assert frame["blob"].to_list() == [b"\x00\x00\x00\x01", b"\x00\x00\x00\x02"]
    things = deltalake.DeltaTable(table.uri, storage_options=options or None).to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    assert duckdb.sql("select kind, count(*), sum(id) from things group by kind order by kind").fetchall() == [("a", 2, 3), ("b", 1, 3)]


def commit_many(root, writer):
    table = table_at(root)
    table.ensure()
    for number in range(5):
        mine = table.write_file({"kind": "own"}, f"{writer}-{number}.parquet", [rows(writer * 10 + number)], blobs=["blob"])
        shared = table.write_file({"kind": "shared"}, f"{number}.parquet", [rows(number)], blobs=["blob"])
        table.commit([mine, shared])


@pytest.mark.slow
def test_concurrent_processes_lose_nothing_and_double_nothing(store_root):
    """Four processes create the table and commit at once; half of the files are the same for all."""
    processes = [multiprocessing.get_context("spawn").Process(target=commit_many, args=(store_root, writer)) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    table = table_at(store_root)
    assert sorted(table.read({"kind": "own"}).column("id").to_pylist()) == sorted(writer * 10 + number for writer in range(4) for number in range(5))
    assert table.read({"kind": "shared"}).column("id").to_pylist() == list(range(5))


def test_a_partition_is_merged_into_one_file_and_others_lose_nothing(store_root):
    table = table_at(store_root)
    table.ensure()
    files = [table.write_file({"kind": kind}, f"{number}.parquet", [rows(number)], blobs=["blob"]) for number, kind in enumerate("aaab")]
    table.commit(files)

    def merge(found):
        assert [file.path for file in found] == ["kind=a/0.parquet", "kind=a/1.parquet", "kind=a/2.parquet"]
        # Others add a file before it is done: it was not merged, and stays.
        other = table_at(store_root)
        other.commit([other.write_file({"kind": "a"}, "late.parquet", [rows(9)], blobs=["blob"])])
        return table.write_file({"kind": "a"}, "merged.parquet", [table.read_file(file) for file in found], blobs=["blob"])

    table.merge({"kind": "a"}, merge)
    assert [file.path for file in table.files()] == ["kind=a/late.parquet", "kind=a/merged.parquet", "kind=b/3.parquet"]
    assert sorted(table.read({"kind": "a"}).column("id").to_pylist()) == [0, 1, 2, 9]
    assert Store(store_root).exists("things/kind=a/0.parquet")  # for whoever is reading it
    table.merge({"kind": "c"}, merge)  # nothing there, nothing done


@pytest.mark.parametrize("told_by", ["commits", "a checkpoint", "a checkpoint and commits behind it", "a checkpoint alone"])
def test_the_log_tells_which_files_left_the_table_and_when(store_root, told_by):
    import deltalake

    table = table_at(store_root)
    assert table.removals() == {}
    table.ensure()
    table.commit([table.write_file({"kind": "a"}, f"{number}.parquet", [rows(number)], blobs=["blob"]) for number in range(3)])
    assert table.removals() == {}

    def merge(name):
        started = time.time()
        table.merge({"kind": "a"}, lambda found: table.write_file({"kind": "a"}, name, [table.read_file(file) for file in found], blobs=["blob"]))
        return started, time.time()

    def checkpoint():
        deltalake.DeltaTable(table.uri, storage_options=table.store.delta_options or None).create_checkpoint()

    first = merge("first.parquet")
    if told_by != "commits":
        checkpoint()
    if told_by == "a checkpoint alone":  # as when old commits were cleaned up
        for path in table.store.list("things/_delta_log"):
            if path.endswith(".json"):
                table.store.delete(path)
    expected = {f"kind=a/{number}.parquet": first for number in range(3)}
    if told_by == "a checkpoint and commits behind it":
        expected["kind=a/first.parquet"] = merge("second.parquet")
    found = table_at(store_root).removals()
    assert found.keys() == expected.keys()
    for path, (started, ended) in expected.items():
        assert started - 0.001 <= found[path] <= ended


def test_of_two_that_merge_one_does(store_root):
    table = table_at(store_root)
    table.ensure()
    table.commit([table.write_file({"kind": "a"}, f"{number}.parquet", [rows(number)], blobs=["blob"]) for number in range(3)])

    def merge(name, found, before=lambda: None):
        before()
        return table.write_file({"kind": "a"}, name, [table.read_file(file) for file in found], blobs=["blob"])

    other = table_at(store_root)
    table.merge({"kind": "a"}, lambda found: merge("second.parquet", found, lambda: other.merge({"kind": "a"}, lambda f: merge("first.parquet", f))))
    assert [file.path for file in table.files()] == ["kind=a/first.parquet"]
    assert table.read().column("id").to_pylist() == [0, 1, 2]
