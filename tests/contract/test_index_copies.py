"""A sorted file of the index is copied from an object store once, and then mapped: by every reader of the machine, and never a damaged copy."""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from model.specs import FeatureSpec
from tests import small_data
from workers.caching import index as caching_index
from workers.caching.build import cache_features
from workers.caching.index import FeatureIndex, compact_index
from workers.caching.layout import index_table
from workers.dataset.samples import read_samples
from workers.errors import MissingFeaturesError
from workers.execution import ExecutionSettings, SilentProgress, cache_folder
from workers.runtime import InlineCluster
from workers.storage import Store

Cached = tuple[Store, FeatureSpec]


@pytest.fixture
def sorted_index(bucket_of: Callable[[str], str], tmp_path: Path, tiny_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """A cache in an object store whose index is put together, and a machine without copies."""
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "cache"))
    store, dataset = Store(f"{bucket_of('seaweedfs')}/{uuid.uuid4().hex}"), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    cache_features(spec, store, ExecutionSettings(feature_unit_bytes=1), SilentProgress(), cluster=InlineCluster())
    monkeypatch.setattr(caching_index, "_COMPACT_ABOVE", 1)
    compact_index(store, spec)
    return store, spec


@pytest.mark.slow
def test_a_copy_is_made_once_and_again_when_it_is_cut_off(sorted_index: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    store, spec = sorted_index
    images = [sample.image_sha256 for sample in read_samples(store, spec.dataset_fingerprint)]
    names = [item.name for item in spec.local_maps]
    reads: list[str] = []
    from_store = Store.read_bytes

    def counted(self: Store, path: str) -> bytes:
        if "/sorted-" in path:
            reads.append(path)
        return from_store(self, path)

    monkeypatch.setattr(Store, "read_bytes", counted)

    def opened() -> int:
        reads.clear()
        assert None not in FeatureIndex(store, spec).places("local", names, images)
        return len(reads)

    assert [opened(), opened()] == [2, 0]
    copies = sorted((cache_folder() / "index").iterdir())
    assert len(copies) == 2
    copies[0].write_bytes(copies[0].read_bytes()[:-1])
    assert [opened(), opened()] == [1, 0]
    # Nobody opens it for long: it goes when the next is copied.
    long_ago = time.time() - 40 * 24 * 3600
    unused = cache_folder() / "index" / "unused.parquet"
    unused.write_bytes(b"")
    for path in (unused, copies[1]):
        os.utime(path, (long_ago, long_ago))
    assert opened() == 0  # it is in use again
    copies[0].unlink()
    assert opened() == 1
    assert sorted((cache_folder() / "index").iterdir()) == copies
    # A machine without room for it reads it as it is.
    monkeypatch.setenv("LOUPE_CACHE", str(unused.parent / copies[0].name))
    assert [opened(), opened()] == [2, 2]


@pytest.mark.slow
def test_an_object_that_is_damaged_is_told_and_not_kept(sorted_index: Cached) -> None:
    store, spec = sorted_index
    table = index_table(store, spec.encoding)
    path = f"{table.path}/{table.files()[0].path}"
    data = bytearray(store.read_bytes(path))
    data[len(data) // 3] ^= 1
    store.write_bytes(path, bytes(data))
    with pytest.raises(MissingFeaturesError, match=r"of the index is damaged or gone .*--repair"):
        FeatureIndex(store, spec)
    assert list((cache_folder() / "index").glob("*")) == []
    store.delete(path)
    with pytest.raises(MissingFeaturesError, match="of the index is damaged or gone"):
        FeatureIndex(store, spec)
