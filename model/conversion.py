"""A model folder whose weights are torch's `.bin` files, as one of safetensors, which is all that Loupe loads.

`openai/clip-vit-large-patch14-336` and Vicuna are published so. Input: such a folder. Output: a folder with the same tensors under the same names, in
the same types, and the files beside them. Nothing in a file is ever run. Invariant: the target is there whole, or not at all.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from model.errors import ReleasedWeightsError
from model.tensor_files import SHARD_BYTES, open_tensor_files, weight_files, write_shards

__all__ = ["HUB_PATTERNS", "Conversion", "convert_folder"]

_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.md")
_NOT_BESIDE = (".bin.index.json", ".msgpack", ".h5")

HUB_PATTERNS = ["*.bin", *_BESIDE]
"""What of a hub's repository a conversion needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was written."""

    folder: Path
    files: tuple[str, ...]
    num_tensors: int
    num_values: int
    num_bytes: int


def convert_folder(source: Path, target: Path, *, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write a folder's weights as safetensors.

    Args:
        source: with `pytorch_model.bin`, or its index and shards.
        target: a folder that is not there yet, or empty.
        shard_bytes: of a file, at most, unless one tensor is larger; about what this takes of memory.

    Returns:
        What was written.

    Raises:
        ReleasedWeightsError: there is nothing to convert, the target holds something, or a file is damaged, holds more than tensors or numbers that
            are not finite.
    """
    if any(source.glob("*.safetensors")):
        raise ReleasedWeightsError(f"{source} holds safetensors already, which is what Loupe loads; name this folder in the recipe")
    if not (source / "config.json").is_file():
        raise ReleasedWeightsError(f"{source}: expected config.json beside the weights, found none; give a whole model folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ReleasedWeightsError(f"{target}: expected a folder that is not there yet, or an empty one; name another")
    files = open_tensor_files(weight_files([source]))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        num_bytes = write_shards(files, {name: name for name in files.stored}, folder, shard_bytes=shard_bytes)
        beside = {path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file() and not path.name.endswith(_NOT_BESIDE)}
        for path in sorted(beside):
            shutil.copyfile(path, folder / path.name)
        if target.exists():
            target.rmdir()
        folder.rename(target)
    return Conversion(
        folder=target,
        files=tuple(sorted(path.name for path in target.iterdir())),
        num_tensors=len(files.stored),
        num_values=sum(tensor.num_values for tensor in files.stored.values()),
        num_bytes=num_bytes,
    )
