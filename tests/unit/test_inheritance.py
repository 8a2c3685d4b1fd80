"""Recipes that extend others are what they would be if written whole; what cannot be merged is refused by name."""

from pathlib import Path

import pytest

from pipelines.errors import RecipeError
from pipelines.recipe import Recipe
from pipelines.recipe_files import load_recipe


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def changed(**changes: object) -> Recipe:
    """The demo with some of its tables replaced."""
    return load_recipe("demo").recipe.model_copy(update=changes)


def test_a_recipe_that_only_renames_is_the_same_experiment(tmp_path: Path) -> None:
    file = load_recipe(write(tmp_path, "same.toml", 'extends = "demo"\nname = "same"\n'))
    assert file.recipe == changed(name="same", description="")
    assert file.text.startswith('extends = "demo"')
    assert "# What it extends: demo" in file.text
    assert load_recipe("demo").text in file.text


def test_tables_are_merged_and_all_else_replaces(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", 'extends = "demo"\nname = "base"\nseeds = [1, 2]\n[dataset]\nheld_out_fraction = 0.5\n')
    text = 'extends = "base.toml"\nname = "top"\nwithout = ["evaluation", "dataset.legibility"]\n[dataset]\nseed = 7\n[schedule]\nalign = []\n'
    recipe = load_recipe(write(tmp_path, "top.toml", text)).recipe
    demo = load_recipe("demo").recipe
    assert (recipe.name, recipe.seeds, recipe.dataset.seed, recipe.dataset.held_out_fraction) == ("top", (1, 2), 7, 0.5)
    assert recipe.dataset.sources == demo.dataset.sources
    assert recipe.dataset.legibility != demo.dataset.legibility  # the default's
    assert (recipe.schedule.align, recipe.schedule.sft) == ((), demo.schedule.sft)


def test_another_kind_takes_nothing_from_the_old_one(tmp_path: Path) -> None:
    text = 'extends = "demo"\nname = "sti"\n[connector.global]\nfusion = { kind = "sti", layers = [2], pool = 4 }\nadapters = { kind = "mlp" }\n'
    branch = load_recipe(write(tmp_path, "sti.toml", text)).recipe.connector.global_branch
    assert branch.fusion.model_dump() == {"map_pool": 1, "kind": "sti", "base": None, "layers": (2,), "pool": 4}
    same = 'extends = "demo"\nname = "three"\n[connector.global.fusion]\ngroups = 4\n'
    assert load_recipe(write(tmp_path, "three.toml", same)).recipe.connector.global_branch.fusion.model_dump() == {
        "map_pool": 1,
        "kind": "dci",
        "base": None,
        "groups": 4,
    }


def test_a_name_is_of_one_recipe_alone(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="name: found nothing; this key is required"):
        load_recipe(write(tmp_path, "nameless.toml", 'extends = "demo"'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "dmeo"', "did you mean 'demo'"),
        ("extends = 3", "extends: found 3; allowed: the name of a recipe"),
        ('without = ["views"]', "found without, but nothing that it extends"),
        ('extends = "demo"\nwithout = ["connector.locale"]', r"without: found 'connector\.locale', which .*demo\.toml does not have"),
        ('extends = "demo"\nwithout = "views"', "allowed: a list of keys"),
        ('extends = "itself.toml"', "which extends this one in turn"),
        ('extends = "demo"\nname = "x"\n[dataset]\nsede = 3', r"dataset: found the unknown key 'sede'; did you mean 'seed'"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, "itself.toml", text))


def test_two_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    with pytest.raises(RecipeError, match="extends this one in turn"):
        load_recipe(write(tmp_path, "b.toml", 'extends = "a.toml"'))
