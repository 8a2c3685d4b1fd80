"""Fine-tuning over mixed samples in a process of its own: one rank of several, as a worker of Ray Train would be."""

import json
from pathlib import Path
from typing import Any

ENGINES = ("torch", "zero-0", "zero-1", "zero-2", "zero-3")


def make_engine(name: str, model: Any, blocks: Any) -> Any:
    from workers.training.engine import DeepSpeedEngine, TorchEngine

    return TorchEngine(model, blocks) if name == "torch" else DeepSpeedEngine(model, blocks, zero_stage=int(name[-1]))


def tune(spec: Any, folder: str, engine: str, *, rank: int = 0, world: int = 1, micro_batch_size: int | None = None) -> None:
    """Fine-tune, as one rank; rank 0 leaves the losses and the hashes of all blocks in the folder."""
    import torch
    import torch.distributed as dist

    from tests.tiny_training import FakeFeatures, mixed_samples
    from workers.storage import Store
    from workers.training.assemble import assemble_model
    from workers.training.batches import BatchBuilder
    from workers.training.checkpoints import CheckpointFolder
    from workers.training.engine import solo_process_group
    from workers.training.loop import run_stage
    from workers.training.progress_log import MetricsLog

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    if engine != "torch":
        solo_process_group()
    store = Store(folder)
    model = assemble_model(spec, freeze_language_model=False)
    builder = BatchBuilder(
        samples=mixed_samples(),
        source=FakeFeatures(spec),
        features=spec.features,
        connector=model.connector,
        schedule=spec.schedule,
        tokenizer=model.tokenizer,
        max_tokens=model.max_tokens,
    )
    made = make_engine(engine, model, spec.schedule.sft.train)
    metrics = MetricsLog(store, "runs/train-connector/k", total_steps=99) if rank == 0 else None
    state = run_stage(
        "sft",
        engine=made,
        builder=builder,
        checkpoints=CheckpointFolder(store, "k", "sft"),
        metrics=metrics,
        context={},
        checkpoint_every_steps=100,
        micro_batch_size=micro_batch_size,
    )
    if metrics is not None:
        metrics.close()
        lines = [json.loads(line) for line in store.read_bytes("runs/train-connector/k/metrics.jsonl").decode().splitlines()]
        found = {
            "losses": [line["loss"] for line in lines],
            "norms": [line["gradient_norm"] for line in lines],
            "hashes": state.records[-1].hashes_after,
        }
        Path(folder, "found.json").write_text(json.dumps(found))


def tune_in_ranks(spec: Any, folder: Path, engine: str, world: int) -> dict[str, Any]:
    """The same in so many processes at once."""
    import multiprocessing

    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=tune, args=(spec, str(folder), engine), kwargs={"rank": rank, "world": world}) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    states = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert states == [0] * world, f"ranks ended with {states}"
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found
