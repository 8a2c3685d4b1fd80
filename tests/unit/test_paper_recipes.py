"""The recipes at real scale are those of the two papers, and can be planned with neither weights nor data here."""

from pathlib import Path

import pytest

from model.specs import DCISpec, GatedMixtureSpec, SingleSpec, TextGuidedSelectorSpec
from pipelines.cli import main
from pipelines.recipe_files import load_recipe
from pipelines.settings import execution_settings
from pipelines.stages import Experiment, open_experiment
from workers.storage import Store

DENSE = ("dense-connector-7b", "dense-connector-13b", "dense-connector-siglip-7b", "dense-connector-8b")
SLIME = ("slime-7b", "slime-13b", "slime-8b", "slime-8b-lora")
CAPTIONS, INSTRUCTIONS = "llava_json/blip_laion_cc_sbu_558k", "llava_json/llava_v1_5_mix665k"
MIX, SMR = "llava_json/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k", "llava_json/SMR"


def planned(name: str, tmp_path: Path) -> Experiment:
    file = load_recipe(name)
    return open_experiment(file, Store(str(tmp_path)), execution_settings({}, file.recipe), planning=True)


def phases(experiment: Experiment, num_images: int = 256_000) -> tuple:
    recipe = experiment.file.recipe
    return recipe.schedule_spec(experiment.connector, 0, dict.fromkeys(recipe.source_labels, num_images)).phases


@pytest.mark.parametrize("name", [*DENSE, *SLIME, "dense-slime-8b"])
def test_every_one_can_be_planned_with_nothing_here(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", name, "--dry-run", "--root", str(tmp_path / "root")])
    told = capsys.readouterr().out
    assert "weights of" in told
    assert "Nothing was started" in told
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("name", "maps", "projector", "language_model", "template"),
    [
        ("dense-connector-7b", ["layer_23", "mean_0_11", "mean_12_23"], 3072, "lmsys/vicuna-7b-v1.5", "vicuna_v1"),
        ("dense-connector-13b", ["layer_23", "mean_0_11", "mean_12_23"], 3072, "lmsys/vicuna-13b-v1.5", "vicuna_v1"),
        ("dense-connector-siglip-7b", ["layer_26", "mean_0_12", "mean_13_25"], 3456, "lmsys/vicuna-7b-v1.5", "vicuna_v1"),
        ("dense-connector-8b", ["layer_26", "mean_0_12", "mean_13_25"], 3456, "meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
    ],
)
def test_dense_connector(name: str, maps: list[str], projector: int, language_model: str, template: str, tmp_path: Path) -> None:
    """methods.md A3 and A7: DCI over the padded picture, two stages of one epoch, 256 at 1e-3 and 128 at 2e-5."""
    experiment = planned(name, tmp_path)
    fusion = experiment.connector.global_branch.fusion
    assert [item.name for item in fusion.maps] == maps
    assert experiment.encoder.width * fusion.num_wide == projector
    assert experiment.connector.blocks == ("global_mlp",)
    assert experiment.features.views.global_fit == "pad"
    assert experiment.features.local_maps == ()
    assert experiment.language_model.model == language_model
    pretrain, finetune = phases(experiment)
    assert (pretrain.train, pretrain.batch_size, pretrain.learning_rate, pretrain.template, pretrain.sources) == (
        ("global_mlp",), 256, 1e-3, "plain", (CAPTIONS,),
    )  # fmt: skip
    assert (finetune.train, finetune.batch_size, finetune.learning_rate, finetune.template, finetune.sources) == (
        ("global_mlp", "language_model"), 128, 2e-5, template, (INSTRUCTIONS,),
    )  # fmt: skip
    assert (pretrain.steps, finetune.steps) == (1000, 2000)
    assert {phase.warmup_fraction for phase in (pretrain, finetune)} == {0.03}
    assert shared_out(experiment) == (3, 8, 16, True)
    assert starts_as_theirs(experiment)


def shared_out(experiment: Experiment) -> tuple[int, int, int | None, bool]:
    execution = experiment.execution
    return execution.zero_stage, execution.train_workers, execution.micro_batch_size, execution.gradient_checkpointing


def starts_as_theirs(experiment: Experiment) -> bool:
    """Features as they are into projectors as torch makes them, as in both papers' code."""
    return (experiment.connector.standardise_inputs, experiment.connector.start) == (False, "authors")


@pytest.mark.parametrize(
    ("name", "align", "fine", "language_model_rate"),
    [("slime-7b", 1e-3, 2e-5, None), ("slime-13b", 1e-3, 2e-5, None), ("slime-8b", 5e-4, 1e-5, None), ("slime-8b-lora", 5e-4, 2e-5, 1e-4)],
)
def test_slime(name: str, align: float, fine: float, language_model_rate: float | None, tmp_path: Path) -> None:
    """methods.md B2 to B7: the authors' code, less its leak."""
    experiment = planned(name, tmp_path)
    branch, local = experiment.connector.global_branch, experiment.connector.local_branch
    assert local is not None
    assert (branch.fusion, branch.adapters) == (SingleSpec(layer=23), GatedMixtureSpec(attention_init="authors", noise="authors"))
    assert (local.fusion, local.merge, local.projector) == (SingleSpec(layer=23), "spatial", "shared")
    assert local.compression is not None
    assert local.compression.queries == 144
    assert local.selector == TextGuidedSelectorSpec(top_p=0.95, temperature=1.0, reduce="sum", noise=0.1)
    assert (experiment.connector.separator, experiment.features.views.max_slices, experiment.features.views.global_fit) == (",", 6, "squash")
    assert experiment.most_local_tokens() + 577 == 1585
    runs = phases(experiment)
    assert [(p.name, p.train, p.experts, p.batch_size, p.learning_rate, p.template, p.sources, p.selector) for p in runs[:3]] == [
        ("I-a", ("global_mlp",), "mlp", 256, align, "plain", (CAPTIONS,), False),
        ("I-b", ("resampler",), "resampler", 256, align, "plain", (CAPTIONS,), False),
        ("II", ("compression",), "mixture", 256, align, "plain", (CAPTIONS,), False),
    ]
    last = runs[3]
    assert (last.name, last.batch_size, last.learning_rate, last.language_model_learning_rate) == ("III", 128, fine, language_model_rate)
    assert last.train == ("global_mlp", "resampler", "gate", "compression", "language_model")
    assert (last.sources, last.selector, last.steps) == ((SMR, MIX), True, 4000)
    assert shared_out(experiment) == (3, 8, 16 if name in ("slime-7b", "slime-13b") else 8, True)
    assert experiment.file.recipe.seeds == (3407,)
    assert starts_as_theirs(experiment)
    lora = experiment.file.recipe.language_model.lora
    assert (lora is not None) == (name == "slime-8b-lora")
    if lora is not None:
        assert (lora.rank, lora.alpha, lora.dropout) == (128, 256, 0.05)


def test_the_flagship_has_dense_maps_in_both_branches(tmp_path: Path) -> None:
    experiment = planned("dense-slime-8b", tmp_path)
    local = experiment.connector.local_branch
    assert local is not None
    assert local.fusion == experiment.connector.global_branch.fusion == DCISpec(base=23, groups=((0, 11), (12, 23)))
    assert local.selector is not None
    assert shared_out(experiment) == (3, 8, 8, True)
    assert starts_as_theirs(experiment)
    assert [phase.name for phase in phases(experiment)] == ["global", "local", "global 2", "local 2", "sft"]
