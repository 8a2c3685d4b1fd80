"""Endpoint, region, addressing and credentials reach all four clients alike, wherever they are set."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import REPOSITORY
from tests.s3_servers import ACCESS_KEY, SECRET_KEY
from workers.errors import CredentialsError, StorageError
from workers.s3_settings import S3Settings, resolve_s3_settings
from workers.storage import Store


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Nothing of the developer's own environment and profiles; writes a config file."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def write(text: str) -> None:
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


@pytest.mark.slow
def test_a_profile_alone_leads_every_client_to_its_server(
    bucket_of: Callable[[str], str], config: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = bucket_of("seaweedfs")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    config(f"[profile mine]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setattr("s3fs.S3FileSystem._cache", {})
    store = Store(f"{bucket}/{uuid.uuid4().hex}")
    for client in store.bulk_clients():
        client.write_bytes(f"{client.name}/a", b"12345")
        assert bytes(client.read_range(f"{client.name}/a", 1, 3)) == b"234", client.name
    # In a process of its own: delta-rs reads profiles once in a process.
    code = """
import sys
import pyarrow as pa
from workers.storage import Store
from workers.tables import Table
schema = pa.schema([pa.field("number", pa.int64())])
table = Table(Store(sys.argv[1]), "numbers", schema, ())
table.commit([table.write_file({}, "a.parquet", [pa.table({"number": [1]}, schema=schema)])])
assert table.read() == pa.table({"number": [1]}, schema=schema)
"""
    subprocess.run([sys.executable, "-c", code, store.root], cwd=REPOSITORY, check=True)
