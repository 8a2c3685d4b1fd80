"""A loop over images with stock transformers, a safetensors file for each: what is there already is left out."""

from pathlib import Path

from common import Encoder, count, read_job, views_of
from safetensors.numpy import save_file

if __name__ == "__main__":
    job = read_job()
    encoder = Encoder(job.encoder, job.threads)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    for image in job.images:
        target = out / f"{Path(image).stem}.safetensors"
        if target.exists():
            continue
        count(job, image)
        maps = encoder(views_of(image))
        save_file({"global": maps[:1], "local": maps[1:]}, target)
