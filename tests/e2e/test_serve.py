"""`loupe serve`: a real Prefect server really schedules. (One with SQLAlchemy 2.1 looks healthy and schedules nothing.)"""

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import settings, start
from tests.tiny import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def asked(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def test_the_flow_is_registered_and_scheduled(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder))
    port = free_port()
    words = ["serve", str(recipe), "--root", str(tmp_path / "root"), "--cron", "0 3 1 1 *", "--port", str(port)]
    with start(tmp_path / "cache", *words) as process:
        api = f"http://127.0.0.1:{port}/api"
        deadline = time.monotonic() + 600
        runs: list[Any] = []
        while not runs:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.5)
            try:
                runs = asked(f"{api}/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                continue
        deployments = asked(f"{api}/deployments/filter", {})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert "<title>" in page.read().decode()
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    assert complained == ""
    assert len(said.splitlines()) == 1, said
    assert "Prefect UI: http://127.0.0.1:" in said
    assert [deployment["name"] for deployment in deployments] == ["tiny"]
    assert deployments[0]["schedules"][0]["schedule"]["cron"] == "0 3 1 1 *"
    assert runs[0]["parameters"]["recipe"] == str(recipe)
    assert runs[0]["expected_start_time"][5:16] == "01-01T03:00"


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_its_end_ends_the_run_under_way_too(
    number: signal.Signals, tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path
) -> None:
    recipe, root = tmp_path / "tiny.toml", tmp_path / "root"
    recipe.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder, seeds="[0]", steps=400))
    words = ["serve", str(recipe), "--root", str(root), "--cron", "* * * * *", "--port", str(free_port())]
    with start(tmp_path / "cache", *words, *settings("num_cpus=2", "checkpoint_every_steps=10")) as process:
        deadline = time.monotonic() + 300
        while not list(root.glob("checkpoints/*/*/step-*/MANIFEST.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        theirs = psutil.Process(process.pid).children(recursive=True)
        assert len(theirs) > 3
        process.send_signal(number)
        said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, said + complained
    assert "Traceback" not in said + complained
    assert "RuntimeWarning" not in complained
    _, alive = psutil.wait_procs(theirs, timeout=60)
    assert alive == []
