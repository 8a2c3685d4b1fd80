"""What every cluster promises: the same jobs give the same results, errors keep their types."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.errors import ImageError
from model.specs import fingerprint
from tests import commands, small_data
from workers.caching.build import cache_features
from workers.caching.layout import BRANCHES, features_table
from workers.dataset.build import build_dataset
from workers.dataset.samples import read_samples
from workers.dataset.spec import LegibilitySpec, RenderedSourceSpec
from workers.dispatch import Dispatch
from workers.errors import ClusterError, GpuFailedError, SourceError, SpecChangedError, WorkerError, WorkFailedError
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import Cluster, InlineCluster, RayCluster
from workers.storage import Store

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.slow)])
def cluster(request):
    if request.param == "inline":
        return InlineCluster()
    request.getfixturevalue("ray_session")
    return RayCluster(ExecutionSettings(num_cpus=2, device="cpu"))


def square(number):
    return number * number


def prepare(number):
    return [number, number + 1]


@dataclass
class Adds:
    """A finisher that is called from two threads."""

    amount: int

    def __call__(self):
        return lambda pair: sum(pair) + self.amount


def fails_with_ours(number):
    raise SourceError(f"source {number} is damaged")


def fails_with_a_model_error(number):
    raise ImageError("truncated", "half an image")


def fails_with_differences(number):
    raise SpecChangedError("another spec", ["a: 1, 2"])


def test_streams_and_pipelines_give_every_result_once(cluster):
    assert isinstance(cluster, Cluster)
    assert sorted(cluster.stream(square, range(20), in_flight=3)) == [number * number for number in range(20)]
    assert sorted(cluster.pipeline(prepare, Adds(5), range(12), finishers=2, in_flight=4)) == [2 * number + 6 for number in range(12)]
    assert sorted(cluster.pipeline(prepare, Adds(5), range(4), finishers=1, in_flight=3, prepare_cpus=2)) == [6, 8, 10, 12]
    assert list(cluster.stream(square, [], in_flight=1)) == []
    assert list(cluster.pipeline(prepare, Adds(5), [], finishers=1, in_flight=1)) == []


def test_jobs_are_taken_only_as_there_is_room(cluster):
    taken = []

    def jobs():
        for number in range(50):
            taken.append(number)
            yield number

    results = cluster.stream(square, jobs(), in_flight=4)
    next(results)
    assert len(taken) <= 5
    results.close()


def test_errors_keep_their_types(cluster):
    with pytest.raises(SourceError, match="source 0 is damaged"):
        list(cluster.stream(fails_with_ours, [0], in_flight=1))
    with pytest.raises(ImageError) as caught:
        list(cluster.stream(fails_with_a_model_error, [0], in_flight=1))
    assert caught.value.reason == "truncated"
    with pytest.raises(SpecChangedError) as changed:
        list(cluster.pipeline(fails_with_differences, Adds(1), [0], finishers=1, in_flight=1))
    assert changed.value.differences == ("a: 1, 2",)


def fails_with_a_key_error(number):
    return {}[number]


def dies(number):
    os._exit(1)


@pytest.mark.slow
def test_foreign_errors_and_deaths_on_ray_become_ours(ray_session):
    cluster = RayCluster(ExecutionSettings(num_cpus=2, max_failures=0))
    with pytest.raises(WorkFailedError, match="KeyError: 7") as failed:
        list(cluster.stream(fails_with_a_key_error, [7], in_flight=1))
    assert not failed.value.retryable
    with pytest.raises(ClusterError, match="beyond its retries") as died:
        list(cluster.stream(dies, [0], in_flight=1))
    assert died.value.retryable
    assert isinstance(died.value, WorkerError)


class Hangs:
    """Makes finishers of which one never comes back."""

    def __call__(self):
        def finish_or_hang(number):
            while number == 4:  # the third job, squared
                time.sleep(0.1)
            return number

        return finish_or_hang


def assert_ended(pid):
    deadline_s = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.mark.slow
def test_work_that_is_stuck_says_where_and_ends(ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path))
    cluster = RayCluster(ExecutionSettings(num_cpus=2, stall_after_s=25))
    done = []
    with pytest.raises(ClusterError, match=r"is stuck: 1 units under way, none ended for \d+ s\. Where its processes were stands in") as stuck:
        done.extend(cluster.pipeline(square, Hangs(), range(4), finishers=1, in_flight=4))
    assert stuck.value.retryable
    (dump,) = (tmp_path / "stalls").iterdir()
    assert "finish_or_hang" in dump.read_text()
    assert "time.sleep(0.1)" in dump.read_text()
    # It would keep its GPU for ever on a cluster that outlives the run.
    assert_ended(int(re.search(r"process (\d+) on ", dump.read_text()).group(1)))


@pytest.mark.slow
def test_stuck_processes_end_where_nothing_can_be_written(ray_session, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "file"))
    cluster = RayCluster(ExecutionSettings(num_cpus=2, device="cpu", stall_after_s=10))
    with pytest.raises(
        ClusterError, match=r"is stuck: .* was printed, since no file can be written \(.*Not a directory.*; set LOUPE_CACHE to"
    ) as stuck:
        list(cluster.pipeline(square, Hangs(), range(2, 3), finishers=1, in_flight=1))
    assert stuck.value.retryable
    printed = capsys.readouterr().err
    assert "finish_or_hang" in printed
    assert_ended(int(re.search(r"process (\d+) on ", printed).group(1)))


@dataclass
class Notes:
    """A finisher that notes what it was given."""

    file: Path

    def __call__(self):
        def finish(number):
            with self.file.open("a") as file:
                file.write(f"{number}\n")
            return number

        return finish


@pytest.mark.slow
def test_units_are_not_done_again_for_a_reader_that_takes_its_time(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(RayCluster, "_dispatch", lambda cluster, give, num_places: Dispatch(give, num_places, max_failures=0, latest_s=1))
    cluster = RayCluster(ExecutionSettings(num_cpus=2, device="cpu"))
    for _ in cluster.pipeline(square, Notes(tmp_path / "notes"), range(4), finishers=2, in_flight=4):
        time.sleep(2)  # all of them are overdue, done, and not read yet
    assert sorted((tmp_path / "notes").read_text().split()) == ["0", "1", "4", "9"]


@dataclass
class Dies:
    """A finisher whose process dies at some jobs: `often` at each of them, as a machine that is taken away, and then no more."""

    folder: Path
    often: int

    def __call__(self):
        def finish(number):
            for time_of in range(self.often):
                if not (self.folder / f"{number}-{time_of}").exists():
                    (self.folder / f"{number}-{time_of}").touch()
                    os._exit(1)
            return number

        return finish


@pytest.mark.slow
def test_what_counts_is_how_often_a_unit_was_tried_and_not_how_often_its_process_died(ray_session, tmp_path):
    cluster = RayCluster(ExecutionSettings(num_cpus=2, device="cpu", max_failures=1))
    assert list(cluster.pipeline(square, Dies(tmp_path, 1), range(4), finishers=1, in_flight=1)) == [0, 1, 4, 9]
    with pytest.raises(ClusterError, match="beyond its retries"):
        list(cluster.pipeline(square, Dies(tmp_path, 3), range(4, 6), finishers=1, in_flight=1))


@dataclass
class LosesItsGpu:
    """A finisher whose process cannot compute any more after an error of CUDA's, which the first `often` tries of each job meet."""

    folder: Path
    often: int
    error: str = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"

    def __call__(self):
        is_lost = False

        def finish(number):
            nonlocal is_lost
            tries = self.folder / f"{number}.txt"
            with tries.open("a") as file:
                file.write(f"{os.getpid()}\n")
            is_lost = is_lost or len(tries.read_text().split()) <= self.often
            if is_lost:
                raise RuntimeError(self.error)
            return number

        return finish


