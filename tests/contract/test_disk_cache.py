"""What was read from an object store is read from this machine's disk the next time, never wrongly, and never beyond the limit for long."""

import errno
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import small_data
from workers.caching.build import cache_features
from workers.caching.disk_cache import DiskCache
from workers.caching.layout import BRANCHES
from workers.caching.reader import CachedFeatures
from workers.dataset.samples import read_samples
from workers.execution import ExecutionSettings, SilentProgress, cache_folder
from workers.runtime import InlineCluster
from workers.storage import Store

SETTINGS = ExecutionSettings(feature_unit_bytes=40_000, encode_batch_views=5)


def usage_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("??/*"))


def noise(seed: int, num_bytes: int = 40_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


@pytest.mark.slow
def test_features_are_read_from_the_disk_and_damage_there_costs_a_read_and_no_more(
    bucket_of: Callable[[str], str], tmp_path: Path, tiny_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "cache"))
    store, dataset = Store(f"{bucket_of('seaweedfs')}/{uuid.uuid4().hex}"), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    cache_features(spec, store, SETTINGS, SilentProgress(), cluster=InlineCluster())
    samples = read_samples(store, spec.dataset_fingerprint)
    asked = {"global": samples, "local": samples[:5]}
    plain = CachedFeatures(store, spec).fetch(asked)
    assert not cache_folder().exists()
    reads: list[str] = []
    from_store = Store.read_into

    def counted(self: Store, path: str, start: int, buffers: Sequence[np.ndarray]) -> None:
        reads.append(path)
        from_store(self, path, start, buffers)

    monkeypatch.setattr(Store, "read_into", counted)

    def fetched() -> int:
        """From a reader that has just been opened; how often it asked the store."""
        reads.clear()
        found = CachedFeatures(store, spec, disk_cache_bytes=2**20).fetch(asked)
        for branch in BRANCHES:
            assert all(torch.equal(packed.values, plain[branch][name].values) for name, packed in found[branch].items())
        return len(reads)

    assert fetched() == 21
    assert fetched() == 0
    files = sorted(cache_folder().glob("features/??/*"))
    files[0].write_bytes(files[0].read_bytes()[:-7])
    assert 0 < fetched() < 21
    assert fetched() == 0
    for path in files:
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(bytes(data))
    assert 0 < fetched() <= len(files)
    assert fetched() == 0
    files[1].unlink()
    files[1].mkdir()  # a disk that takes nothing there
    assert fetched() == fetched() > 0


def test_what_was_read_the_longest_time_ago_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000_000)
    for number in range(20):
        cache.write(f"s3://bucket/{number}", 1000, [noise(number)])
        os.utime(cache._path(f"s3://bucket/{number}"), (number, number))
    there = np.empty(40_000, dtype=np.uint8)
    assert cache.read_into("s3://bucket/0", 1000, [there])  # so it is the youngest now
    np.testing.assert_array_equal(there, noise(0))
    for number in range(20, 40):
        cache.write(f"s3://bucket/{number}", 1000, [noise(number)])
    assert usage_bytes(tmp_path) <= 1_000_000 * 33 / 32 + 45_000
    kept = [number for number in range(40) if cache.read_into(f"s3://bucket/{number}", 1000, [there])]
    assert kept[0] == 0
    assert kept[1:] == list(range(kept[1], 40))
    assert len(kept) >= 18


def test_parts_of_one_object_come_into_one_file_and_holes_are_told_by_their_checksum(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**8)
    parts = noise(1, 10_000), noise(2, 300)
    cache.write("s3://bucket/a", 5_000_000, list(parts))
    assert not cache.read_into("s3://bucket/b", 5_000_000, [np.empty(3, dtype=np.uint8)])
    assert not cache.read_into("s3://bucket/a", 5_000_000, [np.empty(10_301, dtype=np.uint8)])
    first, second = np.empty(9_990, dtype=np.uint8), np.empty(310, dtype=np.uint8)
    assert cache.read_into("s3://bucket/a", 5_000_000, [first, second])
    np.testing.assert_array_equal(np.concatenate([first, second]), np.concatenate(parts))
    hole = np.ones(10, dtype=np.uint8)
    assert cache.read_into("s3://bucket/a", 10, [hole])
    assert not hole.any()
    assert len(list(tmp_path.glob("??/*"))) == 1
    assert usage_bytes(tmp_path) < 50_000


