import errno
import os
import signal
import ssl
import subprocess
import sys

import numpy as np
import obstore
import pytest

from workers.errors import (
    AccessDeniedError,
    CertificateError,
    CredentialsError,
    ObjectNotFoundError,
    StorageError,
    StoreFullError,
    StoreUnavailableError,
)
from workers.storage import Store, open_url, translate_storage_error


class ServiceError(Exception):
    """Shaped like botocore's ClientError."""

    def __init__(self, code):
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}}


class ReadTimeoutError(Exception):
    pass


class NoCredentialsError(Exception):
    pass


def wrapped(code):
    """As s3fs raises it: an OSError that tells less than its cause."""
    error = OSError(errno.EINVAL, "Invalid")
    error.__cause__ = ServiceError(code)
    return error


class ResponseStreamingError(Exception):
    pass


def arrow(code):
    """As Arrow's S3 file system says it."""
    return OSError(f"When reading information for key 'k' in bucket 'b': AWS Error {code} during HeadObject operation: No response body.")


def delta(status, body):
    """As delta-rs draws it."""
    arm = "\n   \x1b[31m\u21b3\x1b[0m "
    return OSError(
        f"Kernel error -> Generic S3 error{arm}Error performing GET http://h/k in 1ms - Server returned non-2xx status code{arm}{status}{arm}{body}"
    )


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (FileNotFoundError(errno.ENOENT, "no"), ObjectNotFoundError, False),
        (ServiceError("NoSuchKey"), ObjectNotFoundError, False),
        (ServiceError("NoSuchBucket"), ObjectNotFoundError, False),
        (PermissionError(errno.EACCES, "no"), AccessDeniedError, False),
        (OSError(errno.EROFS, "read-only"), AccessDeniedError, False),
        (wrapped("SignatureDoesNotMatch"), CredentialsError, False),
        (wrapped("InvalidAccessKeyId"), CredentialsError, False),
        (NoCredentialsError("none"), CredentialsError, False),
        (arrow("ACCESS_DENIED"), AccessDeniedError, False),
        (arrow("UNKNOWN (HTTP status 503)"), StoreUnavailableError, True),
        (arrow("NETWORK_CONNECTION"), StoreUnavailableError, True),
        (arrow("SLOW_DOWN"), StoreUnavailableError, True),
        (arrow("SIGNATURE_DOES_NOT_MATCH"), CredentialsError, False),
        (arrow("NO_SUCH_BUCKET"), ObjectNotFoundError, False),
        (OSError("AWS Error SOMETHING_NEW during GetObject operation: of SlowDown.png, AccessDenied.png, NotFound.png"), StorageError, False),
        (delta("403 Forbidden", "<Error><Code>ExpiredToken</Code><Message>m</Message></Error>"), CredentialsError, False),
        (delta("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>"), AccessDeniedError, False),
        (delta("503 Service Unavailable", ""), StoreUnavailableError, True),
        (
            OSError("Kernel error -> Generic S3 error\n \x1b[31m\u21b3\x1b[0m HTTP error\n \x1b[31m\u21b3\x1b[0m error sending request"),
            StoreUnavailableError,
            True,
        ),
        (
            OSError("Generic S3 error: Error performing GET http://h/k - HTTP error: request or response body error"),
            StoreUnavailableError,
            True,
        ),
        (ServiceError("ConditionalRequestConflict"), StoreUnavailableError, True),
        (ServiceError("NoSuchUpload"), ObjectNotFoundError, False),
        (obstore.exceptions.UnauthenticatedError("no\n\nDebug source:\nmuch"), CredentialsError, False),
        (
            ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer"),
            CertificateError,
            False,
        ),
        (
            arrow("NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate was not OK: AWS Error X"),
            CertificateError,
            False,
        ),
        (delta("200 OK", "HTTP error\n error sending request\n invalid peer certificate\n UnknownIssuer"), CertificateError, False),
        (obstore.exceptions.GenericError("error sending request\n\nDebug source:\nmuch InvalidCertificate(UnknownIssuer)"), CertificateError, False),
        (NotADirectoryError(errno.ENOTDIR, "a file in the way"), ObjectNotFoundError, False),
        (IsADirectoryError(errno.EISDIR, "a folder"), ObjectNotFoundError, False),
        (OSError(errno.ENAMETOOLONG, "long"), ObjectNotFoundError, False),
        (OSError(errno.EMFILE, "too many open files"), StorageError, False),
        (ResponseStreamingError("cut off"), StoreUnavailableError, True),
        (OSError(errno.ENOSPC, "full"), StoreFullError, False),
        (OSError(errno.EDQUOT, "quota"), StoreFullError, False),
        (wrapped("SlowDown"), StoreUnavailableError, True),
        (ServiceError("503"), StoreUnavailableError, True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), StoreUnavailableError, True),
        (ReadTimeoutError("slow"), StoreUnavailableError, True),
        (OSError(errno.EINVAL, "odd"), StorageError, False),
        (ServiceError("SomethingNew"), StorageError, False),
        (RuntimeError(""), StorageError, False),
    ],
)
def test_every_foreign_error_becomes_one_of_ours(error, kind, retryable):
    translated = translate_storage_error(error, "read", "s3://b/k")
    assert type(translated) is kind
    assert translated.retryable is retryable
    assert "cannot read s3://b/k" in str(translated)
    assert "\n" not in str(translated)
    assert "much" not in str(translated)
    assert "\x1b" not in str(translated)
    assert translate_storage_error(translated, "write", "x") is translated


