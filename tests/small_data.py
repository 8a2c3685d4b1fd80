"""Small datasets for tests: pictures of noise instead of drawn ones, LLaVA folders, and the caches over them."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from model.encoder import describe_encoder
from model.specs import FeatureSpec, MapSpec, fingerprint
from model.views import ViewSpec
from workers.dataset.build import DatasetRecord, build_dataset
from workers.dataset.rendering import Rendered
from workers.dataset.samples import Turn
from workers.dataset.spec import DatasetSpec, LegibilitySpec, LlavaJsonSourceSpec, RenderedSourceSpec
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store

NOISE_SOURCES = (RenderedSourceSpec(family="noise", num_images=10), RenderedSourceSpec(family="grain", num_images=6))


def dataset_spec(**changes) -> DatasetSpec:
    fields = {
        "sources": NOISE_SOURCES,
        "seed": 0,
        "held_out_fraction": 0.25,
        "view_px": 56,
        "views": ViewSpec(),
        "legibility": LegibilitySpec(local_min_px=7.0, global_max_px=4.0),
        "turns_per_image": 2,
    }
    return DatasetSpec(**(fields | changes))


def png(seed: int, width: int = 84, height: int = 56) -> bytes:
    """A picture of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def render_noise(family: str, number: int, spec: DatasetSpec) -> Rendered:
    """A renderer that takes no time."""
    seed = int.from_bytes(hashlib.sha256(f"{family}:{number}:{spec.seed}".encode()).digest()[:4], "big")
    turns = tuple(
        Turn(question=f"What is {place}?", answer=str(seed % (place + 3)), kind=f"{family}/digit", detail="small", evidence=(0.0, 0.0, 8.0, 8.0))
        for place in range(spec.turns_per_image)
    )
    return Rendered(png=png(seed), width_px=84, height_px=56, turns=turns, licence="CC0-1.0", detail_score=1.0)


def build(store: Store, spec: DatasetSpec, **changes) -> DatasetRecord:
    """Build a dataset in this process."""
    execution = ExecutionSettings(**({"images_per_build_unit": 4} | changes))
    return build_dataset(spec, store, execution, SilentProgress(), cluster=InlineCluster(), renderer=render_noise)


def conversation(*texts: str) -> list[dict[str, str]]:
    """Human and gpt taking turns."""
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def write_llava(folder: Path, records: list, images: dict[str, bytes]) -> LlavaJsonSourceSpec:
    """A LLaVA source in a folder."""
    (folder / "images").mkdir(parents=True)
    for name, data in images.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(data)
    text = json.dumps(records).encode()
    (folder / "records.json").write_bytes(text)
    return LlavaJsonSourceSpec(records=str(folder / "records.json"), images=str(folder / "images"), records_sha256=hashlib.sha256(text).hexdigest())


def feature_spec(dataset: DatasetSpec, encoder_folder: Path, **changes) -> FeatureSpec:
    """Three maps for the global view, two for the local ones; one of them is shared."""
    fields = {
        "dataset_fingerprint": fingerprint(dataset),
        "encoder": describe_encoder(str(encoder_folder)),
        "views": dataset.views,
        "global_maps": (MapSpec(layers=(5,)), MapSpec(layers=(0, 1, 2)), MapSpec(layers=(1, 4))),
        "local_maps": (MapSpec(layers=(5,)), MapSpec(layers=(3, 4, 5))),
        "precision": "fp16",
    }
    return FeatureSpec(**(fields | changes))
