"""A cluster loses a machine with units under way, and does not get it back."""

import subprocess
import sys
import tempfile

import pytest

from tests.commands import REPOSITORY, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("how", ["gently", "abruptly"])
def test_a_run_ends_without_the_machine_and_the_next_one_begins_without_it(tmp_path, how):
    with tempfile.TemporaryDirectory(prefix="loupe-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: Ray puts sockets below it
        command = [sys.executable, str(REPOSITORY / "tests" / "fault" / "node_driver.py"), folder, how]
        done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=270, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith(("found", "encoders"))]
    # Far sooner than it would be taken for stuck, or that would be its end.
    assert told == ["found 0 1 2 3 4 5 6 7 8 9 10 11 12 13", "encoders cuda 1", "found 0 1 2 3"], done.stderr
    assert "warned: the cluster has lost GPUs: 1 processes encode instead of 2" in done.stderr
    assert done.returncode == 0
    assert not (tmp_path / "stalls").exists()