@pytest.mark.parametrize(("error", "said"), [(ReadTimeoutError("slow answer"), "slow answer"), (ConnectionResetError(), "ConnectionResetError")])
def test_a_failure_is_told_in_its_own_words_or_by_its_name(error, said):
    assert said in str(translate_storage_error(error, "read", "s3://b/k"))


def test_every_number_of_the_operating_system_has_a_translation():
    for number in errno.errorcode:
        assert isinstance(translate_storage_error(OSError(number, "x"), "read", "u"), StorageError)


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("s3://bucket/some/prefix/", "s3://bucket/some/prefix"),
        ("file:///tmp/x/", "file:///tmp/x"),
        ("/tmp/x", "file:///tmp/x"),
        ("/tmp/a b", "file:///tmp/a%20b"),
    ],
)
def test_roots_are_normalised(root, expected):
    assert Store(root).root == expected
    assert Store(Store(root).root).root == expected


def test_a_plain_path_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    store = Store("out")
    assert store.root == (tmp_path / "out").as_uri()
    (tmp_path / "r.json").write_bytes(b"[]")
    found, name = open_url("r.json")
    assert found.read_bytes(name) == b"[]"


@pytest.mark.parametrize("root", ["gs://bucket", "s3:///prefix", "file://host/x", "https://x/y", "file:///tmp/x?a=1", "file:///tmp/x#a"])
def test_other_roots_are_refused(root):
    with pytest.raises(StorageError, match="found"):
        Store(root)


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, not a folder")
    with pytest.raises(StorageError, match=r"the root file://.*/file cannot be written.*--root"):
        Store(str(blocked)).check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_root_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AccessDeniedError, match="cannot be written"):
        Store(str(tmp_path / "x")).check_writable()


def test_free_bytes_are_known_before_the_root_exists(tmp_path):
    free = Store(str(tmp_path / "not" / "yet")).free_bytes()
    assert free is not None
    assert free > 0
    assert Store("s3://bucket").free_bytes() is None


def test_a_disk_that_is_full_on_the_way_to_a_bucket_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = rf"cannot write s3://bucket/a/b by way of {tmp_path}: no space is left .* Free some space in {tmp_path}, or name another folder by TMPDIR"
    with pytest.raises(StoreFullError, match=told), Store("s3://bucket").publishing("a/b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StoreFullError, match=r"cannot write s3://other/b"), Store("s3://bucket").publishing("a/b"):
        raise StoreFullError("cannot write s3://other/b")
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_the_disk_allows_on_the_way_to_a_bucket_is_told(tmp_path):
    program = f"""
import resource, signal, tempfile
import pyarrow as pa
from workers.errors import StoreFullError
from workers.storage import Store
from workers.tables import Table
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tempfile.tempdir = {str(tmp_path)!r}
schema = pa.schema([pa.field("blob", pa.binary(), nullable=False)])
group = pa.table({{"blob": [bytes(10**6)]}}, schema=schema)
try:
    Table(Store("s3://bucket"), "t", schema).write_file({{}}, "a.parquet", [group], blobs=["blob"])
except StoreFullError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert f"cannot write s3://bucket/t/a.parquet by way of {tmp_path}: no space is left" in told
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_killed_process_had_on_the_way_to_a_bucket_are_removed_by_the_next(tmp_path, monkeypatch):
    program = f"""
import os, signal, tempfile
from workers.storage import Store
tempfile.tempdir = {str(tmp_path)!r}
with Store("s3://bucket").publishing("a/b") as path:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "b").read_bytes() == b"half"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Store, "_ask", lambda self, doing, path, ask: None)
    with Store("s3://bucket").publishing("a/b"):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_killed_writers_are_never_listed(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("a/b", b"x")
    (tmp_path / "a" / ".tmp-killed").write_bytes(b"half")
    assert store.list() == ["a/b"]


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    store, disk = Store(str(tmp_path / "root")), tmp_path / "disk"
    store.write_bytes("runs/a", b"x")
    (disk / "table" / "deep").mkdir(parents=True)
    (disk / "table" / "deep" / "b").write_bytes(b"12345")
    (tmp_path / "root" / "features").symlink_to(disk)
    (tmp_path / "root" / "also").symlink_to(disk / "table")  # by another name a file is there as well
    (disk / "table" / "deep" / "up").symlink_to("..")
    (disk / "table" / "root").symlink_to(tmp_path / "root")
    (disk / "nowhere").symlink_to(tmp_path / "gone", target_is_directory=True)
    expected = ["also/deep/b", "features/table/deep/b", "runs/a"]
    assert [item.path for item in store.list_objects()] == expected
    assert [item.size_bytes for item in store.list_objects()] == [5, 5, 1]
    assert [item.path for item in store.list_objects("features")] == ["features/table/deep/b"]
    (disk / "nowhere").unlink()
    assert store.list() == expected


def test_nothing_secret_is_in_the_delta_options(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "hush" not in str(Store("s3://bucket").delta_options)
    assert Store("s3://bucket").delta_options["aws_allow_http"] == "true"
    assert Store("/tmp/x").delta_options == {}


def test_a_read_that_gives_less_than_is_there_goes_on(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write_bytes("a", bytes(range(100)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, start: real(file, [buffers[0][:7]], start))
    buffers = [np.zeros(count, dtype=np.uint8) for count in (3, 0, 30, 17)]
    store.read_into("a", 20, buffers)
    assert np.concatenate(buffers).tolist() == list(range(20, 70))
    with pytest.raises(StorageError, match="it ends 5 bytes before"):
        store.read_into("a", 55, buffers)
