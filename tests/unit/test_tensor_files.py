"""Files of tensors that others wrote: what is read, and what is refused, before a byte of it is trusted."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.errors import ReleasedWeightsError
from model.tensor_files import open_tensor_files, weight_files


def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(2.5, dtype=torch.float16)}


def test_both_formats_and_the_old_one_give_the_same_tensors(tmp_path):
    torch.save(tensors(), tmp_path / "new.bin")
    torch.save(tensors(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(tensors(), tmp_path / "safe.safetensors")
    for name in ("new.bin", "old.bin", "safe.safetensors"):
        opened = open_tensor_files(weight_files([tmp_path / name]))
        assert {key: (held.shape, held.dtype) for key, held in opened.stored.items()} == {
            "a.weight": ((2, 3), "float32"),
            "b": ((4,), "bfloat16"),
            "c": ((), "float16"),
        }
        for key, tensor in tensors().items():
            assert torch.equal(opened.read(key), tensor)
            assert opened.read(key).dtype == tensor.dtype


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_a_new_bin_stays_on_the_disk(tmp_path):
    torch.save({"big": torch.zeros(2**18)}, tmp_path / "big.bin")
    tensor = open_tensor_files([tmp_path / "big.bin"]).read("big")
    assert tensor.sum() == 0
    assert str(tmp_path / "big.bin") in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards_are_found_by_their_index(tmp_path, suffix):
    stem = "pytorch_model" if suffix == ".bin" else "model"
    parts = {f"{stem}-00001-of-00002{suffix}": {"x": torch.zeros(2)}, f"{stem}-00002-of-00002{suffix}": {"y": torch.ones(3)}}
    for file, held in parts.items():
        (torch.save if suffix == ".bin" else save_file)(held, tmp_path / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files([tmp_path])] == sorted(parts)
    assert set(open_tensor_files(weight_files([tmp_path])).stored) == {"x", "y"}
    (tmp_path / f"{stem}-00002-of-00002{suffix}").unlink()
    with pytest.raises(ReleasedWeightsError, match=r"names 2 shards, of which .*00002-of-00002.* is not there; copy or fetch"):
        weight_files([tmp_path])


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ReleasedWeightsError, match=r"names the shard '\.\./model\.safetensors'; shards lie beside their index"):
        weight_files([tmp_path / "in"])


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("kind", ["torch", "torch-old", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, kind):
    touched, file = tmp_path / "touched", tmp_path / "mm_projector.bin"
    value = {"model.mm_projector.0.weight": torch.zeros(2), "extra": Malice(touched)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(value | {"model.mm_projector.0.weight": 1}, protocol=2))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(
        ReleasedWeightsError, match=r"mm_projector\.bin is refused: beside tensors it holds (posix|os)\.system, which loading would run"
    ):
        open_tensor_files([file])
    assert not touched.exists()
    torch.load(file, weights_only=False) if kind != "pickle" else pickle.loads(file.read_bytes())  # the trap is a real one
    assert touched.exists()


def test_a_pickle_of_another_kind_is_refused_without_the_advice_to_run_it(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"extra": Malice(tmp_path / "touched")}, protocol=4))
    with pytest.raises(ReleasedWeightsError, match=r"x\.bin .* cannot be read") as refusal:
        open_tensor_files([tmp_path / "x.bin"])
    assert "weights_only" not in str(refusal.value)
    assert not (tmp_path / "touched").exists()


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("name", ["new.bin", "old.bin", "safe.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.98])
def test_a_cut_off_file_is_named(tmp_path, name, share):
    held = {"a": torch.randn(50, 50)}
    if name == "safe.safetensors":
        save_file(held, tmp_path / name)
    else:
        torch.save(held, tmp_path / name, _use_new_zipfile_serialization=name == "new.bin")
    cut(tmp_path / name, int(share * (tmp_path / name).stat().st_size))
    with pytest.raises(ReleasedWeightsError, match=rf"{name} \(\d+ bytes\) cannot be read .*fetch it again"):
        open_tensor_files([tmp_path / name])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(1)], "found a list"),
        ({}, "found an empty dict"),
        ({"state_dict": {"a": torch.zeros(1)}}, "found a dict as 'state_dict'"),
        ({1: torch.zeros(1)}, "expected tensors by name, found a dict"),
    ],
)
def test_what_is_no_state_dict_is_told(tmp_path, value, message):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(ReleasedWeightsError, match=message):
        open_tensor_files([tmp_path / "x.bin"])


def test_places_that_hold_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ReleasedWeightsError, match=r"expected one of model\.safetensors\.index\.json, .*mm_projector\.bin.*, found notes\.txt"):
        weight_files([tmp_path])
    with pytest.raises(ReleasedWeightsError, match="no such file or folder"):
        weight_files([tmp_path / "nowhere"])
    with pytest.raises(ReleasedWeightsError, match=r"expected a \.bin or \.safetensors file"):
        weight_files([tmp_path / "notes.txt"])


def test_a_name_in_two_files_is_refused(tmp_path):
    for name in ("one.bin", "two.bin"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ReleasedWeightsError, match=r"a is in one\.bin and in two\.bin \(1 such tensors\)"):
        open_tensor_files(weight_files([tmp_path / "one.bin", tmp_path / "two.bin"]))


def test_the_index_wins_over_a_pickle_beside_it(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"y": torch.ones(1)}, tmp_path / "mm_projector.bin")
    assert [path.name for path in weight_files([tmp_path])] == ["model.safetensors", "mm_projector.bin"]
