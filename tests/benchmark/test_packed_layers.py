"""Claim guarded: on a CPU, packed layers take an encoder's forward pass in less time than torch's own, in fp32 and in bf16.

`pytest -m benchmark -s --jaxtyping-packages= tests/benchmark/test_packed_layers.py`; both forms in turns in one process, of ViT-B/16 and of the
encoder that comes with Loupe. THREADS=2 is torch's threads.
"""

import os
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from model.encoder import describe_encoder, load_encoder
from model.encoder_execution import EncoderForward, automatic_batch_views
from model.packed_layers import can_pack
from model.specs import MapSpec
from tests.benchmark.caching import write_vit

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]

ROUNDS = 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ViT-B/16", "builtin:vision-encoder"])
def test_forward_passes_with_packed_layers_and_without(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this machine does not pack {dtype}")
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    spec = describe_encoder(str(write_vit(tmp_path)) if name == "ViT-B/16" else name)
    maps = [MapSpec(layers=(spec.num_blocks - 1,))]
    plain = load_encoder(spec, spec.num_blocks - 1, dtype=dtype)
    packed = EncoderForward(load_encoder(spec, spec.num_blocks - 1, dtype=dtype))
    count = automatic_batch_views(spec, "cpu", dtype)
    views = torch.randint(0, 256, (count, 3, spec.view_px, spec.view_px), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"plain": [], "packed": []}
    for turn in range(ROUNDS + 1):
        for form, run in (("plain", plain), ("packed", packed)):
            started = time.monotonic()
            run(views, maps)
            if turn:  # the first one warms up
                seconds[form].append(time.monotonic() - started)
    ratios = sorted(packed_s / plain_s for packed_s, plain_s in zip(seconds["packed"], seconds["plain"], strict=True))
    print(f"\n{name}, {dtype}, batches of {count}, {torch.get_num_threads()} threads")
    for form, times in seconds.items():
        print(f"{form:8} {count / median(times):6.1f} views/s ({count / max(times):.1f} to {count / min(times):.1f})")
    print(f"packed takes {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of the time")
