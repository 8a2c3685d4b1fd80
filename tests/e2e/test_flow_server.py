"""The flow's server: it serves on loopback, takes a flow run, and ends with its parent whatever ended the parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

START = """
import sys, time
from pipelines.flow_server import start_flow_server
server = start_flow_server()
server.wait_until_ready()
print(server.url, server.pid, flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for both tests: the first start of a database takes longest."""
    return tmp_path_factory.mktemp("cache")


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_HOME")}
    return {**kept, "LOUPE_CACHE": str(folder)}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_end(pid: int, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


def test_it_ends_with_a_parent_that_is_killed(folder: Path) -> None:
    command = [sys.executable, "-c", START + "time.sleep(600)"]
    with subprocess.Popen(command, env=environment(folder), stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        url, pid = parent.stdout.readline().split()
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
            assert answer.status == 200
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_for_end(int(pid))


def test_a_flow_run_is_recorded_and_the_process_ends_soon(folder: Path) -> None:
    program = START + textwrap.dedent(
        """
        from prefect import flow, task
        @task
        def one():
            return 1
        @flow
        def tiny():
            return one()
        assert tiny() == 1
        print(time.monotonic(), flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(folder), capture_output=True, text=True, check=True)
    ended = time.monotonic()
    first, last = done.stdout.splitlines()
    # Sending to a server that is already gone takes Prefect over a minute to give up; 20 s is generous for one that is still there.
    assert ended - float(last) < 20
    assert wait_for_end(int(first.split()[1]))
    assert (folder / "prefect" / "prefect.db").exists()


def test_a_killed_server_is_started_again(folder: Path) -> None:
    command = [sys.executable, "-c", START + "time.sleep(600)"]
    with subprocess.Popen(
        command, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        url, pid = parent.stdout.readline().split()
        os.kill(int(pid), signal.SIGKILL)
        assert parent.stderr.readline() == "loupe: the flow's server ended with status -9; it is started again\n"
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        parent.terminate()