def test_processes_and_threads_share_a_folder(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
import numpy as np
from workers.caching.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 600_000)
for turn in range(150):
    number = turn * int(sys.argv[2]) % 37
    data = np.random.default_rng(number).integers(0, 256, 40_000, dtype=np.uint8)
    there = np.empty_like(data)
    if cache.read_into(f"s3://bucket/{number}", 0, [there]):
        assert (there == data).all() or not there[-1000:].any()  # whole, or being written by another one
    cache.write(f"s3://bucket/{number}", 0, [data])
"""
    started = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), step], stderr=subprocess.PIPE) for step in ("5", "11", "17")]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    assert usage_bytes(tmp_path) <= 600_000 * (1 + 3 / 32) + 3 * 45_000
    cache = DiskCache(tmp_path, 600_000)
    threads = [threading.Thread(target=cache.write, args=("s3://bucket/x", 7, [noise(3)])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = np.empty(40_000, dtype=np.uint8)
    assert cache.read_into("s3://bucket/x", 7, [there])
    np.testing.assert_array_equal(there, noise(3))


def test_a_disk_that_takes_nothing_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = DiskCache(tmp_path / "file", 10**6)
    cache.write("s3://bucket/a", 0, [noise(1)])
    assert not cache.read_into("s3://bucket/a", 0, [np.empty(3, dtype=np.uint8)])


def test_without_locks_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", refused)
    cache = DiskCache(tmp_path, 200_000)
    for number in range(20):
        cache.write(f"s3://bucket/{number}", 0, [noise(number)])
    assert usage_bytes(tmp_path) == 0


def test_an_entry_that_cannot_be_removed_counts_on_and_others_go_in_its_place(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000_000)
    for number in range(20):
        cache.write(f"s3://bucket/{number}", 0, [noise(number)])
        os.utime(cache._path(f"s3://bucket/{number}"), (number, number))
    stuck = cache._path("s3://bucket/0")
    stuck.unlink()
    stuck.mkdir()
    os.utime(stuck, (0, 0))
    for number in range(20, 60):
        cache.write(f"s3://bucket/{number}", 0, [noise(number)])
    assert usage_bytes(tmp_path) <= 1_000_000 * 33 / 32 + 45_000
    there = np.empty(40_000, dtype=np.uint8)
    kept = [number for number in range(60) if cache.read_into(f"s3://bucket/{number}", 0, [there])]
    assert kept == list(range(kept[0], 60))
    assert len(kept) >= 18


def test_what_cannot_be_made_room_for_is_not_kept_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 200_000)
    looks = []

    def refused(path: Path, *, missing_ok: bool = False) -> None:
        looks.append((path, missing_ok))
        raise PermissionError(errno.EPERM, "immutable")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        for number in range(100):
            cache.write(f"s3://bucket/{number}", 0, [noise(number)])
    assert 100_000 < usage_bytes(tmp_path) <= 200_000 * 33 / 32 + 45_000
    assert looks
    for number in range(100, 110):
        cache.write(f"s3://bucket/{number}", 0, [noise(number)])
    there = np.empty(40_000, dtype=np.uint8)
    assert cache.read_into("s3://bucket/109", 0, [there])
    assert usage_bytes(tmp_path) <= 200_000 * 33 / 32 + 45_000


def test_whoever_writes_during_the_first_look_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, looking, go_on = DiskCache(tmp_path / "cache", 2**20), threading.Event(), threading.Event()
    look = DiskCache._make_room

    def slow(self: DiskCache, allowed_bytes: int) -> bool:
        looking.set()
        assert go_on.wait(30)
        return look(self, allowed_bytes)

    monkeypatch.setattr(DiskCache, "_make_room", slow)
    buffers = [np.full(100, number, dtype=np.uint8) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(cache.write, f"s3://bucket/{number}", 0, [buffer]) for number, buffer in enumerate(buffers)]
        assert looking.wait(30)
        done, _ = wait(written, timeout=0.3)
        go_on.set()
        assert not done
    for number, buffer in enumerate(buffers):
        room = np.zeros(100, dtype=np.uint8)
        assert cache.read_into(f"s3://bucket/{number}", 0, [room])
        assert (room == buffer).all()
