"""A short probe of the machine at hand: how fast it prepares images and encodes views. What a plan of a cache counts hours with.

Input: a cache's spec, a typical size. Output: rates. Invariant: nothing is written, nothing is fetched. Where the encoder's weights are not here a
block of the same shape stands in for its blocks, since what a matrix product costs does not depend on its numbers.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model.architectures import encoder_flops
from model.encoder import compute_dtype, load_encoder
from model.encoder_execution import automatic_batch_views
from model.images import cut_views, decode_image
from model.language_model import multiplies_bf16
from model.packed_layers import can_pack, pack_layers
from model.quantisation import ChannelCalibration
from model.specs import EncoderSpec, FeatureSpec, UnknownDigest, deepest_layer
from model.views import Branch, plan_views
from workers.caching.codec import FeatureCodec
from workers.caching.encode import encode_views
from workers.caching.layout import BRANCHES
from workers.devices import choose_device, usable_cores

__all__ = ["ProbedMachine", "probe_machine"]

_ENOUGH_S = 3.0
"""Seconds of measuring how images are prepared, and a third of those in which views are encoded. Cores that were idle begin faster than they go on:
two of them encoded 3.6 views/s for the first three seconds, 3.1 half a minute later and 2.7 over minutes."""
_MOST_IMAGES = 12
_LONGEST_JPEG_PX = 65_500
"""Of a side, by libjpeg."""
_MOST_CALLS = 1000
_PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of square matrices that are large enough for a device's best rate: 20 ms on two cores, 2 ms on an H100."""
_CPU_CALL_FLOPS = 2 * 10**11
"""Of one call of the encoder on a CPU: a few seconds on two cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedMachine:
    """What a probe found."""

    device: str
    cores: int
    prepare_core_s: float
    """Seconds of one core to decode and cut one image of the mean size; reading it is not among them."""
    file_bytes: float
    """Of such an image's file."""
    made_up: bool
    """Whether those images were made up."""
    branch: Branch
    """Whose maps were encoded."""
    views_per_s: float | None
    """Encoded, reduced to maps and rounded, on the whole device; on a CPU with as many cores as are counted. None where it was not asked for."""
    products_flop_s: float | None
    """Of matrix products in the type that training multiplies in, on the whole device; None where `views_per_s` is."""
    real_weights: bool
    """Whether the encoder itself ran, and not a stand-in of its shape."""


def probe_machine(
    spec: FeatureSpec,
    images: Sequence[bytes],
    size_px: tuple[int, int],
    mean_pixels: float,
    *,
    device: str,
    cores: int | None,
    encoder_cores: int | None,
    batch_views: int | None,
    encodes: bool = True,
) -> ProbedMachine:
    """Measure this machine.

    Args:
        spec: of the cache.
        images: files to decode, a few of the dataset's own; none, then one of that size is made up.
        size_px: width and height of the one that is made up.
        mean_pixels: of the images whose time is asked for: decoding takes time by pixels.
        device: `auto`, `cpu` or `cuda`.
        cores: that may be used; None is all.
        encoder_cores: out of those, what encoders on a CPU have; None is all.
        batch_views: views in one forward pass; None is automatic.
        encodes: False leaves the encoder out.

    Returns:
        What was found. Decoding is measured in one thread, as a preparing task runs.
    """
    cores = usable_cores() if cores is None else cores
    files = list(images)[:_MOST_IMAGES] or [_made_up(*size_px)]
    place = choose_device(device).type
    branch = next(branch for branch in reversed(BRANCHES) if spec.maps(branch))  # local views are the many
    threads = torch.get_num_threads()
    rate, real, products = None, False, None
    try:
        if encodes:
            torch.set_num_threads(min(cores, encoder_cores or cores))
            rate, real = _encode_rate(spec, branch, place, batch_views)
            torch.set_num_threads(cores)
            products = _products_flop_s(place)
        prepare_s, file_bytes = _prepare_s(spec, files, mean_pixels)
    finally:
        torch.set_num_threads(threads)
    return ProbedMachine(
        device=place,
        cores=cores,
        prepare_core_s=prepare_s,
        file_bytes=file_bytes,
        made_up=not images,
        branch=branch,
        views_per_s=rate,
        products_flop_s=products,
        real_weights=real,
    )


