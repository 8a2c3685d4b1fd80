"""The clients that move bulk bytes, behind one face: s3fs, Arrow and obstore for buckets, plain calls for folders.

A store writes and reads large objects through the one that measures best (`Store.read_ranges`, `Store.publishing`); `loupe doctor storage` measures
them all on a root of the user's own. Paths are relative to the root; errors are the client's own, for `storage_errors` to translate.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

__all__ = [
    "CHOICES",
    "CLIENT_VARIABLE",
    "PART_BYTES",
    "ArrowClient",
    "BulkClient",
    "Bytes",
    "FolderClient",
    "ObstoreClient",
    "S3fsClient",
    "obstore_works_here",
]

CLIENT_VARIABLE = "LOUPE_S3_CLIENT"
"""Environment variable that chooses what moves bulk bytes."""
CHOICES = ("obstore", "s3fs")
"""What it may name. Not Arrow, whose uploads can end with half an object under its name."""

PART_BYTES = 8 * 2**20
"""Of a multipart upload: 80 GB in S3's 10,000 parts."""
_PARTS_IN_FLIGHT = 8

Bytes = Any
"""Whatever has the buffer protocol: bytes, or memory that the client owns and that is not copied once more."""


class S3fsClient:
    """fsspec's client, on aiobotocore.

    Args:
        filesystem: of s3fs.
        base: bucket and prefix of the root.
    """

    name = "s3fs"

    def __init__(self, filesystem: Any, base: str) -> None:
        self.filesystem = filesystem
        self.base = base

    def write_file(self, path: str, file: Path) -> None:
        """Put a local file there; in parts from 16 MiB on, which are dropped when one fails."""
        self.filesystem.put_file(str(file), f"{self.base}/{path}", chunksize=PART_BYTES, max_concurrency=_PARTS_IN_FLIGHT)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Put a small object there."""
        self.filesystem.pipe_file(f"{self.base}/{path}", data)

    def read(self, path: str) -> Bytes:
        """All of an object by one request. Asked to read in parallel, s3fs sends a HEAD before, whose refusals have no code to tell them apart."""
        return self.filesystem.cat_file(f"{self.base}/{path}", max_concurrency=1)

    def read_range(self, path: str, start: int, length: int) -> Bytes:
        """So many bytes from `start` on; fewer where the object ends before."""
        return self.filesystem.cat_file(f"{self.base}/{path}", start=start, end=start + length, max_concurrency=1)

    def count(self, folder: str) -> int:
        """The number of objects in a folder and below."""
        return len(self.filesystem.find(f"{self.base}/{folder}"))


class ArrowClient:
    """Arrow's client, on the AWS SDK for C++.

    Args:
        filesystem: of Arrow.
        base: bucket and prefix of the root.
    """

    name = "pyarrow.fs"

    def __init__(self, filesystem: pyarrow.fs.FileSystem, base: str) -> None:
        self.filesystem = filesystem
        self.base = base

    def write_file(self, path: str, file: Path) -> None:
        """Put a local file there, in parts; a copy that fails is not finished, so nothing appears."""
        pyarrow.fs.copy_files(
            str(file),
            f"{self.base}/{path}",
            source_filesystem=pyarrow.fs.LocalFileSystem(),
            destination_filesystem=self.filesystem,
            chunk_size=PART_BYTES,
        )

    def write_bytes(self, path: str, data: bytes) -> None:
        """Put a small object there."""
        with self.filesystem.open_output_stream(f"{self.base}/{path}") as stream:
            stream.write(data)

    def read(self, path: str) -> Bytes:
        """All of an object, by HEAD and GET."""
        with self.filesystem.open_input_file(f"{self.base}/{path}") as file:
            return file.read_buffer()

    def read_range(self, path: str, start: int, length: int) -> Bytes:
        """So many bytes from `start` on; fewer where the object ends before. Arrow asks for the size first, by HEAD."""
        with self.filesystem.open_input_file(f"{self.base}/{path}") as file:
            file.seek(start)
            return file.read_buffer(length)

    def count(self, folder: str) -> int:
        """The number of objects in a folder and below."""
        found = self.filesystem.get_file_info(pyarrow.fs.FileSelector(f"{self.base}/{folder}", recursive=True))
        return sum(info.type == pyarrow.fs.FileType.File for info in found)


class ObstoreClient:
    """The Rust object_store's client, as Python's obstore brings it.

    Args:
        bucket: obstore's client of the bucket.
        prefix: of the root in it; may be empty.
    """

    name = "obstore"

    def __init__(self, bucket: Any, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix

    def write_file(self, path: str, file: Path) -> None:
        """Put a local file there, in parts, which are dropped when one fails."""
        import obstore

        obstore.put(self.bucket, self._key(path), file, chunk_size=PART_BYTES, max_concurrency=_PARTS_IN_FLIGHT)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Put a small object there."""
        import obstore

        obstore.put(self.bucket, self._key(path), data, use_multipart=False)

    def read(self, path: str) -> Bytes:
        """All of an object by one request."""
        import obstore

        return obstore.get(self.bucket, self._key(path)).bytes()

    def read_range(self, path: str, start: int, length: int) -> Bytes:
        """So many bytes from `start` on; fewer where the object ends before."""
        import obstore

        return obstore.get_range(self.bucket, self._key(path), start=start, length=length)

    def count(self, folder: str) -> int:
        """The number of objects in a folder and below."""
        import obstore

        return sum(len(page) for page in obstore.list(self.bucket, self._key(folder)))

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path


class FolderClient:
    """Plain calls of the operating system.

    Args:
        folder: the root.
    """

    name = "os"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_file(self, path: str, file: Path) -> None:
        """Copy a local file there, durably."""
        target = self._made(path)
        shutil.copyfile(file, target)
        with target.open("rb") as written:
            os.fsync(written.fileno())

    def write_bytes(self, path: str, data: bytes) -> None:
        """Put a small file there, durably."""
        with self._made(path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: str) -> Bytes:
        """All of a file."""
        return (self.folder / path).read_bytes()

    def read_range(self, path: str, start: int, length: int) -> Bytes:
        """So many bytes from `start` on; fewer where the file ends before. One copy, from the page cache into the result."""
        descriptor = os.open(self.folder / path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _pread(descriptor, start, length)
        finally:
            os.close(descriptor)

    def count(self, folder: str) -> int:
        """The number of files in a folder and below."""
        return sum(len(names) for _, _, names in os.walk(self.folder / folder))

    def _made(self, path: str) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


BulkClient = S3fsClient | ArrowClient | ObstoreClient | FolderClient
"""All of them do the same, each in its own way."""


def _pread(descriptor: int, start: int, length: int) -> bytes:
    data = os.pread(descriptor, length, start)
    if len(data) == length or not data:
        return data
    return b"".join([data, *_pieces(descriptor, start + len(data), length - len(data))])


def _pieces(descriptor: int, start: int, length: int) -> Iterator[bytes]:
    """What one call did not give: Linux reads 2 GiB at most, and network file systems may give less than is there."""
    while length and (data := os.pread(descriptor, length, start)):
        yield data
        start += len(data)
        length -= len(data)


_first_process: int | None = None


def obstore_works_here() -> bool:
    """Whether this process may use obstore: its threads do not survive a fork, and requests in a child of a process that used it hang for ever."""
    global _first_process  # noqa: PLW0603 - the one thread pool in obstore is as global
    if _first_process is None:
        _first_process = os.getpid()
    return _first_process == os.getpid()
