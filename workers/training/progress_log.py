"""What a training run tells while it runs: one JSON line per step, TensorBoard events, and a small file that the driver polls.

    runs/train-connector/<key>/metrics.jsonl    a line per step, each step once, also after resuming
    runs/train-connector/<key>/tensorboard/...  event files, one folder per start
    runs/train-connector/<key>/progress.json    steps done, loss, process number

Written by rank 0 alone. Objects in a store are replaced whole, never appended to, so lines are gathered and written every few seconds and before
every checkpoint: what a checkpoint holds is always on record.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from workers.storage import Store

__all__ = ["MetricsLog"]


class MetricsLog:
    """Lines and events of one run.

    Args:
        store: where they go.
        folder: of the run, relative to the root.
        total_steps: of the whole schedule.
        every_seconds: how often they are written.
    """

    def __init__(self, store: Store, folder: str, *, total_steps: int, every_seconds: float = 2.0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._store, self._folder, self._total, self._every_s = store, folder, total_steps, every_seconds
        self._path = f"{folder}/metrics.jsonl"
        self._lines: list[str] = store.read_bytes(self._path).decode().splitlines() if store.exists(self._path) else []
        self._events = Path(tempfile.mkdtemp(prefix="loupe-events-"))
        self._writer: Any = SummaryWriter(str(self._events))
        self._events_folder = ""
        self._written_at = time.monotonic()
        self.step = 0

    def rewind(self, step: int, stage: str) -> None:
        """Forget every line at or behind a step: that is where training goes on.

        Args:
            step: steps done, over all phases.
            stage: names the folder of the events from here on.
        """
        self._lines = [line for line in self._lines if json.loads(line)["step"] < step]
        self.step = step
        self._events_folder = f"{self._folder}/tensorboard/{stage}-from-{step:08d}"
        self._flush()

    def add(self, row: dict[str, Any]) -> None:
        """Note one step.

        Args:
            row: holds `step` (counted over all phases, from 0), `phase` and numbers.
        """
        self._lines.append(json.dumps(row, sort_keys=True))
        self.step = row["step"] + 1
        for name, value in row.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"train/{name}", value, row["step"])
        if time.monotonic() - self._written_at >= self._every_s:
            self._flush()

    def flush(self) -> None:
        """Write everything now."""
        self._flush()
        self._writer.flush()
        if self._events_folder:
            for number, file in enumerate(sorted(self._events.iterdir())):
                # TensorBoard reads every file with this mark; its own names hold the machine's name.
                self._store.write_bytes(f"{self._events_folder}/events.out.tfevents.{number:04d}", file.read_bytes())

    def close(self) -> None:
        """Write everything and remove temporary files."""
        if self._events_folder:
            self.flush()
        self._writer.close()
        shutil.rmtree(self._events, ignore_errors=True)

    def _flush(self) -> None:
        started = time.monotonic()
        self._store.write_bytes(self._path, "".join(line + "\n" for line in self._lines).encode())
        last = json.loads(self._lines[-1]) if self._lines else {}
        self._store.write_json(
            f"{self._folder}/progress.json",
            {"step": self.step, "total": self._total, "phase": last.get("phase"), "loss": last.get("loss"), "pid": os.getpid()},
        )
        self._written_at = time.monotonic()
        # A long run's file takes a while to write; never spend more than a twentieth of the time on it.
        self._every_s = max(self._every_s, 20 * (self._written_at - started))
