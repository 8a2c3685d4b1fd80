"""Stores that are busy, lines that break, answers that are lost: the result is right, or an error with a name.

A real server behind a proxy that fails.
"""

import os
import uuid
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from tests.s3_faults import Fault, Plan, Proxy, every, fault_proxy, once
from workers.errors import ObjectNotFoundError, StorageError, StoreUnavailableError
from workers.storage import Store
from workers.tables import Table

pytestmark = pytest.mark.slow

NOISE = bytes(range(256)) * 2**15
"""8 MiB."""


@pytest.fixture
def faulty(bucket_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Proxy]]:
    """A fresh root on a real server, reached through the proxy."""
    bucket = bucket_of("seaweedfs")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as (proxy, endpoint):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield Store(f"{bucket}/{uuid.uuid4().hex}"), proxy


FAULTS = ["busy", "reset", "lost", "slow"]


@pytest.mark.parametrize("fault", [*FAULTS, "truncated"])
def test_ranges_come_whole_through_faults(faulty: tuple[Store, Proxy], fault: str) -> None:
    store, proxy = faulty
    store.write_bytes("large", NOISE)
    ranges = [(start * 99_991, 65_536) for start in range(40)] + [(0, len(NOISE)), (5, 0)]
    proxy.plan = every(3, fault)
    parts = store.read_ranges("large", ranges)
    assert [bytes(part) for part in parts] == [NOISE[start : start + length] for start, length in ranges]
    assert len(proxy.faults) >= 10


@pytest.mark.parametrize("fault", [*FAULTS, "truncated"])
def test_objects_are_read_listed_and_found_through_faults(faulty: tuple[Store, Proxy], fault: str) -> None:
    store, proxy = faulty
    for number in range(6):
        store.write_bytes(f"objects/{number}", NOISE[: 1000 * (number + 1)])
    proxy.plan = every(3, fault)
    for number in range(6):
        assert store.read_bytes(f"objects/{number}") == NOISE[: 1000 * (number + 1)]
        assert store.exists(f"objects/{number}")
    assert len(store.list("objects")) == 6
    assert not store.exists("objects/none")
    with pytest.raises(ObjectNotFoundError):
        store.read_bytes("objects/none")
    assert len(proxy.faults) >= 5


@pytest.mark.parametrize("fault", FAULTS)
def test_files_are_published_whole_through_faults(faulty: tuple[Store, Proxy], fault: str) -> None:
    store, proxy = faulty
    proxy.plan = every(3, fault)
    for number in range(2):
        with store.publishing(f"files/{number}") as path:
            path.write_bytes(NOISE * 3)
    store.write_bytes("files/small", b"small")
    proxy.plan = every(10**9, None)
    assert all(store.read_bytes(f"files/{number}") == NOISE * 3 for number in range(2))
    assert store.read_bytes("files/small") == b"small"
    assert proxy.faults


def test_an_upload_is_complete_though_the_answer_to_that_is_lost(faulty: tuple[Store, Proxy]) -> None:
    """Asked again, AWS and SeaweedFS say that it is; MinIO, that there is no such upload."""
    store, proxy = faulty
    asked: dict[str, int] = {}

    def as_minio(_number: int, method: str, path: str) -> Fault:
        if method != "POST" or "uploadId=" not in path:
            return None
        asked[path] = asked.get(path, 0) + 1
        if len(asked) > 1:
            return None
        return "lost" if asked[path] == 1 else "no upload"

    proxy.plan = as_minio
    with store.publishing("file") as path:
        path.write_bytes(NOISE * 3)
    assert list(asked.values()) == [2, 1]
    assert store.read_bytes("file") == NOISE * 3


def test_an_upload_that_fails_leaves_nothing_under_its_name(faulty: tuple[Store, Proxy]) -> None:
    store, proxy = faulty
    store.write_bytes("file", b"before")

    def no_second_part(_number: int, _method: str, path: str) -> str | None:
        return "busy" if "partNumber=2" in path else None

    def fail() -> None:
        with store.publishing("file") as path:
            path.write_bytes(NOISE * 3)

    proxy.plan = no_second_part
    with pytest.raises(StoreUnavailableError):
        fail()
    assert store.read_bytes("file") == b"before"
    assert store.list() == ["file"]
    assert store.abandoned_uploads() == []


@pytest.mark.parametrize("fault", ["busy", "reset", "conflict", "lost"])
def test_a_create_whose_first_try_failed_is_won_by_one(faulty: tuple[Store, Proxy], fault: str) -> None:
    store, proxy = faulty
    proxy.plan = once(fault, "PUT")
    assert store.create_bytes("claim", b"same bytes")
    assert proxy.faults == [fault]
    assert not store.create_bytes("claim", b"same bytes")
    assert store.read_bytes("claim") == b"same bytes"


def test_a_create_that_another_won_while_the_answer_was_lost_is_lost(faulty: tuple[Store, Proxy]) -> None:
    store, proxy = faulty
    other = Store(store.root)

    def overtaken(number: int, method: str, _path: str) -> str | None:
        if (number, method) == (1, "PUT"):
            assert other.create_bytes("claim", b"same bytes")
            return "reset"
        return None

    proxy.plan = overtaken
    assert not store.create_bytes("claim", b"same bytes")


def test_a_store_that_stays_busy_is_an_error_that_says_so(faulty: tuple[Store, Proxy]) -> None:
    store, proxy = faulty
    store.write_bytes("a", b"a")
    proxy.plan = every(1, "busy")
    for ask in (lambda: store.read_ranges("a", [(0, 1)]), lambda: store.read_bytes("a"), lambda: store.create_bytes("b", b"b")):
        with pytest.raises(StoreUnavailableError, match="did not answer"):
            ask()


@pytest.mark.parametrize("fault", ["busy", "reset"])
def test_tables_are_written_and_read_through_faults(faulty: tuple[Store, Proxy], fault: str) -> None:
    store, proxy = faulty
    schema = pa.schema([pa.field("number", pa.int64())])
    table = Table(store, "numbers", schema, ())
    plan: Plan = every(3, fault)
    # A commit whose answer is lost cannot be told from one that another writer won; so only requests that write no log entry fail.
    proxy.plan = lambda number, method, path: None if method == "PUT" and "_delta_log" in path else plan(number, method, path)
    table.ensure()
    files = [table.write_file({}, f"{number}.parquet", [pa.table({"number": [number]}, schema=schema)]) for number in range(4)]
    assert table.commit(files) == 4
    assert table.read() == pa.table({"number": [0, 1, 2, 3]}, schema=schema)
    assert proxy.faults


def test_a_part_beyond_the_end_is_an_error(faulty: tuple[Store, Proxy]) -> None:
    store, _ = faulty
    store.write_bytes("short", b"12345")
    with pytest.raises(StorageError, match="ends before the part"):
        store.read_ranges("short", [(0, 2), (3, 3)])
    with pytest.raises(ObjectNotFoundError):
        store.read_ranges("none", [(0, 2), (3, 3)])
