"""Loupe itself, by the stage that its runs use."""

import json
import sys
from pathlib import Path

from model.encoder import describe_encoder
from model.specs import FeatureSpec, fingerprint
from tests.benchmark.caching import MAPS, VIEWS, dataset_of
from workers.caching.build import cache_features
from workers.execution import ExecutionSettings, SilentProgress
from workers.storage import Store

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    dataset = dataset_of(Path(job["images"][0]).parents[1])
    spec = FeatureSpec(
        dataset_fingerprint=fingerprint(dataset), encoder=describe_encoder(job["encoder"]), views=VIEWS, global_maps=MAPS, local_maps=MAPS
    )
    cache_features(spec, Store(job["out"]), ExecutionSettings(feature_unit_bytes=job["unit_bytes"]), SilentProgress())
