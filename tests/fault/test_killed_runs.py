"""`loupe run` with one of its processes killed by -9, or with Ctrl-C, at each stage: the next run ends with what an undisturbed run ends with.

Under `make test-all`, a minute each. What runs every day: tests/e2e/test_run.py (Ctrl-C, a killed driver), test_training_under_ray.py (a killed
training worker), test_flow_server.py (a killed flow server), tests/contract/test_clusters.py (killed workers of the other stages).
"""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from deltalake import DeltaTable

from tests.commands import PLAIN_LINE, settings, start
from tests.tiny import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.heavy, pytest.mark.timeout(900)]

SETTINGS = ("num_cpus=2", "images_per_build_unit=1", "feature_unit_bytes=16000", "checkpoint_every_steps=5", "train_threads=1", "encoder_threads=1")

REACHED = {
    "build-dataset": "runs/build-dataset/*/staged/*.json",
    "cache-features": "features/*/branch=global/*/*/*.parquet",
    "train-connector": "checkpoints/*/*/step-*/MANIFEST.json",
    "evaluate": "runs/evaluate/*/spec.json",
    "export": "runs/export/*/spec.json",
    "report": "runs/report/*/spec.json",
}
"""The first file that a stage writes once it is at work."""

VICTIMS = {
    "driver": lambda process, words: False,
    "nobody but Ctrl-C": lambda process, words: False,
    "raylet": lambda process, words: process.name() == "raylet",
    "gcs": lambda process, words: process.name() == "gcs_server",
    "worker": lambda process, words: words.startswith("ray::") and "IDLE" not in words and "Agent" not in words,
    "flow server": lambda process, words: "pipelines.flow_server" in words,
}


@dataclass
class World:
    """A recipe and what an undisturbed run of it left behind."""

    folder: Path
    recipe: Path
    root: Path

    def start(self, root: Path) -> "subprocess.Popen[str]":
        return start(self.folder / "cache", "run", str(self.recipe), "--root", str(root), *settings(*SETTINGS))

    def finish(self, root: Path) -> None:
        process = self.start(root)
        said, complained = process.communicate(timeout=600)
        assert process.returncode == 0, said + complained


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("killed")
    recipe = folder / "tiny.toml"
    recipe.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder, seeds="[0]", steps=20))
    world = World(folder=folder, recipe=recipe, root=folder / "undisturbed")
    world.finish(world.root)
    return world


def content(root: Path) -> dict[str, list[str]]:
    """Every row of every table, sorted; every quarantined row; the digest of the trained weights."""
    names = ["samples", "quarantine", *(f"features/{path.name}" for path in sorted((root / "features").iterdir()))]
    tables = {name: DeltaTable(str(root / name)).to_pyarrow_table() for name in names if (root / name / "_delta_log").exists()}
    rows = {name: sorted(map(repr, table.to_pylist())) for name, table in tables.items()}
    manifests = sorted((root / "checkpoints").glob("*/final/MANIFEST.json"))
    return rows | {"weights": [path.read_text() for path in manifests]}


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def victim(process: "subprocess.Popen[str]", kind: str) -> psutil.Process | None:
    if kind in ("driver", "nobody but Ctrl-C"):
        return psutil.Process(process.pid)
    for child in family(process):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if VICTIMS[kind](child, " ".join(child.cmdline())):
                return child
    return None


STORIES = [
    pytest.param(stage, kind, id=f"{kind} in {stage}")
    for stage in REACHED
    for kind in VICTIMS
    # Evaluation, export and the report start no work on Ray; what its processes do by then is nobody's concern.
    if kind in ("driver", "nobody but Ctrl-C", "flow server") or stage in ("build-dataset", "cache-features", "train-connector")
]


@pytest.mark.parametrize(("stage", "kind"), STORIES)
def test_a_killed_process_costs_nothing_but_time(world: World, tmp_path: Path, stage: str, kind: str) -> None:
    root = tmp_path / "root"
    process = world.start(root)
    bystanders: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 300
        while not list(root.glob(REACHED[stage])) or (killed := victim(process, kind)) is None:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{stage} was not reached"
            time.sleep(0.01)
        bystanders = family(process)
        if kind == "nobody but Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        else:
            killed.send_signal(signal.SIGKILL)
        said, complained = process.communicate(timeout=300)
    finally:
        for left in bystanders:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    if kind == "driver":
        assert process.returncode == -signal.SIGKILL
    elif kind == "nobody but Ctrl-C":
        assert process.returncode == 130, said + complained
        assert complained.splitlines()[-1] == "loupe: interrupted; run the same command to resume"
        assert [line for line in complained.splitlines() if not PLAIN_LINE.match(line)] == []
    else:
        # Either the run mends itself, or it says in one paragraph what happened; it never ends well without its results.
        assert "Traceback" not in complained, complained
        # Without its control service, or its node, Ray may end the processes that talk to it, this one too, with words of its own and status 1.
        assert process.returncode in ((0, 1, 2) if kind in ("gcs", "raylet") else (0, 2)), said + complained
        assert process.returncode != 2 or complained.splitlines()[-1].startswith("loupe: ")
        assert process.returncode != 0 or list(root.glob("reports/*/report.html"))
    world.finish(root)
    assert content(root) == content(world.root)
