"""What the benchmarks of caching share: photographs of 2 million pixels that are none, and an encoder of ViT-B/16's shape."""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from model.specs import MapSpec
from model.views import ViewSpec
from tests.small_data import write_llava
from workers.dataset.spec import DatasetSpec, LegibilitySpec, LlavaJsonSourceSpec

MAPS = (MapSpec(layers=(11,)), MapSpec(layers=tuple(range(6))), MapSpec(layers=tuple(range(6, 12))))
"""Of DCI with two groups."""
VIEWS = ViewSpec.anyres(grids=((2, 2),))
"""1 + 4 views of every image."""
SIZE_PX = (1632, 1224)


def photograph(seed: int) -> bytes:
    """A JPEG of 2 million pixels that takes as long to decode as a photograph: smooth shades under noise."""
    generator = np.random.default_rng(seed)
    width_px, height_px = SIZE_PX
    coarse = generator.integers(0, 256, (height_px // 32, width_px // 32, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(SIZE_PX, Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = (smooth + generator.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_photographs(folder: Path, count: int) -> DatasetSpec:
    """A LLaVA folder of so many, and the dataset that it is."""
    images = {f"{number:05d}.jpg": photograph(number) for number in range(count)}
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "noise"}]
    write_llava(folder, [{"image": name, "conversations": turns} for name in images], images)
    return dataset_of(folder)


def dataset_of(folder: Path) -> DatasetSpec:
    """The dataset of a folder that `write_photographs` wrote."""

    records = folder / "records.json"
    source = LlavaJsonSourceSpec(records=str(records), images=str(folder / "images"), records_sha256=hashlib.sha256(records.read_bytes()).hexdigest())
    return DatasetSpec(
        sources=(source,),
        seed=0,
        held_out_fraction=0.1,
        view_px=224,
        views=VIEWS,
        legibility=LegibilitySpec(local_min_px=7.0, global_max_px=4.0),
        turns_per_image=1,
    )


def write_vit(folder: Path) -> Path:
    """A folder of a CLIP ViT-B/16 vision tower with random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder
