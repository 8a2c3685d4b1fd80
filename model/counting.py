"""Numbers of parameters without the parameters: modules built on torch's meta device, where a tensor has a shape and no bytes.

Input: specs, or a language model's config. Output: counts. Invariant: what is counted is what is built: the same constructors run.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import torch

from model.connector import Connector, build_connector
from model.errors import LanguageModelError, first_line
from model.language_model import context_tokens
from model.specs import AdapterSpec, ConnectorSpec, EncoderSpec, GatedMixtureSpec, MLPSpec

__all__ = ["LanguageModelShape", "count_by_block", "count_fixed_numbers", "empty_connector", "language_model_shape"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelShape:
    """What a plan has to know of a language model."""

    context_tokens: int
    """Longest sequence that it allows."""
    hidden: int
    """Width of its input embeddings."""
    num_parameters: int
    """Tied ones counted once."""


def empty_connector(spec: ConnectorSpec, encoder: EncoderSpec, *, hidden: int) -> Connector:
    """A connector with the shapes that it will have and without any numbers.

    Args:
        spec: what to build.
        encoder: whose maps it would read.
        hidden: the language model's width.

    Returns:
        The connector on the meta device.
    """
    # A positional start measures what it has drawn, and there is nothing to measure here; how a resampler starts does not change its shapes.
    local = spec.local_branch
    if local is not None and local.compression is not None:
        local = replace(local, compression=replace(local.compression, attention_init="authors"))
    branch = replace(spec.global_branch, adapters=_started_at_random(spec.global_branch.adapters))
    shaped = replace(spec, global_branch=branch, local_branch=local)
    with torch.device("meta"):
        return build_connector(shaped, encoder, hidden=hidden, embedding_rms=1.0, seed=0)


def _started_at_random(adapters: AdapterSpec) -> AdapterSpec:
    match adapters:
        case MLPSpec():
            return adapters
        case GatedMixtureSpec():
            return replace(adapters, attention_init="authors")
        case _:
            assert_never(adapters)


def count_by_block(connector: Connector) -> dict[str, int]:
    """Parameters of each block.

    Args:
        connector: built, empty or not.

    Returns:
        Numbers by block, in the order in which the connector holds them.
    """
    counts: dict[str, int] = {}
    for name, parameter in connector.named_parameters():
        block = name.split(".")[0]
        counts[block] = counts.get(block, 0) + parameter.numel()
    return counts


def count_fixed_numbers(connector: Connector) -> int:
    """Numbers that a connector holds and no phase trains: codes of places, standardisation, the embeddings' scale.

    Args:
        connector: built, empty or not.

    Returns:
        Their number.
    """
    return sum(buffer.numel() for buffer in connector.buffers())


def language_model_shape(folder: Path) -> LanguageModelShape:
    """The shape of a language model by its config alone.

    Args:
        folder: with a config.json in transformers' layout.

    Returns:
        The shape.

    Raises:
        LanguageModelError: the config cannot be read, or is of no causal language model that transformers knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    context = context_tokens(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise LanguageModelError(f"language model {folder}: its config.json describes no causal language model ({first_line(error)})") from error
    return LanguageModelShape(
        context_tokens=context,
        hidden=int(network.get_input_embeddings().weight.shape[1]),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
