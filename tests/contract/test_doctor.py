"""`loupe doctor storage` on real servers and folders: what it measures, what it leaves (nothing), and what it says of stores that will not do."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipelines import cli
from tests import s3_servers
from workers.errors import AccessDeniedError, StorageError
from workers.storage import Store


def doctor(capsys: pytest.CaptureFixture[str], *words: str, megabytes: int = 8) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["doctor", "storage", "--megabytes", str(megabytes), *words])
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_client_is_measured_and_nothing_is_left(store_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(store_root)
    store.write_bytes("mine", b"x")
    status, out, err = doctor(capsys, "--root", store_root, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    names = {client.name for client in store.bulk_clients()}
    rows = {(row["client"], row["operation"], row["request_bytes"], row["in_flight"]) for row in report["measurements"]}
    for name in names:
        assert {(name, "range", size, flying) for size in (2**20, 2**23) for flying in (1, 8, 32)} <= rows
        assert {(name, "write", 2**23, 1), (name, "read", 2**23, 1), (name, "create", 4096, 8), (name, "list", 0, 1)} <= rows
    assert all(row["seconds"] > 0 and row["requests_per_s"] > 0 and 0 < row["median_ms"] <= row["p95_ms"] for row in report["measurements"])
    assert set(report["best"]) == set(report["used"]) == {"bulk reads", "bulk writes", "ranged reads"}
    assert set(report["best"].values()) <= names
    assert report["creates_exclusively"] is True
    assert report["wins"] == [1] * 8
    assert store.list() == ["mine"]
    assert store.abandoned_uploads() == []


def test_the_table_names_the_best_and_what_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = doctor(capsys, "--root", str(tmp_path))
    assert status == 0
    assert "range of 8 MiB" in out
    assert "A folder has one client, the operating system." in out
    assert "Best for" not in out
    assert "Exclusive creation holds: 8 races of 8 callers, one winner each." in out
    assert list(tmp_path.iterdir()) == []


def test_what_moves_bulk_bytes_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_servers.moto() as bucket:
        jobs = {"bulk writes", "ranged reads"}
        for chosen, used in ((None, "obstore"), ("", "obstore"), ("s3fs", "s3fs"), ("obstore", "obstore")):
            if chosen is None:
                monkeypatch.delenv("LOUPE_S3_CLIENT", raising=False)
            else:
                monkeypatch.setenv("LOUPE_S3_CLIENT", chosen)
            store = Store(f"{bucket}/chosen")
            assert {store.clients_in_use()[job] for job in jobs} == {used}
            with store.publishing("file") as path:
                path.write_bytes(b"0123456789")
            buffer = np.empty(4, dtype=np.uint8)
            store.read_into("file", 3, [buffer])
            assert buffer.tobytes() == b"3456"
        monkeypatch.setenv("LOUPE_S3_CLIENT", "arrow")
        with pytest.raises(StorageError, match="LOUPE_S3_CLIENT: found 'arrow'; allowed: obstore and s3fs, and nothing, which is obstore"):
            Store(f"{bucket}/chosen").clients_in_use()


def test_a_best_client_that_is_not_in_use_is_told_with_how_to_choose_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.doctor._fastest", lambda measurements, operation: "s3fs")
    monkeypatch.delenv("LOUPE_S3_CLIENT", raising=False)
    with s3_servers.moto() as bucket:
        _, out, _ = doctor(capsys, "--root", f"{bucket}/told")
    assert "Best for ranged reads: s3fs, Loupe uses obstore; LOUPE_S3_CLIENT=s3fs in its environment" in out
    assert "Best for bulk reads: s3fs, as Loupe does." in out


def test_a_store_whose_creates_overwrite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(self: Store, path: str, data: bytes) -> bool:
        self.write_bytes(path, data)
        return True

    monkeypatch.setattr(Store, "create_bytes", overwrite)
    status, out, err = doctor(capsys, "--root", str(tmp_path))
    assert status == 1
    assert "EXCLUSIVE CREATION DOES NOT HOLD: 8 callers created one object, and 8 of them won" in out
    assert "do not use Loupe there" in err


def test_what_was_begun_is_removed_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_store: Store, _path: str, _data: bytes) -> bool:
        raise StorageError("the line is cut")

    monkeypatch.setattr(Store, "create_bytes", broken)
    status, _, err = doctor(capsys, "--root", str(tmp_path))
    assert (status, err) == (2, "loupe: the line is cut\n")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    status, _, err = doctor(capsys, "--root", str(tmp_path / "file"))
    assert status == 2
    assert f"{tmp_path}/file is a file" in err


def test_objects_smaller_than_a_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = doctor(capsys, "--root", str(tmp_path), megabytes=7)
    assert (status, "found 7; allowed: 8 or more" in err) == (2, True)


def test_objects_that_nothing_has_room_for_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = doctor(capsys, "--root", str(tmp_path), megabytes=10**9)
    assert status == 2
    assert "found 1000000000; allowed: what the folder of temporary files has room for, which has" in err


def test_a_root_that_was_not_there_is_not_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, _ = doctor(capsys, "--root", str(tmp_path / "new" / "deep"))
    assert status == 0
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_whose_uploads_may_not_be_listed_is_measured_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AccessDeniedError("cannot list uploads: access was denied")

    monkeypatch.setattr(Store, "abandoned_uploads", refused)
    with s3_servers.moto() as bucket:
        status, out, err = doctor(capsys, "--root", f"{bucket}/unlisted")
    assert (status, err) == (0, "")
    assert "Exclusive creation holds" in out


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_named(bucket_of, capsys: pytest.CaptureFixture[str]) -> None:
    bucket_of("moto")
    status, _, err = doctor(capsys, "--root", "s3://no-such-bucket-at-all/x")
    assert status == 2
    assert "the root s3://no-such-bucket-at-all/x cannot be written" in err
    assert "bucket does not exist" in err


@pytest.mark.slow
def test_missing_credentials_are_named(bucket_of, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = bucket_of("seaweedfs")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr("s3fs.S3FileSystem._cache", {})
    status, _, err = doctor(capsys, "--root", bucket)
    assert status == 2
    assert "credentials are missing" in err


@pytest.mark.slow
def test_a_read_only_user_is_named(bucket_of, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = bucket_of("seaweedfs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_servers.READER_KEY)
    monkeypatch.setattr("s3fs.S3FileSystem._cache", {})
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == s3_servers.SECRET_KEY
    status, _, err = doctor(capsys, "--root", bucket)
    assert status == 2
    assert "access was denied" in err