def _made_up(width_px: int, height_px: int) -> bytes:
    """A JPEG that takes about as long to decode as a photograph: smooth shades under noise. Beyond what a JPEG can be, a PNG."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, size=(max(1, height_px // 32), max(1, width_px // 32), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if max(width_px, height_px) > _LONGEST_JPEG_PX:
        smooth.save(file, "PNG", compress_level=1)
        return file.getvalue()
    noise = generator.integers(-12, 13, size=(height_px, width_px, 3), dtype=np.int8)
    pixels = (np.asarray(smooth, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _prepare_s(spec: FeatureSpec, files: Sequence[bytes], mean_pixels: float) -> tuple[float, float]:
    """Seconds of a core for an image of so many pixels, and its file's bytes."""

    def prepare(data: bytes) -> int:
        image = decode_image(data)
        cut_views(image, plan_views(image.width, image.height, spec.encoder.view_px, spec.views), mean_colour=spec.encoder.mean_colour)
        return image.width * image.height

    prepare(files[0])  # loads what is loaded once
    done = pixels = num_bytes = 0
    started = time.thread_time()
    while time.thread_time() - started < _ENOUGH_S and done < max(_MOST_IMAGES, len(files)):
        data = files[done % len(files)]
        pixels += prepare(data)
        num_bytes += len(data)
        done += 1
    share = mean_pixels / pixels
    return (time.thread_time() - started) * share, num_bytes * share


def _encode_rate(spec: FeatureSpec, branch: Branch, device: str, batch_views: int | None) -> tuple[float, bool]:
    """Views of a branch a second, and whether the encoder itself ran."""
    side, deepest, dtype = spec.encoder.view_px, deepest_layer(spec.maps(branch)), compute_dtype(spec.compute, device)
    batch_views = batch_views or automatic_batch_views(spec.encoder, device, dtype)
    if device == "cpu":  # a batch of CLIP-L's 64 views would take minutes
        batch_views = max(1, min(batch_views, _CPU_CALL_FLOPS // max(1, encoder_flops(spec.encoder, deepest))))
    if isinstance(spec.encoder.weights_sha256, UnknownDigest):
        return _stand_in_rate(spec.encoder, deepest, device, dtype, batch_views), False
    encoder = load_encoder(spec.encoder, deepest, device, dtype)
    # The arithmetic of rounding, whatever the numbers: the calibration may be still to come.
    codec = FeatureCodec(spec, {item.place(branch): ChannelCalibration.identity(spec.encoder.width) for branch, item in spec.branch_maps})
    views = np.random.default_rng(0).integers(0, 256, size=(batch_views, 3, side, side), dtype=np.uint8)

    def encode() -> None:
        encode_views(encoder, views, branch, spec.maps(branch), codec, batch_views)

    seconds = _seconds(encode, device)
    if device == "cuda":  # for those who encode, in other processes: this one keeps what it was given otherwise
        del encoder
        torch.cuda.empty_cache()
    return batch_views / seconds, True


def _products_flop_s(device: str) -> float:
    """Of matrix products as training multiplies them."""
    side, dtype = _PRODUCT_SIDE[device], torch.bfloat16 if multiplies_bf16(device) else torch.float32
    left, right = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    @torch.inference_mode()
    def multiply() -> None:
        torch.mm(left, right)

    return 2 * side**3 / _seconds(multiply, device, _ENOUGH_S / 3)


def _seconds(work: Callable[[], None], device: str, enough_s: float | None = None) -> float:
    """Of one call, the median of those in the second half of the time."""
    work()
    times: list[float] = []
    enough_s = 3 * _ENOUGH_S if enough_s is None else enough_s
    began = time.monotonic()
    while len(times) < 2 or (time.monotonic() - began < enough_s and len(times) < _MOST_CALLS):
        started = time.monotonic()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
    return float(np.median(times[len(times) // 2 :]))


def _stand_in_rate(encoder: EncoderSpec, num_blocks: int, device: str, dtype: torch.dtype, batch_views: int) -> float:
    """Of an encoder whose weights are not here: one block of its shape, as often as it has blocks."""
    tokens, width, mlp = encoder.num_patches + encoder.prefix_tokens, encoder.width, encoder.mlp_width
    generator = torch.Generator().manual_seed(0)

    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, mlp), "down": (mlp, width), "gate": (width, mlp)}
    layers = nn.ModuleDict({name: nn.Linear(*shape, device=device, dtype=dtype) for name, shape in shapes.items()})
    if device == "cpu" and can_pack(dtype):
        pack_layers(layers)
    state = torch.randn(batch_views, tokens, width, generator=generator).to(device, dtype)

    @torch.inference_mode()
    def block() -> None:
        normed = F.layer_norm(state, (width,))
        queries, keys, values = layers["qkv"](normed).unflatten(2, (3, encoder.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        middle = state + layers["out"](mixed)
        normed = F.layer_norm(middle, (width,))
        inner = F.silu(layers["gate"](normed)) * layers["up"](normed) if encoder.activation == "swiglu" else F.gelu(layers["up"](normed))
        middle.add_(layers["down"](inner))

    return batch_views / (_seconds(block, device) * max(1, num_blocks))
