"""A recipe resolved against its models: every spec is made before any stage starts, and what is done is not run."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from model.specs import fingerprint
from pipelines.errors import RecipeError, SettingError
from pipelines.plan import plan_lines
from pipelines.recipe import load_recipe
from pipelines.show import show_recipe
from pipelines.stages import STAGES, Experiment, StageRun, check_ready, open_experiment, rendered_feature_bytes, run_stage, shown_path, stage_runs
from tests.tiny import tiny_recipe
from workers.errors import DiskSpaceError
from workers.execution import ExecutionSettings, SilentProgress
from workers.storage import Store


@pytest.fixture
def experiment(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> Experiment:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder))
    return open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings())


def test_opening_writes_nothing(experiment: Experiment) -> None:
    assert experiment.store.list() == []


def test_stages_come_in_order_with_different_keys(experiment: Experiment) -> None:
    runs = list(stage_runs(experiment))
    assert tuple(dict.fromkeys(run.stage for run in runs)) == STAGES
    assert len({run.key for run in runs}) == len(runs)
    assert [run.seed for run in runs if run.stage == "train-connector"] == list(experiment.file.recipe.seeds)
    assert [run.stage for run in stage_runs(experiment, "cache-features")] == ["build-dataset", "cache-features"]


def test_seeds_change_training_alone(experiment: Experiment) -> None:
    assert fingerprint(experiment.training(0)) != fingerprint(experiment.training(1))
    assert experiment.training(0).features == experiment.training(1).features == experiment.features


def test_a_committed_stage_is_not_run(experiment: Experiment) -> None:
    def fail(progress: object) -> None:
        raise AssertionError("ran")

    spec = experiment.dataset
    experiment.store.write_json(f"runs/build-dataset/{fingerprint(spec)[:16]}/COMMITTED.json", {"num_train": 7})
    outcome = run_stage(experiment, StageRun(stage="build-dataset", seed=None, spec=spec, run=fail), SilentProgress())
    assert outcome.reused
    assert outcome.record == {"num_train": 7}


def test_a_stage_that_is_not_committed_is_run(experiment: Experiment) -> None:
    @dataclass
    class Record:
        number: int

    outcome = run_stage(
        experiment, StageRun(stage="build-dataset", seed=None, spec=experiment.dataset, run=lambda _: Record(number=3)), SilentProgress()
    )
    assert not outcome.reused
    assert outcome.record == {"number": 3}


def test_what_cannot_fit_is_refused_before_it_starts(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: rendered_feature_bytes(experiment))
    with pytest.raises(DiskSpaceError, match=r"needs up to .* GB for images and features, and .* are free"):
        check_ready(experiment)
    monkeypatch.setattr(Store, "free_bytes", lambda self: None)
    check_ready(experiment)


def test_models_that_do_not_fit_are_named_with_the_recipe(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    path = tmp_path / "tiny.toml"
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder)
    for wrong, message in (
        (text.replace(str(tiny_encoder_folder), str(tmp_path / "nowhere")), "nowhere"),
        (text.replace('kind = "dci", groups = 2', 'kind = "single", layer = 12'), "needs layer 12"),
    ):
        path.write_text(wrong)
        with pytest.raises(RecipeError, match=message) as caught:
            open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings())
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [-1]", r"seeds\[0\]: found -1"),
        ('branch = "both"\nsteps', 'branch = "both"\nexperts = "resampler"\nsteps', "runs the resampler alone, but the connector has none"),
        ("[[schedule.align]]", '[evaluation]\nmodes = ["both", "both"]\n\n[[schedule.align]]', "each once"),
        ("batch_size = 4", "batch_size = 3", r"--set train_workers=2: the phase that trains .* has batch_size 3; allowed: numbers that divide it"),
    ],
)
def test_what_only_a_later_stage_would_notice_is_refused_first(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, old: str, new: str, message: str
) -> None:
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder)
    if "resampler" in new:
        text = text.replace('adapters = { kind = "gated_mixture" }', 'adapters = { kind = "mlp" }')
    assert old in text
    path = tmp_path / "tiny.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises((RecipeError, SettingError), match=message):
        open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings(train_workers=2))


def test_nothing_held_out_is_said_before_features_are_cached(experiment: Experiment) -> None:
    runs = stage_runs(experiment)
    built = next(runs)
    assert built.stage == "build-dataset"
    experiment.store.write_json(f"runs/build-dataset/{built.key}/COMMITTED.json", {"num_held_out": 0, "num_samples": 16, "num_train": 16})
    with pytest.raises(RecipeError, match=r"dataset\.held_out_fraction: found 0\.4, which holds out none of the 16 images"):
        next(runs)


def test_a_dataset_with_nothing_held_out_can_still_be_shown_and_planned(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    key = fingerprint(experiment.dataset)[:16]
    experiment.store.write_json(f"runs/build-dataset/{key}/COMMITTED.json", {"num_train": 7, "num_held_out": 0, "num_samples": 7, "seconds": 3})
    show_recipe("run", experiment)
    told = capsys.readouterr().out
    assert key in told
    assert "done" in told
    assert "later stages" in told
    assert [(line.fact, "holds out none" in line.value) for line in plan_lines(experiment) if line.topic == "stages"][-1] == ("later ones", True)


def test_an_encoder_folder_without_weights_is_refused(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_encoder_folder / "config.json").read_bytes())
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_recipe(bare, tiny_language_model_folder))
    with pytest.raises(RecipeError, match="safetensors"):
        open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings())


def test_the_plan_tells_sizes_and_starts_nothing(experiment: Experiment) -> None:
    lines = {(line.topic, line.fact): line.value for line in plan_lines(experiment)}
    assert lines["dataset", "images"] == "16"
    assert lines["features", "views of an image"].startswith("1 global + 3 x 2 local")
    # 16 images x 7 views x 3 maps x 16 patches x 32 channels x 2 bytes
    assert lines["features", "cache"] == "344 kB as fp16"
    assert lines["connector", "visual tokens"] == "16 global + 24 local"
    assert lines["training", "global_mlp"] == "3 steps of 4, 12 images seen, rate 0.001"
    assert lines["stages", "build-dataset"].endswith("to do")
    assert experiment.store.list() == []


def test_paths_are_shown_as_people_type_them() -> None:
    assert shown_path("file:///a%20b/c") == "/a b/c"
    assert shown_path("s3://bucket/x") == "s3://bucket/x"
