"""Ray Data as its batch inference guide shows it: read, map, map_batches with a class on an actor, write_parquet."""

import numpy as np
import ray
from common import Encoder, Job, count, read_job, views_of


class Embed:
    """A batch of images in one forward pass."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.encoder = Encoder(job.encoder, job.threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for image in batch["image"]:
            count(self.job, str(image))
        views = batch["views"]
        maps = self.encoder(views.reshape(-1, *views.shape[2:])).reshape(*views.shape[:2], 3, 196, 768)
        return {"image": batch["image"], "global": maps[:, :1], "local": maps[:, 1:]}


if __name__ == "__main__":
    job = read_job()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    data = ray.data.from_items([{"image": image} for image in job.images], override_num_blocks=max(1, len(job.images) // 8))
    data = data.map(lambda row: {"image": row["image"], "views": views_of(row["image"])})
    data = data.map_batches(Embed, fn_constructor_args=(job,), batch_size=job.batch_images, concurrency=1)
    data.write_parquet(job.out)
