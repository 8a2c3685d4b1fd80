import os
import uuid

import pytest

from tests import s3_servers


@pytest.fixture(scope="session")
def moto_server():
    with s3_servers.moto() as bucket:
        yield bucket, os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture(scope="session")
def seaweedfs_server():
    with s3_servers.seaweedfs() as bucket:
        yield bucket, os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def bucket_of(request, monkeypatch):
    """The bucket of a server by its name, which the environment points to during the test: several may be running."""

    def choose(server):
        bucket, endpoint = request.getfixturevalue(f"{server}_server")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        return bucket

    return choose


STORES = [
    "local",
    pytest.param("moto", marks=pytest.mark.slow),
    pytest.param("seaweedfs", marks=pytest.mark.slow),
]


@pytest.fixture(params=STORES)
def store_root(request, tmp_path, bucket_of):
    """A fresh root in each kind of store."""
    if request.param == "local":
        return (tmp_path / "root").as_uri()
    return f"{bucket_of(request.param)}/{uuid.uuid4().hex}"
