"""How work is executed: settings that never change a result's identity, and how a stage tells how far it is.

Nothing here enters a hash. A setting may change speed, memory and the moment a run gives up, never which rows a table holds.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

__all__ = ["ExecutionSettings", "Progress", "SilentProgress", "cache_folder"]


def cache_folder() -> Path:
    """Where a machine keeps what belongs to no root: `$LOUPE_CACHE`, or `loupe` in the user's cache folder."""
    if folder := os.environ.get("LOUPE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loupe"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionSettings:
    """Counts, sizes and limits of a run; `--set key=value` sets these fields.

    Raises:
        ValueError: a count below 1, or a fraction outside of 0..1.
    """

    num_cpus: int | None = None
    """Ray CPUs; None is the machine's."""
    encoder_actors: int = 1
    """Processes that encode: one per accelerator. Where a cluster has lost some since a run began, with those that are left."""
    encoder_threads: int | None = None
    """torch threads of an encoding process; None is every CPU of the run, shared among the actors."""
    encode_batch_views: int | None = None
    """Views in one forward pass; None fits them to the device and the encoder. Halved for the rest of the run where memory ends."""
    encode_compile: bool | None = None
    """Whether torch.compile fuses the encoder's forward pass; None does so on CUDA alone. Where it fails the pass runs as it is. On a CPU it gains
    nothing: two blocks of ViT-B/16 in batches of 8 take 203 to 211 ms a view compiled, 210 to 226 as they are, and minutes to compile."""
    images_in_flight_units: int = 2
    """Work units per worker that may be under way at once: memory against idle time."""
    images_per_build_unit: int = 32
    """Items that one dataset building task handles. Frozen when the dataset's units are planned."""
    feature_unit_bytes: int | None = None
    """Feature bytes that one work unit writes; None is 64 MiB where CPUs encode and 2 GiB where GPUs do, see `unit_bytes`. Frozen when the cache's
    units are planned."""
    feature_cache_bytes: int = 0
    """What training reads of features from an object store is kept on the machine's own disk, in `cache_folder()`, up to so many bytes; 0 keeps
    nothing."""
    max_quarantined_fraction: float = 0.05
    """A source with a larger share of quarantined inputs stops its stage (a handful is always allowed)."""
    train_workers: int = 1
    train_threads: int | None = None
    """torch threads of a training worker."""
    micro_batch_size: int | None = None
    """Samples in one forward and backward pass; None is the whole share of a rank."""
    checkpoint_every_steps: int = 200
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's stage in fine-tuning: 1, 2 and 3 share optimizer state, gradients and weights out among the workers. Alignment runs on 0,
    and on 3 where that is asked for, which shares out the frozen language model."""
    gradient_checkpointing: bool = False
    """Whether the language model's layers are computed again for the backward pass instead of being kept: less memory, about a third more time."""
    max_failures: int = 2
    """Worker deaths that a training run survives; worker deaths that a unit of other work does in one process, and processes that may lose it."""
    stall_after_s: int = 1800
    """So long after the last unit of work ended, a run is taken for stuck: its processes say where they are, and it is begun anew."""
    missing_features: Literal["fail", "encode", "substitute"] = "fail"
    """What training does about an image whose features are gone or damaged. It is no part of the run's identity, so that a run which has met one may
    go on from its checkpoint by another answer; the record counts what was computed or replaced."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_batch_size: int = 64
    object_store_bytes: int | None = None
    """Shared memory that Ray may use between processes; prepared views pass through it, features never do. None is 256 MiB, and on a machine with a
    GPU 1 GiB for each encoding process: three units' views of 338 kB at 336 px."""
    ray_temp_dir: str | None = None
    """Folder for Ray's sockets and logs; short, since socket paths are limited to 107 bytes. None is the system's."""

    @property
    def encoded_units_in_flight(self) -> int:
        """Units under way over all encoders: one more than they compute, so that the next is prepared and the last one written meanwhile."""
        return self.encoder_actors * (self.images_in_flight_units + 1)

    def object_store(self, *, on_gpu: bool) -> int:
        """Bytes that Ray may use between processes.

        Args:
            on_gpu: whether GPUs encode.
        """
        return self.object_store_bytes or (self.encoder_actors * 2**30 if on_gpu else 256 * 2**20)

    def unit_pixel_bytes(self, *, on_gpu: bool) -> int:
        """Bytes of a work unit's views at most, so that all units under way fit between the processes with room for one more of each encoder.

        Narrow maps make large units: int8 of CLIP-L/14-336 pooled by 2 x 2 fills 2 GiB with 3,000 views, whose pixels are 1 GB.

        Args:
            on_gpu: whether GPUs encode.
        """
        return self.object_store(on_gpu=on_gpu) // (self.encoded_units_in_flight + self.encoder_actors)

    def unit_bytes(self, *, on_gpu: bool) -> int:
        """Feature bytes of a work unit.

        Batches are formed within a unit, and the last one is filled up. 2 GiB are 606 views of CLIP-L/14-336 with three maps in fp16: eleven batches
        of 56, of which 2 % is filling; 64 MiB are 18 views, a third of one. On a CPU 18 views are seconds of work, and all that a killed run does
        again.

        Args:
            on_gpu: whether GPUs encode.
        """
        return self.feature_unit_bytes or (2 * 2**30 if on_gpu else 64 * 2**20)

    def __post_init__(self) -> None:
        counts = {
            "num_cpus": self.num_cpus,
            "encoder_actors": self.encoder_actors,
            "encoder_threads": self.encoder_threads,
            "encode_batch_views": self.encode_batch_views,
            "images_in_flight_units": self.images_in_flight_units,
            "images_per_build_unit": self.images_per_build_unit,
            "feature_unit_bytes": self.feature_unit_bytes,
            "object_store_bytes": self.object_store_bytes,
            "train_workers": self.train_workers,
            "train_threads": self.train_threads,
            "micro_batch_size": self.micro_batch_size,
            "checkpoint_every_steps": self.checkpoint_every_steps,
            "eval_batch_size": self.eval_batch_size,
            "stall_after_s": self.stall_after_s,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        if self.feature_cache_bytes < 0:
            raise ValueError(f"feature_cache_bytes must be at least 0, found {self.feature_cache_bytes}")
        if self.max_failures < 0:
            raise ValueError(f"max_failures must be at least 0, found {self.max_failures}")
        if not 0 <= self.max_quarantined_fraction <= 1:
            raise ValueError(f"max_quarantined_fraction must lie in 0..1, found {self.max_quarantined_fraction}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, found {self.zero_stage}")
        if self.missing_features not in ("fail", "encode", "substitute"):
            raise ValueError(f"missing_features must be fail, encode or substitute, found {self.missing_features!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, found {self.device!r}")


@runtime_checkable
class Progress(Protocol):
    """How a stage tells how far it is. One `start`, then any number of `advance`, then `finish`; may repeat."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Work begins.

        Args:
            what: a few words for people, e.g. "encoding images".
            total: how much there is in all.
            done: how much of it was done before this run.
        """

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """More is done. May raise KeyboardInterrupt, to end the work.

        Args:
            count: how much more; 0 only asks whether to go on.
            **facts: numbers worth showing now, e.g. loss=1.2.
        """

    def finish(self) -> None:
        """The work begun last is over, for good or for ill."""


class SilentProgress:
    """A Progress that tells nobody."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Ignore."""

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
