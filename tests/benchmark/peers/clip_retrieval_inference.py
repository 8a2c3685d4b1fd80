"""clip-retrieval's own inference loop: its reader of a folder, its runner, its writer of a partition; around the stock model.

Its own mapper gives one vector for an image; this one gives the maps that the others give, a flat row each. Whoever runs it names the partitions;
none is skipped because its files are there.
"""

from pathlib import Path

import numpy as np
from clip_retrieval.clip_inference.reader import FilesReader
from clip_retrieval.clip_inference.runner import Runner
from clip_retrieval.clip_inference.writer import NumpyWriter
from common import Encoder, count, read_job, views_of_image


class Quiet:
    """A logger that tells nobody."""

    def start(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def __call__(self, stats: dict) -> None:
        """Nothing."""


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
    runner = Runner(
        reader_builder=lambda sampler: FilesReader(
            sampler,
            preprocess=views_of_image,
            tokenizer=None,
            input_dataset=str(Path(job.images[0]).parent),
            batch_size=job.batch_images,
            num_prepro_workers=1,
            **outputs,
        ),
        mapper_builder=lambda: maps_of,
        writer_builder=lambda number: NumpyWriter(number, job.out, output_partition_count=num_partitions, **outputs),
        logger_builder=lambda number: Quiet(),
        output_partition_count=num_partitions,
    )
    for partition in range(num_partitions):
        runner(partition)
