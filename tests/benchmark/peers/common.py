"""What the peers share: the job, and the views and maps as a user of transformers would make them.

Only what a peer's own environment holds is imported: torch, transformers, numpy, pillow. Loupe is not.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VIEW_PX = 224
LAYERS = ((11,), tuple(range(6)), tuple(range(6, 12)))
"""Hidden states of ViT-B/16 whose means are the maps of DCI with two groups."""


@dataclass(frozen=True)
class Job:
    """What is to be cached, from a JSON file."""

    images: list[str]
    encoder: str
    out: str
    counter: str
    """A file that gets a line for every image that is encoded, with the time."""
    threads: int
    batch_images: int
    unit_bytes: int
    """Of Loupe alone."""


def read_job() -> Job:
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def count(job: Job, image: str) -> None:
    """Note that an image is encoded; one write, so that processes do not cut each other's lines."""
    file = os.open(job.counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{image} {time.time()}\n".encode())
    os.close(file)


def views_of_image(image: Image.Image) -> np.ndarray:
    """The whole image squashed, and its four quarters: uint8 [5, 224, 224, 3]."""
    image = image.convert("RGB")
    whole = image.resize((VIEW_PX, VIEW_PX), Image.Resampling.BICUBIC)
    large = np.asarray(image.resize((2 * VIEW_PX, 2 * VIEW_PX), Image.Resampling.BICUBIC))
    tiles = [large[row : row + VIEW_PX, column : column + VIEW_PX] for row in (0, VIEW_PX) for column in (0, VIEW_PX)]
    return np.stack([np.asarray(whole), *tiles])


def views_of(path: str) -> np.ndarray:
    """Those of a file."""
    return views_of_image(Image.open(path))


class Encoder:
    """The stock model with all hidden states, and their means."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from transformers import CLIPImageProcessor, CLIPVisionModel

        torch.set_num_threads(threads)
        self.torch = torch
        self.processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
        self.model = CLIPVisionModel.from_pretrained(folder).eval()

    def __call__(self, views: np.ndarray) -> np.ndarray:
        """uint8 [views, 224, 224, 3] -> fp16 [views, maps, tokens, width]."""
        with self.torch.inference_mode():
            pixels = self.processor(list(views), return_tensors="pt")["pixel_values"]
            states = self.model(pixels, output_hidden_states=True).hidden_states
            maps = [self.torch.stack([states[layer][:, 1:] for layer in layers]).mean(dim=0) for layers in LAYERS]
            found: Any = self.torch.stack(maps, dim=1).half().numpy()
        return found
