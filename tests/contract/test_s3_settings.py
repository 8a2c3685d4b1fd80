"""Endpoint, region, addressing and credentials reach all four clients alike, wherever they are set."""

import os
import pickle
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec.config
import pyarrow as pa
import pyarrow.fs
import pytest

from tests.commands import REPOSITORY
from tests.s3_faults import fault_proxy
from tests.s3_servers import ACCESS_KEY, ROLE_KEY, ROLE_TOKEN, SECRET_KEY, certificates, role_server
from workers.errors import CertificateError, CredentialsError, StorageError
from workers.s3_settings import S3Settings, resolve_s3_settings
from workers.storage import Store
from workers.tables import Table, TableFile


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Nothing of the developer's own environment and profiles, nor of a server's that a test has started; writes a config file."""
    for protocol in ("s3", "s3a"):
        monkeypatch.delitem(fsspec.config.conf, protocol, raising=False)
    monkeypatch.setattr("s3fs.S3FileSystem._cache", {})

    def write(text: str) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        (tmp_path / "config").write_text(text)

    return write


PROFILES = """
[default]
region = eu-west-1
[profile here]
endpoint_url = http://here:1/
region = eu-north-1
s3 =
  addressing_style = virtual
[profile service]
endpoint_url = http://general:1
services = mine
[services mine]
s3 =
  endpoint_url = https://service:2
"""


@pytest.mark.parametrize(
    ("environment", "bucket", "expected"),
    [
        ({}, "b", (None, "eu-west-1", "virtual")),
        ({}, "with.dots", (None, "eu-west-1", "path")),
        ({"AWS_PROFILE": "here"}, "b", ("http://here:1", "eu-north-1", "virtual")),
        ({"AWS_PROFILE": "here", "AWS_S3_ADDRESSING_STYLE": "path"}, "b", ("http://here:1", "eu-north-1", "path")),
        ({"AWS_PROFILE": "service"}, "b", ("https://service:2", "us-east-1", "path")),
        ({"AWS_PROFILE": "here", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "b", (None, "eu-north-1", "virtual")),
        ({"AWS_PROFILE": "here", "AWS_ENDPOINT_URL": "http://general:3"}, "b", ("http://general:3", "eu-north-1", "virtual")),
        ({"AWS_ENDPOINT_URL": "http://general:3", "AWS_ENDPOINT_URL_S3": "http://s3:4"}, "b", ("http://s3:4", "eu-west-1", "path")),
        ({"AWS_DEFAULT_REGION": "ap-south-1"}, "b", (None, "ap-south-1", "virtual")),
        ({"AWS_REGION": "ap-east-1", "AWS_DEFAULT_REGION": "ap-south-1"}, "b", (None, "ap-east-1", "virtual")),
    ],
)
def test_settings_are_found_and_the_environment_wins(
    config: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], bucket: str, expected: tuple[str | None, str, str]
) -> None:
    config(PROFILES)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = resolve_s3_settings(bucket)
    assert (found.endpoint_url, found.region, found.addressing_style) == expected


@pytest.mark.parametrize(("name", "value"), [("AWS_S3_ADDRESSING_STYLE", "sideways"), ("AWS_ENDPOINT_URL", "localhost:1")])
def test_settings_that_are_none_are_refused(config: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    config(PROFILES)
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=value):
        Store("s3://b").exists("a")


def test_a_profile_that_is_not_there_is_named(config: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    config(PROFILES)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    for ask in (lambda: Store("s3://b").exists("a"), lambda: Store("s3://b").delta_options, lambda: Store("s3://b").read_ranges("a", [(0, 1)])):
        with pytest.raises(CredentialsError, match="nobody"):
            ask()


def test_without_credentials_the_error_says_what_to_set(config: Callable[[str], None]) -> None:
    config("")
    with pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID"):
        Store("s3://b").read_ranges("a", [(0, 1)])


def _urls(settings: S3Settings) -> list[str]:
    """Where s3fs and the Rust clients would send a request for k in a bucket."""
    signed = settings.s3fs().sign("bucket/k")
    options = settings.delta_options("bucket")
    return [signed.partition("?")[0], options.get("aws_endpoint", ""), options["aws_virtual_hosted_style_request"]]


def _arrow_address(settings: S3Settings) -> tuple[str, bool]:
    """What Arrow's client was told, out of what it would tell another process."""
    told = settings.arrow().__reduce__()[1][0]
    return told["endpoint_override"] or "", told["force_virtual_addressing"]


