"""What a real S3 server's refusals, and its absence, look like through each of the three clients that Loupe reads with."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests import s3_servers
from workers.errors import AccessDeniedError, CredentialsError, ObjectNotFoundError, StoreUnavailableError
from workers.quarantine import QuarantineRow, can_be_read_now, store_reason
from workers.storage import Store
from workers.tables import Table, TableFile

pytestmark = pytest.mark.slow

SCHEMA = pa.schema([pa.field("number", pa.int64())])


def table(store: Store) -> Table:
    return Table(store, "numbers", SCHEMA, ())


@pytest.fixture
def filled(bucket_of: Callable[[str], str]) -> tuple[str, TableFile]:
    """A root with an object and a table, on a server that checks signatures."""
    store = Store(f"{bucket_of('seaweedfs')}/{uuid.uuid4().hex}")
    store.write_bytes("a.png", b"a")
    file = table(store).write_file({}, "numbers.parquet", [pa.table({"number": [1, 2]}, schema=SCHEMA)])
    table(store).commit([file])
    return store.root, file


def test_wrong_credentials_are_not_the_object_s_fault(filled: tuple[str, TableFile], monkeypatch: pytest.MonkeyPatch) -> None:
    root, file = filled
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.setattr("s3fs.S3FileSystem._cache", {})  # a process keeps its sessions; another process would not have this one
    store = Store(root)
    with pytest.raises(CredentialsError, match="Renew them") as refused:
        store.read_bytes("a.png")
    assert store_reason(refused.value) is None
    with pytest.raises(CredentialsError):
        table(store).files()
    # Arrow asks with HEAD, whose refusal says no more than 403.
    with pytest.raises((CredentialsError, AccessDeniedError)):
        table(store).open_file(file)


def test_a_server_that_is_away_is_worth_another_try(filled: tuple[str, TableFile], monkeypatch: pytest.MonkeyPatch) -> None:
    root, file = filled
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_servers.free_ports(1)[0]}")
    store = Store(root)
    for ask in (lambda: store.read_bytes("a.png"), lambda: table(store).files(), lambda: table(store).open_file(file)):
        with pytest.raises(StoreUnavailableError) as away:
            ask()
        assert away.value.retryable
        assert store_reason(away.value) is None


def test_a_missing_object_is_its_own_fault(filled: tuple[str, TableFile]) -> None:
    with pytest.raises(ObjectNotFoundError) as missing:
        Store(filled[0]).read_bytes("b.png")
    assert store_reason(missing.value) == "missing_file"


def test_an_image_is_looked_for_again_where_it_lies(filled: tuple[str, TableFile], tmp_path: Path) -> None:
    def row(name: str) -> QuarantineRow:
        return QuarantineRow(reason="missing_file", source="s", item=f"{filled[0]}/{name}", index=0, bytes_sha256=None, detail="")

    store = Store(str(tmp_path))  # the root is not where a dataset's images lie
    assert not can_be_read_now(store, [row(f"{number}.png") for number in range(40)])
    assert can_be_read_now(store, [row("b.png"), row("a.png")])


def test_a_large_object_is_read_whole(bucket_of: Callable[[str], str]) -> None:
    store = Store(f"{bucket_of('seaweedfs')}/{uuid.uuid4().hex}")
    data = bytes(range(256)) * 2**16
    store.write_bytes("large", data)
    assert store.read_bytes("large") == data
