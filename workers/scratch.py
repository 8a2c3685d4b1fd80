"""Folders for files that only one process needs: its next neighbour removes them where it was killed before it could.

A folder says whose it is by a file in it. Process numbers mean something on one host and in one container alone, so both are named.
"""

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["owned_folder", "temporary_folder"]

_OWNER_FILE = ".owner"


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path) -> Iterator[Path]:
    """An `owned_folder` that is removed at the end of the block.

    Args:
        prefix: of its name.
        parent: where it shall lie.

    Yields:
        The folder; it holds one hidden file.
    """
    folder = owned_folder(prefix, parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def owned_folder(prefix: str, parent: Path) -> Path:
    """Make a folder of this process. Those of the same prefix whose processes were killed are removed first.

    Args:
        prefix: of its name; tells what it is for.
        parent: where it shall lie.

    Returns:
        The folder, to be removed by whoever asked; it holds one hidden file.
    """
    _sweep(prefix, parent)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        (folder / _OWNER_FILE).write_text(f"{_process_space()} {os.getpid()}")
    except OSError:  # a full disk; without the file nobody would ever remove it
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _sweep(prefix: str, parent: Path) -> None:
    """Remove the folders of our own processes that were killed before they could do it."""
    for folder in parent.glob(f"{prefix}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            owner, _, pid = (folder / _OWNER_FILE).read_text().partition(" ")
            if owner != _process_space():
                continue  # another container's on a shared folder: its process numbers say nothing here
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue  # not ours, being made or being removed right now


def _process_space() -> str:
    """What process numbers are relative to: this host, and on Linux this container."""
    try:
        return f"{platform.node()}/{os.readlink('/proc/self/ns/pid')}".replace(" ", "_")  # noqa: PTH115 - no path, a name
    except OSError:
        return platform.node().replace(" ", "_")
