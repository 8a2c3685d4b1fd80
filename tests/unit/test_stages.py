"""A recipe resolved against its models: every spec is made before any stage starts, and what is done is not run."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Literal

import pytest

from model.errors import SpecError
from model.specs import fingerprint
from pipelines.errors import NothingThereError, RecipeError, SettingError
from pipelines.plan import plan_lines, print_plan
from pipelines.recipe_files import load_recipe
from pipelines.settings import execution_settings
from pipelines.show import show_recipe
from pipelines.stages import (
    STAGES,
    Experiment,
    MissingPart,
    StageRun,
    check_ready,
    feature_bytes,
    fetches_language_model,
    open_experiment,
    run_stage,
    shown_path,
    stage_runs,
)
from tests import small_data
from tests.tiny import tiny_recipe
from workers.dataset.build import build_dataset
from workers.dataset.samples import read_samples
from workers.dataset.sources import split_of
from workers.errors import DiskSpaceError, ExecutionError, RecordError, StorageError
from workers.execution import ExecutionSettings, SilentProgress
from workers.language_models import describe_language_model
from workers.runtime import InlineCluster
from workers.storage import Store


@pytest.fixture
def experiment(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> Experiment:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder))
    return open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings())


def test_opening_writes_nothing(experiment: Experiment) -> None:
    assert experiment.store.list() == []


def test_a_packaged_language_model_is_fetched_before_any_work_and_only_for_work_that_needs_it(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "cache"))
    assert not fetches_language_model(experiment, "report")
    packaged = replace(experiment, language_model=describe_language_model("smollm2-135m-instruct"))
    assert not fetches_language_model(packaged, "cache-features")
    assert fetches_language_model(packaged, "train-connector")
    for run in stage_runs(packaged):
        assert fetches_language_model(packaged, "report") == (run.stage != "report")
        packaged.store.write_json(
            f"runs/{run.stage}/{run.key}/COMMITTED.json", {"num_samples": 8, "num_train_by_source": {"rendered/charts": 6}, "num_held_out": 2}
        )
    assert not fetches_language_model(packaged, "report")


def test_a_schedule_in_epochs_needs_the_language_model_before_its_dataset_is_there(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "epochs.toml"
    path.write_text(re.sub(r"(?m)^steps = .*$", "epochs = 1", experiment.file.text))
    counted = open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings())
    packaged = replace(counted, language_model=describe_language_model("smollm2-135m-instruct"))
    with pytest.raises(SpecError):
        list(stage_runs(packaged))
    assert fetches_language_model(packaged, "report")


def test_stages_come_in_order_with_different_keys(experiment: Experiment) -> None:
    runs = list(stage_runs(experiment))
    assert tuple(dict.fromkeys(run.stage for run in runs)) == tuple(stage for stage in STAGES if stage != "calibrate-features")
    assert len({run.key for run in runs}) == len(runs)
    assert [run.seed for run in runs if run.stage == "train-connector"] == list(experiment.file.recipe.seeds)
    assert [run.stage for run in stage_runs(experiment, "cache-features")] == ["build-dataset", "cache-features"]


def test_int8_is_calibrated_first_and_what_follows_has_keys_then(experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "int8.toml"
    path.write_text(experiment.file.text + '\n[features]\nprecision = "int8"\ncalibration_images = 4\n')
    packed = open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings())
    lines = {line.fact: line.value for line in plan_lines(packed) if line.topic == "stages"}
    assert list(lines)[:4] == ["build-dataset", "calibrate-features", "cache-features", "train-connector seed 0"]
    assert lines["calibrate-features"].endswith("  to do")
    assert {lines[stage] for stage in list(lines)[2:]} == {"key unknown without the calibration, which runs first"}
    with pytest.raises(NothingThereError, match="holds no cached features of recipe"):
        show_recipe("cache", packed)
    replace(packed, missing=(MissingPart(what="a packaged model", note="not here"),)).check_known(packed.features)  # that is no reason
    show_recipe("run", packed)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert shown[:3] == [
        ["build-dataset", lines["build-dataset"].split()[0], "to", "do"],
        ["calibrate-features", lines["calibrate-features"].split()[0], "to", "do"],
        ["cache-features", "to", "do"],
    ]
    assert packed.calibration is not None
    record = {"sha256": "ab" * 32, "maps": [], "fp16_maps": ["local/layer_5"], "seconds": 1}
    packed.store.write_json(f"runs/calibrate-features/{fingerprint(packed.calibration)[:16]}/COMMITTED.json", record)
    assert (packed.features.calibration_sha256, packed.features.fp16_maps) == ("ab" * 32, ("local/layer_5",))
    assert packed.features == replace(packed.planned_features, calibration_sha256="ab" * 32, fp16_maps=("local/layer_5",))
    keys = [run.key for run in stage_runs(packed)]
    assert len(set(keys)) == len(keys)
    assert packed.training(0).features == packed.features
    other = Store(str(tmp_path / "other root"))
    assert replace(packed, store=other).features == packed.planned_features  # a calibration is of one root


def test_live_features_are_not_stored(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "live.toml"
    path.write_text(experiment.file.text + '\n[features]\nsource = "live"\n')
    live = open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings())
    stages = [run.stage for run in stage_runs(live)]
    assert stages[:2] == ["build-dataset", "train-connector"]
    assert "cache-features" not in stages
    assert [run.stage for run in stage_runs(live, "cache-features")] == ["build-dataset"]
    assert live.training(0) == replace(experiment.training(0), feature_source="live")
    assert {(line.topic, line.fact): line.value for line in plan_lines(live)}[
        "features", "cache"
    ] == "none: every view is encoded whenever it is seen"
    with pytest.raises(NothingThereError, match=r"features\.source is live, so there is no cache to show"):
        show_recipe("cache", live)


def test_features_of_global_views_alone_can_be_stored(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "global.toml"
    path.write_text(experiment.file.text + '\n[features]\nsource = "global_cached"\nprecision = "int8"\ncalibration_images = 4\n')
    split = open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings())
    assert [run.stage for run in stage_runs(split)][:4] == ["build-dataset", "calibrate-features", "cache-features", "train-connector"]
    assert split.calibration is not None
    assert (split.calibration.global_maps, split.calibration.local_maps) == (split.features.global_maps, ())
    assert split.cache == replace(split.features, local_maps=()) != split.features
    assert split.training(0).cache == split.cache
    assert split.training(0).features == split.features
    lines = {(line.topic, line.fact): line.value for line in plan_lines(split)}
    assert lines["features", "cache"].endswith(" an image; local views are encoded whenever one is seen")
    assert lines["features", "local maps"] != "none"
    plain = tmp_path / "plain.toml"
    plain.write_text(experiment.file.text + '\n[features]\nsource = "global_cached"\n')
    keys = [run.key for run in stage_runs(open_experiment(load_recipe(str(plain)), experiment.store, ExecutionSettings()))]
    assert keys[1] == fingerprint(replace(experiment.features, local_maps=()))[:16]
    head, tail = plain.read_text().split("[connector.local]")
    plain.write_text(head + tail[tail.index("[language_model]") :].replace('branch = "both"', 'branch = "global"'))
    with pytest.raises(RecipeError, match=r"features\.source is global_cached, .* but the connector has no local branch; use cached"):
        open_experiment(load_recipe(str(plain)), experiment.store, ExecutionSettings())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('source = "live"\nprecision = "int8"', r"features: found source = 'live' beside precision = 'int8', which is a way to store"),
        ('precision = "int4"', r"features\.precision: found 'int4'; did you mean 'int8'\? allowed: fp32, fp16, int8"),
        ("calibration_images = 3", r"features\.calibration_images: found 3; allowed: "),
        ("min_snr_db = 0", r"features\.min_snr_db: found 0; allowed: a finite number from 20 up"),
    ],
)
def test_features_that_cannot_be_stored_so(experiment: Experiment, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "features.toml"
    path.write_text(f"{experiment.file.text}\n[features]\n{text}\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_forms_are_stages_of_their_own_in_the_export_s_place(experiment: Experiment) -> None:
    standard = list(stage_runs(experiment, "export"))
    keys = {standard[-1].key}
    for form in ("llava-hf", "llava-next-hf", "loupe"):
        runs = list(stage_runs(experiment, "export", form))
        assert [(run.stage, run.key) for run in runs[:-1]] == [(run.stage, run.key) for run in standard[:-1]]
        assert runs[-1].stage == "export"
        keys.add(runs[-1].key)
    assert len(keys) == 4


def test_a_form_that_a_recipe_can_never_have_is_refused_first(
    experiment: Experiment, tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path
) -> None:
    for form in ("folder", "loupe"):
        experiment.check_form(form)
    for form in ("llava-hf", "llava-next-hf"):
        with pytest.raises(RecipeError, match=rf"recipe .*tiny\.toml: --to {form}: .* does not compute this connector"):
            experiment.check_form(form)
    path = tmp_path / "folds.toml"
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder)
    text = text.replace('adapters = { kind = "gated_mixture" }', 'adapters = { kind = "mlp" }').replace("compression = { queries = 4 }\n", "")
    text = text.replace("[connector.local]", '[connector.local]\nmerge = "spatial_unpad"\nnewline = true').replace(
        "[connector.global]", '[views]\nrule = "anyres"\n\n[connector]\nseparator = ""\n\n[connector.global]'
    )
    path.write_text(text)
    open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings()).check_form("llava-next-hf")


def test_seeds_change_training_alone(experiment: Experiment) -> None:
    assert fingerprint(experiment.training(0)) != fingerprint(experiment.training(1))
    assert experiment.training(0).features == experiment.training(1).features == experiment.features


def test_a_committed_stage_is_not_run(experiment: Experiment) -> None:
    def fail(progress: object) -> None:
        raise AssertionError("ran")

    spec, committed = experiment.dataset, {"num_train_by_source": {"rendered/charts": 7}, "num_held_out": 2, "num_samples": 9}
    experiment.store.write_json(f"runs/build-dataset/{fingerprint(spec)[:16]}/COMMITTED.json", committed)
    outcome = run_stage(experiment, StageRun(stage="build-dataset", seed=None, spec=spec, run=fail), SilentProgress())
    assert outcome.reused
    assert outcome.record == committed


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
    monkeypatch.setattr(Store, "free_bytes", lambda self: feature_bytes(experiment.dataset, experiment.features))
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
    experiment.store.write_json(
        f"runs/build-dataset/{built.key}/COMMITTED.json", {"num_held_out": 0, "num_samples": 16, "num_train_by_source": {"rendered/charts": 16}}
    )
    with pytest.raises(RecipeError, match=r"dataset\.held_out_fraction: found 0\.4, which holds out none of the 16 images"):
        next(runs)


def test_a_dataset_with_nothing_held_out_can_still_be_shown_and_planned(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    key = fingerprint(experiment.dataset)[:16]
    experiment.store.write_json(
        f"runs/build-dataset/{key}/COMMITTED.json", {"num_train_by_source": {"rendered/charts": 7}, "num_held_out": 0, "num_samples": 7, "seconds": 3}
    )
    show_recipe("run", experiment)
    told = capsys.readouterr().out
    assert key in told
    assert "done" in told
    assert "later stages" in told
    assert [(line.fact, "holds out none" in line.value) for line in plan_lines(experiment) if line.topic == "stages"][-1] == (
        "cache-features and later",
        True,
    )


ASKED = """
[evaluation]
metrics = ["anls", "exact_match"]

