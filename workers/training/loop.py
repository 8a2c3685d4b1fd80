"""The loop of one stage: phases over one engine, checkpoints, the proof of what stayed frozen.

Input: an engine, a batch builder and where to save. Output: records of the phases. The same loop runs under Ray Train on any number of ranks and, in
tests, in a plain process. Invariant: state is (phase, step), weights and optimizer; from them everything that follows is determined, so a run that
was interrupted anywhere ends in the same bytes as one that was not (same number of ranks and threads).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from model.schedule import assert_frozen, block_hashes, learning_rates, proven_parameters, steps_before
from model.specs import PhaseSpec, ScheduleSpec
from workers.commits import from_json, to_json
from workers.errors import TrainingError
from workers.training.batches import BatchBuilder, Prefetcher, StepBatches
from workers.training.checkpoints import CheckpointFolder, Saved, weights_of
from workers.training.engine import Engine
from workers.training.progress_log import MetricsLog
from workers.training.spec import PhaseRecord

__all__ = ["StageName", "StageState", "run_stage", "stage_phases"]

StageName = Literal["align", "sft"]


def stage_phases(schedule: ScheduleSpec, stage: StageName) -> range:
    """Indices of the phases that a stage runs.

    Args:
        schedule: the whole of it.
        stage: align or sft.

    Returns:
        Indices into `schedule.phases`.
    """
    if stage == "align":
        return range(len(schedule.align))
    return range(len(schedule.align), len(schedule.phases))


@dataclass(kw_only=True, slots=True)
class StageState:
    """Where a stage is."""

    phase: int
    """Index in the schedule; one past the stage's last phase when it is done."""
    step: int = 0
    """Steps of the phase that are done."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Of every block at the phase's start; empty before the phase began."""
    losses: list[float] = field(default_factory=list)
    """Of the phase's steps so far."""
    seconds: float = 0.0
    """Of the phase's kept steps."""
    num_missing: int = 0
    """Over all ranks, of the phase's steps up to the last checkpoint: features that were not there, and were computed or replaced."""
    num_missing_since: int = 0
    """Of this rank alone, of the steps since then."""
    records: list[PhaseRecord] = field(default_factory=list)
    """Of the stage's finished phases."""


def _state_json(state: StageState, context: dict[str, Any]) -> dict[str, Any]:
    return {
        "phase": state.phase,
        "step": state.step,
        "hashes": state.hashes,
        "losses": state.losses,
        "seconds": state.seconds,
        "num_missing": state.num_missing,
        "records": to_json(state.records),
        "context": context,
    }


def _state_from(saved: Saved, context: dict[str, Any]) -> StageState:
    found = saved.state["context"]
    if differing := [name for name in context if found.get(name) != context[name]]:
        raise TrainingError(
            f"the checkpoint was made under other conditions: {', '.join(f'{n} was {found.get(n)!r}, is {context[n]!r}' for n in differing)}; "
            "restore them or remove the checkpoints"
        )
    return StageState(
        phase=saved.state["phase"],
        step=saved.state["step"],
        hashes=saved.state["hashes"],
        losses=saved.state["losses"],
        seconds=saved.state["seconds"],
        num_missing=saved.state.get("num_missing", 0),
        records=[from_json(PhaseRecord, record) for record in saved.state["records"]],
    )