def test_the_bucket_is_in_the_host_or_in_the_path_for_every_client(config: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    config("")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    own = S3Settings(endpoint_url="https://store.example:8", region="eu-west-1", addressing_style="virtual")
    assert _urls(own) == ["https://bucket.store.example:8/k", "https://bucket.store.example:8", "true"]
    assert own.obstore("bucket").config["endpoint_url_s3"] == "https://bucket.store.example:8"
    by_path = S3Settings(endpoint_url="https://store.example:8", region="eu-west-1", addressing_style="path")
    assert _urls(by_path) == ["https://store.example:8/bucket/k", "https://store.example:8", "false"]
    aws = S3Settings(endpoint_url=None, region="eu-west-1", addressing_style="virtual")
    assert _urls(aws) == ["https://bucket.s3.eu-west-1.amazonaws.com/k", "", "true"]
    assert [_arrow_address(item) for item in (own, by_path, aws)] == [("store.example:8", True), ("store.example:8", False), ("", False)]
    dotted = S3Settings(endpoint_url=None, region="eu-west-1", addressing_style="path")
    assert _arrow_address(dotted) == ("s3.eu-west-1.amazonaws.com", False)  # the bucket goes into the host only without an endpoint, or when forced


def _every_client_works(root: str) -> None:
    """All but delta-rs."""
    store = Store(root)
    for client in store.bulk_clients():
        client.write_bytes(f"{client.name}/a", b"12345")
        assert bytes(client.read_range(f"{client.name}/a", 1, 3)) == b"234", client.name
        assert client.count(client.name) == 1, client.name


def _a_table_works(root: str, **environment: str) -> None:
    """In a process of its own: delta-rs reads profiles once in a process."""
    code = """
import sys
import pyarrow as pa
import pyarrow.fs
from workers.storage import Store
from workers.tables import Table
schema = pa.schema([pa.field("number", pa.int64())])
table = Table(Store(sys.argv[1]), "numbers", schema, ())
table.commit([table.write_file({}, "a.parquet", [pa.table({"number": [1]}, schema=schema)])])
assert table.read() == pa.table({"number": [1]}, schema=schema)
"""
    subprocess.run([sys.executable, "-c", code, root], cwd=REPOSITORY, check=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_a_profile_alone_leads_every_client_to_its_server(
    bucket_of: Callable[[str], str], config: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = bucket_of("seaweedfs")
    config(f"[profile mine]\nregion = us-east-1\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    root = f"{bucket}/{uuid.uuid4().hex}"
    _every_client_works(root)
    _a_table_works(root)


@pytest.mark.slow
def test_a_role_that_a_profile_assumes_is_who_asks_by_every_client(
    bucket_of: Callable[[str], str], config: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = bucket_of("moto")  # which lets everybody in: what counts is who asks
    (tmp_path / "credentials").write_text("[base]\naws_access_key_id = plainkey\naws_secret_access_key = plainsecret\n")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as (proxy, endpoint), role_server() as roles:
        config(
            f"[profile team]\nregion = us-east-1\nendpoint_url = {endpoint}\nservices = mine\nrole_arn = arn:aws:iam::123456789012:role/r\n"
            f"source_profile = base\n[services mine]\nsts =\n  endpoint_url = {roles}\n"
        )
        monkeypatch.setenv("AWS_PROFILE", "team")
        store = Store(f"{bucket}/{uuid.uuid4().hex}")
        for client in store.bulk_clients():
            proxy.signers.clear()
            client.write_bytes(f"{client.name}/a", b"12345")
            assert bytes(client.read(f"{client.name}/a")) == b"12345", client.name
            assert proxy.signers == {(ROLE_KEY, ROLE_TOKEN)}, client.name
        proxy.signers.clear()
        _a_table_works(store.root)
        assert proxy.signers == {(ROLE_KEY, ROLE_TOKEN)}
        # As Ray Train sends it to its workers.
        sent = pickle.dumps(store.filesystem)
        assert b"rolesecret" not in sent
        proxy.signers.clear()
        with pickle.loads(sent).open_input_file(store.fs_path("obstore/a")) as file:
            assert file.read() == b"12345"
        assert proxy.signers == {(ROLE_KEY, ROLE_TOKEN)}


@pytest.mark.slow
@pytest.mark.parametrize(("minutes", "renewed"), [(5, True), (60, False)])  # botocore renews what is good for less than fifteen
def test_arrow_asks_with_credentials_that_were_renewed(
    bucket_of: Callable[[str], str],
    config: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: int,
    *,
    renewed: bool,
) -> None:
    bucket = bucket_of("moto")
    expires = datetime.now(UTC) + timedelta(minutes=minutes)
    script = tmp_path / "keys"
    script.write_text(
        f"cd {tmp_path}\necho x >> calls\n"
        f"""echo '{{"Version": 1, "AccessKeyId": "key'$(wc -l < calls | tr -d ' ')'", "SecretAccessKey": "s", "SessionToken": "t","""
        f""" "Expiration": "{expires.isoformat()}"}}'\n"""
    )
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as (proxy, endpoint):
        config(f"[profile team]\nregion = us-east-1\nendpoint_url = {endpoint}\ncredential_process = sh {script}\n")
        monkeypatch.setenv("AWS_PROFILE", "team")
        store = Store(f"{bucket}/{uuid.uuid4().hex}")
        filesystem = store.filesystem  # held for a long time
        told = []
        for number in range(3):
            proxy.signers.clear()
            with filesystem.open_output_stream(store.fs_path(f"a{number}")) as stream:
                stream.write(b"1")
            told.append(proxy.signers.copy())
    assert all(len(signers) == 1 for signers in told)  # a stream is one caller's from its first byte to its last
    numbers = [int(key.removeprefix("key")) for signers in told for key, _ in signers]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == (3 if renewed else 1)


@pytest.mark.slow
def test_the_filesystem_that_is_renewed_does_all_that_arrows_own_does(bucket_of: Callable[[str], str], tmp_path: Path) -> None:
    store = Store(f"{bucket_of('seaweedfs')}/{uuid.uuid4().hex}")
    filesystem = store.filesystem
    base = store.fs_path()
    (tmp_path / "file.gz").write_bytes(b"not compressed")
    filesystem.create_dir(f"{base}/folder", recursive=True)
    assert filesystem.get_file_info(f"{base}/folder").type == pyarrow.fs.FileType.Directory
    pyarrow.fs.copy_files(str(tmp_path), f"{base}/folder", source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=filesystem)
    with filesystem.open_input_stream(f"{base}/folder/file.gz", compression=None) as stream:
        assert stream.read() == b"not compressed"
    for path in ("folder/a.gz", "b"):
        with filesystem.open_output_stream(f"{base}/{path}") as stream:
            stream.write(b"12345")
    with filesystem.open_input_stream(f"{base}/folder/a.gz") as stream:  # compressed once and no more
        assert stream.read() == b"12345"
    assert store.read_bytes("folder/a.gz")[:2] == b"\x1f\x8b"
    filesystem.copy_file(f"{base}/b", f"{base}/folder/c")
    filesystem.move(f"{base}/b", f"{base}/folder/d")
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(f"{base}/folder"))
    assert sorted(info.base_name for info in found) == ["a.gz", "c", "d", "file.gz"]
    filesystem.delete_file(f"{base}/folder/c")
    assert [info.type for info in filesystem.get_file_info([f"{base}/folder/c", f"{base}/folder/d"])] == [
        pyarrow.fs.FileType.NotFound,
        pyarrow.fs.FileType.File,
    ]
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_file(f"{base}/folder/c")
    filesystem.delete_dir_contents(f"{base}/folder")
    assert store.list("folder") == []
    filesystem.delete_dir(f"{base}/folder")
    filesystem.delete_dir_contents(f"{base}/folder", missing_dir_ok=True)
    assert filesystem.type_name == "py::s3"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_the_authorities_that_are_trusted_are_told_to_every_client(
    bucket_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = bucket_of("seaweedfs")
    authority, own = certificates(tmp_path)
    monkeypatch.setattr("s3fs.S3FileSystem._cache", {})
    monkeypatch.setattr("workers.storage_errors._FIRST_PAUSE_S", 0.0)
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], own) as (_, endpoint):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        root = f"{bucket}/{uuid.uuid4().hex}"
        store = Store(root)
        strangers: list[Callable[[], Any]] = [
            lambda: store.read_bytes("a"),
            lambda: store.read_ranges("a", [(0, 1)]),
            lambda: Table(store, "numbers", pa.schema([])).files(),
            lambda: Table(store, "numbers", pa.schema([])).open_file(TableFile(path="a", num_rows=1, size_bytes=1)),
        ]
        for ask in strangers:
            with pytest.raises(CertificateError, match=r"certificate is not trusted .* AWS_CA_BUNDLE.* SSL_CERT_FILE"):
                ask()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        _every_client_works(root)
        with pytest.raises(CertificateError, match="by SSL_CERT_FILE too: delta-rs"):
            Table(Store(root), "numbers", pa.schema([])).files()
        _a_table_works(root, SSL_CERT_FILE=str(authority))


def test_a_profile_names_the_authorities_and_a_file_that_is_not_there_is_named(
    config: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.pem"
    config(f"[default]\nca_bundle = {bundle}\n")
    with pytest.raises(CertificateError, match=r"ca_bundle of the AWS profile, is a file with certificates, found '.*bundle.pem'"):
        resolve_s3_settings("b")
    bundle.write_text("")
    assert resolve_s3_settings("b").ca_bundle == str(bundle)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "other"))
    (tmp_path / "other").write_text("")
    assert resolve_s3_settings("b").ca_bundle == str(tmp_path / "other")


@pytest.mark.slow
def test_keys_and_endpoint_of_fsspec_reach_every_client(
    bucket_of: Callable[[str], str], config: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = bucket_of("seaweedfs")
    given = {"key": ACCESS_KEY, "secret": SECRET_KEY, "endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    config("[default]\naws_access_key_id = unknown\naws_secret_access_key = unknown\n")
    root = f"{bucket}/{uuid.uuid4().hex}"
    _a_table_works(root, **{f"FSSPEC_S3_{name.upper()}": value for name, value in given.items()})
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    _every_client_works(root)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({"endpoint_url": "http://mine:1/"}, {}, ("http://mine:1", "eu-west-1")),
        ({"endpoint_url": "http://mine:1"}, {"AWS_PROFILE": "here"}, ("http://mine:1", "eu-north-1")),
        ({"endpoint_url": "http://mine:1"}, {"AWS_ENDPOINT_URL": "http://general:3"}, ("http://general:3", "eu-west-1")),
        ({"client_kwargs": {"endpoint_url": "http://mine:2", "region_name": "mars-1"}}, {"AWS_PROFILE": "here"}, ("http://mine:2", "mars-1")),
        ({"client_kwargs": {"region_name": "mars-1"}}, {"AWS_REGION": "ap-east-1"}, (None, "ap-east-1")),
        ({"client_kwargs": {"region_name": "mars-1"}}, {"AWS_DEFAULT_REGION": "ap-east-1"}, (None, "ap-east-1")),
    ],
)
def test_what_fsspec_says_comes_behind_the_aws_environment_and_before_the_profile(
    config: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    environment: dict[str, str],
    expected: tuple[str | None, str],
) -> None:
    config(PROFILES)
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = resolve_s3_settings("b")
    assert (found.endpoint_url, found.region) == expected


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({"key": "mine", "secret": 12345, "token": "t"}, {}, ("mine", "12345", "t")),
        ({"key": "mine", "secret": "s"}, {"AWS_ACCESS_KEY_ID": "aws", "AWS_SECRET_ACCESS_KEY": "a"}, ("aws", "a", None)),
        ({"key": "mine", "secret": "s"}, {"AWS_PROFILE": "other"}, ("profile", "p", None)),
    ],
)
def test_keys_of_fsspec_come_behind_those_that_the_aws_environment_names(
    config: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    environment: dict[str, str],
    expected: tuple[str, str, str | None],
) -> None:
    config("[profile other]\n")
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = profile\naws_secret_access_key = p\n")
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = resolve_s3_settings("b")
    found = settings.credentials.current()
    assert (found.access_key, found.secret_key, found.token) == expected
    s3fs = settings.s3fs()
    delta = settings.delta_options("b")
    by_fsspec = expected if expected[0] == "mine" else (None, None, None)
    assert (s3fs.key, s3fs.secret, s3fs.token) == by_fsspec
    assert tuple(delta.get(f"aws_{name}") for name in ("access_key_id", "secret_access_key", "session_token")) == by_fsspec
    arrow = settings.arrow().__reduce__()[1][0]
    assert (arrow["access_key"], arrow["secret_key"], arrow["session_token"]) == (*expected[:2], expected[2] or "")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"anon": True}, "sets anon"),
        ({"profile": "x"}, "FSSPEC_S3_PROFILE"),
        ({"key": "a"}, "expected both or none"),
        ({"secret": "a"}, "both or none"),
    ],
)
def test_what_s3fs_alone_would_follow_is_refused(
    config: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], told: str
) -> None:
    config("")
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    with pytest.raises(CredentialsError, match=told):
        Store("s3://b").exists("a")
