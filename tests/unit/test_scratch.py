"""Folders of temporary files: gone at the end, and after a kill when the next process comes."""

import errno
import os
import subprocess
import sys

import pytest

from workers import scratch


def test_folders_of_killed_processes_are_swept_and_no_others(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owners = {"killed": ended.pid, "living": os.getpid(), "elsewhere": ended.pid, "unreadable": None}
    for name, pid in owners.items():
        folder = tmp_path / f"mine-{name}"
        folder.mkdir()
        space = "another-host/pid:[1]" if name == "elsewhere" else scratch._process_space()
        if pid is not None:
            (folder / scratch._OWNER_FILE).write_text(f"{space} {pid}")
    (tmp_path / "somebody-else-s").mkdir()
    own = scratch.owned_folder("mine-", tmp_path)
    assert (own / scratch._OWNER_FILE).read_text() == f"{scratch._process_space()} {os.getpid()}"
    left = {path.name.removeprefix("mine-") for path in tmp_path.iterdir() if path != own}
    assert left == {"living", "elsewhere", "unreadable", "somebody-else-s"}


def test_a_folder_is_gone_at_the_end_of_its_block_whatever_happens(tmp_path):
    def fail():
        with scratch.temporary_folder("mine-", tmp_path) as folder:
            (folder / "file").write_bytes(b"x")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_say_whose_it_is_is_not_left_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        scratch.owned_folder("mine-", tmp_path)
    assert list(tmp_path.iterdir()) == []