def run_stage(
    stage: StageName,
    *,
    engine: Engine,
    builder: BatchBuilder,
    checkpoints: CheckpointFolder,
    metrics: MetricsLog | None,
    context: dict[str, Any],
    checkpoint_every_steps: int,
    micro_batch_size: int | None = None,
    device: torch.device | str = "cpu",
) -> StageState:
    """Run a stage from its last checkpoint to its end.

    Args:
        stage: align or sft.
        engine: around a model with its initial weights; a checkpoint's replace them.
        builder: of batches.
        checkpoints: read by all ranks, written by rank 0.
        metrics: of rank 0; None elsewhere.
        context: what a checkpoint must have been made under, e.g. the run's fingerprint.
        checkpoint_every_steps: besides those at phase ends.
        micro_batch_size: most samples in a forward pass.
        device: where batches go.

    Returns:
        The final state with a record per phase.

    Raises:
        FrozenBlockChangedError: a phase changed what it must not train.
        TrainingError: a checkpoint does not fit, or the loss is no number any more.
    """
    schedule = builder.schedule
    phases = stage_phases(schedule, stage)
    state = StageState(phase=phases.start)
    saved = checkpoints.latest()
    if saved is not None:
        state = _state_from(saved, context)
        engine.load_weights(saved.model)
        engine.load_optimizer_tensors(saved.optimizer)
        del saved
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    blocks = proven_parameters(engine.model)
    with_language_model = any("language_model" in schedule.phases[index].train for index in phases)

    def share_missing() -> None:
        counted = torch.tensor(state.num_missing_since, device=device)
        if world > 1:
            dist.all_reduce(counted)
        state.num_missing, state.num_missing_since = state.num_missing + int(counted), 0

    def save(hashes: Mapping[str, str]) -> None:
        optimizer = engine.optimizer_tensors()  # all ranks: what is shared out is gathered
        weights = weights_of(engine.model, with_language_model=with_language_model, whole=engine.whole, keep=rank == 0)
        if rank == 0:
            _check_saved(weights, blocks, hashes)
            if metrics is not None:
                metrics.flush()
            step = steps_before(schedule.phases, state.phase) + state.step
            checkpoints.save(Saved(step=step, model=weights, optimizer=optimizer, state=_state_json(state, context)))

    if metrics is not None:
        metrics.rewind(steps_before(schedule.phases, state.phase) + state.step, stage)
    prefetcher = Prefetcher(lambda: _upcoming(builder, phases, state.phase, state.step, rank, world, micro_batch_size))
    try:
        steps = iter(prefetcher)
        while state.phase in phases:
            phase = schedule.phases[state.phase]
            engine.set_active(phase.train)
            if not state.hashes:
                state.hashes = block_hashes(blocks, engine.whole)
            started = time.monotonic()
            while state.step < phase.steps:
                _step(engine, steps, phase, state, metrics, schedule, device)
                if state.step % checkpoint_every_steps == 0 and state.step < phase.steps:
                    state.seconds += time.monotonic() - started
                    share_missing()
                    save({})
                    started = time.monotonic()
            state.seconds += time.monotonic() - started
            after = block_hashes(blocks, engine.whole)
            assert_frozen(state.hashes, after, phase)
            share_missing()
            state.records.append(_record(phase, state, after))
            state.phase, state.step, state.hashes, state.losses, state.seconds, state.num_missing = state.phase + 1, 0, {}, [], 0.0, 0
            save(after)
    finally:
        prefetcher.close()
    return state


def _check_saved(weights: Mapping[str, Tensor], blocks: Mapping[str, Mapping[str, Tensor]], hashes: Mapping[str, str]) -> None:
    """What is about to be saved as a phase's result is what its proof was made of, byte for byte."""
    saved = {block: {name: weights[name] for name in parameters} for block, parameters in blocks.items() if parameters.keys() <= weights.keys()}
    if differing := [block for block, found in block_hashes(saved).items() if hashes.get(block, found) != found]:
        raise TrainingError(
            f"the weights of {differing} that were to be saved are not those that were trained; nothing was written, the last checkpoint is from "
            "before"
        )


def _upcoming(
    builder: BatchBuilder, phases: range, phase: int, step: int, rank: int, world: int, micro_batch_size: int | None
) -> Iterator[StepBatches]:
    for index in range(phase, phases.stop):
        for number in range(step if index == phase else 0, builder.schedule.phases[index].steps):
            yield builder.build(index, number, rank=rank, world=world, micro_batch_size=micro_batch_size)


def _step(
    engine: Engine,
    steps: Iterator[StepBatches],
    phase: PhaseSpec,
    state: StageState,
    metrics: MetricsLog | None,
    schedule: ScheduleSpec,
    device: torch.device | str,
) -> None:
    started = time.monotonic()
    batches = next(steps)
    waited = time.monotonic() - started
    rates = learning_rates(phase, state.step)
    micro_batches = [batch.to(device) for batch in batches.micro_batches]
    sums = engine.step(micro_batches, supervised=batches.supervised, rates=rates, max_grad_norm=phase.max_grad_norm)
    if not (isfinite(sums.loss) and isfinite(sums.gradient_norm)):
        raise TrainingError(
            f"phase {phase.name!r}: at step {state.step} the loss is {sums.loss} and the gradient's norm {sums.gradient_norm}; lower learning_rate "
            "or max_grad_norm. The last checkpoint is from before"
        )
    seconds = time.monotonic() - started
    state.losses.append(sums.loss)
    state.num_missing_since += batches.num_missing
    if metrics is not None:
        metrics.add(
            {
                "step": steps_before(schedule.phases, state.phase) + state.step,
                "phase": phase.name,
                "loss": sums.loss,
                "token_accuracy": sums.accuracy,
                "gradient_norm": sums.gradient_norm,
                "learning_rate": float(max(rates.values())),
                "supervised_tokens": batches.supervised,
                "samples": batches.samples,
                "seconds": seconds,
                "waited_seconds": waited,
                "samples_per_second": batches.samples / max(seconds, 1e-9),
            }
        )
    state.step += 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _record(phase: PhaseSpec, state: StageState, after: dict[str, str]) -> PhaseRecord:
    tenth = max(1, phase.steps // 10)
    return PhaseRecord(
        name=phase.name,
        train=phase.train,
        steps=phase.steps,
        seconds=state.seconds,
        first_loss=_mean(state.losses[:tenth]),
        last_loss=_mean(state.losses[-tenth:]),
        samples=phase.steps * phase.batch_size,
        hashes_before=state.hashes,
        hashes_after=after,
        num_missing=state.num_missing,
    )
