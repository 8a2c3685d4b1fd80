"""Imports: what `loupe import-weights` makes of the authors' folders, found again, mended, refused; whole models with their language model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.encoder import describe_encoder
from model.errors import ReleasedWeightsError
from model.language_model import load_language_model
from model.released_language_model import write_language_model
from model.specs import CompressionSpec, ConnectorSpec, GatedMixtureSpec, GlobalBranchSpec, LocalBranchSpec, SingleSpec
from model.tensor_files import open_tensor_files, weight_files
from model.views import ViewSpec
from pipelines import cli
from tests.released import parameters_as, slime_modules, write_slime
from tests.tiny import TINY_HIDDEN, TINY_WIDTH
from workers import importing
from workers.errors import DiskSpaceError
from workers.importing import import_weights
from workers.storage import Store

SINGLE = SingleSpec(layer=5)
SLIME = ConnectorSpec(
    global_branch=GlobalBranchSpec(fusion=SINGLE, adapters=GatedMixtureSpec(noise="authors")),
    local_branch=LocalBranchSpec(fusion=SINGLE, compression=CompressionSpec(queries=4)),
    standardise_inputs=False,
)
OLD_CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "pretraining_tp": 1,
    "use_cache": True,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mm_projector_type": "gated",
    "mm_resampler_type": "cosine",
    "mm_vision_select_layer": -2,
    "seperator": 11,
    "use_mm_proj": True,
    "image_grid_pinpoints": [[672, 672]],
    "tokenizer_model_max_length": 2048,
    "auto_map": {"AutoModelForCausalLM": "modeling_llava.LlavaLlamaForCausalLM"},
}
"""As transformers 4.37 writes it and SliME's code adds to it."""


@pytest.fixture
def encoder(tiny_encoder_folder):
    return describe_encoder(str(tiny_encoder_folder))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "root"))


@pytest.fixture
def modules():
    return slime_modules(patches=16, queries=4, width=TINY_WIDTH, hidden=TINY_HIDDEN, table=torch.float16)


@pytest.fixture
def adapters(tmp_path, modules):
    return write_slime(tmp_path / "released", modules)


