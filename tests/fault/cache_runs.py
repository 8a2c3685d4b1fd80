"""What the tests that kill caching share: how a driver is started, and the rows that a table must end with."""

import os
import subprocess
import sys

from tests.commands import REPOSITORY
from workers.caching.layout import BRANCHES, features_table
from workers.execution import ExecutionSettings

UNDISTURBED = ExecutionSettings(feature_unit_bytes=16_000, encoder_threads=1)


def start(root, encoder, stop_after):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tests" / "fault" / "cache_driver.py"), root, str(encoder), str(stop_after)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY, start_new_session=True
    )


def wait_for(process, line):
    for found in process.stdout:
        if found.strip().startswith(line):
            return found.strip()
    raise AssertionError(f"the driver ended with {process.wait()} before it said {line!r}")


def rows(store, spec):
    found = []
    for branch in BRANCHES:
        table = features_table(store, spec).read({"branch": branch})
        found += [(branch, row["image_sha256"], row["view_index"], *(row[item.name] for item in spec.maps(branch))) for row in table.to_pylist()]
    return sorted(found)
