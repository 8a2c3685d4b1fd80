"""Where torch computes."""

import torch

from workers.errors import ExecutionError

__all__ = ["choose_device"]


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