@pytest.fixture
def whole(tmp_path, modules, tiny_language_model_folder):
    """A whole model in two shards, as the last stage leaves it."""
    from transformers import LlamaForCausalLM

    folder = tmp_path / "whole"
    folder.mkdir()
    network = LlamaForCausalLM.from_pretrained(tiny_language_model_folder, dtype=torch.bfloat16)
    language_model = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rest = {
        **parameters_as(modules[0], "model.mm_projector", torch.bfloat16),
        "model.mm_projector.mean": torch.zeros(1),
        "model.mm_projector.std": torch.ones(1),
        **parameters_as(modules[1], "model.sampler", torch.bfloat16),
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": torch.zeros(TINY_WIDTH),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    names = sorted(language_model)
    shards = [{name: language_model[name] for name in names[:9]} | rest, {name: language_model[name] for name in names[9:]}]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    more = ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    config = {name: getattr(network.config, name) for name in (*sizes, *more)}
    (folder / "config.json").write_text(json.dumps(OLD_CONFIG | config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tiny_language_model_folder / name).exists():
            shutil.copyfile(tiny_language_model_folder / name, folder / name)
    return folder


def test_adapters_become_a_connector_that_is_found_again(adapters, encoder, store, monkeypatch):
    record = import_weights([adapters], SLIME, encoder, ViewSpec.slime(), store)
    assert store.list(record.folder) == [f"{record.folder}/connector.safetensors", f"{record.folder}/import.json"]
    assert record.hidden == TINY_HIDDEN
    assert record.language_model is None
    assert set(record.sources) == {"mm_projector.bin", "sampler.bin", "config.json"}
    tensors = load_file(store.local_path(record.connector))
    assert float(tensors["token_scale"]) == 1.0
    monkeypatch.setattr(Store, "write_bytes", lambda *_: pytest.fail("an import that is there was made again"))
    assert import_weights([adapters], SLIME, encoder, ViewSpec.slime(), store) == record
    assert import_weights([adapters / "mm_projector.bin", adapters / "sampler.bin"], SLIME, encoder, ViewSpec.slime(), store).key == record.key


def test_other_bytes_or_another_recipe_are_another_import(adapters, encoder, store, modules):
    from dataclasses import replace

    first = import_weights([adapters], SLIME, encoder, ViewSpec.slime(), store)
    another = replace(SLIME, separator=None)
    assert import_weights([adapters], another, encoder, ViewSpec.slime(), store).key != first.key
    with torch.no_grad():
        modules[0].w_gate += 1
    assert import_weights([write_slime(adapters, modules)], SLIME, encoder, ViewSpec.slime(), store).key != first.key


@pytest.mark.parametrize("damage", ["connector cut", "connector gone", "record gone"])
def test_a_damaged_import_is_made_again(adapters, encoder, store, damage):
    record = import_weights([adapters], SLIME, encoder, ViewSpec.slime(), store)
    path = store.local_path(record.connector)
    whole = path.read_bytes()
    match damage:
        case "connector cut":
            path.write_bytes(whole[:-1])
        case "connector gone":
            path.unlink()
        case "record gone":
            store.delete(f"{record.folder}/import.json")
    assert import_weights([adapters], SLIME, encoder, ViewSpec.slime(), store) == record
    assert path.read_bytes() == whole


def test_what_is_refused_leaves_nothing(adapters, encoder, store):
    tensors = torch.load(adapters / "sampler.bin")
    tensors.pop("model.sampler.post_qformer.ln_kv.bias")
    torch.save(tensors, adapters / "sampler.bin")
    with pytest.raises(ReleasedWeightsError, match=r"missing     model\.sampler\.post_qformer\.ln_kv\.bias \[32\]"):
        import_weights([adapters], SLIME, encoder, ViewSpec.slime(), store)
    assert store.list() == []


@torch.no_grad()
def test_a_whole_model_gives_its_language_model_too(whole, encoder, store, tiny_language_model_folder):
    record = import_weights([whole], SLIME, encoder, ViewSpec.slime(), store)
    target = store.local_path(f"{record.folder}/language_model")
    assert record.language_model.num_tensors == len(torch.load(whole / "pytorch_model-00002-of-00002.bin")) + 9
    assert record.language_model.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert {part.part for part in record.report.left} == {"language model", "vision tower"}
    imported, original = load_language_model(target), load_language_model(tiny_language_model_folder)
    ids = torch.arange(12)[None]
    expected = original.network.bfloat16().float()(input_ids=ids).logits  # stored in bfloat16, as the authors do
    torch.testing.assert_close(imported.network(input_ids=ids).logits, expected)
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if key.startswith(("mm_", "use_mm_", "image_", "tokenizer_")) or key in ("seperator", "auto_map")]
    assert "temperature" not in json.loads((target / "generation_config.json").read_text())
    assert imported.tokenizer.chat_template == original.tokenizer.chat_template
    imported.network.save_pretrained(target.parent / "saved")  # as an export does
    assert not list(store.local_path().rglob(".tmp-*"))
    assert import_weights([whole], SLIME, encoder, ViewSpec.slime(), store) == record
    alone = import_weights([whole], SLIME, encoder, ViewSpec.slime(), store, connector_only=True)
    assert alone.key != record.key
    assert alone.language_model is None
    assert alone.connector_sha256 == record.connector_sha256


def test_a_language_model_is_written_in_shards_of_a_size(whole, tmp_path):
    files, config = open_tensor_files(weight_files([whole])), json.loads((whole / "config.json").read_text())
    (tmp_path / "out").mkdir()
    written = write_language_model(files, config, whole, tmp_path / "out", shard_bytes=40_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == written.num_tensors
    largest = max(tensor.num_values for tensor in files.stored.values()) * 2
    assert all(shard.stat().st_size <= max(40_000, largest) + 4_000 for shard in shards)
    load_language_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"a language model without a tokenizer .*--connector-only"),
        (lambda folder: edit_config(folder, model_type="llava_mpt"), r"model_type 'llava_mpt'; expected one of llava_llama, llava, llava_mistral"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), r"9 of the language model's tensors .*\n  missing     model\.layers\.2\."),
        (lambda folder: edit_config(folder, num_hidden_layers=1), r"unexpected  model\.layers\.1\."),
        (
            lambda folder: edit_config(folder, vocab_size=7),
            r"shape       model\.embed_tokens\.weight: expected \[7, 64\], found \[262, 64\] of",
        ),
        (lambda folder: edit_config(folder, hidden_size="x"), r"config\.json is of no llama that transformers can build"),
        (lambda folder: edit_shard(folder, "model.norm.weight", torch.nan), r"model\.norm\.weight holds numbers that are not finite"),
        (lambda folder: (folder / "config.json").write_text("[1]"), r"config\.json: expected a JSON object, found a list"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused(whole, encoder, store, spoil, message):
    spoil(whole)
    with pytest.raises(ReleasedWeightsError, match=message):
        import_weights([whole], SLIME, encoder, ViewSpec.slime(), store)
    assert store.list() == []
    assert not list(store.local_path().rglob("*")) if store.local_path().exists() else True


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(folder, name, value):
    for file in folder.glob("*.bin"):
        tensors = torch.load(file)
        if name in tensors:
            tensors[name].fill_(value)
            torch.save(tensors, file)


def test_a_full_disk_is_told_first(whole, encoder, store, monkeypatch):
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(DiskSpaceError, match=r"the language model takes about 0\.0 GB, and 0\.0 GB are free; .*--connector-only"):
        import_weights([whole], SLIME, encoder, ViewSpec.slime(), store)


RECIPE = """
name = "imported"
[dataset]
sources = [{{ kind = "rendered", family = "charts", num_images = 8 }}]
held_out_fraction = 0.4
[encoder]
model = "{encoder}"
[connector]
standardise_inputs = false
weights = "nowhere/connector.safetensors"
[connector.global]
fusion = {{ kind = "single" }}
adapters = {{ kind = "gated_mixture", noise = "authors" }}
[connector.local]
fusion = {{ kind = "single" }}
compression = {{ queries = 4 }}
[language_model]
model = "nowhere"
"""


def run(words, capsys):
    try:
        cli.main(words)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_needs_no_language_model_and_no_weights_that_are_still_to_come(whole, tmp_path, tiny_encoder_folder, capsys):
    recipe, root = tmp_path / "slime.toml", tmp_path / "root"
    recipe.write_text(RECIPE.format(encoder=tiny_encoder_folder))
    words = ["import-weights", str(whole), "--recipe", str(recipe), "--root", str(root)]
    status, out, err = run([*words, "--dry-run"], capsys)
    assert (status, err) == (0, "")
    assert out.endswith("Nothing was written.\n")
    assert not root.exists()
    status, out, err = run(words, capsys)
    assert (status, err) == (0, "")
    assert "imported    model.mm_projector.w_gate [32, 2] bfloat16 -> gate.weight" in out
    assert "left        vision tower: 1 tensors, 32 values" in out
    lines = [line.strip() for line in out.partition("Put into")[2].splitlines()]
    weights, model = (line.partition(' = "')[2].rstrip('"') for line in lines[1:3])
    assert Path(weights).is_file()
    assert Path(model, "tokenizer.json").is_file()
    assert run(words, capsys) == (status, out, err)


def test_the_encoder_s_weights_may_be_elsewhere(whole, tmp_path, tiny_encoder_folder, capsys, monkeypatch):
    """An import needs the encoder's shape alone, and is the same import whether the weights are here or not."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("httpx.Client.send", lambda *_, **__: pytest.fail("asked the network"))
    bare = shutil.copytree(tiny_encoder_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    recipe, said = tmp_path / "slime.toml", []
    for folder in (tiny_encoder_folder, bare):
        recipe.write_text(RECIPE.format(encoder=tmp_path / "encoder"))
        (tmp_path / "encoder").symlink_to(folder)
        said.append(run(["import-weights", str(whole), "--recipe", str(recipe), "--root", str(tmp_path / "root")], capsys))
        (tmp_path / "encoder").unlink()
    assert said[0] == said[1]
    assert said[0][0] == 0
    assert len(list((tmp_path / "root" / "imports").iterdir())) == 1


def test_the_command_tells_what_is_wrong_in_one_paragraph(adapters, tmp_path, tiny_encoder_folder, capsys):
    recipe = tmp_path / "slime.toml"
    recipe.write_text(RECIPE.format(encoder=tiny_encoder_folder).replace("queries = 4", "queries = 9"))
    words = ["--recipe", str(recipe), "--root", str(tmp_path / "root")]
    status, out, err = run(["import-weights", str(adapters), *words], capsys)
    assert (status, out) == (2, "")
    assert "connector.local.compression: the files hold 4 queries, the recipe says 9 queries" in err
    assert run(["import-weights", *words], capsys)[0] == 2
    status, _, err = run(["import-weights", str(tmp_path / "nowhere"), *words], capsys)
    assert status == 2
    assert "no such file or folder" in err
    assert not (tmp_path / "root").exists()
