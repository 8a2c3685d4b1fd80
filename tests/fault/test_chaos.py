"""Caching at the mercy of chance: whatever is killed at whatever moment, the table ends as an undisturbed one, value for value, and verifies.

A case is a function of its number: what is hit (an encoder, a preparing task, the driver, the S3 server, or nothing, with a second driver racing the
first) and when. `make test` plays a few, `make test-all` the hundred.
"""

import contextlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from model.specs import fingerprint
from tests import small_data
from tests.fault.cache_runs import UNDISTURBED, rows, start
from tests.s3_faults import every, fault_proxy
from tests.s3_servers import SeaweedServer, credentials, new_bucket
from workers.caching.build import cache_features
from workers.caching.verify import verify_cache
from workers.execution import SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VICTIMS = ("server", "driver", "encoder", "task", "race")
FEW = 2
CASES = [pytest.param(number, marks=[] if number < FEW else [pytest.mark.heavy]) for number in range(100)]
TRIES = 4
"""Of a driver: a server that is away for seconds may outlast a run's own retries, never the next run."""


def assert_whole(store, undisturbed):
    spec, expected = undisturbed
    assert rows(store, spec) == expected
    found = verify_cache(spec, store, UNDISTURBED, SilentProgress(), stage_key=fingerprint(spec)[:16], cluster=InlineCluster(), seed=0, num_encoded=3)
    assert found.faults == ()
    assert (found.num_cached, found.num_twice, found.num_encoded) == (16, 0, 3)


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The driver, and whatever of its family is left at the end, by their own ids."""
    family: list[psutil.Process] = []
    try:
        yield process
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
    finally:
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_units(process: subprocess.Popen[str], count: int) -> bool:
    """Whether so many units ended before the driver did."""
    return any(line.startswith("units") and int(line.split()[1]) >= count for line in process.stdout or ())


def kill_worker(process: subprocess.Popen[str], title: str) -> None:
    """Kill one of the driver's Ray processes by its title, the encoder where there is none of it now."""
    children = psutil.Process(process.pid).children(recursive=True)
    for wanted in (title, "_Finisher"):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if wanted in "".join(child.cmdline()):
                    child.kill()
                    return


@pytest.mark.parametrize("number", CASES)
def test_nothing_that_is_killed_is_missed(number, tmp_path, undisturbed, tiny_encoder_folder):
    chance = random.Random(number)
    victim = VICTIMS[number % len(VICTIMS)]
    after_units, delay_s = chance.randrange(8), chance.random() * 0.4
    with tempfile.TemporaryDirectory(prefix="loupe-weed-") as name, contextlib.ExitStack() as stack:
        server = SeaweedServer(Path(name))
        servers = stack.enter_context(contextlib.ExitStack())
        running = servers.enter_context(server.running())
        stack.enter_context(credentials(server.endpoint))
        root = f"{new_bucket(server.endpoint, running, server.log)}/{number}"
        store = Store(root)
        small_data.build(store, small_data.dataset_spec())
        process = stack.enter_context(ended(start(root, tiny_encoder_folder, 0)))
        alive = after_units == 0 or wait_for_units(process, after_units)
        time.sleep(delay_s)
        if alive and process.poll() is None:
            if victim == "driver":
                process.kill()
            elif victim == "server":
                running.kill()
                running.wait()
                time.sleep(chance.random())
                running = servers.enter_context(server.running())
            elif victim == "race":
                other = stack.enter_context(ended(start(root, tiny_encoder_folder, 0)))
                other.communicate(timeout=300)
                assert other.returncode == 0
            else:
                kill_worker(process, "prepare_unit" if victim == "task" else "_Finisher")
        process.communicate(timeout=300)
        if victim in ("encoder", "task", "race"):
            assert process.returncode == 0
        for _ in range(TRIES):
            again = stack.enter_context(ended(start(root, tiny_encoder_folder, 0)))
            again.communicate(timeout=300)
            if again.returncode == 0:
                break
        assert again.returncode == 0
        assert_whole(store, undisturbed)


@pytest.mark.parametrize("fault", ["busy", "reset", "slow", "lost", "truncated"])
def test_a_store_that_fails_now_and_then_is_asked_again(fault, undisturbed):
    spec, _ = undisturbed
    with tempfile.TemporaryDirectory(prefix="loupe-weed-") as name:
        server = SeaweedServer(Path(name))
        with server.running() as running, credentials(server.endpoint):
            bucket = new_bucket(server.endpoint, running, server.log)
            store = Store(f"{bucket}/faulty")
            small_data.build(store, small_data.dataset_spec())
            with fault_proxy(server.endpoint) as (proxy, endpoint), credentials(endpoint):
                proxy.plan = every(9, fault)
                cache_features(spec, Store(f"{bucket}/faulty"), UNDISTURBED, SilentProgress(), cluster=InlineCluster())
                assert len(proxy.faults) > 10
            assert_whole(Store(f"{bucket}/faulty"), undisturbed)


def test_a_full_disk_ends_the_run_and_the_next_one_completes(tmp_path, undisturbed, tiny_encoder_folder):
    """Files may grow to 12 kB only, which is what a full disk looks like to whoever writes: the features' files do not fit, records do."""
    store = Store(str(tmp_path / "root"))
    small_data.build(store, small_data.dataset_spec())
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY));"
        "from pathlib import Path; from tests import small_data; from tests.fault.test_killed_caching import UNDISTURBED;"
        "from workers.caching.build import cache_features; from workers.errors import StoreFullError; from workers.execution import SilentProgress;"
        "from workers.runtime import InlineCluster; from workers.storage import Store\n"
        "spec = small_data.feature_spec(small_data.dataset_spec(), Path(sys.argv[2]))\n"
        "try:\n    cache_features(spec, Store(sys.argv[1]), UNDISTURBED, SilentProgress(), cluster=InlineCluster())\n"
        "except StoreFullError as error:\n    print('full:', error); raise SystemExit(3)\n"
    )
    said = subprocess.run([sys.executable, "-c", code, store.root, str(tiny_encoder_folder)], check=False, capture_output=True, text=True)
    assert said.returncode == 3, said.stderr
    assert "no space is left" in said.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    cache_features(undisturbed[0], store, UNDISTURBED, SilentProgress(), cluster=InlineCluster())
    assert_whole(store, undisturbed)
