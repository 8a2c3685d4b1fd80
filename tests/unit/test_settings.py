"""--set takes execution settings alone."""

from dataclasses import fields
from pathlib import Path

import pytest

from pipelines.errors import SettingError
from pipelines.recipe_files import load_recipe
from pipelines.settings import execution_settings, settings_from_words
from tests.unit.test_recipe import MINIMAL
from workers.execution import ExecutionSettings


def test_words_become_settings() -> None:
    words = ["train_workers=2", "num_cpus=none", "device=cpu", "max_quarantined_fraction=0.1", "ray_temp_dir=/tmp/r"]
    execution = execution_settings(settings_from_words(words))
    assert execution == ExecutionSettings(train_workers=2, device="cpu", max_quarantined_fraction=0.1, ray_temp_dir="/tmp/r")


def test_numbers_that_are_choices() -> None:
    assert execution_settings({"zero_stage": "2"}).zero_stage == 2
    assert execution_settings({"zero_stage": "3"}).zero_stage == 3
    with pytest.raises(SettingError, match="found '4'; allowed: 0, 1, 2, 3"):
        execution_settings({"zero_stage": "4"})


def test_the_command_line_stands_before_the_recipe_and_the_recipe_before_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL + "[execution]\nzero_stage = 2\ntrain_workers = 4\ngradient_checkpointing = true\n")
    recipe = load_recipe(str(path)).recipe
    suggested = execution_settings({}, recipe)
    assert suggested == ExecutionSettings(zero_stage=2, train_workers=4, gradient_checkpointing=True)
    assert execution_settings({"train_workers": "1", "gradient_checkpointing": "false"}, recipe) == ExecutionSettings(zero_stage=2)
    assert execution_settings({}, load_recipe("demo").recipe) == ExecutionSettings()


def test_a_setting_of_the_recipe_s_table_is_no_part_of_the_experiment() -> None:
    with pytest.raises(SettingError, match=r"no such setting; did you mean 'zero_stage'\?"):
        execution_settings({"execution.zero_stage": "1"})


def test_nothing_given_is_the_default() -> None:
    assert execution_settings({}) == ExecutionSettings()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train_workers", "no 'key=value'"),
        ("train_worker=2", r"did you mean 'train_workers'\? settings are num_cpus, "),
        ("learning_rate=1", "belongs to the experiment, not to its execution; edit the recipe"),
        ("schedule.sft.steps=1", "edit the recipe"),
        ("train_workers=two", "found 'two'; allowed: a whole number"),
        ("num_cpus=many", "found 'many'; allowed: a whole number, none"),
        ("device=gpu", "found 'gpu'; allowed: auto, cpu, cuda"),
        ("train_workers=0", "train_workers must be at least 1, found 0"),
    ],
)
def test_mistakes_are_named(word: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        execution_settings(settings_from_words([word]))


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="found twice"):
        settings_from_words(["num_cpus=1", "num_cpus=2"])


def test_every_unknown_setting_lists_them_all() -> None:
    with pytest.raises(SettingError) as caught:
        execution_settings({"xyzzy": "1"})
    assert all(field.name in str(caught.value) for field in fields(ExecutionSettings))
