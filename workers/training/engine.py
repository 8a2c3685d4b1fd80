"""One optimizer step over a phase's active blocks: DeepSpeed's engine, and a plain torch twin that tests hold it to.

Input: micro-batches of one rank. Output: loss sums and the gradient's norm. Every trainable block has a parameter group of its own from the start;
which of them train is switched by `requires_grad` between steps, so a block keeps its optimizer state while others train.

Invariant: a block that is not active is bit-identical after a step, state included. That holds on ZeRO-0, where a parameter without a gradient is
skipped; ZeRO-1 and 2 fill missing gradients with zeros and let Adam's momentum move "frozen" weights (32 % of their norm in 10 steps, measured), so
those stages take blocks that all train and nothing else.

Optimizer state leaves and enters as named fp32 tensors, free of ranks and of pickles.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.schedule import parameters_by_block, set_active_blocks
from model.specs import Block
from model.vision_language import Batch, VisionLanguageModel
from workers.errors import TrainingError

__all__ = ["DeepSpeedEngine", "Engine", "StepSums", "TorchEngine", "solo_process_group"]

ZeroStage = Literal[0, 1, 2]

_STATE_NAMES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSums:
    """What a step did, over all ranks."""

    loss: float
    """Mean over the supervised tokens, in nats."""
    accuracy: float
    """Share of supervised tokens predicted right."""
    gradient_norm: float
    """Before clipping."""


@runtime_checkable
class Engine(Protocol):
    """Steps a model's active blocks."""

    model: VisionLanguageModel

    def set_active(self, active: Sequence[Block]) -> None:
        """From now on these blocks train and no other."""

    def step(self, micro_batches: Sequence[Batch], *, supervised: int, rates: Mapping[Block, float], max_grad_norm: float) -> StepSums:
        """One optimizer step.

        Args:
            micro_batches: of this rank.
            supervised: tokens that the summed loss is divided by: those of all ranks.
            rates: learning rate of every active block.
            max_grad_norm: the gradient of all active blocks is scaled down to this norm.

        Returns:
            Sums over all ranks.
        """

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """State of the optimizer by parameter name and kind. All ranks must call it."""

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from saved state. Call it before the first step."""

    def close(self) -> None:
        """Give back memory and hooks."""


def _adamw(blocks: Mapping[Block, Mapping[str, nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW without weight decay, one group per block. torch's own: nothing is compiled at run time."""
    groups = [{"params": list(parameters.values()), "name": block, "lr": 0.0} for block, parameters in blocks.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def _set_rates(optimizer: Any, blocks: Mapping[Block, Any], rates: Mapping[Block, float]) -> None:
    for block, group in zip(blocks, optimizer.param_groups, strict=True):
        group["lr"] = rates.get(block, 0.0)


def _named_state(optimizer: torch.optim.AdamW, blocks: Mapping[Block, Mapping[str, nn.Parameter]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for parameters in blocks.values():
        for name, parameter in parameters.items():
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}:{kind}"] = value.detach().clone()
    return tensors


def _restore_state(optimizer: torch.optim.AdamW, blocks: Mapping[Block, Mapping[str, nn.Parameter]], tensors: Mapping[str, Tensor]) -> None:
    known = {name: parameter for parameters in blocks.values() for name, parameter in parameters.items()}
    if strangers := sorted({key.rpartition(":")[0] for key in tensors} - known.keys()):
        raise TrainingError(f"the saved optimizer state is of another model: it holds {strangers[:3]}; remove the checkpoint or restore the recipe")
    for key, value in tensors.items():
        name, _, kind = key.rpartition(":")
        state = optimizer.state[known[name]]
        state[kind] = value.clone() if kind == "step" else value.to(known[name].device, copy=True)


def _fill_missing(parameters: Sequence[nn.Parameter]) -> None:
    """Zeros for active parameters that a batch did not touch, so that the same steps are taken whatever the number of ranks."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _tied(total: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """A loss that backward() accepts, also when no sample of the batch reaches an active block (blind samples of a frozen language model)."""
    if total.requires_grad:
        return total
    return total + 0.0 * next(parameter for parameter in parameters if parameter.requires_grad).sum()


class _AtOnce(torch.autograd.Function):
    """Gives tensors on, and their gradients back all at once: zeros for those that nothing asked for."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004 - nothing is kept; gradients come materialised
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return gradients


class _InOneOrder(nn.Module):
    """A model whose connector gets its gradients whole, last and in one order, whatever a batch reaches of it.

    ZeRO-1 and 2 sum gradients over ranks in buckets that they fill as gradients come. A rank whose samples reach other blocks than another's (text
    alone, blind ones, one branch) would fill them otherwise: the sum hangs, dies, or adds gradients of different parameters. Every sequence reaches
    the language model, in the same order. autograd runs what was made first last, so what is routed before anything else has its gradient behind it.

    Args:
        model: to run.
        names: of the parameters that may or may not be reached.
    """

    def __init__(self, model: VisionLanguageModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(names)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """As the model's."""
        if not self._names:
            return self.model(batch)  # type: ignore[no-any-return]
        routed = _AtOnce.apply(*(self.model.get_parameter(name) for name in self._names))  # type: ignore[no-untyped-call]
        objective, total, correct = torch.func.functional_call(self.model, dict(zip(self._names, routed, strict=True)), (batch,))
        return objective + 0.0 * routed[0].sum(), total, correct


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _step_sums(total: Tensor, correct: Tensor, supervised: int, norm: Tensor | float) -> StepSums:
    sums = torch.stack([total.double(), correct.double()])
    if _world() > 1:
        dist.all_reduce(sums)
    loss, right = (sums / max(1, supervised)).tolist()
    return StepSums(loss=loss, accuracy=right, gradient_norm=float(norm))


class TorchEngine:
    """The twin: torch alone, gradients summed over ranks by hand. The oracle of the tests.

    Args:
        model: to train.
        trainable: blocks that get optimizer state.
    """

    def __init__(self, model: VisionLanguageModel, trainable: Sequence[Block]) -> None:
        self.model = model
        self._all = parameters_by_block(model)
        self._blocks = {block: self._all[block] for block in self._all if block in trainable}
        self._parameters = [parameter for parameters in self._blocks.values() for parameter in parameters.values()]
        self._optimizer = _adamw(self._blocks)

    def set_active(self, active: Sequence[Block]) -> None:
        """As Engine.set_active."""
        set_active_blocks(self._all, active)

    def step(self, micro_batches: Sequence[Batch], *, supervised: int, rates: Mapping[Block, float], max_grad_norm: float) -> StepSums:
        """As Engine.step."""
        totals, rights = [], []
        for batch in micro_batches:
            objective, total, correct = self.model(batch)
            (_tied(objective, self._parameters) / max(1, supervised)).backward()
            totals.append(total)
            rights.append(correct)
        _fill_missing(self._parameters)
        active = [parameter for parameter in self._parameters if parameter.requires_grad]
        if _world() > 1:
            for parameter in active:
                dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(active, max_grad_norm)
        _set_rates(self._optimizer, self._blocks, rates)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return _step_sums(torch.stack(totals).sum(), torch.stack(rights).sum(), supervised, norm)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As Engine.optimizer_tensors."""
        return _named_state(self._optimizer, self._blocks)

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """As Engine.load_optimizer_tensors."""
        _restore_state(self._optimizer, self._blocks, tensors)

    def close(self) -> None:
        """As Engine.close."""
        self._optimizer.state.clear()


class DeepSpeedEngine:
    """DeepSpeed around the same optimizer. Needs an initialised process group: Ray Train's, or `solo_process_group`.

    Args:
        model: to train, on its device.
        trainable: blocks that get optimizer state. On ZeRO-1 and 2 all of them must train in every step.
        zero_stage: 0 for alternating phases; 1 or 2 shard optimizer state (and gradients) of fine-tuning over ranks.
        max_grad_norm: needed by ZeRO-1 and 2, which clip by a norm fixed at the start.
        largest_micro_batch: samples in a micro-batch; DeepSpeed wants to know, nothing follows from it.

    Raises:
        TrainingError: the process group is missing.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        trainable: Sequence[Block],
        *,
        zero_stage: ZeroStage = 0,
        max_grad_norm: float = 1.0,
        largest_micro_batch: int = 1,
    ) -> None:
        if not dist.is_initialized():
            raise TrainingError("DeepSpeed needs a process group: train under Ray Train, or inside solo_process_group()")
        deepspeed = _import_deepspeed(model.device)
        self.model = model
        self._zero_stage = zero_stage
        self._all = parameters_by_block(model)
        self._blocks = {block: self._all[block] for block in self._all if block in trainable}
        self._parameters = [parameter for parameters in self._blocks.values() for parameter in parameters.values()]
        set_active_blocks(self._all, list(self._blocks))
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": largest_micro_batch,
            "gradient_accumulation_steps": 1,  # boundaries are set by hand: phases differ in batch size
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "gradient_clipping": max_grad_norm if zero_stage else 0.0,
        }
        reached = [name for block in self._blocks if zero_stage and block != "language_model" for name in self._blocks[block]]
        module = _InOneOrder(model, reached)
        self._engine, optimizer, _, _ = deepspeed.initialize(model=module, optimizer=_adamw(self._blocks), config=config, dist_init_required=False)
        self._optimizer = optimizer

    def set_active(self, active: Sequence[Block]) -> None:
        """As Engine.set_active.

        Args:
            active: blocks.

        Raises:
            TrainingError: some blocks would rest on a stage that moves resting blocks.
        """
        if self._zero_stage and set(active) != set(self._blocks):
            raise TrainingError(
                f"on ZeRO-{self._zero_stage} all of {list(self._blocks)} must train in every step, found {list(active)}: resting blocks would be "
                "moved by their momentum; use zero_stage=0"
            )
        set_active_blocks(self._all, active)

    def step(self, micro_batches: Sequence[Batch], *, supervised: int, rates: Mapping[Block, float], max_grad_norm: float) -> StepSums:
        """As Engine.step."""
        totals, rights = [], []
        world = _world()
        for number, batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(number + 1 == len(micro_batches))
            objective, total, correct = self._engine(batch)
            # DeepSpeed averages gradients over ranks; the loss is a sum over all of them.
            self._engine.backward(_tied(objective, self._parameters) * (world / max(1, supervised)), scale_wrt_gas=False)
            totals.append(total)
            rights.append(correct)
        _set_rates(self._optimizer, self._blocks, rates)
        norm: Tensor | float
        if self._zero_stage == 0:
            _fill_missing(self._parameters)
            active = [parameter for parameter in self._parameters if parameter.requires_grad]
            norm = nn.utils.clip_grad_norm_(active, max_grad_norm)
            self._engine.step()
        else:
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
        return _step_sums(torch.stack(totals).sum(), torch.stack(rights).sum(), supervised, norm)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As Engine.optimizer_tensors."""
        if self._zero_stage == 0:
            return _named_state(self._optimizer, self._blocks)
        tensors: dict[str, Tensor] = {}
        for names, parameters, state in self._shards():
            for kind in _STATE_NAMES:
                # Every rank holds one slice of a group's parameters laid end to end, padded to a common length.
                slices = [torch.empty_like(state[kind]) for _ in range(_world())]
                dist.all_gather(slices, state[kind])
                flat, start = torch.cat(slices), 0
                for name, parameter in zip(names, parameters, strict=True):
                    tensors[f"{name}:{kind}"] = flat[start : start + parameter.numel()].reshape(parameter.shape).clone()
                    start += parameter.numel()
            tensors |= {f"{name}:step": torch.as_tensor(state["step"], dtype=torch.float32).clone() for name in names}
        return tensors

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """As Engine.load_optimizer_tensors."""
        if self._zero_stage == 0:
            _restore_state(self._optimizer, self._blocks, tensors)
            return
        rank = dist.get_rank()
        for (names, _, state), partition in zip(self._shards(), self._optimizer.single_partition_of_fp32_groups, strict=True):
            for kind in _STATE_NAMES:
                flat = torch.cat([tensors[f"{name}:{kind}"].flatten() for name in names])
                padded = nn.functional.pad(flat, (0, partition.numel() * _world() - flat.numel()))
                state[kind] = padded[rank * partition.numel() : (rank + 1) * partition.numel()].to(partition.device, copy=True)
            state["step"] = tensors[f"{names[0]}:step"].clone()

    def close(self) -> None:
        """As Engine.close."""
        self._engine.destroy()

    def _shards(self) -> list[tuple[list[str], list[nn.Parameter], dict[str, Any]]]:
        """For every group of ZeRO-1 or 2: its parameters in the order in which they lie end to end, and this rank's slice of their state."""
        names = {parameter: name for parameters in self._blocks.values() for name, parameter in parameters.items()}
        shards = []
        for group, partition in zip(self._optimizer.round_robin_bit16_groups, self._optimizer.single_partition_of_fp32_groups, strict=True):
            shards.append(([names[parameter] for parameter in group], list(group), self._optimizer.optimizer.state[partition]))
        return shards


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, without its build of a C++ extension at the first process group (74 s, needs a compiler) and without its chatter."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import logging

    import deepspeed
    import deepspeed.ops

    compatible = deepspeed.ops.__compatible_ops__
    if "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    return deepspeed


def solo_process_group() -> None:
    """A process group of this process alone, on gloo, where none is there yet. Opens no port."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
