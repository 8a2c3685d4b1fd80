"""Models that are published as .bin files become folders of safetensors: the same tensors, whole or not at all, and nothing is run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.conversion import convert_folder
from model.encoder import describe_encoder, load_encoder
from model.errors import EncoderError, LanguageModelError, ReleasedWeightsError
from model.language_model import load_language_model, resolve_folder
from model.specs import MapSpec
from pipelines.cli import main


def pickled(folder: Path, target: Path, *, shards: int = 1) -> Path:
    """A model's folder as it would be with .bin files."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, target / file)
        weight_map |= dict.fromkeys(part, file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def test_an_encoder_gives_the_same_maps(tiny_encoder_folder, tmp_path, capsys):
    source = pickled(tiny_encoder_folder, tmp_path / "pickled")
    with pytest.raises(EncoderError, match=rf"`loupe convert-weights {source} FOLDER` makes safetensors"):
        describe_encoder(str(source))
    main(["convert-weights", str(source), str(tmp_path / "models" / "clip")])
    said = capsys.readouterr().out
    assert f'Put into the recipe:  model = "{tmp_path}/models/clip"' in said
    assert "model.safetensors" in said
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["clip"]
    views = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    maps = [MapSpec(layers=(3,)), MapSpec(layers=(0, 1, 2))]
    ours, theirs = (load_encoder(describe_encoder(str(folder)), 3)(views, maps) for folder in (tmp_path / "models" / "clip", tiny_encoder_folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_language_model_in_shards_keeps_every_tensor_and_type(shards, tiny_language_model_folder, tmp_path):
    source = pickled(tiny_language_model_folder, tmp_path / "pickled", shards=shards)
    with pytest.raises(LanguageModelError, match="convert-weights"):
        resolve_folder(str(source))
    made = convert_folder(source, tmp_path / "made", shard_bytes=20_000)
    files = sorted((tmp_path / "made").glob("*.safetensors"))
    assert len(files) > 2
    assert not any(name.endswith(".bin.index.json") for name in made.files)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(tiny_language_model_folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected)
    assert made.num_bytes == sum(tensor.nbytes for tensor in expected.values())
    ids = torch.tensor([[5, 6, 7]])
    logits = [load_language_model(folder).network(input_ids=ids).logits for folder in (tmp_path / "made", tiny_language_model_folder)]
    assert torch.equal(*logits)


def test_tied_tensors_are_written_each(tmp_path):
    (tmp_path / "source").mkdir()
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared, "view": shared.T}, tmp_path / "source" / "pytorch_model.bin")
    (tmp_path / "source" / "config.json").write_text("{}")
    convert_folder(tmp_path / "source", tmp_path / "made")
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["view"], shared.T)


class Running:
    """What a pickle can do."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def spoilt(kind: str, source: Path, tmp_path: Path) -> str:
    weights = source / "pytorch_model.bin"
    tensors = torch.load(weights, weights_only=True)
    match kind:
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:-200])
            return "cut off or no weights file"
        case "runs code":
            torch.save(tensors | {"more": Running(tmp_path / "ran")}, weights)
            return "is refused: beside tensors it holds"
        case "not finite":
            name = min(tensors)
            tensors[name].view(-1)[0] = float("nan")
            torch.save(tensors, weights)
            return f"{name} holds numbers that are not finite"
        case "no config":
            (source / "config.json").unlink()
            return "expected config.json beside the weights"
        case "safetensors":
            (source / "model.safetensors").write_bytes(b"")
            return "holds safetensors already"
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["cut off", "runs code", "not finite", "no config", "safetensors"])
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(kind, tiny_encoder_folder, tmp_path):
    source = pickled(tiny_encoder_folder, tmp_path / "pickled")
    message = spoilt(kind, source, tmp_path)
    with pytest.raises(ReleasedWeightsError, match=message):
        convert_folder(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["pickled"]


def test_what_is_in_the_target_is_not_written_over(tiny_encoder_folder, tmp_path):
    source = pickled(tiny_encoder_folder, tmp_path / "pickled")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("")
    with pytest.raises(ReleasedWeightsError, match="expected a folder that is not there yet, or an empty one"):
        convert_folder(source, tmp_path / "made")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["mine"]


def test_a_name_that_is_nowhere_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert-weights", "nobody/nothing", str(tmp_path / "made")])
    said = capsys.readouterr().err
    assert "convert-weights nobody/nothing: expected a folder here or a model on the hub, found neither" in said
    assert "Traceback" not in said
