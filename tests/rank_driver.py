"""One rank of a fine-tuning run on DeepSpeed, as a process of its own: `python -m tests.rank_driver JSON`. Ranks meet in a file; nothing listens.

Writes what the tests compare into `out/rank-<n>.json`. With `die_after`, every rank ends after so many batches as a killed process would.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    os.environ.update({"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = job["rank"], job["world"]
    dist.init_process_group("gloo", store=dist.FileStore(job["meeting"], world), rank=rank, world_size=world)

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

    class Dying(BatchBuilder):
        """Ends its process at its n-th batch, in the thread that prefetches."""

        def build(self, *args: Any, **kwargs: Any) -> Any:
            if args[1] == job["die_after"]:
                os._exit(9)
            return super().build(*args, **kwargs)

    builder = Dying(
        samples=fake_samples(),
        source=FakeFeatures(spec),
        features=spec.features,
        connector=model.connector,
        schedule=spec.schedule,
        tokenizer=model.tokenizer,
        max_tokens=model.max_tokens,
    )
    stage = job["zero_stage"]
    engine: Any = TorchEngine(model, spec.schedule.sft.train) if stage is None else DeepSpeedEngine(model, spec.schedule.sft.train, zero_stage=stage)
    losses: list[float] = []
    step = engine.step

    def noting(*args: Any, **kwargs: Any) -> Any:
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
    out = Path(job["store"]) / "out"
    out.mkdir(parents=True, exist_ok=True)
    record = state.records[0]
    matrices = [parameter for parameter in model.language_model.parameters() if parameter.ndim == 2 or hasattr(parameter, "ds_shape")]
    held = sum(parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel() for parameter in matrices)
    facts = {"losses": losses, "before": record.hashes_before, "after": record.hashes_after, "shapes": shapes, "held": held, "left": sum(p.numel() for p in matrices if len(getattr(p, "ds_shape", ())) == 2)}
    (out / f"rank-{rank}.json").write_text(json.dumps(facts))
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
