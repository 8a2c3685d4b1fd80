"""Claim guarded: on a GPU the encode path reaches the share of the bare forward pass, and that the share of the device's peak, that README.md tells.

    python tests/benchmark/encoder_on_gpu.py                                CLIP-L/14-336 of random weights in bf16, under four minutes
    python tests/benchmark/encoder_on_gpu.py --batches                      the bare forward pass alone, in batches of several sizes
    python tests/benchmark/encoder_on_gpu.py --device cpu --compute fp32 --shape vit-b16 --views 40 --unit-views 40 --repeats 3 --no-compile

Needs torch, transformers, numpy, safetensors and pyarrow, and none of Loupe's other packages: neither Ray nor Delta Lake. Prints JSON: of every rate
the median of its repeats with the least and the most. Matrix product: the peak that torch reaches here on one large product. Bare: the encoder's
forward pass over views that are on the device already, as it is written. Path: views on the host, through ViewEncoder to int8 and into Parquet files,
written by a second thread as the cache writes them, a row group for an image. Two units that were under way at once are then held against the bare
forward pass, view by view: were a buffer written before its last reader is done, a view would be another one.
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
import types
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
LOCAL_VIEWS = 4
"""Of each image, beside its global view."""

# Hidden, MLP, heads, view, patch, blocks.
SHAPES = {
    "clip-l14-336": (1024, 4096, 16, 336, 14, 24),
    "vit-b16": (768, 3072, 12, 224, 16, 12),
    "tiny": (32, 64, 2, 56, 14, 3),
}


def _without_jaxtyping() -> None:
    """Where jaxtyping is not installed, annotations of shapes mean nothing: they are checked under test alone."""
    if importlib.util.find_spec("jaxtyping") is not None:
        return

    class Shape:
        def __class_getitem__(cls, _: object) -> Any:
            return Any

    def found(name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)  # what Python asks of every module
        return Shape

    module = types.ModuleType("jaxtyping")
    module.__getattr__ = found  # type: ignore[method-assign]
    sys.modules["jaxtyping"] = module


def make_encoder(shape: str, device: str, dtype: torch.dtype) -> Any:
    """An encoder of random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from model.encoder import Encoder
    from model.specs import EncoderSpec

    width, mlp_width, num_heads, view_px, patch_px, num_blocks = SHAPES[shape]
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp_width,
        num_attention_heads=num_heads,
        image_size=view_px,
        patch_size=patch_px,
        num_hidden_layers=num_blocks,
    )
    model: Any = CLIPVisionModel(config)
    tower = getattr(model, "vision_model", model).to(dtype)
    spec = EncoderSpec(
        model=shape,
        weights_sha256="0" * 64,
        family="clip",
        view_px=view_px,
        patch_px=patch_px,
        width=width,
        num_blocks=num_blocks,
        prefix_tokens=1,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        num_heads=num_heads,
        mlp_width=mlp_width,
        activation="quick_gelu",
        norm_eps=1e-5,
    )
    return Encoder(tower, spec, num_blocks).to(device)


def _seconds(work: Callable[[], object], device: str) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(f"{median(values):.4g}"), "min": float(f"{min(values):.4g}"), "max": float(f"{max(values):.4g}"), "repeats": len(values)}


