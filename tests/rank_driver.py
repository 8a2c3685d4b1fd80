"""One rank of fine-tuning runs on DeepSpeed, as a process of its own: `python -m tests.rank_driver RANK WORLD MEETING`, one job a line on
standard input.

Jobs are JSON, see `JOB`; the answer to each is a line of JSON on standard output. Ranks meet in the file MEETING. With `die_before` a process
ends in mid-run, as a killed one would.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

JOB = {"zero_stage": 3, "lora": False, "precision": "fp32", "micro_batch_size": 1, "gradient_checkpointing": False, "die_before": None}
"""What a job is unless it says otherwise; it has to say `store` and `language_model`. No `zero_stage` is the twin."""


def fine_tune(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job, and tell what tests compare."""
    from model.language_model import checkpoint_layers
    from model.specs import LoraSpec
    from tests.tiny_training import FakeFeatures, fake_samples, tiny_schedule, tiny_training_spec
    from workers.storage import Store
    from workers.training.assemble import assemble_model
    from workers.training.batches import BatchBuilder
    from workers.training.checkpoints import CheckpointFolder, weights_of
    from workers.training.engine import DeepSpeedEngine, TorchEngine
    from workers.training.loop import run_stage

    lora = LoraSpec(rank=4, alpha=8.0, dropout=0.1) if job["lora"] else None
    spec = tiny_training_spec(Path(job["language_model"]), lora=lora, precision=job["precision"], schedule=tiny_schedule(steps=4))
    model = assemble_model(spec, freeze_language_model=False)
    if job["gradient_checkpointing"]:
        checkpoint_layers(model.language_model)
    builder = BatchBuilder(
        samples=fake_samples(),
        source=FakeFeatures(spec),
        features=spec.features,
        connector=model.connector,
        schedule=spec.schedule,
        tokenizer=model.tokenizer,
        max_tokens=model.max_tokens,
    )
    stage, trained = job["zero_stage"], spec.schedule.sft.train
    engine: Any = TorchEngine(model, trained) if stage is None else DeepSpeedEngine(model, trained, zero_stage=stage)
    losses: list[float] = []
    step = engine.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        if len(losses) == job["die_before"]:
            os._exit(9)
        sums = step(*args, **kwargs)
        losses.append(sums.loss)
        return sums

    engine.step = noting
    state = run_stage(
        "sft",
        engine=engine,
        builder=builder,
        checkpoints=CheckpointFolder(Store(job["store"]), "k", "sft"),
        metrics=None,
        context={"key": "k"},
        checkpoint_every_steps=1,
        micro_batch_size=job["micro_batch_size"],
    )
    shapes = {name: list(tensor.shape) for name, tensor in weights_of(model, with_language_model=True, whole=engine.whole).items()}
    parameters = list(model.language_model.parameters())
    shared = [parameter for parameter in parameters if len(getattr(parameter, "ds_shape", ())) == 2]
    record = state.records[0]
    engine.close()
    return {
        "losses": losses,
        "before": record.hashes_before,
        "after": record.hashes_after,
        "shapes": shapes,
        "held": sum(parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel() for parameter in parameters),
        "left": sum(parameter.numel() for parameter in shared),
    }


def main() -> None:
    """Work until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what DeepSpeed prints is no answer
    os.environ.update({"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[3], world), rank=rank, world_size=world)
    for line in sys.stdin:
        print(json.dumps(fine_tune(JOB | json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
