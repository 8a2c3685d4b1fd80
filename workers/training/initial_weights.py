"""The weights that a connector starts from instead of random ones: an imported one's, or those of an earlier run.

Input: the address of a connector.safetensors. Output: a copy in the root, weights/<sha256>.safetensors, that training reads. Invariant: identity is
the digest of the bytes, wherever they lay; weights of another connector are refused before any work is spent, and standardisation comes with them, so
nothing is measured again.
"""

import hashlib
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model.connector import Connector, build_connector
from model.errors import first_line
from model.specs import ConnectorSpec, EncoderSpec
from workers.errors import TrainingError
from workers.storage import Store, open_url

__all__ = ["WeightsFile", "check_weights", "initial_tensors", "keep_weights", "open_weights", "start_from"]

_SHOWN = 6
"""Tensors that a refusal names; the rest are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsFile:
    """A connector's weights, wherever they lie."""

    address: str
    """Path or URL."""
    sha256: str


def open_weights(address: str) -> tuple[WeightsFile, dict[str, Tensor]]:
    """Read weights that a recipe names.

    Args:
        address: path or URL of a connector.safetensors.

    Returns:
        Their identity and themselves.

    Raises:
        TrainingError: the file holds no tensors by name, or numbers that are not finite.
        StorageError: it cannot be read.
    """
    store, name = open_url(address)
    data = store.read_bytes(name)
    tensors = _parsed(data, address)
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise TrainingError(f"connector.weights: {address} holds numbers that are not finite (in {broken[0]}); train or import it anew")
    return WeightsFile(address=address, sha256=hashlib.sha256(data).hexdigest()), tensors


def _parsed(data: bytes, address: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise TrainingError(
            f"connector.weights: {address} is no safetensors file ({first_line(error)}); authors' files become one by `loupe import-weights`"
        ) from error
    return tensors


def check_weights(tensors: dict[str, Tensor], address: str, spec: ConnectorSpec, encoder: EncoderSpec, hidden: int) -> Connector:
    """A connector that holds these weights.

    Args:
        tensors: by name.
        address: where they lie, for messages.
        spec: of the connector.
        encoder: whose maps it reads.
        hidden: the language model's width.

    Returns:
        The connector.

    Raises:
        TrainingError: they are another connector's; the message says which tensors differ.
    """
    connector = build_connector(spec, encoder, hidden=hidden, embedding_rms=1.0, seed=0)
    places = connector.state_dict()
    lines = [f"{name}: expected {list(places[name].shape)}, found nothing" for name in places if name not in tensors]
    for name, tensor in tensors.items():
        if name not in places:
            lines.append(f"{name}: expected nothing, found {list(tensor.shape)}")
        elif tensor.shape != places[name].shape or tensor.dtype != places[name].dtype:
            lines.append(f"{name}: expected {list(places[name].shape)} of {places[name].dtype}, found {list(tensor.shape)} of {tensor.dtype}")
    if lines:
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise TrainingError(
            f"connector.weights: {address} is of another connector than the recipe describes (with the language model's width {hidden}); give that "
            "of this one (authors' files become one by `loupe import-weights`), or change the recipe:"
            + "".join(f"\n  {line}" for line in lines[:_SHOWN])
            + more
        )
    connector.load_state_dict(tensors)
    inputs = [part for part in (connector.global_input, connector.local_input) if part is not None]
    if not spec.standardise_inputs and any(bool((part.mean != 0).any() or (part.scale != 1).any()) for part in inputs):
        raise TrainingError(f"connector.weights: {address} centres and scales its inputs, the recipe has standardise_inputs = false; set it to true")
    return connector


def _path(sha256: str) -> str:
    return f"weights/{sha256}.safetensors"


def keep_weights(store: Store, weights: WeightsFile) -> None:
    """Copy weights into the root, where every worker finds them, unless they are there.

    Args:
        store: of the root.
        weights: as `open_weights` gave them.

    Raises:
        TrainingError: the file is another one by now.
    """
    if store.exists(_path(weights.sha256)):
        return
    source, name = open_url(weights.address)
    data = source.read_bytes(name)
    if hashlib.sha256(data).hexdigest() != weights.sha256:
        raise TrainingError(f"connector.weights: {weights.address} has changed since the run was planned; run again")
    store.write_bytes(_path(weights.sha256), data)


def initial_tensors(store: Store, sha256: str) -> dict[str, Tensor]:
    """Weights out of the root.

    Args:
        store: of the root.
        sha256: of their file.

    Returns:
        Tensors by name.

    Raises:
        TrainingError: they are not there or damaged.
    """
    path = _path(sha256)
    if not store.exists(path):
        raise TrainingError(f"{store.url(path)}, from which training starts, is not there; run the recipe again, which puts it there")
    data = store.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise TrainingError(f"{store.url(path)}, from which training starts, is damaged; remove it and run the recipe again")
    return _parsed(data, path)


def start_from(connector: Connector, store: Store, sha256: str, encoder: EncoderSpec) -> None:
    """Put weights out of the root into a connector.

    Args:
        connector: changed in place.
        store: of the root.
        sha256: of their file.
        encoder: whose maps it reads.

    Raises:
        TrainingError: they are not there, damaged or of another connector.
    """
    checked = check_weights(initial_tensors(store, sha256), store.url(_path(sha256)), connector.spec, encoder, connector.hidden)
    connector.load_state_dict(checked.state_dict())
