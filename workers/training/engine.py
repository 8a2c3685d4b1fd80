"""One optimizer step over a phase's active blocks: DeepSpeed's engine, and a plain torch twin that tests hold it to.

Input: micro-batches of one rank. Output: loss sums and the gradient's norm. Every trainable block has a parameter group of its own from the start;
which of them train is switched by `requires_grad` between steps, so a block keeps its optimizer state while others train.

Invariant: a block that is not active is bit-identical after a step, state included. That holds on ZeRO-0, where a parameter without a gradient is
skipped. ZeRO-1, 2 and 3 fill missing gradients with zeros and let Adam's momentum move "frozen" weights (32 % of their norm in 10 steps, measured),
so 1 and 2 take blocks that all train and nothing else, and on 3, which alone shares a frozen language model out, the optimizer does not see the
groups of resting blocks.

On those stages every block runs in every micro-batch (see `VisionLanguageModel.runs_every_block`): ranks that share gradients or parameters out have
to meet in the same order, and a block that a rank's samples do not show would be missed by the others.

Weights and optimizer state leave and enter whole, as named tensors, free of ranks and of pickles.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.schedule import parameters_by_block, set_active_blocks
from model.specs import Block
from model.vision_language import Batch, VisionLanguageModel
from workers.errors import TrainingError
from workers.training.checkpoints import load_weights

__all__ = ["DeepSpeedEngine", "Engine", "StepSums", "TorchEngine", "solo_process_group"]

ZeroStage = Literal[0, 1, 2, 3]

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

    def whole(self, parameter: Any) -> AbstractContextManager[Any]:
        """Inside of it a parameter is all there on every rank. All ranks must enter it, in the same order."""

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from saved weights, as `checkpoints.weights_of` gave them; the same ones on all ranks. Call it before the first step."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """State of the optimizer by parameter name and kind. All ranks must call it; where it is shared out, rank 0 alone gets it whole."""

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from saved state. Call it before the first step."""

    def close(self) -> None:
        """Give back memory and hooks."""


class _PhasedAdamW(torch.optim.AdamW):
    """AdamW that steps the groups of active blocks alone: weights, moments and clocks of the others stand still, whatever gradients they get."""

    active: frozenset[str] = frozenset()

    def step(self, closure: Any = None) -> Any:
        """One step of the active groups."""
        every = self.param_groups
        self.param_groups = [group for group in every if group["name"] in self.active]
        try:
            return super().step(closure)
        finally:
            self.param_groups = every


