"""Stage train-connector: two Ray Train runs, align and sft, each resumed from our own checkpoints.

    spec -> [align: all alignment phases on one engine] -> [sft: a fresh engine in a fresh process] -> checkpoints/<key>/final -> record

Every process of the cluster may die at any moment. What is done is what a checkpoint's manifest says; Ray's own checkpoints are not used, since they
count only once its controller has polled them. Invariant: a stage whose last checkpoint is there is not started again.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from model.errors import ModelError, first_line
from model.schedule import steps_before
from model.specs import CONNECTOR_BLOCKS, fingerprint
from workers.commits import Stage, from_json
from workers.errors import ClusterError, ObjectNotFoundError, StorageError, TrainingError, WorkerError, WorkFailedError
from workers.execution import ExecutionSettings, Progress, SilentProgress
from workers.runtime import gpu_failure, ray_runtime
from workers.storage import Store
from workers.training.spec import PhaseRecord, TrainingRecord, TrainingSpec

__all__ = ["TrainingRecord", "TrainingSpec", "train_connector", "train_stage"]

_MEASURED_IMAGES = 64
"""Images on which the connector's input standardisation is measured: 4,096 global and 24,576 local patches at 64 patches a view."""

_STAGES = ("align", "sft")


@dataclass(frozen=True, kw_only=True, slots=True)
class _StageJob:
    """What a training worker is told."""

    spec: TrainingSpec
    root: str
    execution: ExecutionSettings
    stage: str
    threads: int


def train_connector(spec: TrainingSpec, store: Store, execution: ExecutionSettings, progress: Progress) -> TrainingRecord:
    """Train a connector, or finish a run that was interrupted, or find it done.

    Args:
        spec: what to train, on what, in which schedule.
        store: where dataset, features and results are.
        execution: train_workers, train_threads, micro_batch_size, zero_stage, checkpoint_every_steps, max_failures and device count.
        progress: told about steps.

    Returns:
        The record, committed.

    Raises:
        ErrorBudgetError: too many conversations cannot be trained on.
        TrainingError: the run cannot start, resume or go on.
        ClusterError: workers died more often than max_failures allows.
    """
    stage = Stage.open(store, "train-connector", spec)
    if (done := stage.committed(TrainingRecord)) is not None:
        return done
    schedule = spec.schedule
    total = steps_before(schedule.phases, len(schedule.phases))
    with stage.attempt() as timer:
        from workers.training.screening import screen

        screening = screen(spec, store, execution, progress)
        with _following(store, stage, total, progress) as losses:
            for name in _STAGES:
                phases = _phases(spec, name)
                if phases and _done_records(spec, store, name) is None:
                    job = _StageJob(spec=spec, root=store.root, execution=execution, stage=name, threads=_threads(execution))
                    _fit(job, losses, progress)
        records = [record for name in _STAGES if _phases(spec, name) for record in _finished(spec, store, name)]
        files, parameters, num_bytes = _write_final(spec, store)
        samples = sum(record.samples for record in records)
        step_seconds = sum(record.seconds for record in records)
        facts: dict[str, Any] = (
            store.read_json(stage.path("facts.json"))
            if records
            else {"num_images": 0, "num_text_only": 0, "device": "none", "products": spec.precision}
        )
        record = TrainingRecord(
            training_fingerprint=fingerprint(spec),
            folder=f"checkpoints/{stage.key}/final",
            files=files,
            phases=tuple(records),
            steps=total,
            samples=samples,
            num_images=facts["num_images"],
            num_text_only=facts["num_text_only"],
            num_quarantined=len(screening.rows),
            quarantined_by_reason=screening.by_reason,
            parameters=parameters,
            seconds=timer.seconds,
            samples_per_second=samples / max(step_seconds, 1e-9),
            bytes_written=num_bytes,
            workers=execution.train_workers,
            threads=_threads(execution),
            device=facts["device"],
            products=facts["products"],
            versions={name: version(name) for name in _versioned(spec)} | {"python": platform.python_version()},
        )
    return stage.commit(record)


def _versioned(spec: TrainingSpec) -> tuple[str, ...]:
    """The libraries on which the numbers rest."""
    return ("torch", "transformers", "deepspeed", "ray", *(() if spec.lora is None else ("peft",)))


def _phases(spec: TrainingSpec, stage: str) -> range:
    from workers.training.loop import stage_phases

    return stage_phases(spec.schedule, "align" if stage == "align" else "sft")


