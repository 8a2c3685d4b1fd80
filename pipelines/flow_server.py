"""The flow's own Prefect server: one child process on loopback over SQLite, there while a command runs and gone with it.

Prefect can start such a server by itself, but that one outlives a killed parent. This one dies with its parent whatever the parent died of,
listens on a port that the system picked, and starts while the recipe is still being checked. Where PREFECT_API_URL is set, that server is used.
"""

import atexit
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.errors import FlowServerError
from workers.execution import cache_folder

__all__ = ["FlowServer", "flow_environment", "start_flow_server"]

START_TIMEOUT_S = 240.0  # 4 s on an idle machine, 90 s seen on a crowded one
FOREIGN_TIMEOUT_S = 20.0  # a server of somebody else's is there already, or it is not
REFUSED_TIMEOUT_S = 5.0  # where connections are refused nothing listens; long enough for a server that is just being started again
NUM_RESTARTS = 3
PR_SET_PDEATHSIG = 1


def flow_environment() -> dict[str, str]:
    """What Prefect's environment has to say: no telemetry, a home of our own, quiet. What the user has set stands."""
    wanted = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(cache_folder() / "prefect"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the command prints its own errors, in one paragraph; the server keeps Prefect's
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        # SQLite on a disk that is busy with features; by default the server gives up after 10 and 5 s, and the run with it.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "120",
        "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "120",
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FlowServer:
    """A server that is starting or started. One of our own is started again when something ends it: a run need not die of that.

    Args:
        url: of its API.
        start: starts its process; None for a server of somebody else's.
        log: what it prints; None for a server of somebody else's.
    """

    def __init__(self, url: str, start: "Callable[[], subprocess.Popen[bytes]] | None" = None, log: Path | None = None) -> None:
        self.url = url
        self.log = log
        self._start = start
        self._process = None if start is None else start()
        self._stopping = threading.Event()

    @property
    def pid(self) -> int | None:
        """Process number; None for a server of somebody else's."""
        return None if self._process is None else self._process.pid

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until it answers.

        Args:
            timeout_s: how long at most.

        Raises:
            FlowServerError: it ended, or did not answer in time.
        """
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise FlowServerError(f"PREFECT_API_URL: found {self.url!r}; allowed: an http or https URL such as http://127.0.0.1:4200/api")
        if self._process is None:
            timeout_s = min(timeout_s, FOREIGN_TIMEOUT_S)
        began_s = time.monotonic()
        refused = False
        while time.monotonic() < began_s + timeout_s:
            if self._process is not None and self._process.poll() is not None:
                raise FlowServerError(f"the flow's server ended with status {self._process.returncode} while starting; its log is {self.log}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:  # noqa: S310 - always http
                    if answer.status == 200 and (self._process is None or self._process.poll() is None):
                        if self._start is not None:
                            threading.Thread(target=self._keep_alive, args=(self._start,), name="keep-flow-server", daemon=True).start()
                        return
                refused = False
            except (OSError, http.client.HTTPException) as error:
                refused = isinstance(getattr(error, "reason", error), ConnectionRefusedError)
            if refused and self._process is None and time.monotonic() > began_s + REFUSED_TIMEOUT_S:
                break
            time.sleep(0.1)
        where = "is PREFECT_API_URL right?" if self.log is None else f"its log is {self.log}"
        what = "refuses connections" if refused else f"did not answer within {timeout_s:.0f} s"
        raise FlowServerError(f"the flow's server at {self.url} {what}; {where}")

    def stop(self) -> None:
        """End it, and wait for its end."""
        self._stopping.set()
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _keep_alive(self, start: "Callable[[], subprocess.Popen[bytes]]") -> None:
        """Start the server again when it ends. Its children die with the thread that started them, so this one lasts as long as the last of them."""
        assert self._process is not None
        for _ in range(NUM_RESTARTS):
            status = self._process.wait()
            if self._stopping.is_set():
                return
            print(f"loupe: the flow's server ended with status {status}; it is started again", file=sys.stderr, flush=True)
            self._process = start()
            if self._stopping.is_set():
                self._process.terminate()
                return
        self._process.wait()  # a child that has not asked yet to die with its parent would die with this thread


def start_flow_server(*, ui: bool = False, port: int | None = None) -> FlowServer:
    """Start a server and point Prefect in this process at it; it is stopped when this process ends.

    Must be called before Prefect is imported: Prefect reads its environment then, and what it has registered to send at exit (states, logs) is sent
    before the server is stopped only because exit handlers run in reverse order. Without a server that sending takes over a minute to give up.

    Args:
        ui: serve the web UI and run the scheduler too, for `loupe serve`.
        port: which port; None lets the system pick one.

    Returns:
        The server, which may still be starting: call `wait_until_ready` before the first flow run.
    """
    os.environ.update(flow_environment())
    theirs = os.environ.get("PREFECT_API_URL")
    home = Path(os.environ["PREFECT_HOME"])
    log = home / "loupe-server.log"
    try:
        home.mkdir(parents=True, exist_ok=True)  # with somebody else's server too: Prefect warns where it is missing
        if not theirs:
            log.write_bytes(b"")
    except OSError as error:
        raise FlowServerError(
            f"the flow's server keeps its database and log in {home}, which cannot be written ({error.strerror}); set LOUPE_CACHE to a writable "
            "folder"
        ) from error
    if theirs:
        return FlowServer(theirs.rstrip("/"))
    chosen = port or _free_port()
    # The API changes deployments, and so what runs, for whoever can reach it: a web page in the user's browser must not, hence only our own origin.
    guarded = {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{chosen}"}
    only_api = {} if ui else {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
    api_url = f"http://127.0.0.1:{chosen}/api"
    environment = {**guarded, **os.environ, **only_api, "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_API_URL": api_url}

    def start() -> "subprocess.Popen[bytes]":
        with log.open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "pipelines.flow_server", str(chosen), str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # Ctrl-C is for the flow, which still has its last state to report
            )

    server = FlowServer(api_url, start, log)
    os.environ["PREFECT_API_URL"] = api_url
    atexit.register(server.stop)
    return server


def _serve(port: int, parent: int) -> None:
    """Run the server in this process, and end with the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # the parent died before it could be watched
    import uvicorn

    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
