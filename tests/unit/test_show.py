"""What `loupe show` prints: words that can be pasted, figures for people, and of a damaged record its name."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from model.specs import fingerprint
from pipelines.errors import NothingThereError
from pipelines.recipe_files import load_recipe
from pipelines.show import show_recipe
from pipelines.stages import Experiment, open_experiment
from tests.tiny import tiny_recipe
from workers.errors import RecordError
from workers.execution import ExecutionSettings
from workers.storage import Store


@pytest.fixture
def experiment(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.delenv("COLUMNS", raising=False)
    path = tmp_path / "a recipe.toml"
    path.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder))
    return open_experiment(load_recipe(str(path)), Store(str(tmp_path / "a root")), ExecutionSettings())


def commit(experiment: Experiment, stage: str, spec: Any, record: Any) -> str:
    path = f"runs/{stage}/{fingerprint(spec)[:16]}/COMMITTED.json"
    experiment.store.write_json(path, record)
    return path


@pytest.mark.parametrize("root", [None, "a root"])
@pytest.mark.parametrize(("what", "command"), [("dataset", "build-dataset"), ("cache", "cache-features")])
def test_what_is_missing_is_made_by_the_command_that_is_named(experiment: Experiment, tmp_path: Path, what: Any, command: str, root: Any) -> None:
    with pytest.raises(NothingThereError) as caught:
        show_recipe(what, experiment, root)
    place, recipe = str(tmp_path / "a root"), str(tmp_path / "a recipe.toml")
    assert str(caught.value).startswith(f"{place} holds no ")
    assert shlex.split(str(caught.value).split("`")[1]) == ["loupe", command, recipe, "--root", root or place]


def test_a_recipe_that_comes_with_loupe_goes_by_its_name(tmp_path: Path) -> None:
    experiment = open_experiment(load_recipe("demo"), Store(str(tmp_path)), ExecutionSettings())
    with pytest.raises(NothingThereError, match=f"of recipe 'demo'; `loupe build-dataset demo --root {tmp_path}` makes"):
        show_recipe("dataset", experiment, str(tmp_path))


def test_figures_are_for_people(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"num_small_turns": 4, "views_per_second": 245.0701878025876, "image_bytes": 18575892, "seconds": 61.2, "encoder": "x" * 200}
    commit(experiment, "cache-features", experiment.features, record)
    show_recipe("cache", experiment)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    place = experiment.store.local_path("features") / fingerprint(experiment.features.encoding)[:16]
    assert lines[1:] == [
        f"encoder           {'x' * 200}",
        "image bytes       18.6 MB",
        "small turns       4",
        "seconds           1 min 01 s",
        "views per second  245",
        f"table: {place}",
    ]


def test_how_true_the_maps_are_stands_below_the_facts(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    quality = {
        "global/layer_5": {"snr_db": 43.21, "cosine": 0.9999911, "worst_cosine": 0.99993},
        "local/layer_5": {"snr_db": 999.0, "cosine": 1.0, "worst_cosine": 1.0},
    }
    commit(experiment, "cache-features", experiment.features, {"quality": quality})
    show_recipe("cache", experiment)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-4:-1]] == [
        ["map", "signal", "over", "rounding", "cosine", "worst", "token's"],
        ["global/layer_5", "43.2", "dB", "0.999991", "0.999930"],
        ["local/layer_5", "exact", "1.000000", "1.000000"],
    ]


def test_a_long_error_stands_below_the_table(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    commit(
        experiment,
        "build-dataset",
        experiment.dataset,
        {"num_train_by_source": {"rendered/charts": 7}, "num_held_out": 0, "num_samples": 7, "seconds": "no number"},
    )
    show_recipe("run", experiment)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{experiment.file.recipe.name} in {experiment.store.local_path()}"
    assert lines[1].split() == ["stage", "key", "state", "time"]
    assert len(lines) == 4
    assert lines[3].startswith("later stages: recipe ")


@pytest.mark.parametrize("record", [[], {}, {"seconds": 1.0}, {"num_held_out": 0}])
def test_a_record_that_is_none_is_named(experiment: Experiment, record: Any) -> None:
    path = commit(experiment, "build-dataset", experiment.dataset, record)
    with pytest.raises(RecordError) as caught:
        show_recipe("run", experiment)
    assert str(experiment.store.local_path(path)) in str(caught.value).replace("%20", " ")


def test_an_image_can_be_pasted_into_ask(experiment: Experiment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    turn = SimpleNamespace(question="What is [red]?\nSay it.", answer="7", detail="small")
    samples = [
        SimpleNamespace(family="maps", split="train", turns=[turn], image=SimpleNamespace(path=path))
        for path in ("images/a b.png", "file:///far/c%20d.png", "s3://b/e.png")
    ]
    samples.append(SimpleNamespace(family="text", split="train", turns=[turn], image=None))
    monkeypatch.setattr("workers.dataset.samples.read_samples", lambda store, key: samples)
    commit(experiment, "build-dataset", experiment.dataset, {"num_train_by_source": {"rendered/charts": 3}, "num_held_out": 0, "num_samples": 3})
    monkeypatch.setenv("COLUMNS", "40")
    show_recipe("dataset", experiment)
    out = capsys.readouterr().out
    lines = out.partition("some questions")[2].splitlines()[1:]
    *pasted, alone = lines[::2]
    assert [shlex.split(line) for line in pasted] == [[str(experiment.store.local_path("images/a b.png"))], ["/far/c d.png"], ["s3://b/e.png"]]
    assert alone == "text only"
    assert lines[1] == "    What is [red]? Say it.  7  (small)"
