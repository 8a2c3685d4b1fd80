"""Plans without weights and without data: complete as far as shapes go, plain about what is missing, and good for nothing but being read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model.architectures import known_encoder, known_encoders
from model.errors import CanonicalisationError
from model.specs import DCISpec, SingleSpec, fingerprint
from pipelines import cli
from pipelines.connector_tables import DCIFusion, SingleFusion
from pipelines.errors import RecipeError
from pipelines.plan import plan_lines
from pipelines.recipe_files import load_recipe
from pipelines.stages import Experiment, open_experiment, run_stage, stage_runs
from tests.tiny import tiny_recipe
from workers.execution import ExecutionSettings, SilentProgress
from workers.storage import Store

CLIP_L, VICUNA = "openai/clip-vit-large-patch14-336", "lmsys/vicuna-13b-v1.5"


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache, a hub that may be asked, and a network that must not be."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("httpx.Client.send", lambda *_, **__: pytest.fail("asked the network"))


def opened(tmp_path: Path, text: str, *, planning: bool = True) -> Experiment:
    (tmp_path / "recipe.toml").write_text(text)
    return open_experiment(load_recipe(str(tmp_path / "recipe.toml")), Store(str(tmp_path / "root")), ExecutionSettings(), planning=planning)


def slime_recipe(encoder: str = CLIP_L, language_model: str = VICUNA) -> str:
    return tiny_recipe(Path(encoder), Path(language_model)).replace("queries = 4", "queries = 144")


def facts(experiment: Experiment) -> dict[tuple[str, str], str]:
    return {(line.topic, line.fact): line.value for line in plan_lines(experiment)}


def with_records(text: str, records: str, images: str, more: str = "") -> str:
    start = text.index("sources = [")
    return (
        text[:start] + f"sources = [{{ kind = 'llava_json', records = '{records}', images = '{images}'{more} }}]" + text[text.index("]", start) + 1 :]
    )


def test_known_models_are_planned_whole_without_any_file(tmp_path: Path) -> None:
    experiment = opened(tmp_path, slime_recipe())
    found = facts(experiment)
    assert found["path", "a view"] == "336 x 336 px: 24 x 24 patches of 14 px"
    assert found["path", "hidden states"] == "[577, 1024] each; 23 of 24 blocks run"
    assert found["path", "global maps"] == "3 x [576, 1024]: layer_23, mean_0_11, mean_12_23"
    assert found["path", "global fused"] == "[576, 3072] by dci"
    assert found["path", "global tokens"] == "[576, 5120] behind gated_mixture"
    assert found["path", "local compressed"] == "[144, 3072] of each view"
    assert found["path", "local tokens"] == "[144, 5120] of each view, shared projector"
    assert found["path", "sequence"] == "576 global + 1 separator + 576 local = 1153 visual tokens of 4096; 2943 left for text"
    assert found["parameters", "global_mlp"] == f"{3072 * 5120 + 5120 + 5120 * 5120 + 5120:,}"
    assert found["parameters", "language model"] == "13,015,864,320"
    assert found["parameters", "encoder"] == "290,909,184 held, none trained"
    # 16 drawn images of 672 x 448 px x 5 views x 3 maps x 576 patches x 1024 channels x 2 bytes
    assert found["features", "cache"] == "283 MB as fp16; 17.7 MB an image"
    assert found["training", "global_mlp"] == "3 steps of 4, 12 images seen; global_mlp at 0.001; sees global"
    assert [fact for topic, fact in found if topic == "missing"] == [f"weights of {CLIP_L}", f"weights of {VICUNA}", f"tokenizer of {VICUNA}"]
    stages = {fact: value for (topic, fact), value in found.items() if topic == "stages"}
    assert stages.pop("build-dataset") == f"{fingerprint(experiment.dataset)[:16]}  to do"  # pictures and views need no weights
    assert set(stages.values()) == {f"key unknown without the weights of {CLIP_L}"}
    assert list(stages) == [
        "cache-features",
        *(f"{stage} seed {seed}" for stage in ("train-connector", "evaluate") for seed in (0, 1)),
        "export",
        "report",
    ]
    assert experiment.store.list() == []


def test_images_of_typical_sizes_have_the_papers_visual_tokens(tmp_path: Path) -> None:
    """SliME's own figures for 336 px views: the grid, and 576 global tokens, a separator and 144 tokens of each slice."""
    found = facts(opened(tmp_path, slime_recipe()))
    for size, grid, local, total in (
        ("336 x 336 px", "1 x 2", 288, 865),
        ("640 x 480 px", "2 x 2", 576, 1153),
        ("1024 x 768 px", "3 x 2", 864, 1441),
        ("1920 x 1080 px", "3 x 2", 864, 1441),
        ("3000 x 300 px", "7 x 1", 1008, 1585),
    ):
        expected = f"{grid} local views; 576 global + 1 separator + {local} local = {total} visual tokens of 4096; {4096 - total} left for text"
        assert found["image", size] == expected