@pytest.mark.slow
def test_a_process_that_lost_its_gpu_is_begun_anew_and_its_units_are_tried_again(ray_session, tmp_path, caplog):
    cluster = RayCluster(ExecutionSettings(num_cpus=2, device="cpu", max_failures=9))
    assert sorted(cluster.pipeline(square, LosesItsGpu(tmp_path, 1), range(4), finishers=1, in_flight=2)) == [0, 1, 4, 9]
    assert "a unit was lost and is under way again: CUDA failed on " in caplog.text
    for number in (0, 1, 4, 9):
        tries = (tmp_path / f"{number}.txt").read_text().split()
        assert len(set(tries)) == len(tries)


@pytest.mark.slow
def test_a_gpu_that_fails_again_and_again_is_named_and_a_lack_of_memory_is_none(ray_session, tmp_path):
    cluster = RayCluster(ExecutionSettings(num_cpus=2, device="cpu", max_failures=1))
    with pytest.raises(GpuFailedError, match=r"CUDA failed on .+ in process \d+: CUDA error: an illegal memory access was encountered\. ") as failed:
        list(cluster.pipeline(square, LosesItsGpu(tmp_path, 9), range(4), finishers=2, in_flight=1))
    assert failed.value.retryable
    assert len((tmp_path / "0.txt").read_text().split()) == 2
    with pytest.raises(WorkFailedError, match="RuntimeError: CUDA error: out of memory"):
        list(cluster.pipeline(square, LosesItsGpu(tmp_path, 9, "CUDA error: out of memory"), range(7, 8), finishers=1, in_flight=1))
    assert len((tmp_path / "49.txt").read_text().split()) == 1