def matrix_peak(device: str, dtype: torch.dtype, side: int, repeats: int) -> dict[str, float]:
    """TFLOP/s of one large product."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    calls = 20 if device == "cuda" else 1
    return _spread(
        [2 * side**3 * calls / _seconds(lambda: [left @ right for _ in range(calls)], device) / 1e12 for _ in range(repeats)]  # type: ignore[misc]
    )


def _write(path: Path, encoded: Any) -> None:
    """A file for each branch, with a row group for an image."""
    for branch, found in encoded.items():
        views = 1 if branch == "global" else LOCAL_VIEWS
        writer = None
        for start in range(0, len(found.finite), views):
            columns, arrays = [], []
            for name, stored in found.maps.items():
                for kind, values in (("", stored.values), ("__steps", stored.steps)):
                    part = np.ascontiguousarray(values[start : start + views])
                    field = pa.binary(part[0].nbytes)
                    columns.append(name + kind)
                    arrays.append(pa.FixedSizeBinaryArray.from_buffers(field, len(part), [None, pa.py_buffer(part)]))
            table = pa.Table.from_arrays(arrays, names=columns)
            if writer is None:
                writer = pq.ParquetWriter(f"{path}-{branch}.parquet", table.schema, compression="none", use_dictionary=False, write_statistics=False)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON."""
    from model.architectures import encoder_flops
    from model.encoder import compute_dtype
    from model.encoder_execution import EncoderForward, automatic_batch_views
    from model.quality import MapQuality
    from model.quantisation import ChannelCalibration, map_quality
    from model.specs import CalibrationRule, FeatureSpec, MapSpec
    from model.views import ViewSpec
    from workers.caching.batching import ViewEncoder
    from workers.caching.codec import FeatureCodec

    device = options.device
    dtype = compute_dtype(options.compute, device)
    encoder = make_encoder(options.shape, device, dtype)
    spec, deepest = encoder.spec, encoder.deepest_layer
    # As Dense Connector reads an encoder: its last layers, and means of its two halves.
    half = deepest // 2
    maps = (MapSpec(layers=(deepest,)), MapSpec(layers=tuple(range(half))), MapSpec(layers=tuple(range(half, deepest))))
    view_tflop = encoder_flops(spec, deepest) / 1e12
    peak = matrix_peak(device, dtype, 8192 if device == "cuda" else 256, options.repeats)
    generator = np.random.default_rng(0)

    def bare_rate(batch_views: int, forward: Callable[..., object]) -> dict[str, float]:
        views = torch.from_numpy(generator.integers(0, 256, (batch_views, 3, spec.view_px, spec.view_px), dtype=np.uint8)).to(device)
        calls = max(1, options.views // batch_views)
        forward(views, list(maps))
        forward(views, list(maps))
        return _spread(
            [calls * batch_views / _seconds(lambda: [forward(views, list(maps)) for _ in range(calls)], device) for _ in range(options.repeats)]
        )

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "shape": options.shape,
        "compute": options.compute,
        "view_gflop": round(view_tflop * 1e3, 3),
        "matrix_product_tflop_s": peak,
    }
    if options.batches:
        rates = {size: bare_rate(size, encoder) for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= options.views}
        return found | {"bare_views_s": rates}
    batch_views = options.batch_views or automatic_batch_views(spec, device, dtype)
    bare = bare_rate(batch_views, encoder)
    variants = {}
    for name, compiled, recorded in (("compiled", True, False), ("recorded", False, True), ("compiled and recorded", True, True)):
        if device != "cuda" and (recorded or not options.compile):
            continue
        forward = EncoderForward(encoder, compiled=compiled, recorded=recorded)
        variants[name] = bare_rate(batch_views, forward) | {"is_compiled": forward.is_compiled}
        forward.release()

    features = FeatureSpec(
        dataset_fingerprint="0" * 64,
        encoder=spec,
        views=ViewSpec(),
        global_maps=maps,
        local_maps=maps,
        precision="int8",
        calibration=CalibrationRule(num_images=4, min_snr_db=30.0),
        calibration_sha256="0" * 64,
        compute=options.compute,
    )
    calibrations = {f"{branch}/{item.name}": ChannelCalibration.identity(spec.width) for branch in ("global", "local") for item in maps}
    num_images = max(1, options.unit_views // (1 + LOCAL_VIEWS))
    unit: Any = {
        "global": generator.integers(0, 256, (num_images, 3, spec.view_px, spec.view_px), dtype=np.uint8),
        "local": generator.integers(0, 256, (num_images * LOCAL_VIEWS, 3, spec.view_px, spec.view_px), dtype=np.uint8),
    }
    unit_views = num_images * (1 + LOCAL_VIEWS)
    num_units = max(2, options.views // unit_views)
    view_encoder = ViewEncoder(encoder, FeatureCodec(features, calibrations), options.batch_views, compiled=None if options.compile else False)
    wanted: Any = {"global": maps, "local": maps}

    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ThreadPoolExecutor(1) as second:

        def land_and_write(pending: Any, number: int) -> None:
            _write(Path(folder) / str(number), pending.result())

        def path() -> None:
            writing: list[Future[None]] = []
            for number in range(num_units):
                pending = view_encoder.submit(unit, wanted, {"global": 1, "local": LOCAL_VIEWS})
                if writing:
                    writing.pop().result()
                writing.append(second.submit(land_and_write, pending, number % 3))
            writing.pop().result()

        path()
        rates = [num_units * unit_views / _seconds(path, device) for _ in range(options.repeats)]
        written = sum(file.stat().st_size for file in Path(folder).iterdir()) / min(3, num_units)
    both = [view_encoder.submit(part, wanted, {"global": 0, "local": 0}) for part in (unit, {branch: views[::-1] for branch, views in unit.items()})]
    local, reversed_local = (pending.result()["local"].maps for pending in both)
    quality, worst_view_db = {item.name: MapQuality() for item in maps}, math.inf
    for start in range(0, len(unit["local"]), batch_views):
        stop = min(start + batch_views, len(unit["local"]))
        computed = encoder(torch.from_numpy(unit["local"][start:stop]).to(device), list(maps))
        for item in maps:
            for place in range(start, stop):
                for stored, row in ((local[item.name], place), (reversed_local[item.name], len(unit["local"]) - 1 - place)):
                    found_view = map_quality(computed[item.name][place - start], view_encoder.codec.load("local", item, stored[row : row + 1])[0])
                    quality[item.name] += found_view
                    worst_view_db = min(worst_view_db, found_view.snr_db)
    best = max([bare, *variants.values()], key=lambda rate: rate["median"])["median"]
    return found | {
        "batch_views": view_encoder.batch_size.views,
        "bare_views_s": bare,
        "bare_of_peak": round(bare["median"] * view_tflop / peak["median"], 4),
        "variants_views_s": variants,
        "unit_views": unit_views,
        "unit_file_bytes": int(written),
        "path_views_s": _spread(rates),
        "path_snr_db": {name: round(kept.snr_db, 2) for name, kept in quality.items()},
        "path_worst_view_snr_db": round(worst_view_db, 2),
        "path_of_bare": round(median(rates) / bare["median"], 4),
        "path_of_best": round(median(rates) / best, 4),
    }


def main(words: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="clip-l14-336")
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder and few views: whether it runs at all")
    parser.add_argument("--compute", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--batch-views", type=int, help="views in one forward pass; automatic when absent")
    parser.add_argument("--batches", action="store_true", help="the bare forward pass alone, in batches of 1 to 128 views")
    parser.add_argument("--views", type=int, default=4000, help="views in one repeat")
    parser.add_argument("--unit-views", type=int, default=640, help="views of one unit, which is one file of each branch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--folder", help="where files are written; the system's folder for temporary ones when absent")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU here. --device cpu measures the CPU, and --device cpu --tiny whether all of it runs")
    if options.tiny:
        options.shape, options.views, options.unit_views, options.repeats, options.compile = "tiny", 40, 20, 2, False
    sys.path.insert(0, str(REPOSITORY))
    _without_jaxtyping()
    print(json.dumps(measure(options), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
