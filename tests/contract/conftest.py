import uuid

import pytest

from tests import s3_servers


@pytest.fixture(scope="session")
def moto_bucket():
    with s3_servers.moto() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def seaweedfs_bucket():
    with s3_servers.seaweedfs() as bucket:
        yield bucket


STORES = [
    "local",
    pytest.param("moto", marks=pytest.mark.slow),
    pytest.param("seaweedfs", marks=pytest.mark.slow),
]


@pytest.fixture(params=STORES)
def store_root(request, tmp_path):
    """A fresh root in each kind of store."""
    if request.param == "local":
        return (tmp_path / "root").as_uri()
    return f"{request.getfixturevalue(request.param + '_bucket')}/{uuid.uuid4().hex}"
