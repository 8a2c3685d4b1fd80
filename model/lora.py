"""Low-rank adapters in a language model, by peft: put in, told apart from the base, saved in peft's layout, merged.

Input: a loaded causal language model and a LoraSpec. Output: the same model, its linear layers wrapped in place; the model's class, its embeddings,
its head and its decoder stay where they were. Invariants: the base's weights never change; the same spec and seed give the same initial bytes; with
fresh adapters (B is zero) the model computes what the base does; dropout is a function of what it is told, never of a global random state.

Differs from peft alone: initial numbers come from a generator of their own, and dropout draws per sequence from a key that the batch brings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.errors import LanguageModelError, first_line
from model.specs import LoraSpec

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "SequenceKeys",
    "add_adapters",
    "base_name",
    "is_adapter",
    "load_adapters",
    "merge_adapters",
    "num_adapter_parameters",
    "save_adapters",
    "sequence_keys",
    "target_layers",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NAME = "default"
"""What peft calls an adapter that nobody names."""

_KEY_STEP = 0x9E3779B97F4A7C15
"""Odd, and far from a small multiple of anything: keys of neighbouring layers differ in many bits."""


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """What a base parameter is called without the adapter around it."""
    return name.replace(".base_layer.", ".")


@dataclass(kw_only=True, slots=True)
class SequenceKeys:
    """What the dropout of all adapters of a model draws from: told before a forward pass, still true when checkpointed layers run again for theirs.

    Attributes:
        keys: one number per sequence of the batch, None to drop nothing.
        lengths: tokens of each; what lies behind is padding.
    """

    keys: tuple[int, ...] | None = None
    lengths: tuple[int, ...] = ()

    def tell(self, keys: Sequence[int] | None, lengths: Sequence[int]) -> None:
        """Which sequences come next.

        Args:
            keys: one per sequence; None drops nothing.
            lengths: tokens of each.
        """
        self.keys, self.lengths = None if keys is None else tuple(keys), tuple(lengths)


class _KeyedDropout(nn.Module):
    """Dropout whose mask of a sequence depends on the sequence's key, its length and the layer alone: not on rank, batch or what ran before."""

    def __init__(self, fraction: float, layer: int, told: SequenceKeys) -> None:
        super().__init__()
        self.fraction, self.layer, self.told = fraction, layer, told

    def forward(self, inputs: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Zero some inputs and scale up the others.

        Args:
            inputs: of the adapter: [batch, length, width] where sequences are told of.

        Returns:
            Them, as they are where no keys are told.

        Raises:
            LanguageModelError: the layer does not see one row per sequence, so that no mask can be told.
        """
        keys = self.told.keys
        if keys is None:
            return inputs
        if inputs.ndim != 3 or inputs.shape[0] != len(keys):
            raise LanguageModelError(
                f"language_model.lora.dropout: an adapted layer sees inputs of shape {tuple(inputs.shape)} for {len(keys)} sequences, so its dropout "
                "cannot follow them; use dropout = 0, or name other targets"
            )
        kept = torch.ones(inputs.shape, dtype=inputs.dtype, device=inputs.device)
        for row, (key, length) in enumerate(zip(keys, self.told.lengths, strict=True)):
            generator = torch.Generator(inputs.device).manual_seed((key + self.layer * _KEY_STEP) % 2**63)
            drawn = torch.rand(length, inputs.shape[2], generator=generator, device=inputs.device)
            kept[row, :length] = (drawn >= self.fraction).to(inputs.dtype) / (1 - self.fraction)
        return inputs * kept


def target_layers(network: nn.Module, lora: LoraSpec) -> dict[str, nn.Module]:
    """The layers that get an adapter.

    Args:
        network: a causal language model without adapters; may lie on the meta device.
        lora: names them.

    Returns:
        Linear layers by name, in the model's order.

    Raises:
        LanguageModelError: a name matches no layer, the head, or a layer that is not linear.
    """
    from transformers.pytorch_utils import Conv1D

    head = network.get_output_embeddings()  # type: ignore[operator]
    modules = {name: module for name, module in network.named_modules() if name and module is not head}
    linear: dict[str, nn.Module] = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    if isinstance(lora.targets, str):
        return linear
    chosen: dict[str, nn.Module] = {}
    for target in lora.targets:
        matching = _ending_in(target, modules)
        if not matching or not matching.keys() <= linear.keys():
            what = f"{next(name for name in matching if name not in linear)} is not linear" if matching else "no layer has that name"
            raise LanguageModelError(
                f"language_model.lora.targets: found {target!r}, but in a {type(network).__name__} {what}; allowed: 'all-linear', or names out of "
                f"{last_names}. The head gets no adapter"
            )
        chosen |= matching
    return {name: module for name, module in linear.items() if name in chosen}


def _ending_in(target: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}


def num_adapter_parameters(network: nn.Module, lora: LoraSpec) -> int:
    """Parameters of the adapters that a model would get.

    Args:
        network: a causal language model without adapters; may lie on the meta device.
        lora: the adapters.

    Returns:
        Their number.
    """
    return sum(lora.rank * sum(module.weight.shape) for module in target_layers(network, lora).values())  # type: ignore[misc, arg-type]


def add_adapters(network: nn.Module, lora: LoraSpec, *, seed: int) -> None:
    """Put fresh adapters into a model, in place: the base without gradients and in its own type, the adapters in fp32.

    Args:
        network: a causal language model, on the CPU.
        lora: the adapters.
        seed: of their initial numbers.

    Raises:
        LanguageModelError: the model has no such layers, or peft cannot adapt them.
    """
    from peft import inject_adapter_in_model

    layers = target_layers(network, lora)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; what it drew is replaced below
        try:
            inject_adapter_in_model(_peft_config(lora, sorted(layers)), network)
        except (ValueError, TypeError) as error:
            raise LanguageModelError(f"language_model.lora: peft cannot adapt a {type(network).__name__} ({first_line(error)})") from error
    generator = torch.Generator().manual_seed(seed)
    told = SequenceKeys()
    for number, wrapped in enumerate(_adapted(network).values()):
        down, up = wrapped.lora_A[_NAME], wrapped.lora_B[_NAME]
        bound = 1 / math.sqrt(down.weight.shape[1])  # what torch and peft start a linear layer with
        down.weight.data = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
        up.weight.data = torch.zeros(up.weight.shape)
        if lora.dropout:
            wrapped.lora_dropout[_NAME] = _KeyedDropout(lora.dropout, number, told)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    network.train(mode=False)


def _peft_config(lora: LoraSpec, targets: list[str], base_model: str | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=base_model is not None,
    )


def _adapted(network: nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def sequence_keys(network: nn.Module) -> SequenceKeys | None:
    """What to tell the dropout of a model's adapters.

    Args:
        network: a causal language model.

    Returns:
        The one object that all of them read; None where nothing drops.
    """
    return next((module.told for module in network.modules() if isinstance(module, _KeyedDropout)), None)


def _peft_name(name: str) -> str:
    """A parameter's name in peft's files."""
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"


def _shortest_targets(network: nn.Module) -> list[str]:
    """Names that choose the adapted layers and no other: last names, as everybody writes them, where those do."""
    adapted = _adapted(network)
    last_names = {name.rpartition(".")[2] for name in adapted}
    inside = tuple(f"{name}." for name in adapted)
    chosen = {name for name, _ in network.named_modules() if name.rpartition(".")[2] in last_names and not name.startswith(inside)}
    return sorted(last_names if chosen == adapted.keys() else adapted)


def save_adapters(network: nn.Module, lora: LoraSpec, folder: Path, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft reads them.

    Args:
        network: with adapters.
        lora: what they are.
        folder: where; made if it is not there.
        base_model: name of the base model, for people and for peft.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _peft_config(lora, _shortest_targets(network), base_model).save_pretrained(folder)
    tensors = {_peft_name(name): parameter for name, parameter in network.named_parameters() if is_adapter(name)}
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    (folder / ADAPTER_WEIGHTS).write_bytes(data)


def load_adapters(network: nn.Module, lora: LoraSpec, folder: Path) -> None:
    """Put saved adapters into a model, in place.

    Args:
        network: the base model, without adapters.
        lora: what they are.
        folder: with adapter_model.safetensors.

    Raises:
        LanguageModelError: the file is of other adapters than the spec's.
    """
    add_adapters(network, lora, seed=0)
    tensors = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
    places = {_peft_name(name): parameter for name, parameter in network.named_parameters() if is_adapter(name)}
    if strangers := sorted(tensors.keys() ^ places.keys()):
        raise LanguageModelError(f"{folder / ADAPTER_WEIGHTS} holds other adapters than this model has: {strangers[0]} stands on one side only")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != places[name].shape:
                raise LanguageModelError(
                    f"{folder / ADAPTER_WEIGHTS}: {name} has the shape {tuple(tensor.shape)}, expected {tuple(places[name].shape)}"
                )
            places[name].copy_(tensor)


@torch.no_grad()
def merge_adapters(network: nn.Module) -> None:
    """Add every adapter to the weight that it goes with and take it out, in place. Sums are made in fp32, then rounded to the base's type once.

    Args:
        network: with adapters.
    """
    for name, wrapped in _adapted(network).items():
        base = wrapped.get_base_layer()
        delta = wrapped.get_delta_weight(_NAME).float()
        base.weight.copy_(base.weight.float() + delta)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, base)
    del network.peft_config  # peft's note that there are adapters
