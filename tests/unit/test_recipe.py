"""Recipes: what is shipped is valid, every mistake is named with file, field, what was found and what is allowed, and specs come out as written."""

import re
import tomllib
from dataclasses import fields
from math import ceil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from model.errors import SpecError
from model.specs import BranchMix, EncoderSpec, FeatureSpec, LoraSpec, MapSpec, fingerprint
from pipelines.connector_tables import DCIFusion
from pipelines.errors import RecipeError
from pipelines.recipe import Execution, Recipe, RenderedSource
from pipelines.recipe_fields import Table
from pipelines.recipe_files import _LIST_EXAMPLES, load_recipe, recipe_files
from pipelines.schedule_tables import Schedule, schedule_presets
from workers.execution import ExecutionSettings

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


def parts(annotation: Any) -> list[Any]:
    """An annotation and whatever it is made of."""
    return [annotation, *(part for argument in get_args(annotation) for part in parts(argument))]


def tables() -> list[type[Table]]:
    """Every table that a recipe may hold."""
    found: list[type[Table]] = [Recipe]
    for table in found:
        for field in table.model_fields.values():
            found += [part for part in parts(field.annotation) if isinstance(part, type) and issubclass(part, Table) and part not in found]
    return found


def choices(annotation: Any) -> set[str]:
    """The words that a key's literals allow."""
    return {word for part in parts(annotation) if get_origin(part) is Literal for word in get_args(part)}


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(str(path)).recipe


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_shipped_recipes_are_valid_and_named_as_their_files(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.name == name.replace("/", "-")
    assert recipe.description
    connector = recipe.connector_spec(encoder_spec())
    for seed in recipe.seeds:
        assert recipe.schedule_spec(connector, seed, num_train_images=dict.fromkeys(recipe.source_labels, 100)).phases
    digests = {source.records: "0" * 64 for source in recipe.dataset.sources if source.kind == "llava_json"}
    assert recipe.dataset_spec(encoder_spec(), digests).sources


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
    schedule = recipe.schedule_spec(connector, seed=5, num_train_images={"rendered/charts": 30})
    assert schedule.seed == 5
    assert schedule.align[0].train == ("global_mlp",)
    assert schedule.sft is not None
    assert schedule.sft.train == ("global_mlp", "resampler", "gate", "compression", "language_model")
    assert schedule.sft.steps == 8  # ceil(2 * 30 / 8)
    assert schedule.sft.branch == BranchMix(both=0.5, global_only=0.5)


def test_the_encoder_computes_as_the_recipe_says(tmp_path: Path) -> None:
    encoder = encoder_spec()

    def features(text: str) -> FeatureSpec:
        recipe = load(tmp_path, text)
        return recipe.feature_spec(recipe.dataset_spec(encoder, {}), encoder, recipe.connector_spec(encoder))

    plain, half = features(MINIMAL), features(MINIMAL + '\n[features]\ncompute = "bf16"\n')
    assert (plain.compute, half.compute) == ("fp32", "bf16")
    assert fingerprint(plain) != fingerprint(half)
    with pytest.raises(RecipeError, match=r"features\.compute: found 'tf32'"):
        features(MINIMAL + '\n[features]\ncompute = "tf32"\n')


def test_a_phase_s_template_is_the_language_model_s_unless_it_names_one(tmp_path: Path) -> None:
    connector = load(tmp_path, MINIMAL).connector_spec(encoder_spec())
    model = 'model = "some/language-model"'

    def templates(text: str) -> list[str]:
        recipe = load(tmp_path, text)
        spec = recipe.schedule_spec(connector, seed=0, num_train_images={"rendered/charts": 10})
        assert recipe.templates == {recipe.language_model.template, *(phase.template for phase in spec.phases)}
        return [phase.template for phase in spec.phases]

    assert templates(MINIMAL) == ["own", "own"]
    vicuna = MINIMAL.replace(model, f'{model}\ntemplate = "vicuna_v1"')
    assert templates(vicuna) == ["vicuna_v1", "vicuna_v1"]
    assert templates(vicuna.replace("steps = 3", 'steps = 3\ntemplate = "plain"')) == ["plain", "vicuna_v1"]
    assert templates(vicuna.replace("epochs = 2", 'epochs = 2\ntemplate = "own"')) == ["vicuna_v1", "own"]
    blind = vicuna.replace('branch = "global"', 'branch = "blind"\ntemplate = "plain"').replace('["global_mlp"]', '["language_model"]')
    with pytest.raises(SpecError, match=r"schedule\.align\[0\]: phase 'language_model': template plain leaves out what is asked"):
        templates(blind)


def test_a_dataset_to_be_asked_is_all_held_out(tmp_path: Path) -> None:
    asked = "[evaluation]\nmetrics = ['anls']\n[evaluation.dataset]\nsources = [{ kind = 'rendered', family = 'maps', num_images = 3 }]\nseed = 4\n"
    recipe = load(tmp_path, MINIMAL + asked)
    encoder = encoder_spec()
    spec = recipe.evaluation_dataset_spec(encoder, {})
    assert spec is not None
    assert (spec.held_out_fraction, spec.seed, spec.view_px, spec.views) == (1.0, 4, 112, recipe.view_spec())
    assert [source.family for source in spec.sources] == ["maps"]
    assert recipe.dataset_spec(encoder, {}).held_out_fraction == 0.1
    assert recipe.evaluation.metrics == ("anls",)
    plain = load(tmp_path, MINIMAL)
    assert plain.evaluation_dataset_spec(encoder, {}) is None
    assert plain.evaluation.metrics == ("exact_match",)
    assert plain.dataset_spec(encoder, {}) == recipe.dataset_spec(encoder, {})


def test_equal_groups_include_the_base_layer_for_clip_and_stop_before_it_for_siglip(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    clip = recipe.connector_spec(encoder_spec(num_blocks=24)).global_branch.fusion.maps
    assert clip == (MapSpec(layers=(23,)), MapSpec(layers=tuple(range(12))), MapSpec(layers=tuple(range(12, 24))))
    siglip = recipe.connector_spec(encoder_spec(num_blocks=27, family="siglip")).global_branch.fusion.maps
    assert siglip == (MapSpec(layers=(26,)), MapSpec(layers=tuple(range(13))), MapSpec(layers=tuple(range(13, 26))))


def test_a_recipe_says_nothing_about_execution_but_in_its_own_table() -> None:
    settings = {field.name for field in fields(ExecutionSettings)}
    for table in tables():
        keys = {field.alias or name for name, field in table.model_fields.items()}
        assert keys == settings if table is Execution else not keys & settings


def test_suggested_settings_are_no_identity(tmp_path: Path) -> None:
    plain, suggesting = load(tmp_path, MINIMAL), load(tmp_path, MINIMAL + '[execution]\nzero_stage = 3\ntrain_workers = 8\ndevice = "cuda"\n')
    assert plain.suggested_settings == {}
    assert suggesting.suggested_settings == {"zero_stage": 3, "train_workers": 8, "device": "cuda"}
    encoder = encoder_spec()
    connector = plain.connector_spec(encoder)
    assert suggesting.connector_spec(encoder) == connector
    images = dict.fromkeys(plain.source_labels, 9)
    assert fingerprint(suggesting.schedule_spec(connector, 0, images)) == fingerprint(plain.schedule_spec(connector, 0, images))
    assert fingerprint(suggesting.dataset_spec(encoder, {})) == fingerprint(plain.dataset_spec(encoder, {}))


def test_adapters_come_out_as_written(tmp_path: Path) -> None:
    model = 'model = "some/language-model"'
    assert load(tmp_path, MINIMAL).language_model.lora_spec() is None
    words = 'lora = { rank = 128, alpha = 256, dropout = 0.05, targets = "all-linear" }'
    assert load(tmp_path, MINIMAL.replace(model, f"{model}\n{words}")).language_model.lora_spec() == LoraSpec(rank=128, alpha=256.0, dropout=0.05)
    words = 'lora = { rank = 2, alpha = 2, targets = ["q_proj", "v_proj"] }'
    assert load(tmp_path, MINIMAL.replace(model, f"{model}\n{words}")).language_model.lora_spec() == LoraSpec(
        rank=2, alpha=2.0, targets=("q_proj", "v_proj")
    )


MISTAKES = [
    (
        'name = "tiny"',
        'name = "tiny"\nfeatures.table = "features/x"',
        r'features\.table: found "features/x"; allowed: a table.s folder, such as features/0123456789abcdef',
    ),
    (
        'name = "tiny"',
        'name = "tiny"\nfeatures = { source = "live", table = "features/0123456789abcdef" }',
        r"features: found source = 'live' beside table",
    ),
    ("steps = 3", "stepz = 3", r"schedule\.align\[0\]: found the unknown key 'stepz'; did you mean 'steps'\? allowed here: name, train"),
    ('name = "tiny"', 'name = "tiny"\nlearning_rate = 1', r"top level: found the unknown key 'learning_rate'"),
    ("queries = 4", 'queries = "four"', r'connector\.local\.compression\.queries: found "four"; allowed: a whole number from 1 up'),
    ("queries = 4", "queries = 0", r"connector\.local\.compression\.queries: found 0; allowed: a whole number from 1 up"),
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
    ("learning_rate = 1e-4", "learning_rate = -1.0", r"schedule\.sft\.learning_rate: found -1\.0; allowed: a finite number greater than 0"),
    ('model = "some/folder"', "", r"encoder\.model: found nothing; this key is required"),
    ('name = "tiny"', 'name = "tiny"\nseeds = [1, 1]', r"seeds: found \[1, 1\]; allowed: different numbers"),
    ('name = "tiny"', 'name = "tiny"\nseeds = 0', r"seeds: found 0; allowed: a list, such as \[0, 1\]$"),
    ('name = "tiny"', 'name = "tiny"\nseeds = []', r"seeds: found \[\]; allowed: a list of at least 1, such as \[0, 1\]$"),
    (
        'name = "tiny"',
        'name = "My Demo"',
        r'name: found "My Demo"; allowed: lower-case letters, digits and dashes, beginning with a letter or digit$',
    ),
    ('train = ["global_mlp"]', 'train = "x"', r'schedule\.align\[0\]\.train: found "x"; allowed: a list, such as \["global_mlp"\]$'),
    (
        'train = ["global_mlp"]',
        'train = ["gate", "gate"]',
        r'align\[0\]\.train: found \["gate", "gate"\]; allowed: each block once; connector stands for',
    ),
    (
        '"connector", "language_model"',
        '"connector", "gate"',
        r'sft\.train: found \["connector", "gate"\]; allowed: each block once; connector stands for',
    ),
    (
        "[[schedule.align]]",
        "[schedule.align]",
        r"schedule\.align: found \{.*\}; allowed: any number of tables, each written \[\[schedule\.align\]\]$",
    ),
    ("[schedule.sft]", "[[schedule.sft]]", r"schedule\.sft: found \[.*\]; allowed: a table, written \[schedule\.sft\]$"),
    ("[schedule.sft]", "[[schedule.sft]]\nname = 3\n[[schedule.sft]]", r"schedule\.sft: found \[.*\]; allowed: a table, written \[schedule\.sft\]$"),
    ("{ queries = 4 }", "4", r"connector\.local\.compression: found 4; allowed: a table, written \[connector\.local\.compression\]$"),
    ("[dataset]", "[dataset]\nheld_out_fraction = nan", r"held_out_fraction: found NaN; allowed: a finite number greater than 0 and less than 1$"),
    ("steps = 3", "steps = 3\nevidence_weight = -1.0", r"evidence_weight: found -1\.0; allowed: a finite number from 0 up$"),
    (
        "steps = 3",
        'steps = 3\ntemplate = "vicuna"',
        r"align\[0\]\.template: found 'vicuna'; did you mean 'vicuna_v1'\? allowed: own, vicuna",
    ),
    ('guage-model"', 'guage-model"\ntemplate = 3', r"language_model\.template: found 3; allowed: own, vicuna_v1, llama3, plain, chatml$"),
    ("steps = 3", "steps = true", r"steps: found true; allowed: a whole number from 1 up$"),
    ('model = "some/folder"', 'model = ""', r'encoder\.model: found ""; allowed: text in quotes, of at least 1 character$'),
    (
        'kind = "dci", groups = 2',
        'kind = "dci", groups = "two"',
        r'global\.fusion\.groups: found "two"; allowed: how many groups, from 1 up, or the first',
    ),
    (
        'kind = "dci", groups = 2',
        'kind = "dci", groups = [0, 3]',
        r"recipe [^ ]*: connector\.global\.fusion\.groups: found \[0, 3\]; allowed: how many",
    ),
    ('kind = "dci", groups = 2', 'kind = "sci", layers = [1, "2"]', r'fusion\.layers\[1\]: found "2"; allowed: a layer'),
    ('kind = "dci", groups = 2', 'kind = "sci", layers = 1', r"fusion\.layers: found 1; allowed: a list, such as \[2, 5\]$"),
    *(
        ('model = "some/language-model"', f'model = "some/language-model"\nlora = {{ {lora} }}', rf"language_model\.lora\.{message}")
        for lora, message in (
            ("rank = 0, alpha = 2", "rank: found 0; allowed: a whole number from 1 up$"),
            ("rank = 2, alpha = 0", "alpha: found 0; allowed: a finite number greater than 0$"),
            ("rank = 2", "alpha: found nothing; this key is required$"),
            ("rank = 2, alpha = 2, dropout = 1.0", "dropout: found 1.0; allowed: a finite number from 0 up and less than 1$"),
            ('rank = 2, alpha = 2, targets = "q_proj"', 'targets: found "q_proj"; allowed: "all-linear", or a list of layers, such as '),
            ("rank = 2, alpha = 2, targets = []", r'targets: found \[\]; allowed: "all-linear", or a list of layers'),
        )
    ),
    ("[schedule.sft]", "[execution]\nzero_stage = 4\n[schedule.sft]", r"execution\.zero_stage: found 4; allowed: 0, 1, 2, 3$"),
    ("[schedule.sft]", "[execution]\nzero_stag = 2\n[schedule.sft]", r"execution: found the unknown key 'zero_stag'; did you mean 'zero_stage'\?"),
    ("[schedule.sft]", "[execution]\ntrain_workers = 0\n[schedule.sft]", r"execution: train_workers must be at least 1, found 0$"),
    (
        "[schedule.sft]",
        '[execution]\nmicro_batch_size = "4"\n[schedule.sft]',
        r'micro_batch_size: found "4"; allowed: a whole number from 0',
    ),
    ("[schedule.sft]", "[execution]\ngradient_checkpointing = 1\n[schedule.sft]", r"gradient_checkpointing: found 1; allowed: true or false$"),
    (
        "[dataset]",
        '[evaluation]\nmetrics = ["anls", "anlz"]\n[dataset]',
        r"evaluation\.metrics\[1\]: found 'anlz'; did you mean 'anls'\? allowed: exact",
    ),
    (
        "[dataset]",
        "[evaluation]\nmetrics = []\n[dataset]",
        r'evaluation\.metrics: found \[\]; allowed: a list of at least 1, such as \["exact_match", ',
    ),
    ("[dataset]", "[evaluation.dataset]\nseed = 1\n[dataset]", r"evaluation\.dataset\.sources: found nothing; this key is required"),
    ("[dataset]", "[evaluation]\ndataset = 3\n[dataset]", r"evaluation\.dataset: found 3; allowed: a table, written \[evaluation\.dataset\]$"),
    (
        "[dataset]",
        "[evaluation.dataset]\nheld_out_fraction = 0.5\nsources = [{ kind = 'rendered', family = 'maps', num_images = 3 }]\n[dataset]",
        r"evaluation\.dataset: found the unknown key 'held_out_fraction'; allowed here: sources, seed, turns_per_image, legibility",
    ),
    (
        "[dataset]",
        "[evaluation.dataset]\nsources = [{ kind = 'rendered', family = 'map', num_images = 3 }]\n[dataset]",
        r"evaluation\.dataset\.sources\[0\]\.family: found 'map'; did you mean 'maps'\?",
    ),
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


def test_mistakes_that_are_not_told_are_counted(tmp_path: Path) -> None:
    source = '{ kind = "rendered", family = "charts", num_images = 4 }'
    sources = ", ".join(source.replace("4", "0") for _ in range(11))
    with pytest.raises(RecipeError, match="has 11 mistakes, the first 8:") as caught:
        load(tmp_path, MINIMAL.replace(source, sources))
    assert str(caught.value).count("\n") == 8


@pytest.mark.parametrize("key", ["sources", "layers", "train", "metrics", "modes", "seeds"])
def test_examples_of_lists_are_lists(key: str) -> None:
    assert isinstance(tomllib.loads(f"x = {_LIST_EXAMPLES[key]}")["x"], list)


def test_every_list_has_an_example() -> None:
    lists = {
        field.alias or name
        for table in tables()
        for name, field in table.model_fields.items()
        if any(get_origin(part) is tuple for part in parts(field.annotation))
        and name not in ("align", "pool", "groups", "targets")  # which may be numbers or a word
    }
    assert lists == set(_LIST_EXAMPLES)


def test_broken_toml_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no valid TOML: .*line 2"):
        load(tmp_path, "\nname = tiny\n")


def test_unknown_recipes_are_named_with_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"no recipe named 'dmeo'; did you mean 'demo'\?"):
        load_recipe("dmeo")
    with pytest.raises(RecipeError, match=r"no file nowhere/x\.toml"):
        load_recipe("nowhere/x.toml")


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text(MINIMAL)
    assert load_recipe("~/mine.toml").path == tmp_path / "mine.toml"
    with pytest.raises(RecipeError, match="found no file ~nobody-at-all/x"):
        load_recipe("~nobody-at-all/x.toml")


def test_a_folder_is_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found the folder .*, but a recipe is a TOML file; give the path of a TOML file, or one of: demo"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'train = ["global_mlp"]': 'train = ["compression"]'}, r"schedule\.align\[0\]: phase 'compression': branch .* leaves compression of train"),
        ({"steps = 3": "steps = 3\nevidence_weight = 1.0"}, r"schedule\.align\[0\]: .* found evidence_weight 1, but branch shows no local views"),
        ({"steps = 3": "steps = 3\nlanguage_model_learning_rate = 1e-3"}, r"schedule\.align\[0\]: .* found language_model_learning_rate 0\.001"),
        ({"{ both = 0.5, global = 0.5 }": '"local"'}, r"schedule\.sft: phase 'sft': branch .* leaves resampler, gate of train without effect"),
        (
            {"compression = {": 'projector = "own"\ncompression = {', 'branch = "global"': "branch = { local = 0.5, blind = 0.5 }"},
            r"schedule\.align\[0\]: branch leaves global_mlp of train without effect: .* a projector of their own",
        ),
    ],
)
def test_phases_that_would_train_nothing_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    text = MINIMAL
    for right, wrong in changes.items():
        assert right in text
        text = text.replace(right, wrong, 1)
    recipe = load(tmp_path, text)
    with pytest.raises(SpecError, match=message):
        recipe.schedule_spec(recipe.connector_spec(encoder_spec()), 0, {"rendered/charts": 10})


