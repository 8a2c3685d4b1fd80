"""Files of tensors that others wrote: torch's `.bin` and safetensors, alone or as shards with an index, read name by name.

Input: files, or a folder of them. Output: names, shapes and types at once, tensors one by one. Nothing in a file is ever run: a pickle that
holds more than tensors is refused. Invariant: a name stands for one tensor, whichever file it is in; a tensor is read from the disk when it is asked
for.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import ReleasedWeightsError, first_line

__all__ = ["SHARD_BYTES", "StoredTensor", "TensorFiles", "dtype_name", "open_tensor_files", "weight_files", "write_shards"]

_WHOLE = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What a folder's whole model is called, best first."""

_PARTS = ("mm_projector", "sampler", "non_lora_trainables")
"""What LLaVA's training code calls the files of what it trained beside the language model."""

_SUFFIXES = (".safetensors", ".bin")

SHARD_BYTES = 2**30
"""Of a file that is written, at most, unless one tensor is larger."""

_SAFETENSORS_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """What is known of a tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As torch calls it, such as `bfloat16`."""

    @property
    def num_values(self) -> int:
        """Numbers in it."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        """Bytes that its numbers take."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.num_values * dtype.itemsize


def dtype_name(tensor: Tensor) -> str:
    """A tensor's type as torch calls it, such as `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def weight_files(places: Sequence[Path]) -> list[Path]:
    """The files of tensors that folders and files stand for.

    Args:
        places: folders, `.bin` and `.safetensors` files, or the index of a sharded model.

    Returns:
        Files, each once, in the order found.

    Raises:
        ReleasedWeightsError: a place is not there, holds no weights, or an index names a file that is missing.
    """
    files: list[Path] = []
    for place in places:
        if place.is_dir():
            files += _of_folder(place)
        elif not place.is_file():
            raise ReleasedWeightsError(f"{place}: no such file or folder; give a folder with released weights, or its .bin or .safetensors files")
        elif place.name.endswith(".index.json"):
            files += _of_index(place)
        elif place.suffix in _SUFFIXES:
            files.append(place)
        else:
            raise ReleasedWeightsError(f"{place}: expected a .bin or .safetensors file, an .index.json or a folder")
    return list(dict.fromkeys(files))


def _of_folder(folder: Path) -> list[Path]:
    files: list[Path] = []
    whole = next((folder / name for name in _WHOLE if (folder / name).is_file()), None)
    if whole is not None:
        files += _of_index(whole) if whole.suffix == ".json" else [whole]
    for stem in _PARTS:
        files += [folder / f"{stem}{suffix}" for suffix in _SUFFIXES if (folder / f"{stem}{suffix}").is_file()][:1]
    if not files:
        expected = [*_WHOLE, *(f"{stem}.bin" for stem in _PARTS)]
        raise ReleasedWeightsError(
            f"{folder}: expected one of {', '.join(expected)}, found {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}; "
            "give the folder of a released model, or its files by name"
        )
    return files


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleasedWeightsError(f"{index} is no index of shards ({first_line(error)}); copy or fetch it again") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ReleasedWeightsError(f"{index} names the shard {outside[0]!r}; shards lie beside their index")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ReleasedWeightsError(f"{index} names {len(names)} shards, of which {', '.join(missing)} is not there; copy or fetch what is missing")
    return [index.parent / name for name in names]


class TensorFiles:
    """Tensors by name over some files; make it with `open_tensor_files`.

    Args:
        stored: what is known of each, by name.
        pickled: tensors that torch maps from the disk, by name; the others are read from their safetensors file.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], pickled: Mapping[str, Tensor]) -> None:
        self.stored = dict(stored)
        self._pickled = dict(pickled)

    @property
    def files(self) -> list[Path]:
        """The files, in the order given."""
        return list(dict.fromkeys(tensor.file for tensor in self.stored.values()))

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored.

        Args:
            name: in its file.

        Returns:
            The tensor, on the CPU.

        Raises:
            ReleasedWeightsError: its bytes cannot be read.
        """
        if name in self._pickled:
            return self._pickled[name]
        file = self.stored[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
        return tensor


def open_tensor_files(files: Sequence[Path]) -> TensorFiles:
    """Names, shapes and types of all tensors in some files.

    Args:
        files: `.bin` and `.safetensors` files.

    Returns:
        The tensors, not read yet.

    Raises:
        ReleasedWeightsError: a file cannot be read, holds more than tensors, or two hold different tensors under one name.
    """
    stored: dict[str, StoredTensor] = {}
    pickled: dict[str, Tensor] = {}
    for file in files:
        tensors = {} if file.suffix == ".safetensors" else _unpickled(file)
        found = _safetensors_header(file) if file.suffix == ".safetensors" else {name: _described(file, tensor) for name, tensor in tensors.items()}
        if twice := sorted(stored.keys() & found.keys()):
            raise ReleasedWeightsError(
                f"{twice[0]} is in {stored[twice[0]].file.name} and in {file.name} ({len(twice)} such tensors), and which one counts is not known; "
                "give the files of one checkpoint alone"
            )
        stored |= found
        pickled |= tensors
    return TensorFiles(stored, pickled)


def write_shards(files: TensorFiles, names: Mapping[str, str], target: Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors as safetensors in transformers' layout: one file, or shards with an index, shard by shard.

    Args:
        files: that hold them.
        names: their names in the files, by the name to be written, in the order of the files so that each is gone through once.
        target: a folder.
        shard_bytes: of a file, at most, unless one tensor is larger; about what this takes of memory.

    Returns:
        Bytes of all tensors.

    Raises:
        ReleasedWeightsError: a tensor cannot be read or holds numbers that are not finite.
    """
    groups = list(_groups(files, names, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Cloned: of tied tensors a pickle holds one and the same memory, which safetensors refuses.
        tensors = {name: files.read(names[name]).clone(memory_format=torch.contiguous_format) for name in group}
        if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise ReleasedWeightsError(f"{files.stored[names[broken[0]]].file}: {broken[0]} holds numbers that are not finite; fetch it again")
        save_file(tensors, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    num_bytes = sum(files.stored[name].num_bytes for name in names.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    return num_bytes


def _groups(files: TensorFiles, names: Mapping[str, str], shard_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, stored in names.items():
        num_bytes = files.stored[stored].num_bytes
        if group and size + num_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


def _described(file: Path, tensor: Tensor) -> StoredTensor:
    return StoredTensor(file=file, shape=tuple(tensor.shape), dtype=dtype_name(tensor))


def _safetensors_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
            return {
                name: StoredTensor(
                    file=file, shape=tuple(part.get_shape()), dtype=_SAFETENSORS_TYPES.get(str(part.get_dtype()), str(part.get_dtype()).lower())
                )
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    """A `.bin` file's tensors, left on the disk where its format (a zip archive, since torch 1.6) allows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles newer than torch's own, which then fail anyhow
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if called := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", str(error)):
            raise ReleasedWeightsError(
                f"{file} is refused: beside tensors it holds {called.group(1)}, which loading would run, and nothing in a weights file is ever run. "
                "Get the file from its authors, or have it converted to safetensors by someone who trusts it"
            ) from error
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]  # what torch says before it is advice to run the file after all
        raise _unreadable(file, ValueError(reason)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError) as error:
        raise _unreadable(file, error) from error  # the reader for old files raises whatever their bytes lead it to
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(name, str) for name in loaded):
        raise ReleasedWeightsError(f"{file}: expected tensors by name, found {_told(loaded)}; give the file that holds the weights")
    if other := [name for name, value in loaded.items() if not isinstance(value, Tensor)]:
        raise ReleasedWeightsError(
            f"{file}: expected tensors by name, found {_told(loaded[other[0]])} as {other[0]!r}; an optimizer's or trainer's state is no weights file"
        )
    return loaded


def _told(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ({}, [], ()) else f"a {type(value).__name__}"


def _unreadable(file: Path, error: BaseException) -> ReleasedWeightsError:
    size = file.stat().st_size
    return ReleasedWeightsError(
        f"{file} ({size} bytes) cannot be read ({first_line(error)}); it is cut off or no weights file: copy or fetch it again"
    )
