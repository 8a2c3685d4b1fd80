"""Multipart uploads that a killed process leaves behind are found and dropped: their parts cost money and are in no listing."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from workers.storage import Store


def test_folders_have_none(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("a", b"x")
    assert store.abandoned_uploads() == []


@pytest.mark.slow
@pytest.mark.parametrize("server", ["moto", "seaweedfs"])
def test_unfinished_uploads_are_found_and_dropped(bucket_of: Callable[[str], str], server: str) -> None:
    bucket = bucket_of(server)
    store = Store(f"{bucket}/{uuid.uuid4().hex}")
    store.write_bytes("tables/whole", b"x")
    begun = {}
    for path in ("tables/one", "tables/two", "other/three"):
        key = f"{store.root.removeprefix(bucket + '/')}/{path}"
        name = bucket.removeprefix("s3://")
        begun[path] = store._s3.call_s3("create_multipart_upload", Bucket=name, Key=key)["UploadId"]
        for number in (1, 2):
            store._s3.call_s3("upload_part", Bucket=name, Key=key, UploadId=begun[path], PartNumber=number, Body=b"x" * 5 * 2**20)
    found = store.abandoned_uploads("tables")
    assert {(upload.path, upload.upload_id, upload.num_bytes) for upload in found} == {
        (path, begun[path], 10 * 2**20) for path in ("tables/one", "tables/two")
    }
    assert len(store.abandoned_uploads()) == 3
    if server == "seaweedfs":  # moto's uploads all begin in 2010
        assert all(datetime.now(UTC) - upload.started < timedelta(minutes=5) for upload in found)
    for upload in found:
        store.abort_upload(upload)
        store.abort_upload(upload)
    assert [upload.path for upload in store.abandoned_uploads()] == ["other/three"]
    assert store.list() == ["tables/whole"]