def _adamw(blocks: Mapping[Block, Mapping[str, nn.Parameter]]) -> _PhasedAdamW:
    """AdamW without weight decay, one group per block. torch's own: nothing is compiled at run time."""
    groups = [{"params": list(parameters.values()), "name": block, "lr": 0.0} for block, parameters in blocks.items()]
    optimizer = _PhasedAdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer.active = frozenset(blocks)
    return optimizer


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
        self._optimizer.active = frozenset(active)

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

    def whole(self, parameter: Any) -> AbstractContextManager[Any]:
        """As Engine.whole."""
        return nullcontext(parameter)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """As Engine.load_weights."""
        load_weights(self.model, tensors)

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
        zero_stage: 0 or 3 for alternating phases; 1, 2 and 3 share optimizer state, gradients, weights out over ranks.
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
        model.runs_every_block = zero_stage > 0
        self._shapes = {parameter: parameter.shape for parameter in model.parameters()}
        # Vectors (norms, biases) stay whole: gathering each would cost more than it saves.
        sharding = {"stage3_param_persistence_threshold": model.connector.hidden} if zero_stage == 3 else {}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": largest_micro_batch,
            "gradient_accumulation_steps": 1,  # boundaries are set by hand: phases differ in batch size
            "zero_optimization": {"stage": zero_stage, **sharding},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "gradient_clipping": max_grad_norm if zero_stage else 0.0,
        }
        self._adamw = _adamw(self._blocks)
        self._engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self._adamw, config=config, dist_init_required=False)
        self._optimizer = optimizer
        self._gathered = deepspeed.zero.GatheredParameters

    def set_active(self, active: Sequence[Block]) -> None:
        """As Engine.set_active.

        Args:
            active: blocks.

        Raises:
            TrainingError: some blocks would rest on a stage that moves resting blocks.
        """
        if self._zero_stage in (1, 2) and set(active) != set(self._blocks):
            raise TrainingError(
                f"on ZeRO-{self._zero_stage} all of {list(self._blocks)} must train in every step, found {list(active)}: resting blocks would be "
                "moved by their momentum; use zero_stage=0 or 3"
            )
        set_active_blocks(self._all, active)
        self._adamw.active = frozenset(active)

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
            self._optimizer.clip_grad = max_grad_norm  # of this phase
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
        return _step_sums(torch.stack(totals).sum(), torch.stack(rights).sum(), supervised, norm)

    @contextlib.contextmanager
    def whole(self, parameter: Any) -> Iterator[None]:
        """As Engine.whole.

        Args:
            parameter: of the model; what is none is left as it is.

        Yields:
            Nothing; the parameter is there meanwhile.

        Raises:
            TrainingError: it was gathered in another shape than it had.
        """
        if self._zero_stage < 3 or not isinstance(parameter, nn.Parameter):
            yield
            return
        with self._gathered([parameter]):
            if parameter.shape != self._shapes[parameter]:
                raise TrainingError(
                    f"ZeRO-3 gathered a parameter of shape {tuple(self._shapes[parameter])} as {tuple(parameter.shape)}; nothing of it is used. "
                    "Report it with the version of deepspeed"
                )
            yield

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """As Engine.load_weights."""
        if self._zero_stage < 3:
            load_weights(self.model, tensors)
            return
        changed = [parameter for name, parameter in self.model.named_parameters() if name in tensors]
        with self._gathered(changed, modifier_rank=0):
            load_weights(self.model, tensors)  # rank 0's are the ones that are shared out again
        self._optimizer.refresh_fp32_params()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As Engine.optimizer_tensors."""
        if self._zero_stage == 0:
            return _named_state(self._optimizer, self._blocks)
        if self._zero_stage == 3:
            return self._gathered_state()
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
        if self._zero_stage == 3:
            for flat, group in zip(self._optimizer.fp32_partitioned_groups_flat, self._named_groups(), strict=True):
                if f"{group[0][0]}:step" in tensors:
                    self._optimizer.optimizer.state[flat] = self._part_of_state(flat, group, tensors, rank)
            return
        for (names, _, state), partition in zip(self._shards(), self._optimizer.single_partition_of_fp32_groups, strict=True):
            for kind in _STATE_NAMES:
                flat = torch.cat([tensors[f"{name}:{kind}"].flatten() for name in names])
                padded = nn.functional.pad(flat, (0, partition.numel() * _world() - flat.numel()))
                state[kind] = padded[rank * partition.numel() : (rank + 1) * partition.numel()].to(partition.device, copy=True)
            state["step"] = tensors[f"{names[0]}:step"].clone()

    def close(self) -> None:
        """As Engine.close."""
        self._engine.destroy()

    def _named_groups(self) -> list[list[tuple[str, Any]]]:
        """The parameters of every group that ZeRO-3 steps at once, in the order in which a rank's parts of them lie end to end."""
        names = {parameter: name for parameters in self._blocks.values() for name, parameter in parameters.items()}
        return [[(names[parameter], parameter) for parameter in group] for group in self._optimizer.fp16_groups]

    def _gathered_state(self) -> dict[str, Tensor]:
        """ZeRO-3's state, put together one parameter at a time: the device holds one of them whole at most."""
        tensors: dict[str, Tensor] = {}
        for flat, group in zip(self._optimizer.fp32_partitioned_groups_flat, self._named_groups(), strict=True):
            state = self._optimizer.optimizer.state.get(flat, {})
            start = 0
            for name, parameter in group:
                size = parameter.partition_numel()
                for kind in _STATE_NAMES if state else ():
                    parts = [flat.new_empty(size) for _ in range(_world())]
                    dist.all_gather(parts, state[kind].narrow(0, start, size).contiguous())
                    if dist.get_rank() == 0:
                        shape = self._shapes[parameter]
                        tensors[f"{name}:{kind}"] = torch.cat(parts)[: shape.numel()].reshape(shape).cpu()
                if state and dist.get_rank() == 0:
                    tensors[f"{name}:step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone()
                start += size
        return tensors

    def _part_of_state(self, flat: Tensor, group: Sequence[tuple[str, Any]], tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """One rank's part of a group's state, padded as ZeRO-3 pads it: every parameter by itself."""
        state: dict[str, Tensor] = {"step": tensors[f"{group[0][0]}:step"].clone()}
        for kind in _STATE_NAMES:
            state[kind], start = torch.zeros_like(flat), 0
            for name, parameter in group:
                size = parameter.partition_numel()
                whole = tensors[f"{name}:{kind}"].flatten()
                padded = nn.functional.pad(whole, (0, size * _world() - whole.numel()))
                state[kind].narrow(0, start, size).copy_(padded[rank * size : (rank + 1) * size])
                start += size
        return state

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
