"""The alternating schedule at work: where a step lies, its learning rates, which blocks train, and the proof that the others did not.

Input: a ScheduleSpec and a step counted over all phases. Invariant: everything here is a pure function of its arguments, so a run that resumes at
step k does what an uninterrupted one does; a block that a phase must not train has the same bytes at its end as at its start, or the phase fails.

Source: SliME's schedule (one launch per phase, cosine with warm-up each). Differs: phases alternate inside one run, blocks keep their optimizer
state.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import FrozenBlockChangedError
from model.lora import base_name, is_adapter
from model.specs import BLOCKS, Block, PhaseSpec

__all__ = [
    "LANGUAGE_MODEL_BASE",
    "Whole",
    "assert_frozen",
    "block_hashes",
    "learning_rates",
    "parameters_by_block",
    "proven_parameters",
    "schedule_factor",
    "set_active_blocks",
    "steps_before",
]

LANGUAGE_MODEL_BASE = "language_model_base"
"""What the proofs call the language model below adapters. It is no block: no phase may train it."""

Whole = Callable[[Any], AbstractContextManager[Any]]
"""Inside of what it gives, a parameter that is shared out among ranks is all there. `nullcontext` where none is."""


def steps_before(phases: Sequence[PhaseSpec], index: int) -> int:
    """Steps of all phases before one."""
    return sum(phase.steps for phase in phases[:index])


def schedule_factor(phase: PhaseSpec, step: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then half a cosine down to 0.

    Args:
        phase: with its steps and warm-up.
        step: counted from 0 within the phase.

    Returns:
        In (0, 1].

    Differs: the schedule of the authors' trainer begins at 0, so that their first step changes nothing; here the first has a share of its own.
    """
    warmup = math.ceil(phase.warmup_fraction * phase.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, phase.steps - warmup)))


def learning_rates(phase: PhaseSpec, step: int) -> dict[Block, float]:
    """Learning rate of every block that the phase trains.

    Args:
        phase: what trains, and how fast.
        step: counted from 0 within the phase.

    Returns:
        Rate by block.
    """
    factor = schedule_factor(phase, step)
    own = phase.language_model_learning_rate
    return {block: factor * (own if block == "language_model" and own is not None else phase.learning_rate) for block in phase.train}


def parameters_by_block(model: nn.Module) -> dict[Block, dict[str, nn.Parameter]]:
    """A model's parameters by block and name.

    Args:
        model: has children `connector` (whose children are named after blocks) and `language_model`.

    Returns:
        In the order of BLOCKS; blocks without parameters are left out. A language model with adapters means these alone.
    """
    found: dict[Block, dict[str, nn.Parameter]] = {}
    for block in BLOCKS:
        prefix = "language_model." if block == "language_model" else f"connector.{block}."
        if named := {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefix)}:
            found[block] = {name: parameter for name, parameter in named.items() if is_adapter(name)} or named
    return found


def proven_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """What a phase's proof covers: every block, and the language model below adapters where there are any.

    Args:
        model: as for `parameters_by_block`.

    Returns:
        By block; the base as LANGUAGE_MODEL_BASE, under the names that its parameters have without adapters, so that its hash is the one that the
        language model had when it was frozen as a whole.
    """
    blocks = parameters_by_block(model)
    found: dict[str, dict[str, nn.Parameter]] = dict(blocks.items())
    if any(is_adapter(name) for name in blocks.get("language_model", {})):
        named = model.named_parameters()
        found[LANGUAGE_MODEL_BASE] = {
            base_name(name): parameter for name, parameter in named if name.startswith("language_model.") and not is_adapter(name)
        }
    return found


def set_active_blocks(blocks: Mapping[Block, Mapping[str, nn.Parameter]], active: Sequence[Block]) -> None:
    """Let gradients reach the active blocks alone.

    Args:
        blocks: what `parameters_by_block` gave.
        active: what trains now.

    Raises:
        FrozenBlockChangedError: a block to train is not there: nothing would train it, without a sign.
    """
    if missing := [block for block in active if block not in blocks]:
        raise FrozenBlockChangedError(
            f"a phase trains {missing}, but the model has the blocks {list(blocks)} only; name blocks that the connector has"
        )
    for block, parameters in blocks.items():
        for parameter in parameters.values():
            parameter.requires_grad_(block in active)
            if block not in active:
                parameter.grad = None


def block_hashes(
    blocks: Mapping[str, Mapping[str, Tensor]] | Mapping[Block, Mapping[str, nn.Parameter]],
    whole: Whole = nullcontext,
) -> dict[str, str]:
    """sha256 (hex) over the names, shapes and numbers of every block's parameters, to the bit.

    Numbers of half precision count as what they are in fp32: a frozen language model is held in either type, by device, and a run may go on on
    another device.

    Args:
        blocks: what `parameters_by_block` or `proven_parameters` gave.
        whole: inside of it a parameter that is shared out among ranks is all there; then all ranks must call this.

    Returns:
        Digest by block.
    """
    hashes: dict[str, str] = {}
    for block, parameters in blocks.items():
        digest = hashlib.sha256()
        for name, parameter in sorted(parameters.items()):
            with whole(parameter):
                values = parameter.detach().cpu()
                if values.dtype in (torch.bfloat16, torch.float16):
                    values = values.float()
                digest.update(f"{name}:{values.dtype}:{tuple(values.shape)};".encode())
                digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        hashes[block] = digest.hexdigest()
    return hashes


def assert_frozen(before: Mapping[str, str], after: Mapping[str, str], phase: PhaseSpec) -> None:
    """Check that a phase changed what it trains and nothing else may have changed.

    Args:
        before: hashes at the phase's start.
        after: hashes at its end.
        phase: what it was to train.

    Raises:
        FrozenBlockChangedError: another block's bytes differ.
    """
    changed = [block for block in before if block not in phase.train and before[block] != after.get(block)]
    if changed:
        raise FrozenBlockChangedError(
            f"phase {phase.name!r} trains {list(phase.train)}, yet {changed} changed as well; its result is not what the schedule says. "
            "Nothing of this phase is kept; report it with the versions of torch and deepspeed"
        )