@dataclass
class Overlaps:
    """A finisher that finishes only when it runs twice at a time."""

    def __call__(self):
        barrier = threading.Barrier(2, timeout=60)

        def finish(pair):
            barrier.wait()
            return time.monotonic()

        return finish


@pytest.mark.slow
def test_a_finisher_works_on_two_jobs_at_once(ray_session):
    cluster = RayCluster(ExecutionSettings(num_cpus=2, device="cpu"))
    assert len(list(cluster.pipeline(prepare, Overlaps(), range(4), finishers=1, in_flight=3))) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", ["", "ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[2])\nray.shutdown()"], ids=["imported", "used"]
)
def test_ray_starts_with_a_token_in_a_program_that_imported_it_before(tmp_path, before):
    program = f"""
import os, sys
import ray
{before}
from workers.execution import ExecutionSettings
from workers.runtime import ray_runtime

def length(text):
    return len(text)

with ray_runtime(ExecutionSettings(num_cpus=1, ray_temp_dir=sys.argv[1])) as cluster:
    print(list(cluster.stream(length, ["text"], in_flight=1)), os.environ["RAY_AUTH_MODE"])
"""
    environment = {**commands.environment(tmp_path), "HOME": str(tmp_path)}  # where Ray would keep a token
    del environment["RAY_AUTH_MODE"]
    with tempfile.TemporaryDirectory(prefix="loupe-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: Ray puts sockets below it
        command = [sys.executable, "-c", program, f"{folder}/own", f"{folder}/before"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.stdout == "[4] token\n", done.stderr
    assert (tmp_path / ".ray" / "auth_token").exists() == bool(before)


@pytest.mark.slow
def test_a_dataset_and_its_cache_are_the_same_on_ray_and_inline(ray_session, tmp_path, tiny_encoder_folder):
    sources = (RenderedSourceSpec(family="geometry", num_images=4), RenderedSourceSpec(family="charts", num_images=3))
    # Limits for these tests' small views, which show everything at half of the size of the demo's.
    dataset = small_data.dataset_spec(sources=sources, legibility=LegibilitySpec(local_min_px=2.5, global_max_px=2.5))
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    settings = ExecutionSettings(num_cpus=2, images_per_build_unit=3, feature_unit_bytes=60_000, encoder_threads=1, device="cpu")
    found = {}
    for name in ("inline", "ray"):
        store = Store(str(tmp_path / name))
        cluster = InlineCluster() if name == "inline" else None
        built = build_dataset(dataset, store, settings, SilentProgress(), cluster=cluster)
        record = cache_features(spec, store, settings, SilentProgress(), cluster=cluster)
        assert (built.num_samples, record.num_cached) == (7, 7)
        samples = read_samples(store, fingerprint(dataset))
        rows = []
        for branch in BRANCHES:
            table = features_table(store, spec)
            rows += [(branch, tuple(sorted(row.items(), key=str))) for row in table.read({"branch": branch}).to_pylist()]
        found[name] = (samples, sorted(rows, key=str))
        assert [path for path in store.list() if "staged" in path] == []
    assert found["inline"][0] == found["ray"][0]
    assert found["inline"][1] == found["ray"][1]
