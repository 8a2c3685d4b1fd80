"""Recipes: what is shipped is valid, every mistake is named with file, field, what was found and what is allowed, and specs come out as written."""

from pathlib import Path
from typing import Any

import pytest

from model.errors import SpecError
from model.specs import BranchMix, EncoderSpec, MapSpec, fingerprint
from pipelines.errors import RecipeError
from pipelines.recipe import Recipe, load_recipe, recipe_files

MINIMAL = """
name = "tiny"

[dataset]
sources = [{ kind = "rendered", family = "charts", num_images = 4 }]

[encoder]
model = "some/folder"

[connector.global]
fusion = { kind = "dci", groups = 2 }
adapters = { kind = "gated_mixture" }

[connector.local]
fusion = { kind = "dci", groups = 2 }
compression = { queries = 4 }

[language_model]
model = "some/language-model"

[[schedule.align]]
train = ["global_mlp"]
branch = "global"
steps = 3
learning_rate = 1e-3

[schedule.sft]
train = ["connector", "language_model"]
branch = { both = 0.5, global = 0.5 }
epochs = 2
batch_size = 8
learning_rate = 1e-4
"""


def encoder_spec(**changes: Any) -> EncoderSpec:
    values = {
        "model": "some/folder",
        "weights_sha256": "0" * 64,
        "family": "clip",
        "view_px": 112,
        "patch_px": 14,
        "width": 192,
        "num_blocks": 8,
        "prefix_tokens": 1,
        "num_heads": 2,
        "mlp_width": 64,
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return EncoderSpec(**(values | changes))


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(str(path)).recipe


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_shipped_recipes_are_valid_and_named_as_their_files(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.name == name
    assert recipe.description
    connector = recipe.connector_spec(encoder_spec())
    for seed in recipe.seeds:
        assert recipe.schedule_spec(connector, seed, num_train_samples=100).phases
    assert recipe.dataset_spec(encoder_spec(), {}).sources


def test_the_recipes_that_the_documents_name_exist() -> None:
    assert {"demo", "detail-study", "demo-smollm2"} <= set(recipe_files())


def test_specs_come_out_as_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    encoder = encoder_spec()
    connector = recipe.connector_spec(encoder)
    assert [m.name for m in connector.global_branch.fusion.maps] == ["layer_7", "mean_0_3", "mean_4_7"]
    dataset = recipe.dataset_spec(encoder, {})
    assert dataset.view_px == 112
    features = recipe.feature_spec(dataset, encoder, connector)
    assert features.dataset_fingerprint == fingerprint(dataset)
    assert features.global_maps == features.local_maps == connector.global_branch.fusion.maps
    schedule = recipe.schedule_spec(connector, seed=5, num_train_samples=30)
    assert schedule.seed == 5
    assert schedule.align[0].train == ("global_mlp",)
    assert schedule.sft is not None
    assert schedule.sft.train == ("global_mlp", "resampler", "gate", "compression", "language_model")
    assert schedule.sft.steps == 8  # ceil(2 * 30 / 8)
    assert schedule.sft.branch == BranchMix(both=0.5, global_only=0.5)


def test_equal_groups_include_the_base_layer_for_clip_and_stop_before_it_for_siglip(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    clip = recipe.connector_spec(encoder_spec(num_blocks=24)).global_branch.fusion.maps
    assert clip == (MapSpec(layers=(23,)), MapSpec(layers=tuple(range(12))), MapSpec(layers=tuple(range(12, 24))))
    siglip = recipe.connector_spec(encoder_spec(num_blocks=27, family="siglip")).global_branch.fusion.maps
    assert siglip == (MapSpec(layers=(26,)), MapSpec(layers=tuple(range(13))), MapSpec(layers=tuple(range(13, 26))))


def test_a_recipe_says_nothing_about_execution() -> None:
    from dataclasses import fields

    from workers.execution import ExecutionSettings

    def keys(model: Any) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    assert not keys(Recipe) & {field.name for field in fields(ExecutionSettings)}


MISTAKES = [
    ("steps = 3", "stepz = 3", r"schedule\.align\[0\]: found the unknown key 'stepz'; did you mean 'steps'\? allowed here: name, train"),
    ('name = "tiny"', 'name = "tiny"\nlearning_rate = 1', r"top level: found the unknown key 'learning_rate'"),
    ("queries = 4", 'queries = "four"', r'connector\.local\.compression\.queries: found "four"; allowed: a valid integer'),
    ("queries = 4", "queries = 0", r"connector\.local\.compression\.queries: found 0; allowed: greater than or equal to 1"),
    (
        'kind = "dci", groups = 2 }\nadapters',
        'kind = "dcj", groups = 2 }\nadapters',
        r"connector\.global\.fusion\.kind: found 'dcj'; did you mean 'dci'\?",
    ),
    (
        'kind = "dci", groups = 2 }\nadapters',
        "groups = 2 }\nadapters",
        r"connector\.global\.fusion: found no 'kind'; allowed kinds: single, sti, sci, dci",
    ),
    (
        'kind = "gated_mixture"',
        'kind = "gated_mixture", nois = true',
        r"connector\.global\.adapters: found the unknown key 'nois'; did you mean 'noise'",
    ),
    ('train = ["global_mlp"]', 'train = ["global_mpl"]', r"schedule\.align\[0\]\.train\[0\]: found 'global_mpl'; did you mean 'global_mlp'\?"),
    ('branch = "global"', 'branch = "globl"', r"schedule\.align\[0\]\.branch: found .globl."),
    ("epochs = 2", "epochs = 2\nsteps = 3", r"schedule\.sft: found both of steps and epochs; allowed: exactly one"),
    ("learning_rate = 1e-4", "learning_rate = -1.0", r"schedule\.sft\.learning_rate: found -1\.0; allowed: greater than 0"),
    ('model = "some/folder"', "", r"encoder\.model: found nothing; this key is required"),
    ('name = "tiny"', 'name = "tiny"\nseeds = [1, 1]', r"seeds: found \[1, 1\]; allowed: different numbers"),
    ('family = "charts"', 'family = "chart"', r"dataset\.sources\[0\]\.family: found 'chart'; did you mean 'charts'\?"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISTAKES, ids=[message[:40] for _, _, message in MISTAKES])
def test_mistakes_are_named(tmp_path: Path, right: str, wrong: str, message: str) -> None:
    assert right in MINIMAL
    with pytest.raises(RecipeError, match=message) as caught:
        load(tmp_path, MINIMAL.replace(right, wrong, 1))
    assert str(tmp_path / "recipe.toml") in str(caught.value)


def test_several_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has 2 mistakes") as caught:
        load(tmp_path, MINIMAL.replace("queries = 4", "queries = 0").replace("learning_rate = 1e-4", "learning_rate = 0.0"))
    assert str(caught.value).count("\n") == 2


def test_broken_toml_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no valid TOML: .*line 2"):
        load(tmp_path, "\nname = tiny\n")


def test_unknown_recipes_are_named_with_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"no recipe named 'dmeo'; did you mean 'demo'\?"):
        load_recipe("dmeo")
    with pytest.raises(RecipeError, match=r"no file nowhere/x\.toml"):
        load_recipe("nowhere/x.toml")


def test_blocks_and_branches_that_the_connector_lacks_are_refused(tmp_path: Path) -> None:
    no_gate = load(tmp_path, MINIMAL.replace('"gated_mixture"', '"mlp"').replace('train = ["global_mlp"]', 'train = ["resampler"]'))
    with pytest.raises(SpecError, match=r"schedule\.align\[0\]: train names resampler, which this connector does not have"):
        no_gate.schedule_spec(no_gate.connector_spec(encoder_spec()), 0, 10)
    local = MINIMAL.index("[connector.local]")
    no_local = load(tmp_path, MINIMAL[:local] + MINIMAL[MINIMAL.index("[language_model]") :])
    with pytest.raises(SpecError, match=r"schedule\.sft: branch uses local views, but the recipe has no \[connector\.local\]"):
        no_local.schedule_spec(no_local.connector_spec(encoder_spec()), 0, 10)


def test_layers_beyond_the_encoder_are_refused(tmp_path: Path) -> None:
    text = MINIMAL.replace('kind = "dci", groups = 2', 'kind = "single", layer = 9')
    recipe = load(tmp_path, text)
    encoder = encoder_spec()
    with pytest.raises(SpecError, match=r"needs layer 9, but some/folder has layers 0\.\.8"):
        recipe.feature_spec(recipe.dataset_spec(encoder, {}), encoder, recipe.connector_spec(encoder))


def test_epochs_need_a_built_dataset(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert recipe.uses_epochs
    with pytest.raises(SpecError, match=r"schedule\.sft: the length is in epochs"):
        recipe.schedule_spec(recipe.connector_spec(encoder_spec()), 0)


def test_the_families_are_those_that_can_be_rendered() -> None:
    from typing import get_args

    from pipelines.recipe import RenderedSource
    from workers.dataset.rendering import FAMILIES

    assert get_args(RenderedSource.model_fields["family"].annotation) == FAMILIES