[evaluation.dataset]
sources = [{ kind = "rendered", family = "maps", num_images = 5 }]
turns_per_image = 2
legibility = { local_min_px = 3.0, global_max_px = 3.0 }

[[schedule.align]]"""


def test_a_dataset_to_be_asked_has_stages_of_its_own(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    plain = with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, "held_out_fraction = 0.4", "held_out_fraction = 0.4")
    experiment = with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, "[[schedule.align]]", ASKED)
    runs = list(stage_runs(experiment))
    assert [run.name for run in runs[:5]] == [
        "build-dataset",
        "build-dataset (asked)",
        "cache-features",
        "cache-features (asked)",
        "train-connector seed 0",
    ]
    assert len({run.key for run in runs}) == len(runs)
    # What is trained does not depend on what is asked; what is asked is another evaluation.
    assert experiment.training(0) == plain.training(0)
    assert experiment.dataset == plain.dataset
    assert experiment.asked is not None
    assert experiment.evaluation(0).dataset_fingerprint == fingerprint(experiment.asked[0]) != plain.evaluation(0).dataset_fingerprint
    assert experiment.asked[1] == replace(experiment.features, dataset_fingerprint=fingerprint(experiment.asked[0]))
    assert experiment.evaluation(0).metrics == ("anls", "exact_match")
    assert [run.name for run in stage_runs(experiment, "build-dataset")] == ["build-dataset", "build-dataset (asked)"]


def test_the_plan_tells_what_is_asked(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    experiment = with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, "[[schedule.align]]", ASKED)
    lines = {(line.topic, line.fact): line.value for line in plan_lines(experiment)}
    assert lines["evaluation", "metrics"] == "anls, exact_match"
    assert lines["evaluation", "images"] == "5 drawn, of a dataset of its own"
    assert lines["evaluation", "questions"] == "at most 10"
    assert lines["evaluation", "cache"] == "108 kB as fp16; 21.5 kB an image"  # 5 images x 7 views x 3 maps x 16 patches x 32 channels x 2 bytes
    assert lines["features", "cache"] == "344 kB as fp16; 21.5 kB an image"
    assert lines["stages", "cache-features (asked)"].endswith("to do")


def test_nothing_need_be_held_out_where_another_dataset_is_asked(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder).replace("held_out_fraction = 0.4", "held_out_fraction = 1e-7")
    (tmp_path / "none.toml").write_text(text.replace("[[schedule.align]]", ASKED, 1))
    experiment = open_experiment(load_recipe(str(tmp_path / "none.toml")), Store(str(tmp_path / "root")), ExecutionSettings())
    key = fingerprint(experiment.dataset)[:16]
    experiment.store.write_json(f"runs/build-dataset/{key}/COMMITTED.json", {"num_held_out": 0, "num_samples": 16, "num_train_by_source": {}})
    assert len(list(stage_runs(experiment))) == 10


def test_room_is_checked_for_the_dataset_that_is_asked_too(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, "[[schedule.align]]", ASKED)
    monkeypatch.setattr(Store, "free_bytes", lambda self: 16 * 300_000 + 400_000)  # enough for the training dataset alone
    with pytest.raises(DiskSpaceError, match="needs up to"):
        check_ready(experiment)


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
    assert lines["dataset", "images"] == "16 drawn"
    assert lines["features", "views of an image"].startswith("1 global + 3 x 2 local")
    # 16 images x 7 views x 3 maps x 16 patches x 32 channels x 2 bytes
    assert lines["features", "cache"] == "344 kB as fp16; 21.5 kB an image"
    assert lines["connector", "visual tokens"] == "16 global + 24 local"
    assert lines["training", "global_mlp"] == "3 steps of 4, 12 images seen; global_mlp at 0.001; sees global"
    assert lines["stages", "build-dataset"].endswith("to do")
    assert experiment.store.list() == []


def with_change(tmp_path: Path, encoder: Path, language_model: Path, old: str, new: str) -> Experiment:
    text = tiny_recipe(encoder, language_model)
    assert old in text
    (tmp_path / "changed.toml").write_text(text.replace(old, new))
    return open_experiment(load_recipe(str(tmp_path / "changed.toml")), Store(str(tmp_path / "root")), ExecutionSettings())


@pytest.mark.parametrize(("part", "fault"), [("encoder", "cut off"), ("language model", "cut off"), ("language model", "no template")])
def test_models_that_cannot_be_loaded_are_refused_first(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, part: str, fault: str
) -> None:
    folders = {"encoder": tmp_path / "encoder", "language model": tmp_path / "language"}
    shutil.copytree(tiny_encoder_folder, folders["encoder"])
    shutil.copytree(tiny_language_model_folder, folders["language model"])
    if fault == "cut off":
        weights = folders[part] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        message = r"model\.safetensors cannot be read .*copy or fetch it again"
    else:
        (folders[part] / "chat_template.jinja").unlink(missing_ok=True)
        path = folders[part] / "tokenizer_config.json"
        path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "chat_template"}))
        message = "has no chat template.*instruct"
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_recipe(folders["encoder"], folders["language model"]))
    with pytest.raises(RecipeError, match=message):
        open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings())


def test_a_language_model_without_a_template_takes_one_of_ours(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    """As Vicuna, whose tokenizer brings none."""
    folder = shutil.copytree(tiny_language_model_folder, tmp_path / "language")
    (folder / "chat_template.jinja").unlink()
    named = f'model = "{folder}"'
    with pytest.raises(RecipeError, match=r"no chat template.*language_model\.template \(vicuna_v1"):
        with_change(tmp_path, tiny_encoder_folder, folder, "steps = 3", 'steps = 3\ntemplate = "plain"')
    experiment = with_change(tmp_path, tiny_encoder_folder, folder, named, f'{named}\ntemplate = "vicuna_v1"')
    training = experiment.training(0)
    assert training.language_model.template == "vicuna_v1"
    assert [phase.template for phase in training.schedule.phases] == ["vicuna_v1", "vicuna_v1"]
    with pytest.raises(RecipeError, match="plain leaves out what is asked"):
        with_change(tmp_path, tiny_encoder_folder, folder, named, f'{named}\ntemplate = "plain"')
    with pytest.raises(RecipeError, match=rf"language model '{folder}': the template llama3 writes the tokens"):
        with_change(tmp_path, tiny_encoder_folder, folder, named, f'{named}\ntemplate = "llama3"')


def test_a_packaged_model_tells_which_templates_it_knows(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    named = f'model = "{tiny_language_model_folder}"'
    smollm2 = 'model = "smollm2-135m-instruct"\ntemplate = '
    with pytest.raises(RecipeError, match="does not know the tokens of the template llama3; allowed: own, chatml, vicuna_v1, plain"):
        with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, named, f'{smollm2}"llama3"')
    experiment = with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, named, f'{smollm2}"chatml"')
    assert experiment.training(0).language_model.template == "chatml"


def test_more_visual_tokens_than_the_language_model_holds_are_refused(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path
) -> None:
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder)
    found = re.search(r"queries = \d+", text)
    assert found
    with pytest.raises(RecipeError, match=r"local visual tokens.*holds \d+ tokens in all; lower connector\.local\.compression\.queries"):
        with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, found[0], "queries = 10000")


def test_a_fraction_that_holds_nothing_out_is_refused(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"held_out_fraction: found 1e-07, which of 16 images holds out about 1.6e-06"):
        with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, "held_out_fraction = 0.4", "held_out_fraction = 1e-7")


def test_the_plan_of_records_counts_them(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    (tmp_path / "mine.json").write_text(json.dumps([{"id": str(number), "image": "a.png", "conversations": turns} for number in range(7)]))
    (tmp_path / "images").mkdir()
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder)
    start, end = text.index("sources = ["), text.index("]", text.index("sources = [")) + 1
    source = f"sources = [{{ kind = 'llava_json', records = '{tmp_path}/mine.json', images = '{tmp_path}/images' }}]"
    experiment = with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, text[start:end], source)
    facts = {(line.topic, line.fact): line.value for line in plan_lines(experiment, "build-dataset")}
    assert facts["dataset", "images"] == "7 records read"
    assert facts["dataset", "questions"] == "those of the records"
    assert "local, by its shape and size" in facts["features", "views of an image"]
    assert facts["features", "cache"].startswith("up to ")
    assert [fact for topic, fact in facts if topic == "stages"] == ["build-dataset"]


def test_a_plan_that_could_not_be_carried_out_is_refused(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"cannot be written: .*/file is a file\. Choose another place with --root"):
            print_plan(replace(experiment, store=Store(str(root))))
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(ExecutionError, match="device=cuda: torch sees no GPU"):
            print_plan(replace(experiment, execution=ExecutionSettings(device="cuda")))
    print_plan(experiment)
    assert experiment.store.list() == []


@pytest.mark.parametrize(
    ("device", "address", "has_gpu", "sees_gpu", "refused"),
    [
        (
            "auto",
            None,
            True,
            False,
            r"--set device=auto: torch sees no GPU .* here: device=cpu\. There is a GPU: is its driver too old for torch ",
        ),
        ("cuda", None, True, False, r"--set device=cuda: torch sees no GPU .* allowed here: device=cpu\. There is a GPU"),
        ("cuda", None, False, False, r"--set device=cuda: torch sees no GPU on this machine; allowed here: device=cpu or device=auto"),
        ("auto", None, True, True, None),
        ("auto", None, False, False, None),
        ("cpu", None, True, False, None),
        ("auto", "there:6379", True, False, None),  # what computes is another machine
        ("cuda", "there:6379", True, False, None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_before_anything_starts(
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    device: Literal["auto", "cpu", "cuda"],
    address: str | None,
    has_gpu: bool,
    sees_gpu: bool,
    refused: str | None,
) -> None:
    monkeypatch.setattr("workers.runtime._has_gpu", lambda: has_gpu)
    monkeypatch.setattr("torch.cuda.is_available", lambda: sees_gpu)
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    asked = replace(experiment, execution=ExecutionSettings(device=device))
    for write in (True, False):
        if refused is None:
            check_ready(asked, write=write)
        else:
            with pytest.raises(ExecutionError, match=refused):
                check_ready(asked, write=write)


@pytest.mark.parametrize("record", [[], {}, "done", {"num_samples": 16, "num_held_out": 3}])
def test_a_record_that_is_none_is_named(experiment: Experiment, record: object) -> None:
    experiment.store.write_json(f"runs/build-dataset/{fingerprint(experiment.dataset)[:16]}/COMMITTED.json", record)
    with pytest.raises(RecordError, match=r"COMMITTED\.json (should be a stage's record, found|lacks num_train_by_source)"):
        list(stage_runs(experiment))


def test_paths_are_shown_as_people_type_them() -> None:
    assert shown_path("file:///a%20b/c") == "/a b/c"
    assert shown_path("s3://bucket/x") == "s3://bucket/x"


def with_lora(text: str, lora: str) -> str:
    return re.sub(r"(?m)^(\[language_model\]\nmodel = .*)$", rf"\1\nlora = {{ {lora} }}", text)


def test_adapters_are_planned_and_change_training_alone(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "lora.toml"
    path.write_text(with_lora(experiment.file.text, "rank = 4, alpha = 8"))
    adapted = open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings())
    assert adapted.features == experiment.features
    assert fingerprint(adapted.training(0)) != fingerprint(experiment.training(0))
    planned = {line.fact: line.value for line in plan_lines(adapted)}
    count = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert planned["adapters"] == f"{count:,}: rank 4, alpha 8, on all-linear"
    merging = replace(adapted, merge_export=True)
    assert fingerprint(merging.export()) != fingerprint(adapted.export())
    merging.check_form("folder")
    adapted.check_form("loupe")
    with pytest.raises(RecipeError, match=r"--merge goes with --to folder; what --to loupe writes holds adapters merged always\. Leave --merge out"):
        merging.check_form("loupe")


@pytest.mark.parametrize(
    ("lora", "changes", "message"),
    [
        (
            'rank = 4, alpha = 8, targets = ["qproj"]',
            {},
            r"language_model\.lora\.targets: found 'qproj', but in a LlamaForCausalLM no layer has that name",
        ),
        ("rank = 4, alpha = 8", {'"connector", "language_model"': '"connector"'}, r"schedule\.sft trains \['global_mlp', .*; add language_model to"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_any_work(
    experiment: Experiment, tmp_path: Path, lora: str, changes: dict[str, str], message: str
) -> None:
    path = tmp_path / "lora.toml"
    text = with_lora(experiment.file.text, lora)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings())


def test_settings_that_are_not_the_default_are_planned_with_who_set_them(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "suggesting.toml"
    path.write_text(experiment.file.text + "\n[execution]\nzero_stage = 2\ntrain_workers = 2\nmicro_batch_size = 2\n")
    file = load_recipe(str(path))
    settings = {"train_workers": "1", "gradient_checkpointing": "true"}
    suggesting = open_experiment(file, experiment.store, execution_settings(settings, file.recipe))
    planned = [(line.fact, line.value) for line in plan_lines(suggesting) if line.topic == "execution"]
    assert planned == [
        ("train_workers", "1  (--set; the recipe suggests 2)"),
        ("micro_batch_size", "2  (the recipe suggests it)"),
        ("zero_stage", "2  (the recipe suggests it)"),
        ("gradient_checkpointing", "true  (--set)"),
    ]
    assert not [line for line in plan_lines(experiment) if line.topic == "execution"]
    assert fingerprint(suggesting.training(0)) == fingerprint(experiment.training(0))


def test_the_longest_sequence_can_be_set_and_no_longer_than_the_model(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path
) -> None:
    model = f'model = "{tiny_language_model_folder}"'

    def opened(max_tokens: int) -> Experiment:
        return with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, model, f"{model}\nmax_tokens = {max_tokens}")

    assert opened(300).training(0).max_tokens == 300
    with pytest.raises(RecipeError, match=r"language_model\.max_tokens: found 5000, but .* holds 2048 tokens"):
        opened(5000)
    with pytest.raises(RecipeError, match=r"but language_model\.max_tokens allows 30 tokens in all"):
        opened(30)


def with_records(tmp_path: Path, encoder: Path, language_model: Path, records: list[dict[str, object]], **changes: str) -> Experiment:
    """The tiny recipe over a LLaVA file in place of its pictures."""
    source = small_data.write_llava(tmp_path / "llava", records, {f"{number}.png": small_data.png(number) for number in range(10)})
    text = tiny_recipe(encoder, language_model, seeds="[0]")
    named = f'sources = [{{ kind = "llava_json", records = "{source.records}", images = "{source.images}" }}]'
    text = re.sub(r"(?m)^sources = .*$", named, text)
    for old, new in changes.items():
        text = re.sub(rf"(?m)^{old} = .*$", new, text)
    path = tmp_path / "mixed.toml"
    path.write_text(text)
    return open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings())


def mixed_records(num_images: int, num_text_only: int) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [
        {"image": f"{k}.png", "conversations": small_data.conversation("<image>\nq?", "a")} for k in range(num_images)
    ]
    return [*records, *({"conversations": small_data.conversation(f"Question {k}?", "a")} for k in range(num_text_only))]


def build_records(experiment: Experiment) -> Experiment:
    build_dataset(experiment.dataset, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    return experiment


def test_a_plan_counts_records_without_an_image_and_no_features_of_them(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path
) -> None:
    experiment = with_records(tmp_path, tiny_encoder_folder, tiny_language_model_folder, mixed_records(10, 30))
    lines = {(line.topic, line.fact): line.value for line in plan_lines(experiment)}
    assert lines["dataset", "images"] == "10 records read"
    assert lines["dataset", "text only"].startswith("30 records without an image: seen by phases that train the language model")
    assert lines["dataset", "split"] == "about 24 train, 16 held out"
    assert lines["dataset", "questions"] == "those of the records"
    shown = re.match(r"up to (\d+) kB", lines["features", "cache"])
    assert shown
    assert int(shown[1]) == round(feature_bytes(experiment.dataset, experiment.features, 10) / 1000)


def test_a_built_mix_sets_the_length_of_epochs_and_is_shown(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = mixed_records(10, 30)
    experiment = build_records(with_records(tmp_path, tiny_encoder_folder, tiny_language_model_folder, records, steps="epochs = 1"))
    samples = [sample for sample in read_samples(experiment.store, fingerprint(experiment.dataset)) if sample.split == "train"]
    align, sft = (phase.steps for phase in experiment.training(0).schedule.phases)
    assert align == ceil(sum(not sample.text_only for sample in samples) / 4)
    assert sft == ceil(len(samples) / 4) > align
    show_recipe("dataset", experiment)
    told = capsys.readouterr().out
    assert re.search(r"text only +30", told)
    assert re.search(r"(?m)^text +\d+ +\d+ +30$", told)
    assert re.search(r"(?m)^text only$", told)


def test_a_dataset_without_any_image_is_refused_before_features_are_cached(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path
) -> None:
    experiment = build_records(with_records(tmp_path, tiny_encoder_folder, tiny_language_model_folder, mixed_records(0, 9)))
    with pytest.raises(RecipeError, match=r"dataset\.sources: found 9 samples without an image and none with one"):
        list(stage_runs(experiment, "cache-features"))


def test_held_out_text_is_nothing_to_evaluate_on(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    images = mixed_records(10, 0)
    sides = {split_of(hashlib.sha256(small_data.png(k)).hexdigest(), 0, 0.4): images[k] for k in range(10)}
    experiment = build_records(with_records(tmp_path, tiny_encoder_folder, tiny_language_model_folder, [sides["train"], *mixed_records(0, 20)]))
    record = experiment.record("build-dataset", experiment.dataset)
    assert record is not None
    assert record["num_held_out"] > 0
    with pytest.raises(RecipeError, match="which holds out none of the 1 images"):
        list(stage_runs(experiment))
    assert [run.stage for run in stage_runs(experiment, "cache-features")] == ["build-dataset", "cache-features"]


def test_captions_of_pictures_with_several_questions_are_refused_before_there_are_pictures(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path
) -> None:
    """In `plain` a conversation has one turn, so nearly all of them would end in quarantine, after everything was cached."""
    change = ("steps = 3", 'steps = 3\ntemplate = "plain"')
    with pytest.raises(
        RecipeError, match=r"phase 'global_mlp': the template plain holds one caption.*up to 3 questions; set dataset\.turns_per_image = 1"
    ):
        with_change(tmp_path, tiny_encoder_folder, tiny_language_model_folder, *change)


def test_extras_that_messages_name_are_there() -> None:
    import tomllib

    repository = Path(__file__).resolve().parents[2]
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [repository / "README.md", *(path for package in ("model", "workers", "pipelines") for path in (repository / package).rglob("*.py"))]
    named = {name for path in sources for name in re.findall(r"pip install (?:-e )?'\.?(?:loupe)?\[([\w-]+)\]'", path.read_text())}
    assert named == {"lmms-eval", "video", "smollm2"}
    assert named <= extras.keys()
    assert not any("'loupe[" in path.read_text() for path in sources)  # a package of that name is somebody else's
