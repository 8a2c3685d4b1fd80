"""What every store promises, whatever it is made of."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from workers.errors import ObjectNotFoundError, StorageError
from workers.storage import Store, open_url


@pytest.fixture
def store(store_root):
    return Store(store_root)


def test_bytes_come_back_and_are_replaced_whole(store):
    store.write_bytes("a/b.bin", b"first")
    store.write_bytes("a/b.bin", b"second")
    assert store.read_bytes("a/b.bin") == b"second"
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert not store.exists("a/c")


def test_what_is_not_there_is_an_error_with_a_name(store, tmp_path):
    with pytest.raises(ObjectNotFoundError, match="nothing lies there"):
        store.read_bytes("nothing")
    with pytest.raises(ObjectNotFoundError):
        store.download_folder("nothing", tmp_path)
    store.delete("nothing")
    assert store.list("nothing") == []


def test_lists_are_sorted_complete_and_end_at_folder_borders(store):
    names = ["runs/a/2", "runs/a/1", "runs/ab/1", "runs/a/deep/er/1", "other"]
    for name in names:
        store.write_bytes(name, b"x")
    assert store.list("runs/a") == ["runs/a/1", "runs/a/2", "runs/a/deep/er/1"]
    assert store.list() == sorted(names)
    store.delete("runs/a/1")
    assert store.list("runs/a") == ["runs/a/2", "runs/a/deep/er/1"]


def test_exclusive_creation_has_one_winner(store):
    assert store.create_bytes("claim", b"mine")
    assert not store.create_bytes("claim", b"yours")
    assert store.read_bytes("claim") == b"mine"
    for turn in range(5):
        with ThreadPoolExecutor(8) as pool:
            wins = list(pool.map(lambda number, turn=turn: store.create_json(f"race-{turn}", number), range(8)))
        assert wins.count(True) == 1
        assert store.read_json(f"race-{turn}") == wins.index(True)


def test_of_callers_with_the_same_bytes_one_wins(store):
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda _: store.create_bytes("claim", b"same"), range(8)))
    assert wins.count(True) == 1
    assert not store.create_bytes("claim", b"same")


def test_ranges_come_in_their_order_from_many_threads(store):
    data = os.urandom(300_000)
    store.write_bytes("large", data)
    ranges = [(7 * start, 1000 + start) for start in range(100)] + [(0, len(data)), (len(data) - 1, 1), (len(data), 0)]
    with ThreadPoolExecutor(4) as pool:
        for parts in pool.map(lambda _: store.read_ranges("large", ranges), range(4)):
            assert [bytes(part) for part in parts] == [data[start : start + length] for start, length in ranges]
    assert store.read_ranges("large", []) == []
    assert memoryview(store.read_ranges("large", [(5, 10)])[0]) == data[5:15]


def test_a_range_that_is_not_there_is_an_error_with_a_name(store):
    store.write_bytes("short", b"12345")
    for part in ((3, 3), (5, 1), (9, 2)):
        with pytest.raises(StorageError, match="short"):
            store.read_ranges("short", [(0, 1), part])
    with pytest.raises(StorageError, match=r"found start and length \(-1, 2\)"):
        store.read_ranges("short", [(-1, 2)])
    with pytest.raises(ObjectNotFoundError):
        store.read_ranges("none", [(0, 1), (1, 1)])


def test_a_store_survives_a_fork(store):
    store.write_bytes("a", b"12345")
    script = """
import os, sys
from workers.storage import Store
store = Store(sys.argv[1])
def read():
    with store.publishing(f"published-{os.getpid()}") as path:
        path.write_bytes(b"whole")
    return [bytes(part) for part in store.read_ranges("a", [(0, 2), (3, 2)])] + [store.read_bytes(f"published-{os.getpid()}"), store.exists("none")]
expected = [b"12", b"45", b"whole", False]
assert read() == expected
child = os.fork()
if child == 0:
    os._exit(0 if read() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert read() == expected
"""
    done = subprocess.run([sys.executable, "-c", script, store.root], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_json_that_is_none_is_an_error_with_a_name(store):
    store.write_json("a.json", {"b": [1, None]})
    assert store.read_json("a.json") == {"b": [1, None]}
    store.write_bytes("a.json", b"{")
    with pytest.raises(StorageError, match="should be JSON"):
        store.read_json("a.json")


def test_a_published_file_appears_whole_or_not_at_all(store):
    with store.publishing("big/file.bin") as path:
        path.write_bytes(b"x" * 1000)
        assert not store.exists("big/file.bin")
    assert len(store.read_bytes("big/file.bin")) == 1000

    def fails_halfway():
        with store.publishing("big/half.bin") as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_halfway()
    assert store.list("big") == ["big/file.bin"]


def test_a_whole_root_comes_down(store, tmp_path):
    store.write_bytes("a.txt", b"a")
    store.write_bytes("deep/b.txt", b"b")
    store.download_folder("", tmp_path / "copy")
    assert (tmp_path / "copy" / "a.txt").read_text() == "a"
    assert (tmp_path / "copy" / "deep" / "b.txt").read_text() == "b"


def test_folders_come_down(store, tmp_path):
    for name, text in (("a.txt", b"a"), ("deep/b.txt", b"b")):
        store.write_bytes(f"exports/one/{name}", text)
    store.download_folder("exports/one", tmp_path / "copy")
    assert sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.txt")) == ["a.txt", "deep/b.txt"]
    assert (tmp_path / "copy" / "deep" / "b.txt").read_text() == "b"


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../b", "s3://elsewhere/x"])
def test_paths_stay_below_the_root(store, path):
    for operation in (store.read_bytes, store.exists, store.delete, store.list, store.url):
        with pytest.raises(StorageError, match="relative to its root"):
            operation(path)


def test_urls_lead_back_to_their_objects(store):
    store.write_bytes("images/with a space & more.png", b"pixels")
    url = store.url("images/with a space & more.png")
    other, name = open_url(url)
    assert other.read_bytes(name) == b"pixels"
    assert Store(store.root + "/elsewhere").read_reference(url) == b"pixels"
    assert store.read_reference("images/with a space & more.png") == b"pixels"


def test_a_store_travels_between_processes(store):
    store.write_bytes("a", b"x")
    assert store.read_ranges("a", [(0, 1)]) == [b"x"]
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"x"


def test_a_writable_root_leaves_nothing_behind(store):
    store.check_writable()
    assert store.list() == []


def test_every_client_writes_reads_and_counts(store, tmp_path):
    file = tmp_path / "large"
    file.write_bytes(os.urandom(20 * 2**20))
    for client in store.bulk_clients():
        client.write_bytes(f"{client.name}/small", b"12345")
        assert bytes(client.read(f"{client.name}/small")) == b"12345"
        assert bytes(client.read_range(f"{client.name}/small", 1, 3)) == b"234"
        client.write_file(f"{client.name}/large", file)
        assert store.read_bytes(f"{client.name}/large") == file.read_bytes()
        assert client.count(client.name) == 2
    assert set(store.clients_in_use().values()) <= {client.name for client in store.bulk_clients()}
    assert store.abandoned_uploads() == []


def test_bulk_reading_through_arrow(store):
    import pyarrow as pa

    with store.publishing("t/a.parquet") as path:
        pq.write_table(pa.table({"a": [1, 2]}), path)
    assert pq.read_table(store.fs_path("t/a.parquet"), filesystem=store.filesystem).to_pydict() == {"a": [1, 2]}
