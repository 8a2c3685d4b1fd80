"""Where torch computes."""

import torch

from workers.errors import ExecutionError

__all__ = ["choose_device"]


def choose_device(asked: str) -> torch.device:
    """The device to compute on.

    Args:
        asked: `auto` takes a GPU where there is one; `cpu`, `cuda`, or any device of torch's.

    Returns:
        A torch device.

    Raises:
        ExecutionError: cuda was asked for and is not there.
    """
    there = torch.cuda.is_available()
    if asked == "auto":
        return torch.device("cuda" if there else "cpu")
    device = torch.device(asked)
    if device.type == "cuda" and not there:
        raise ExecutionError("device is cuda, but torch sees no GPU here; use device=auto or device=cpu")
    return device
