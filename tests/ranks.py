"""Fine-tuning runs in processes of their own, one a rank, as workers of Ray Train would be.

`python -m tests.ranks RANK WORLD MEETING` is one of them: it works off jobs, a line of JSON each on standard input, and answers each with a line on
standard output. Ranks meet in the file MEETING. With `die_before` a process ends in mid-run, as a killed one would.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.commands import REPOSITORY

ENGINES = ("torch", "zero-0", "zero-1", "zero-2", "zero-3")

OPTIONS = {"engine": "zero-3", "samples": "fake", "micro_batch_size": 1, "gradient_checkpointing": False, "die_before": None}
"""How a job is run unless it says otherwise; it has to say `spec` and `store`."""


def fine_tune(spec: Any, store: str, **options: Any) -> dict[str, Any]:
    """Run a spec's fine-tuning as one rank, and tell what tests compare."""
    from model.language_model import checkpoint_layers
    from tests.tiny_training import FakeFeatures, fake_samples, mixed_samples
    from workers.storage import Store
    from workers.training.assemble import assemble_model
    from workers.training.batches import BatchBuilder
    from workers.training.checkpoints import CheckpointFolder, weights_of
    from workers.training.engine import DeepSpeedEngine, TorchEngine
    from workers.training.loop import run_stage

    job = OPTIONS | options
    model = assemble_model(spec, freeze_language_model=False)
    if job["gradient_checkpointing"]:
        checkpoint_layers(model.language_model)
    builder = BatchBuilder(
        samples={"fake": fake_samples, "mixed": mixed_samples}[job["samples"]](),
        source=FakeFeatures(spec),
        features=spec.features,
        connector=model.connector,
        schedule=spec.schedule,
        tokenizer=model.tokenizer,
        max_tokens=model.max_tokens,
    )
    name, trained = job["engine"], spec.schedule.sft.train
    engine: Any = TorchEngine(model, trained) if name == "torch" else DeepSpeedEngine(model, trained, zero_stage=int(name[-1]))
    steps: list[Any] = []
    step = engine.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        if len(steps) == job["die_before"]:
            os._exit(9)
        steps.append(step(*args, **kwargs))
        return steps[-1]

    engine.step = noting
    state = run_stage(
        "sft",
        engine=engine,
        builder=builder,
        checkpoints=CheckpointFolder(Store(store), "k", "sft"),
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
        "losses": [sums.loss for sums in steps],
        "norms": [sums.gradient_norm for sums in steps],
        "before": record.hashes_before,
        "after": record.hashes_after,
        "shapes": shapes,
        "held": sum(parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel() for parameter in parameters),
        "left": sum(parameter.numel() for parameter in shared),
    }


class Ranks:
    """Processes that fine-tune together, job after job."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder, self.log = world, folder, folder / "log"
        self.jobs: dict[str, tuple[list[dict[str, Any]], Path]] = {}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        meeting = str(self.folder / f"meeting-{time.time_ns()}")
        with self.log.open("a") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "tests.ranks", str(rank), str(self.world), meeting],
                    cwd=REPOSITORY,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                for rank in range(self.world)
            ]

    def run(self, spec: Any, *, store: Path | None = None, **options: Any) -> tuple[list[dict[str, Any]], Path]:
        """What each rank answers, and the store. Finished jobs are kept; of one that dies, the ranks' answers are empty."""
        from workers.commits import to_json

        job: dict[str, Any] = {"spec": to_json(spec)} | options
        key = json.dumps([str(store), job], sort_keys=True)
        if key in self.jobs:
            return self.jobs[key]
        if not self.processes:
            self.start()
        store = store or self.folder / f"job-{len(self.jobs)}"
        for process in self.processes:
            assert process.stdin
            process.stdin.write(json.dumps(job | {"store": str(store)}) + "\n")
            process.stdin.flush()
        if options.get("die_before") is not None:
            for process in self.processes:
                assert process.wait(120) == 9
                self._close_pipes(process)
            self.processes = []
            return [], store
        self.jobs[key] = [json.loads(self._line(process)) for process in self.processes], store
        return self.jobs[key]

    def _line(self, process: "subprocess.Popen[str]") -> str:
        """A rank's answer. Where one has died its neighbours wait for it for ever, so they are ended, and what they said is told."""
        assert process.stdout
        while not select.select([process.stdout], [], [], 1.0)[0]:
            if any(other.poll() is not None for other in self.processes):
                break
        line = process.stdout.readline() if all(other.poll() is None for other in self.processes) else ""
        if not line:
            self.close()
            raise AssertionError(f"a rank ended: {self.log.read_text()[-3000:]}")
        return line

    def close(self) -> None:
        died = any(process.poll() is not None for process in self.processes)
        for process in self.processes:
            if died:
                process.kill()
            self._close_pipes(process)
            process.wait(60)
        self.processes = []

    @staticmethod
    def _close_pipes(process: "subprocess.Popen[str]") -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def ranks_of(folder: Path, *worlds: int) -> Iterator[dict[int, Ranks]]:
    """Groups of so many ranks; they start with their first job."""
    groups = {}
    for world in worlds:
        (folder / str(world)).mkdir()
        groups[world] = Ranks(world, folder / str(world))
    try:
        yield groups
    finally:
        for group in groups.values():
            group.close()


def main() -> None:
    """Work until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what DeepSpeed prints is no answer
    os.environ.update({"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"})
    import torch
    import torch.distributed as dist

    from workers.commits import from_json
    from workers.training.spec import TrainingSpec

    torch.set_num_threads(1)
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[3], world), rank=rank, world_size=world)
    for line in sys.stdin:
        job = json.loads(line)
        spec = from_json(TrainingSpec, job.pop("spec"))
        print(json.dumps(fine_tune(spec, **job)), file=answers, flush=True)


if __name__ == "__main__":
    main()
