"""Saved training state: safetensors and JSON, files first, a manifest with their digests last.

    checkpoints/<key>/<stage>/step-00000200/model.safetensors       what may have changed: connector; language model or its adapters
    checkpoints/<key>/<stage>/step-00000200/optimizer.safetensors   AdamW's state by parameter name, fp32
    checkpoints/<key>/<stage>/step-00000200/state.json              phase, step, hashes of the blocks, records of finished phases
    checkpoints/<key>/<stage>/step-00000200/MANIFEST.json           sha256 of the others; a folder without it does not exist

Invariant: whoever finds a manifest finds the files it names, whole; a folder that does not match its manifest is passed over for an older one.
Nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from model.schedule import Whole, parameters_by_block
from workers.errors import TrainingError
from workers.storage import Store

__all__ = ["CheckpointFolder", "Saved", "load_weights", "read_checked", "weights_of", "write_checked"]

_MANIFEST = "MANIFEST.json"
_KEPT = 2
"""Checkpoints that stay; older ones are deleted once a newer one is whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint in memory."""

    step: int
    """Steps done, counted over all phases of the schedule."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def _weights(model: nn.Module, *, with_language_model: bool) -> dict[str, Tensor]:
    """Where what training may change lies: the connector's parameters and measured buffers, the language model's block.

    Of a language model with adapters that is these alone.
    """
    parameters = dict(model.named_parameters())
    places: dict[str, Tensor] = {name: parameters.get(name, tensor) for name, tensor in model.state_dict().items() if name.startswith("connector.")}
    if with_language_model:
        places |= parameters_by_block(model).get("language_model", {})
    return places


def weights_of(model: nn.Module, *, with_language_model: bool, whole: Whole = nullcontext, keep: bool = True) -> dict[str, Tensor]:
    """What training may have changed: parameters (tied ones once) and the connector's measured buffers.

    Args:
        model: a VisionLanguageModel.
        with_language_model: whether the language model's parameters (with adapters: theirs alone) are among them.
        whole: inside of it a tensor that is shared out among ranks is all there; then all ranks must call this.
        keep: False where the tensors are not wanted, and only the other ranks need this one's part in it.

    Returns:
        Tensors on the CPU by parameter or buffer name.

    Raises:
        TrainingError: a tensor is empty: it is not all there, and must not be saved as if it were.
    """
    tensors = {}
    for name, tensor in _weights(model, with_language_model=with_language_model).items():
        with whole(tensor):
            if not tensor.numel():
                raise TrainingError(f"{name} is empty on this rank, so it cannot be saved; nothing was written. Report it with the zero_stage")
            if keep:
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved weights into a model, in place.

    Args:
        model: a VisionLanguageModel.
        tensors: as `weights_of` gave them.

    Raises:
        TrainingError: they are of another model.
    """
    places = _weights(model, with_language_model=any(name.startswith("language_model.") for name in tensors))
    if difference := sorted(places.keys() ^ tensors.keys()):
        raise TrainingError(
            f"saved weights are of another model: {difference[:4]} stand on one side only; remove the checkpoint or restore the recipe"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if places[name].shape != tensor.shape:
                raise TrainingError(
                    f"saved weights are of another model: {name} has shape {tuple(tensor.shape)}, expected {tuple(places[name].shape)}"
                )
            places[name].copy_(tensor)


def write_checked(store: Store, folder: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """Write files and then their manifest.

    Args:
        store: where.
        folder: relative to the root.
        files: bytes by name.

    Returns:
        sha256 (hex) by name.
    """
    digests = {}
    for name, data in files.items():
        store.write_bytes(f"{folder}/{name}", data)
        digests[name] = hashlib.sha256(data).hexdigest()
    store.write_json(f"{folder}/{_MANIFEST}", {"files": digests})
    return digests


def read_checked(store: Store, folder: str) -> dict[str, bytes] | None:
    """The files of a folder if they are what its manifest says.

    Args:
        store: where.
        folder: relative to the root.

    Returns:
        Bytes by name; None when there is no manifest, or a file is missing or differs.
    """
    if not store.exists(f"{folder}/{_MANIFEST}"):
        return None
    files = {}
    for name, digest in store.read_json(f"{folder}/{_MANIFEST}")["files"].items():
        if not store.exists(f"{folder}/{name}"):
            return None
        files[name] = store.read_bytes(f"{folder}/{name}")
        if hashlib.sha256(files[name]).hexdigest() != digest:
            return None
    return files


class CheckpointFolder:
    """The checkpoints of one stage of one training run.

    Args:
        store: where they lie.
        key: of the training run.
        stage: `align` or `sft`.
    """

    def __init__(self, store: Store, key: str, stage: str) -> None:
        self._store = store
        self.folder = f"checkpoints/{key}/{stage}"

    def save(self, saved: Saved) -> None:
        """Write a checkpoint, then delete those that are no longer needed.

        Args:
            saved: what to keep.
        """
        files = {
            "model.safetensors": safetensors.torch.save(saved.model),
            "optimizer.safetensors": safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in saved.optimizer.items()}),
            "state.json": json.dumps(saved.state, sort_keys=True).encode(),
        }
        write_checked(self._store, self._path(saved.step), files)
        # Counted are those before this one: what lies behind it is damaged or half written, else training would have gone on from there.
        for step in [step for step in self._steps() if step < saved.step][: -(_KEPT - 1)]:
            # The manifest goes first: a half deleted checkpoint must not look whole.
            paths = self._store.list(self._path(step))
            for path in sorted(paths, key=lambda path: not path.endswith(_MANIFEST)):
                self._store.delete(path)

    def latest(self) -> Saved | None:
        """The newest whole checkpoint."""
        for step in reversed(self._steps()):
            saved = self.load(step)
            if saved is not None:
                return saved
        return None

    def load(self, step: int) -> Saved | None:
        """The checkpoint of one step.

        Args:
            step: steps done, counted over all phases of the schedule.

        Returns:
            It; None when it is missing or damaged.
        """
        files = read_checked(self._store, self._path(step))
        if files is None:
            return None
        return Saved(
            step=step,
            model=safetensors.torch.load(files["model.safetensors"]),
            optimizer=safetensors.torch.load(files["optimizer.safetensors"]),
            state=json.loads(files["state.json"]),
        )

    def _path(self, step: int) -> str:
        return f"{self.folder}/step-{step:08d}"

    def _steps(self) -> list[int]:
        names = {path[len(self.folder) + 1 :].split("/")[0] for path in self._store.list(self.folder)}
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))
