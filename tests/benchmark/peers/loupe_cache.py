"""Loupe itself, by the stage that its runs use."""

import json
import sys
import time
from pathlib import Path

from model.encoder import describe_encoder
from model.specs import FeatureSpec, fingerprint
from tests.benchmark.caching import MAPS, VIEWS, dataset_of
from workers.caching.build import cache_features
from workers.execution import ExecutionSettings, SilentProgress
from workers.storage import Store


class Counter(SilentProgress):
    """Writes a line for every image of a unit that is done, with the time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """As Progress.advance."""
        with self._path.open("a") as file:
            file.writelines(f"- {time.time()}\n" for _ in range(count))


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    dataset = dataset_of(Path(job["images"][0]).parents[1])
    spec = FeatureSpec(
        dataset_fingerprint=fingerprint(dataset), encoder=describe_encoder(job["encoder"]), views=VIEWS, global_maps=MAPS, local_maps=MAPS
    )
    cache_features(spec, Store(job["out"]), ExecutionSettings(feature_unit_bytes=job["unit_bytes"]), Counter(Path(job["counter"])))