def test_a_shared_projector_trains_on_local_views_alone(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL.replace('branch = "global"', 'branch = "local"'))
    assert recipe.schedule_spec(recipe.connector_spec(encoder_spec()), 0, {"rendered/charts": 10}).align[0].train == ("global_mlp",)


def test_the_readme_names_every_key_and_setting() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    section = text.partition("## Recipe keys and settings\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"[a-z0-9_-]+", " ".join(re.findall(r"`([^`\n]+)`", section))))
    keys = {field.alias or name for table in tables() for name, field in table.model_fields.items()}
    assert keys - named == set()
    assert {field.name for field in fields(ExecutionSettings)} - named == set()
    words = {word for table in tables() for field in table.model_fields.values() for word in choices(field.annotation) if isinstance(word, str)}
    assert words - named == set()


def test_blocks_and_branches_that_the_connector_lacks_are_refused(tmp_path: Path) -> None:
    no_gate = load(tmp_path, MINIMAL.replace('"gated_mixture"', '"mlp"').replace('train = ["global_mlp"]', 'train = ["resampler"]'))
    with pytest.raises(SpecError, match=r"schedule\.align\[0\]: train names resampler, which this connector does not have"):
        no_gate.schedule_spec(no_gate.connector_spec(encoder_spec()), 0, {"rendered/charts": 10})
    local = MINIMAL.index("[connector.local]")
    no_local = load(tmp_path, MINIMAL[:local] + MINIMAL[MINIMAL.index("[language_model]") :])
    with pytest.raises(SpecError, match=r"schedule\.sft: branch uses local views, but the recipe has no \[connector\.local\]"):
        no_local.schedule_spec(no_local.connector_spec(encoder_spec()), 0, {"rendered/charts": 10})


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
    from workers.dataset.rendering import FAMILIES

    assert get_args(RenderedSource.model_fields["family"].annotation) == FAMILIES


SLIME = '[schedule]\npreset = "slime"\n'


def with_schedule(text: str) -> str:
    """The minimal recipe with another schedule."""
    return MINIMAL[: MINIMAL.index("[[schedule.align]]")] + text


@pytest.mark.parametrize("name", sorted(schedule_presets()))
def test_every_preset_is_a_schedule(tmp_path: Path, name: str) -> None:
    text = with_schedule(f'[schedule]\npreset = "{name}"\n')
    if name == "dense_connector":
        text = text[: text.index("[connector.local]")] + text[text.index("[language_model]") :]
        text = text.replace("gated_mixture", "mlp")
    recipe = load(tmp_path, text)
    spec = recipe.schedule_spec(recipe.connector_spec(encoder_spec()), 0, {"rendered/charts": 512})
    assert spec.sft is not None
    assert "language_model" in spec.sft.train


def test_every_preset_can_be_named() -> None:
    assert choices(Schedule.model_fields["preset"].annotation) == set(schedule_presets())


def test_the_authors_four_runs(tmp_path: Path) -> None:
    """methods.md B7: what trains, at which rate and batch size, for how long, and what the selector does."""
    changes = '[schedule.change.I-a]\nsources = ["charts"]\n[schedule.change.III]\nlearning_rate = 1e-5\nsteps = 7\n'
    text = with_schedule(SLIME + changes).replace("queries = 4 }", 'queries = 4 }\nselector = { kind = "text_guided" }')
    text = text.replace("num_images = 4 }]", 'num_images = 4 }, { kind = "rendered", family = "maps", num_images = 4 }]')
    recipe = load(tmp_path, text)
    schedule = recipe.schedule_spec(recipe.connector_spec(encoder_spec()), 3, {"rendered/charts": 512, "rendered/maps": 2048})
    found = [(p.name, p.train, p.batch_size, p.steps, p.learning_rate, p.experts, p.selector, p.sources) for p in schedule.phases]
    everything = ("global_mlp", "resampler", "gate", "compression", "language_model")
    assert found == [
        ("I-a", ("global_mlp",), 256, 2, 1e-3, "mlp", False, ("rendered/charts",)),
        ("I-b", ("resampler",), 256, 10, 1e-3, "resampler", False, ()),
        ("II", ("compression",), 256, 10, 1e-3, "mixture", False, ()),
        ("III", everything, 128, 7, 1e-5, "mixture", True, ()),
    ]
    assert [(p.branch.global_only, p.branch.local_only, p.branch.both) for p in schedule.phases] == [(1, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert {p.warmup_fraction for p in schedule.phases} == {0.03}


def test_repeats_alternate(tmp_path: Path) -> None:
    recipe = load(tmp_path, with_schedule('[schedule]\npreset = "alternating"\nrepeats = 3\n'))
    schedule = recipe.schedule_spec(recipe.connector_spec(encoder_spec()), 0, {"rendered/charts": 512})
    assert [phase.name for phase in schedule.phases] == ["global", "local", "global 2", "local 2", "global 3", "local 3", "sft"]
    assert [phase.train for phase in schedule.align] == [("global_mlp", "resampler", "gate"), ("compression",)] * 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ('[schedule]\npreset = "slim"', r"schedule: preset: found 'slim'; did you mean 'slime'\? allowed: alternating, dense_connector, slime"),
        (
            SLIME + "[schedule.change.III-a]\nsteps = 3",
            r"schedule: change: found 'III-a'; did you mean 'III'\? phases of preset 'slime': I-a, I-b, II, III",
        ),
        (SLIME + "[schedule.sft]\nsteps = 3", r"schedule: found sft beside preset = 'slime'"),
        ("[schedule.change.III]\nsteps = 3", r"schedule: found change without preset"),
        (
            SLIME + '[schedule.change.III]\nlearning_rate = "fast"',
            r"schedule\.change\.III\.learning_rate: found \"fast\"; allowed: a finite number greater than 0",
        ),
        (
            SLIME + "[schedule.change.III]\nlerning_rate = 1.0",
            r"schedule\.change\.III: found the unknown key 'lerning_rate'; did you mean 'learning_rate'",
        ),
    ],
)
def test_presets_that_cannot_be(tmp_path: Path, schedule: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, with_schedule(schedule))


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ('rule = "slime"\nmax_side = 3', "found max_side, which rule = 'slime' does not have; allowed: max_slices, or rule = 'slime_paper'"),
        ('rule = "anyres"\ngrids = [[0, 1]]', r"views\.grids: found .*; allowed: grids of \[columns, rows\] of 1 to 12"),
        ('rule = "anyres"\ngrids = [[1, 2], [1, 2]]', r"each once; found \[\[1, 2\], \[1, 2\]\]"),
    ],
)
def test_views_that_cannot_be(tmp_path: Path, views: str, message: str) -> None:
    with pytest.raises((RecipeError, SpecError), match=message):
        load(tmp_path, MINIMAL + f"\n[views]\n{views}\n").view_spec()


def test_groups_that_do_not_divide_are_refused_with_what_would(tmp_path: Path) -> None:
    encoder = encoder_spec()
    with pytest.raises(
        SpecError, match=r"found 3, but .* has the 8 layers 0\.\.7 .* allowed: one of \[1, 2, 4, 8\], .* such as \[\[0, 2\], \[3, 4\], \[5, 7\]\]"
    ):
        DCIFusion(kind="dci", groups=3).spec(encoder)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ('{ kind = "sci", layers = [2, 2] }', r"found \[2, 2\] beside the base layer 7, in which a layer stands twice; allowed: each layer once"),
        ('{ kind = "sci", base = 5, layers = [2, 5] }', r"found \[2, 5\] beside the base layer 5"),
        ('{ kind = "sti", layers = [3, 1, 3] }', r"found \[3, 1, 3\] beside the base layer 7"),
        (
            '{ kind = "dci", groups = [[0, 3], [0, 3]] }',
            r"found \[\[0, 3\], \[0, 3\]\] beside the base layer 7, in which the same layers stand twice",
        ),
        ('{ kind = "dci", groups = [[0, 3], [7, 7]] }', r"found \[\[0, 3\], \[7, 7\]\] beside the base layer 7"),
    ],
)
def test_a_layer_twice_is_refused_and_its_place_told_once(tmp_path: Path, fusion: str, message: str) -> None:
    mlp = MINIMAL.replace('kind = "gated_mixture"', 'kind = "mlp"')
    recipe = load(tmp_path, mlp.replace('{ kind = "dci", groups = 2 }', fusion, 1))
    with pytest.raises(SpecError, match=rf"^connector\.global: fusion\.\w+: {message}"):
        recipe.connector_spec(encoder_spec())


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        (
            '{ kind = "dci", groups = 2, map_pool = 3 }',
            r"^connector\.local\.fusion\.map_pool: found squares of 3 x 3 patches, which do not tile the 8 x 8 of .*; allowed: one of \[1, 2, 4, 8\]",
        ),
        ('{ kind = "dci", groups = 2, map_pool = 0 }', r"connector\.local\.fusion\.map_pool: found 0; allowed: "),
    ],
)
def test_pools_that_do_not_tile_are_refused(tmp_path: Path, fusion: str, message: str) -> None:
    text = MINIMAL.replace('{ kind = "dci", groups = 2 }\ncompression', f"{fusion}\ncompression")
    with pytest.raises((SpecError, RecipeError), match=message):
        load(tmp_path, text).connector_spec(encoder_spec())


def test_a_pool_makes_local_views_cheaper(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL.replace('{ kind = "dci", groups = 2 }\ncompression', '{ kind = "dci", groups = 2, map_pool = 2 }\ncompression'))
    connector = recipe.connector_spec(encoder_spec())
    encoder = encoder_spec()
    features = recipe.feature_spec(recipe.dataset_spec(encoder, {}), encoder, connector)
    assert [item.name for item in features.local_maps] == [f"{item.name}_pool_2" for item in features.global_maps]
    assert features.view_bytes("local") * 4 == features.view_bytes("global")


def test_groups_may_overlap_and_leave_layers_out(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL.replace("groups = 2", "groups = [[0, 4], [3, 6]]"))
    assert recipe.connector_spec(encoder_spec()).global_branch.fusion.maps[1:] == (MapSpec(layers=(0, 1, 2, 3, 4)), MapSpec(layers=(3, 4, 5, 6)))


def test_a_place_that_the_mistake_names_itself_is_told_once(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL.replace("compression = {", "newline = true\ncompression = {"))
    with pytest.raises(SpecError, match=r"^connector\.local\.newline ends the lines"):
        recipe.connector_spec(encoder_spec())
    recipe = load(tmp_path, with_schedule(SLIME + '[schedule.change.I-b]\nbranch = "local"'))
    with pytest.raises(SpecError, match=r"^schedule\.preset 'slime', phase 'I-b': branch \(found .*\) leaves resampler of train without effect"):
        recipe.schedule_spec(recipe.connector_spec(encoder_spec()), 0, {"rendered/charts": 512})


def test_sources_of_a_phase_must_be_the_dataset_s(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    phase = recipe.schedule.phases[0].model_copy(update={"sources": ("map",)})
    with pytest.raises(SpecError, match="found 'map', which names 0 of the dataset's sources; allowed: rendered/charts"):
        phase.source_labels(recipe.source_labels)


def test_epochs_count_what_a_phase_sees(tmp_path: Path) -> None:
    """Samples without an image count where the language model is trained, and nowhere else; in `plain` not even there."""
    connector = load(tmp_path, MINIMAL).connector_spec(encoder_spec())
    text = MINIMAL.replace("steps = 3", "epochs = 2")
    counts = {"num_train_images": {"rendered/charts": 30}, "num_train_text_only": {"rendered/charts": 21}}

    def steps(text: str, **counts: dict[str, int]) -> list[int]:
        return [phase.steps for phase in load(tmp_path, text).schedule_spec(connector, 0, **counts).phases]

    sizes = [phase.batch_size for phase in load(tmp_path, text).schedule.phases]
    assert steps(text, **counts) == [ceil(2 * 30 / sizes[0]), ceil(2 * 51 / sizes[1])]
    assert steps(text, num_train_images=counts["num_train_images"]) == [ceil(2 * 30 / size) for size in sizes]
    captions = text.replace('model = "some/language-model"', 'model = "some/language-model"\ntemplate = "plain"')
    assert steps(captions, **counts) == [ceil(2 * 30 / size) for size in sizes]
    with pytest.raises(SpecError, match=r"schedule\.align\[0\]: the phase sees sources with no training image; give it others"):
        steps(text, num_train_images={"rendered/charts": 0}, num_train_text_only={"rendered/charts": 21})
