"""What a driver leaves behind of Ray: nothing of its own, what a user chose, and nothing on the terminal. With a real Ray: tests/contract."""

import os
import subprocess
import sys

import pytest

from workers import runtime


@pytest.mark.parametrize("keep", [True, False])
def test_only_folders_of_our_own_are_removed(tmp_path, keep):
    folder = tmp_path / "ray"
    folder.mkdir()
    (folder / "log").write_text("text")
    runtime._stop_ray(folder, keep=keep)
    assert folder.exists() == keep


def test_folders_of_killed_drivers_are_swept_and_no_others(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owners = {"killed": ended.pid, "living": os.getpid(), "elsewhere": ended.pid, "unreadable": None}
    for name, pid in owners.items():
        folder = tmp_path / f"{runtime._TEMP_DIR_PREFIX}{name}"
        folder.mkdir()
        space = "another-host/pid:[1]" if name == "elsewhere" else runtime._process_space()
        if pid is not None:
            (folder / runtime._PID_FILE).write_text(f"{space} {pid}")
    (tmp_path / "somebody-else-s").mkdir()
    runtime._sweep(tmp_path)
    left = {path.name.removeprefix(runtime._TEMP_DIR_PREFIX) for path in tmp_path.iterdir()}
    assert left == {"living", "elsewhere", "unreadable", "somebody-else-s"}


def test_native_code_is_silenced_and_heard_again(capfd):
    os.write(2, b"before ")
    with runtime._stderr_silenced():
        os.write(2, b"during ")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"


def test_silence_where_there_is_no_standard_error():
    program = "import os\nos.close(2)\nfrom workers.runtime import _stderr_silenced\nwith _stderr_silenced():\n    print('worked')"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "worked\n"