def _threads(execution: ExecutionSettings) -> int:
    """Torch threads of a worker: the run's CPUs shared among the workers, unless set."""
    if execution.train_threads is not None:
        return execution.train_threads
    return max(1, (execution.num_cpus or os.cpu_count() or 1) // execution.train_workers)


def _last_checkpoint(spec: TrainingSpec, store: Store, stage: str) -> Any:
    """The checkpoint at a stage's end, whole; None when the stage is not done, or has to go on from an older one since this one is damaged."""
    from workers.training.checkpoints import CheckpointFolder

    step = steps_before(spec.schedule.phases, _phases(spec, stage).stop)
    return CheckpointFolder(store, fingerprint(spec)[:16], stage).load(step)


def _done_records(spec: TrainingSpec, store: Store, stage: str) -> list[PhaseRecord] | None:
    """Records of a stage's phases if it is done."""
    saved = _last_checkpoint(spec, store, stage)
    return None if saved is None else [from_json(PhaseRecord, record) for record in saved.state["records"]]


def _finished(spec: TrainingSpec, store: Store, stage: str) -> list[PhaseRecord]:
    records = _done_records(spec, store, stage)
    if records is None:
        raise TrainingError(f"stage {stage} ended without its last checkpoint below {store.url('checkpoints')}; run again")
    return records


def _write_final(spec: TrainingSpec, store: Store) -> tuple[dict[str, str], dict[str, int], int]:
    """Trained weights from the last stage's last checkpoint, split by part; file digests, parameters by block, bytes."""
    import safetensors.torch

    from workers.training.assemble import final_folder
    from workers.training.checkpoints import write_checked

    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in _final_weights(spec, store).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    files = {f"{part}.safetensors": safetensors.torch.save(tensors) for part, tensors in parts.items()}
    parameters = {
        block: sum(tensor.numel() for name, tensor in parts["connector"].items() if name.startswith(f"{block}.")) for block in CONNECTOR_BLOCKS
    }
    if "language_model" in parts:
        parameters["language_model"] = sum(tensor.numel() for tensor in parts["language_model"].values())
    digests = write_checked(store, final_folder(spec), files)
    return digests, {block: count for block, count in parameters.items() if count}, sum(len(data) for data in files.values())


def _final_weights(spec: TrainingSpec, store: Store) -> dict[str, Any]:
    """What the last phase left; without phases, what training would have started from."""
    stages = [name for name in _STAGES if _phases(spec, name)]
    if not stages:
        from workers.training.initial_weights import initial_tensors

        assert spec.initial_weights_sha256 is not None
        return {f"connector.{name}": tensor for name, tensor in initial_tensors(store, spec.initial_weights_sha256).items()}
    saved = _last_checkpoint(spec, store, stages[-1])
    if saved is None:
        raise TrainingError(f"the last checkpoint of stage {stages[-1]} below {store.url('checkpoints')} is damaged; remove it and run again")
    weights: dict[str, Any] = saved.model
    return weights


@contextlib.contextmanager
def _following(store: Store, stage: Stage, total: int, progress: Progress) -> Iterator[list[ClusterError]]:
    """Tell the progress what rank 0 writes down and how often workers were lost, from a thread: Ray's fit() blocks.

    Yields:
        A list for the losses.
    """

    def read() -> dict[str, Any]:
        try:
            found: dict[str, Any] = store.read_json(stage.path("progress.json"))
        except ObjectNotFoundError:
            return {"step": 0}
        return found

    def follow() -> None:
        known, num_losses = first, 0
        while True:
            over = ended.wait(0.5)
            try:
                now = read()
            except StorageError:
                now = {"step": known}  # a store that is away for a moment stops no training, nor what is shown of it
            step = int(now["step"])
            if step > known or len(losses) > num_losses:
                facts = {name: now[name] for name in ("phase", "loss") if now.get(name) is not None}
                known, num_losses, count = max(known, step), len(losses), max(0, step - known)
                progress.advance(count, **facts, **({"lost_workers": num_losses} if num_losses else {}))
            if over:
                return

    first = int(read()["step"])
    progress.start("training the connector", total, first)
    losses: list[ClusterError] = []
    ended = threading.Event()
    thread = threading.Thread(target=follow, name="follow-training", daemon=True)
    thread.start()
    try:
        yield losses
    finally:
        ended.set()
        thread.join()
        progress.finish()


def _fit(job: _StageJob, losses: list[ClusterError], progress: Progress) -> None:
    """Run one stage, again as often as `max_failures` allows when its workers were lost.

    Ray's own counting is not used: it tries errors of the code again as well (a stale cache, a loss that is not finite), and workers that cannot
    start it tries for ever.

    Args:
        job: the stage.
        losses: gets an entry per loss.
        progress: asked before every try whether to go on at all.

    Raises:
        ClusterError: workers were lost more often than that.
        WorkFailedError: the code raised an error that is none of ours.
        WorkerError: ours, from a worker.
    """
    num_losses = 0
    while True:
        progress.advance(0)
        try:
            with _sigint_handler_kept():
                return _fit_once(job)
        except ClusterError as error:
            # From another rank, a worker's death looks like an error of the code: a connection that its peer has closed.
            lost = error.retryable or job.execution.train_workers > 1
            num_losses += 1
            if not lost or num_losses > job.execution.max_failures:
                raise
            losses.append(error)


@contextlib.contextmanager
def _sigint_handler_kept() -> Iterator[None]:
    """Put the handler of Ctrl-C back: Ray Train leaves its own there, and once its run has ended that one does nothing."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _fit_once(job: _StageJob) -> None:
    """Run one stage under Ray Train, with new workers."""
    execution, store = job.execution, Store(job.root)
    with ray_runtime(execution) as cluster:
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

        device = cluster.device(execution.train_workers, "train_workers")
        use_gpu = device == "cuda"
        job = replace(job, execution=replace(execution, device=device))
        key = fingerprint(job.spec)[:16]
        folder = f"runs/train-connector/{key}/ray"
        local = store.local_path(folder)
        storage: dict[str, Any] = (
            {"storage_path": str(local)} if local is not None else {"storage_path": store.fs_path(folder), "storage_filesystem": store.filesystem}
        )
        make_trainer: Any = TorchTrainer
        trainer = make_trainer(
            _train_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=execution.train_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": min(1.0, cluster.num_cpus / execution.train_workers)} | ({"GPU": 1} if use_gpu else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(
                name=f"{key}-{job.stage}-{time.time_ns()}",  # a name of its own: Ray would go on with an older run of the same name
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env={"env_vars": _worker_environment()},
                **storage,
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            raise _translated(list(error.worker_failures.values()), job.stage) from error
        except ControllerError as error:
            raise _translated([error.controller_failure], job.stage) from error
        except TrainingFailedError as error:
            raise ClusterError(f"stage {job.stage} was lost ({first_line(error)}); run again, it goes on from its last checkpoint") from error


def _worker_environment() -> dict[str, str]:
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Workers of a cluster that was there before have none of this process's environment.
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if "RAY_ADDRESS" not in os.environ and sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # one machine: its workers talk over the loopback interface alone
    return environment


def _translated(failures: list[Exception], stage: str) -> Exception:
    """Our own error if a worker raised one; else one that names what happened."""
    chain: list[BaseException] = []
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = getattr(cause, "cause", None) or cause.__cause__
    for error in chain:
        if isinstance(error, (ModelError, WorkerError)):
            return error
    deaths = [failure for failure in failures if type(failure).__module__.startswith("ray")]
    first = next(iter(deaths or failures), None)
    text = (str(first).strip().splitlines() or [""])[-1] if first is not None else ""
    if deaths:
        return ClusterError(f"stage {stage} lost its workers ({text}); run again, it goes on from its last checkpoint")
    return WorkFailedError(f"stage {stage} failed with {type(first).__name__}: {text}")


def _train_worker(config: dict[str, Any]) -> None:
    """What runs in every worker of Ray Train; its torch backend has made the process group."""
    job: _StageJob = config["job"]
    try:
        train_stage(job.spec, Store(job.root), job.execution, job.stage, threads=job.threads)
    except RuntimeError as error:
        failure = gpu_failure(error, "it goes on from its last checkpoint")
        if failure is None:
            raise
        raise failure from error


def train_stage(spec: TrainingSpec, store: Store, execution: ExecutionSettings, stage: str, *, threads: int) -> None:
    """Run one stage in this process, as one rank of the process group (made here if there is none).

    Args:
        spec: of the run.
        store: where everything is.
        execution: settings.
        stage: align or sft.
        threads: of torch; Ray sets OMP_NUM_THREADS to 1.
    """
    import torch
    import torch.distributed as dist

    from model.language_model import checkpoint_layers, load_tokenizer
    from workers.dataset.samples import read_samples
    from workers.devices import choose_device
    from workers.evaluation import check_questions
    from workers.language_models import language_model_folder
    from workers.training.assemble import training_data
    from workers.training.batches import BatchBuilder
    from workers.training.checkpoints import CheckpointFolder
    from workers.training.engine import DeepSpeedEngine, solo_process_group
    from workers.training.loop import run_stage, stage_phases
    from workers.training.progress_log import MetricsLog
    from workers.training.screening import screen

    torch.set_num_threads(threads)
    solo_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    device = choose_device(execution.device)
    key = fingerprint(spec)[:16]
    run_folder = f"runs/train-connector/{key}"
    name = "align" if stage == "align" else "sft"
    phases = [spec.schedule.phases[index] for index in stage_phases(spec.schedule, "align" if stage == "align" else "sft")]
    refused = screen(spec, store, execution, SilentProgress()).refused
    data = training_data(spec, store, "train", execution, device=str(device), verify=rank == 0)
    samples = [sample for sample in data.samples if sample.index not in refused]
    num_text_only = sum(sample.text_only for sample in samples)
    counts = {"num_images": len(samples) - num_text_only, "num_text_only": num_text_only}
    model, trainable = _starting_model(spec, store, name, device)
    builder = BatchBuilder(
        samples=samples,
        source=data.source,
        features=spec.features,
        connector=model.connector,
        schedule=spec.schedule,
        tokenizer=load_tokenizer(language_model_folder(spec.language_model.model), None),
        max_tokens=spec.longest_sequence(model.max_tokens),
        substitutes=execution.missing_features == "substitute",
    )
    checkpoints = CheckpointFolder(store, key, name)
    if CheckpointFolder(store, key, "align").latest() is None and checkpoints.latest() is None:
        if rank == 0:
            check_questions(read_samples(store, spec.dataset_fingerprint, "held_out"), model, spec.features, execution)
        if spec.initial_weights_sha256 is None:  # else the measured numbers are among them
            global_maps, local_maps = builder.measuring_maps(_MEASURED_IMAGES)
            model.connector.measure_inputs(
                {name: maps.to(device).dense() for name, maps in global_maps.items()},
                None if local_maps is None else {name: maps.to(device).dense() for name, maps in local_maps.items()},
            )
    # Optimizer state and gradients of the connector alone are not worth sharing out, a frozen language model is.
    zero_stage = execution.zero_stage if name == "sft" or execution.zero_stage == 3 else 0
    if execution.gradient_checkpointing:
        checkpoint_layers(model.language_model)
    engine = DeepSpeedEngine(
        model,
        trainable,
        zero_stage=zero_stage,
        max_grad_norm=phases[0].max_grad_norm,
        largest_micro_batch=execution.micro_batch_size or max(phase.batch_size for phase in phases) // world,
    )
    metrics = None
    if rank == 0:
        store.write_json(f"{run_folder}/facts.json", {**counts, "device": _device_name(device), "products": model.products})
        metrics = MetricsLog(store, run_folder, total_steps=steps_before(spec.schedule.phases, len(spec.schedule.phases)))
    try:
        run_stage(
            "align" if name == "align" else "sft",
            engine=engine,
            builder=builder,
            checkpoints=checkpoints,
            metrics=metrics,
            context={"training_fingerprint": fingerprint(spec), **counts},
            checkpoint_every_steps=execution.checkpoint_every_steps,
            micro_batch_size=execution.micro_batch_size,
            device=device,
        )
    finally:
        if metrics is not None:
            metrics.close()
        engine.close()


def _starting_model(spec: TrainingSpec, store: Store, stage: str, device: Any) -> tuple[Any, tuple[Any, ...]]:
    """The model that a stage starts from, and the blocks that its optimizer knows."""
    from workers.training.checkpoints import load_weights

    if stage == "align":
        return _assembled(spec, store, freeze_language_model=True, device=device), spec.connector.blocks
    assert spec.schedule.sft is not None
    trains = spec.schedule.sft.train
    model = _assembled(spec, store, freeze_language_model="language_model" not in trains, device=device)
    if spec.schedule.align:
        aligned = _last_checkpoint(spec, store, "align")
        if aligned is None:
            raise TrainingError(
                "fine-tuning starts from the aligned connector, whose checkpoint is missing or damaged; remove the checkpoints and run again"
            )
        load_weights(model, aligned.model)
    return model, trains


def _assembled(spec: TrainingSpec, store: Store, *, freeze_language_model: bool, device: Any) -> Any:
    """The model as it is before the first phase: with the seed's weights, or those that the recipe names."""
    from workers.training.assemble import assemble_model
    from workers.training.initial_weights import start_from

    model = assemble_model(spec, freeze_language_model=freeze_language_model, device=device)
    if spec.initial_weights_sha256 is not None:
        start_from(model.connector, store, spec.initial_weights_sha256, spec.features.encoder)
    return model


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return json.dumps(platform.processor() or platform.machine()).strip('"')
