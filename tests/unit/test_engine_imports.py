"""What DeepSpeed must not do here: compile an extension when a process group starts."""

import pytest
import torch

from workers.training.engine import _import_deepspeed


@pytest.mark.slow
def test_the_shared_memory_extension_is_not_built():
    """The switch is an internal name of DeepSpeed: if it goes away, the build (74 s, needs a compiler) comes back, and this test tells."""
    deepspeed = _import_deepspeed(torch.device("cpu"))
    assert deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm") is False