def test_merges_selectors_limits_and_sources_are_planned_as_they_compute(tmp_path: Path) -> None:
    """AnyRes with newlines: the counts are those of the connector's own order of tokens."""
    before, after = slime_recipe().split("[connector.local]\n")
    after = after.replace(
        "compression = { queries = 144 }", 'merge = "spatial_unpad"\nnewline = true\noutput_grid = 12\nselector = { kind = "learnable", top_p = 0.9 }'
    )
    text = f"{before}[connector.local]\n{after}".replace(f'model = "{VICUNA}"', f'model = "{VICUNA}"\nmax_tokens = 2048')
    text = text.replace("steps = 3\nbatch_size = 4", 'epochs = 2\nsources = ["rendered/charts"]\nbatch_size = 4', 1)
    found = facts(opened(tmp_path, text))
    assert found["path", "local tokens"] == "[144, 5120] of each view, shared projector, resized to 12 x 12"
    assert found["path", "local merge"] == "spatial_unpad, a newline behind every line"
    assert found["path", "local selector"] == "learnable, top_p 0.9, in the phases that say so; all tokens are counted here"
    # 2 x 2 views of 12 x 12 tokens, nothing of a 4:3 picture's 24 x 24 padded but 3 lines above and below, and a newline behind each of 18 lines.
    assert found["image", "640 x 480 px"] == (
        "2 x 2 local views; 576 global + 1 separator + 450 local = 1027 visual tokens of 2048; 1021 left for text"
    )
    assert found["parameters", "newline"] == "5,120"
    assert found["parameters", "selector"] == f"{2 * 5120 * 128:,}"
    assert (
        found["training", "global_mlp"] == "2 epochs of 4, about 3 steps; global_mlp at 0.001; sees global; of rendered/charts"
    )  # 2 x 5 / 4: of the 8 charts three are held out


def test_a_plan_without_local_views_counts_the_global_one_alone(tmp_path: Path) -> None:
    text = slime_recipe().replace('fusion = { kind = "dci", groups = 2 }\nadapters = { kind = "gated_mixture" }', (
        'fusion = { kind = "sti", layers = [7, 15] }\nadapters = { kind = "mlp" }'
    ))  # fmt: skip
    start = text.index("[connector.local]")
    text = text[:start] + text[text.index("[language_model]") :]
    text = text.replace('branch = "both"', 'branch = "global"')
    found = facts(opened(tmp_path, text))
    assert found["path", "global fused"] == "[720, 1024] by sti"
    assert found["image", "1920 x 1080 px"] == "720 global = 720 visual tokens of 4096; 3376 left for text"
    assert found["parameters", "connector"].startswith("31,467,520, and ")
    assert [fact for topic, fact in found if topic == "path" and fact.startswith("local")] == []


def test_branches_that_look_less_deep_run_fewer_blocks(tmp_path: Path) -> None:
    text = slime_recipe().replace(
        '[connector.local]\nfusion = { kind = "dci", groups = 2 }', '[connector.local]\nfusion = { kind = "single", layer = 7 }'
    )
    text = text.replace("queries = 144 }", 'queries = 144 }\nprojector = "own"')
    found = facts(opened(tmp_path, text))
    assert found["path", "hidden states"] == "[577, 1024] each; 23 of 24 blocks run for global views and 7 of 24 blocks run for local views"
    assert found["path", "local compressed"] == "[144, 1024] of each view"
    assert found["parameters", "local_mlp"] == "31,467,520"


