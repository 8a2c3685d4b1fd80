"""Caching with its processes killed: the next run completes, and the table holds each row once."""

import contextlib
import os
import signal
import time

import psutil
import pytest

from model.specs import fingerprint
from tests import small_data
from tests.fault.cache_runs import UNDISTURBED, rows, start, wait_for
from workers.caching.build import CacheRecord, cache_features
from workers.caching.layout import features_table
from workers.caching.units import read_outcome
from workers.commits import Stage
from workers.execution import SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store

pytestmark = [pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_IMAGES = 16


@pytest.fixture
def store(root):
    store = Store(root)
    small_data.build(store, small_data.dataset_spec())
    return store


def is_alive(process):
    """Whether it still runs; one that nobody has buried yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def ending_by_themselves(process):
    """The process's children must end with it; what is left after the test is ended by its own id."""
    family = psutil.Process(process.pid).children(recursive=True)
    # Ray's two agents first try, for up to two minutes, to tell the dead control service that it is dead.
    bound = [child for child in family if "Agent" not in "".join(child.cmdline())]
    try:
        yield bound
        deadline = time.monotonic() + 60
        while (alive := [child for child in bound if is_alive(child)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive
    finally:
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.stdin.close()
        process.stdout.close()


def test_a_killed_driver_takes_ray_along_and_the_next_run_completes(store, undisturbed, tiny_encoder_folder):
    spec, expected = undisturbed
    process = start(store.root, tiny_encoder_folder, 3)
    wait_for(process, "units 3")
    with ending_by_themselves(process) as family:
        assert any("raylet" in child.name() for child in family)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    stage = Stage.open(store, "cache-features", spec)
    assert stage.committed(CacheRecord) is None
    assert 3 <= len(store.list(stage.path("units"))) < 8

    again = start(store.root, tiny_encoder_folder, 0)
    assert wait_for(again, "done") == f"done {NUM_IMAGES} {fingerprint(spec)}"
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert rows(store, spec) == expected


def test_a_killed_encoder_is_replaced_within_the_run(store, undisturbed, tiny_encoder_folder):
    spec, expected = undisturbed
    process = start(store.root, tiny_encoder_folder, 2)
    wait_for(process, "units 2")
    encoders = [child for child in psutil.Process(process.pid).children(recursive=True) if "_Finisher" in "".join(child.cmdline())]
    assert len(encoders) == 1
    encoders[0].kill()
    time.sleep(0.5)
    process.stdin.write("go on\n")
    process.stdin.flush()
    wait_for(process, "done")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert rows(store, spec) == expected


def assert_all_is_in_the_tables(stage, spec):
    """Whatever is on record, for whoever looks before the next run."""
    outcomes = [read_outcome(stage.store, path) for path in stage.store.list(stage.path("units"))]
    assert outcomes
    assert {file.path for file in features_table(stage.store, spec).files()} == {file.path for outcome in outcomes for file in outcome.files}


def test_sigterm_leaves_a_state_that_the_next_run_resumes(store, undisturbed, tiny_encoder_folder):
    """By the handler that Ray puts in place of whatever was there, in the stage that starts it."""
    spec, expected = undisturbed
    process = start(store.root, tiny_encoder_folder, 2)
    wait_for(process, "units 2")
    with ending_by_themselves(process):
        process.terminate()
        # Ray's handler ends the process with the signal's number; while Ray waits in native code it raises a KeyboardInterrupt instead.
        assert process.wait(timeout=60) in (signal.SIGTERM, 130)
    stage = Stage.open(store, "cache-features", spec)
    assert [store.read_json(path)["outcome"] for path in store.list(stage.path("attempts"))] == ["interrupted"]
    assert_all_is_in_the_tables(stage, spec)
    cache_features(spec, store, UNDISTURBED, SilentProgress(), cluster=InlineCluster())
    assert rows(store, spec) == expected


def test_ctrl_c_leaves_a_state_that_the_next_run_resumes(store, undisturbed, tiny_encoder_folder):
    spec, expected = undisturbed
    process = start(store.root, tiny_encoder_folder, 2)
    wait_for(process, "units 2")
    with ending_by_themselves(process):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        wait_for(process, "interrupted")
        assert process.wait(timeout=60) == 130
    stage = Stage.open(store, "cache-features", spec)
    accounts = [store.read_json(path)["outcome"] for path in store.list(stage.path("attempts"))]
    assert accounts == ["interrupted"]
    assert_all_is_in_the_tables(stage, spec)
    done = len(store.list(stage.path("units")))
    assert done >= 2

    class Counts(SilentProgress):
        num_units = 0

        def advance(self, count=1, **facts):
            Counts.num_units += 1

    cache_features(spec, store, UNDISTURBED, Counts(), cluster=InlineCluster())
    assert Counts.num_units == 8 - done
    assert rows(store, spec) == expected
