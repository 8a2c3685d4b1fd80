"""clip-retrieval's own inference loop: its reader of a folder, its runner, its writer of a partition; around the stock model.

Its own mapper gives one vector for an image; this one gives the maps that the others give, a flat row each. Whoever runs it names the partitions;
none is skipped because its files are there.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
from common import Encoder, count, read_job, views_of_image


class Quiet:
    """A logger that tells nobody."""

    def start(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def __call__(self, stats: dict) -> None:
        """Nothing."""


def part(name: str) -> ModuleType:
    """A module of its inference package alone: the package's own imports want a web server, an index builder and two towers of weights."""
    package = importlib.util.find_spec("clip_retrieval")
    assert package is not None
    assert package.origin is not None
    found = importlib.util.spec_from_file_location(f"inference_{name}", Path(package.origin).parent / "clip_inference" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


if __name__ == "__main__":
    job = read_job()
    num_partitions = max(1, len(job.images) // 8)
    encoder = Encoder(job.encoder, job.threads)

    def maps_of(item: dict) -> dict:
        for name in item["image_filename"]:
            count(job, name)
        views = np.asarray(item["image_tensor"])
        maps = encoder(views.reshape(-1, *views.shape[2:]))
        return {"image_embs": maps.reshape(len(views), -1), "image_filename": item["image_filename"]}

    outputs = {"enable_text": False, "enable_image": True, "enable_metadata": False}
    runner = part("runner").Runner(
        reader_builder=lambda sampler: part("reader").FilesReader(
            sampler,
            preprocess=views_of_image,
            tokenizer=None,
            input_dataset=str(Path(job.images[0]).parent),
            batch_size=job.batch_images,
            num_prepro_workers=1,
            **outputs,
        ),
        mapper_builder=lambda: maps_of,
        writer_builder=lambda number: part("writer").NumpyWriter(number, job.out, output_partition_count=num_partitions, **outputs),
        logger_builder=lambda number: Quiet(),
        output_partition_count=num_partitions,
    )
    for partition in range(num_partitions):
        runner(partition)
