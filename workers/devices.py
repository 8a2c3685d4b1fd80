"""Where torch computes."""

import os
from pathlib import Path

import torch

from workers.errors import ExecutionError

__all__ = ["choose_device", "usable_cores"]


def choose_device(asked: str) -> torch.device:
    """The device to compute on.

    Args:
        asked: `auto` takes a GPU where there is one; `cpu`, `cuda`, or any device of torch's.

    Returns:
        A torch device, a GPU with its number: CUDA's current one belongs to the thread, and threads that are started later begin at the first.

    Raises:
        ExecutionError: cuda was asked for and is not there.
    """
    there = torch.cuda.is_available()
    device = torch.device(("cuda" if there else "cpu") if asked == "auto" else asked)
    if device.type != "cuda" or ":" in str(device):
        return device
    if not there:
        raise ExecutionError("device is cuda, but torch sees no GPU here (its driver may be too old for this torch); use device=cpu")
    return torch.device("cuda", torch.cuda.current_device())


_CPU_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Files of a container's control group, of version 2 and 1: microseconds of CPU time, in so many microseconds."""


def usable_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores that this process may use, as Ray counts them: those that it may run on, and no more than its container has time for.

    Args:
        groups: where control groups are mounted.

    Returns:
        At least 1.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in _CPU_QUOTAS:
        try:
            quota, period = map(int, " ".join((groups / name).read_text() for name in names).split())
        except (OSError, ValueError):  # not of this version, or without a quota
            continue
        if quota > 0 and period > 0:
            return max(1, min(there, quota // period))
    return there
