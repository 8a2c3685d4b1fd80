"""Caches a small dataset on a real Ray, and stops for its parent at an agreed moment: `python cache_driver.py ROOT ENCODER STOP_AFTER`."""

import sys
from pathlib import Path

from model.specs import fingerprint
from tests import small_data
from workers.caching.build import cache_features
from workers.execution import ExecutionSettings, SilentProgress
from workers.storage import Store


class Stops(SilentProgress):
    """Says how many units are committed, and after `stop_after` of them waits for a line."""

    def __init__(self, stop_after: int) -> None:
        self.num_units = 0
        self.stop_after = stop_after

    def advance(self, count: int = 1, **facts: float | str) -> None:
        self.num_units += 1
        print("units", self.num_units, flush=True)
        if self.num_units == self.stop_after:
            sys.stdin.readline()


def main() -> None:
    root, encoder, stop_after = sys.argv[1:]
    spec = small_data.feature_spec(small_data.dataset_spec(), Path(encoder))
    settings = ExecutionSettings(num_cpus=2, feature_unit_bytes=16_000, encoder_threads=1)
    try:
        record = cache_features(spec, Store(root), settings, Stops(int(stop_after)))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise SystemExit(130) from None
    print("done", record.num_cached, fingerprint(spec), flush=True)


if __name__ == "__main__":
    main()
