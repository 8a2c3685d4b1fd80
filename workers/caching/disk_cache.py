"""Features that were read from an object store, kept on this machine's own disk up to a number of bytes.

Of every file that was read from there is a file here with holes: what was read lies at its own place, all else was never written. Nothing says which
places are filled; whoever reads has each map's checksum from the index, and takes what does not match it, such as a hole, from the store. So any
number of processes may share a folder, be killed in it and find it changed: the worst is a read from the store. When there is too much, what was read
the longest time ago goes, by whole files.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["DiskCache"]

_LOOK_SHARE = 1 / 32
"""Of the limit: so much is written by a process before it looks at the whole folder again."""

_KEPT_SHARE = 0.9
"""Of the limit: so much is left when there was too much, so that the next file does not start the search again."""


class DiskCache:
    """Parts of objects, by their place.

    Args:
        folder: of this machine; shared by all processes that name it.
        max_bytes: that the files may take on disk, exceeded by a thirty-second part for each process at most. Where they cannot be kept to it, on a
            file system without locks or with files that cannot be removed, nothing more is written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._unseen_bytes = 0
        self._lock = threading.Lock()
        self._has_room: bool | None = None
        """Whether the last look at the folder left room for more; None before the first."""

    def read_into(self, url: str, start: int, buffers: Sequence[np.ndarray]) -> bool:
        """Fill buffers, one behind the other, from a place on, with what may be the object's bytes: compare their checksum.

        Args:
            url: of the object.
            start: of the first byte.
            buffers: uint8, one-dimensional, contiguous.

        Returns:
            Whether there was anything there.
        """
        wanted = sum(len(buffer) for buffer in buffers)
        try:
            file = os.open(self._path(url), os.O_RDONLY)
        except OSError:
            return False
        try:
            if os.preadv(file, [buffer.data for buffer in buffers], start) != wanted:
                return False
            os.utime(file)  # read last now; the kernel's own note of it comes once a day
        except OSError:
            return False
        finally:
            os.close(file)
        return True

    def write(self, url: str, start: int, buffers: Sequence[np.ndarray]) -> None:
        """Keep bytes of an object, unless the disk does not take them or there is no room for them.

        Args:
            url: of the object.
            start: of the first byte.
            buffers: uint8, one-dimensional, contiguous: one behind the other.
        """
        path, num_bytes = self._path(url), sum(len(buffer) for buffer in buffers)
        with self._lock:
            self._unseen_bytes += num_bytes
            if self._has_room is None:  # whoever writes meanwhile waits to hear of it
                self._unseen_bytes, self._has_room = 0, self._make_room(self._max_bytes - num_bytes)
            looks = self._unseen_bytes > self._max_bytes * _LOOK_SHARE
            if looks:
                self._unseen_bytes = 0
        if looks:
            # Without room it is looked for again after as many bytes as with it: a look takes as long as the folder has files.
            self._has_room = self._make_room(self._max_bytes - num_bytes)
        if not self._has_room:
            return
        # A disk that is full or broken makes this slow, and nothing wrong: the features lie in the store.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwritev(file, [buffer.data for buffer in buffers], start)
            finally:
                os.close(file)

    def _path(self, url: str) -> Path:
        digest = hashlib.sha256(url.encode()).hexdigest()
        return self._folder / digest[:2] / digest[2:34]

    def _make_room(self, allowed_bytes: int) -> bool:
        """Remove what was read the longest time ago, one process at a time; whether no more than so many bytes are left."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held = []
            for path in self._folder.glob("??/*"):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    held.append((found.st_mtime_ns, found.st_blocks * 512, path))
        except OSError:
            return False
        else:
            return self._remove_oldest(held, allowed_bytes)
        finally:
            os.close(lock)

    def _remove_oldest(self, held: list[tuple[int, int, Path]], allowed_bytes: int) -> bool:
        total = sum(num_bytes for _, num_bytes, _ in held)
        kept_bytes = allowed_bytes * _KEPT_SHARE if total > allowed_bytes else allowed_bytes
        for _, num_bytes, path in sorted(held):
            if total <= kept_bytes:
                break
            with contextlib.suppress(OSError):  # one that stays counts on, and the next ones go in its place
                path.unlink(missing_ok=True)
                total -= num_bytes
        return total <= allowed_bytes
