"""The flow's server: it serves on loopback, takes a flow run, and ends with its parent whatever ended the parent."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.commands import environment

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


def waited(url: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """What becomes of waiting for somebody else's server, and how long it takes."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", START + "import prefect"],
        env={**environment(folder), "PREFECT_API_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, time.monotonic() - began


def test_a_server_of_somebody_else_s_that_refuses_connections_is_not_waited_for_long(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, not listening: refused, and nobody else can take the port
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
        done, seconds = waited(url, tmp_path)
    assert f"FlowServerError: the flow's server at {url} refuses connections; is PREFECT_API_URL right?" in done.stderr
    assert seconds < 15
    assert (tmp_path / "prefect").is_dir()  # Prefect warns where it is missing


def test_a_server_of_somebody_else_s_that_is_slow_is_waited_for(tmp_path: Path) -> None:
    class Slow(http.server.BaseHTTPRequestHandler):
        began = time.monotonic()

        def do_GET(self) -> None:
            self.send_response(200 if time.monotonic() - self.began > 7 else 503)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done, seconds = waited(f"http://127.0.0.1:{server.server_port}/api", tmp_path)
        server.shutdown()
    assert done.returncode == 0
    assert seconds > 6
    assert "UserWarning" not in done.stderr


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