def test_a_packaged_language_model_is_known_by_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is, is known before it is fetched: so are its keys."""
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "cache"))
    found = facts(opened(tmp_path, slime_recipe("builtin:vision-encoder", "smollm2-135m-instruct")))
    note = "not here, and a plan fetches nothing; the run itself fetches and converts their package"
    assert {fact: value for (topic, fact), value in found.items() if topic == "missing"} == {
        "weights of smollm2-135m-instruct": note,
        "tokenizer of smollm2-135m-instruct": note,
    }
    assert all(value.endswith("  to do") for (topic, _), value in found.items() if topic == "stages")
    assert found["parameters", "language model"] == "134,515,008"


@pytest.mark.parametrize(
    ("language_model", "count"),
    [
        (VICUNA, 40 * (4 * (5120 + 5120) + 3 * (5120 + 13824))),
        ("Qwen/Qwen2.5-7B-Instruct", 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))),
        ("microsoft/phi-2", 32 * (4 * (2560 + 2560) + 2 * (2560 + 10240))),
        ("smollm2-135m-instruct", 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))),
    ],
)
def test_adapters_of_models_that_are_not_here_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language_model: str, count: int) -> None:
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "cache"))
    model = f'model = "{language_model}"'
    text = slime_recipe(language_model=language_model).replace("queries = 144", "queries = 36")
    found = facts(opened(tmp_path, text.replace(model, f"{model}\nlora = {{ rank = 128, alpha = 256, dropout = 0.05 }}")))
    assert found["parameters", "adapters"] == f"{count * 128:,}: rank 128, alpha 256, on all-linear"
    with pytest.raises(RecipeError, match=r"language_model\.lora\.targets: found 'qproj', but in a .*ForCausalLM no layer has that name"):
        opened(tmp_path, text.replace(model, f'{model}\nlora = {{ rank = 2, alpha = 2, targets = ["qproj"] }}'))


def test_a_real_run_still_refuses_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"clip-vit-large-patch14-336': expected a folder here or a model on the hub, found neither"):
        opened(tmp_path, slime_recipe(), planning=False)


@pytest.mark.parametrize("words", [["show", "cache"], ["show", "dataset"], ["compare", "abcd1234"]])
def test_what_cannot_be_found_for_want_of_weights_says_so(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = with_records(slime_recipe(), "records.json", "images") if "dataset" in words else slime_recipe()
    (tmp_path / "recipe.toml").write_text(text)
    (tmp_path / "root" / "runs" / "evaluate" / "abcd1234abcd1234").mkdir(parents=True)
    path, root = str(tmp_path / "recipe.toml"), str(tmp_path / "root")
    command = [words[0], path, words[1]] if words[0] == "compare" else [*words, path]
    with pytest.raises(SystemExit):
        cli.main([*command, "--root", root])
    what = "the records records.json" if "dataset" in words else f"the weights of {CLIP_L}"
    assert capsys.readouterr().err == (
        f"loupe: recipe {path}: what it has left in {root} is found by keys that depend on {what}, and those are not on this machine; look from a "
        "machine that has them, or put them here\n"
    )


def test_show_lists_the_stages_whose_keys_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text(slime_recipe())
    cli.main(["show", "run", str(tmp_path / "recipe.toml"), "--root", str(tmp_path / "root")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "build-dataset"
    assert lines[3].startswith(f"later stages: recipe {tmp_path / 'recipe.toml'}: what it has left in")
    assert len(lines) == 4


def test_what_was_planned_without_weights_cannot_be_run(tmp_path: Path) -> None:
    experiment = opened(tmp_path, slime_recipe())
    for run in list(stage_runs(experiment))[1:]:
        with pytest.raises(CanonicalisationError, match=r"are not on this machine, so what depends on them has no key"):
            _ = run.key
        with pytest.raises(CanonicalisationError):
            run_stage(experiment, replace(run, run=lambda _: pytest.fail("ran")), SilentProgress())
    assert experiment.store.list() == []


@pytest.mark.parametrize("kept", [("config.json",), ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")])
def test_folders_with_a_config_alone_are_planned_like_whole_ones(
    tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, kept: tuple[str, ...]
) -> None:
    whole = opened(tmp_path, tiny_recipe(tiny_encoder_folder, tiny_language_model_folder), planning=False)
    assert replace(opened(tmp_path, tiny_recipe(tiny_encoder_folder, tiny_language_model_folder)), store=whole.store) == whole
    bare = {"encoder": tmp_path / "bare-encoder", "language": tmp_path / "bare-language"}
    for folder, source in ((bare["encoder"], tiny_encoder_folder), (bare["language"], tiny_language_model_folder)):
        folder.mkdir()
        for name in kept:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    experiment = opened(tmp_path, tiny_recipe(bare["encoder"], bare["language"]))
    expected, found = facts(whole), facts(experiment)
    missing = {key for key in found if key[0] == "missing"}
    assert {fact for _, fact in missing} == {
        f"weights of {bare['encoder']}",
        f"weights of {bare['language']}",
        *([] if len(kept) > 1 else [f"tokenizer of {bare['language']}"]),
    }
    needed = "not in that folder; the run itself needs them there"
    unchecked = "; whether its chat template, which the recipe takes, gives a loss mask is seen only then"
    assert {key[1].split()[0]: found[key] for key in missing} == {
        "weights": needed,
        **({} if len(kept) > 1 else {"tokenizer": needed + unchecked}),
    }
    same = [key for key in expected if key[0] not in {"stages", "root"} and key not in {("features", "encoder"), ("connector", "language model")}]
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert found["stages", "build-dataset"] == expected["stages", "build-dataset"]
    assert found["stages", "cache-features"] == f"key unknown without the weights of {bare['encoder']}"
    with pytest.raises(RecipeError, match="found none"):
        opened(tmp_path, tiny_recipe(bare["encoder"], bare["language"]), planning=False)


@pytest.mark.parametrize(
    ("encoder", "language_model", "message"),
    [
        (
            "somebody/some-tower",
            VICUNA,
            r"encoder 'somebody/some-tower': .* found neither; a plan asks no network, .* Known are openai/",
        ),
        (
            CLIP_L,
            "somebody/some-model",
            r"language model 'somebody/some-model': .* found neither; .*Known are lmsys/vicuna-7b-v1\.5",
        ),
        ("/no/such/folder", VICUNA, r"encoder '/no/such/folder': expected a folder with config\.json.*found no such folder"),
        (CLIP_L, "/no/such/folder", r"language model '/no/such/folder': no such folder"),
        ("builtin:nothing", VICUNA, r"there is no encoder 'builtin:nothing'"),
    ],
)
def test_names_that_are_neither_known_nor_here_are_errors(tmp_path: Path, encoder: str, language_model: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        opened(tmp_path, slime_recipe(encoder, language_model))


def test_folders_that_lack_even_a_config_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"found no config\.json"):
        opened(tmp_path, slime_recipe(str(tmp_path / "empty")))
    with pytest.raises(RecipeError, match=r"lacks config\.json, weights"):
        opened(tmp_path, slime_recipe(language_model=str(tmp_path / "empty")))


def test_damaged_weights_stay_an_error_in_a_plan(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    for broken in ("encoder", "language"):
        folders = {"encoder": tmp_path / f"{broken}-encoder", "language": tmp_path / f"{broken}-language"}
        shutil.copytree(tiny_encoder_folder, folders["encoder"])
        shutil.copytree(tiny_language_model_folder, folders["language"])
        (folders[broken] / "model.safetensors").write_bytes(b"version https://git-lfs")
        with pytest.raises(RecipeError, match=rf"{broken}.*model\.safetensors cannot be read"):
            opened(tmp_path, tiny_recipe(folders["encoder"], folders["language"]))


@pytest.mark.parametrize("records", ["/no/such/records.json", "file:///no/such/records.json"])
def test_records_that_cannot_be_read_are_listed(tmp_path: Path, records: str) -> None:
    experiment = opened(tmp_path, with_records(slime_recipe(), records, str(tmp_path / "no-images")))
    found = facts(experiment)
    assert found["missing", f"records {records}"].startswith("cannot be read, so their images are unknown and the plan counts none of them (")
    assert found["missing", f"images {tmp_path / 'no-images'}"] == "no such folder here; the run itself needs it"
    assert found["dataset", "images"] == "those of 1 source that cannot be read"
    assert ("dataset", "split") not in found
    assert found["features", "cache"] == "those of the records that cannot be read; up to 28.3 MB an image"
    assert found["stages", "build-dataset"] == f"key unknown without the records {records}"
    with pytest.raises(CanonicalisationError, match=r"the records .* are not on this machine"):
        _ = next(stage_runs(experiment)).key


def test_the_recipes_own_digest_of_records_stands_in_for_the_file(tmp_path: Path) -> None:
    experiment = opened(tmp_path, with_records(slime_recipe(), "/no/such.json", str(tmp_path), f", records_sha256 = '{'a' * 64}'"))
    assert facts(experiment)["stages", "build-dataset"] == f"{fingerprint(experiment.dataset)[:16]}  to do"


def test_readable_records_are_counted_beside_others(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([{"image": "a.png", "conversations": []}] * 90))
    text = with_records(slime_recipe(), f"{tmp_path}/mine.json", str(tmp_path)).replace("steps = 3\nbatch_size = 4", "epochs = 2\nbatch_size = 4")
    found = facts(opened(tmp_path, text))
    assert found["dataset", "images"] == "90 records read"
    assert (
        found["training", "global_mlp"] == "2 epochs of 4, about 27 steps; global_mlp at 0.001; sees global"
    )  # 2 x 54 / 4: four tenths are held out
    both = text.replace("sources = [", "sources = [{ kind = 'llava_json', records = '/no/such.json', images = '/no' }, ")
    found = facts(opened(tmp_path, both))
    assert found["dataset", "images"] == "90 records read, those of 1 source that cannot be read"
    assert found["training", "global_mlp"] == "2 epochs of 4; global_mlp at 0.001; sees global"
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(RecipeError, match="should be a JSON array of at least one LLaVA record"):
        opened(tmp_path, text)


def test_the_command_plans_and_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(with_records(slime_recipe(), "/no/such/records.json", "/no/such/images"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for command in ("run", "cache-features"):
        cli.main([command, "recipe.toml", "--dry-run"])
        told = capsys.readouterr().out
        assert f"weights of {CLIP_L}" in told
        assert "not here, and a plan fetches nothing" in told
        assert "key unknown without the records" in told
        assert "Nothing was started and nothing was written." in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", known_encoders())
def test_presets_for_every_known_encoder(name: str) -> None:
    """The base is the last block but one; two groups share the layers out: with it, but for SO400M, as the authors have it."""
    encoder = known_encoder(name)
    assert encoder is not None
    base = encoder.num_blocks - 1
    assert SingleFusion(kind="single").spec(encoder) == SingleSpec(layer=base)
    groups = {
        ("clip", 12): ((0, 5), (6, 11)),
        ("clip", 24): ((0, 11), (12, 23)),
        ("siglip", 12): ((0, 5), (6, 11)),
        ("siglip", 24): ((0, 11), (12, 23)),
        ("siglip", 27): ((0, 12), (13, 25)),
        ("siglip", 40): ((0, 19), (20, 39)),
        ("dinov2", 12): ((0, 5), (6, 11)),
        ("dinov2", 24): ((0, 11), (12, 23)),
        ("dinov2", 40): ((0, 19), (20, 39)),
    }
    kind = {"siglip2": "siglip", "dinov2_with_registers": "dinov2"}.get(encoder.family, encoder.family)
    assert DCIFusion(kind="dci").spec(encoder) == DCISpec(base=base, groups=groups[kind, encoder.num_blocks])
