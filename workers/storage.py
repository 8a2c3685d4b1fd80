"""Where everything durable lies: one root URL, `file://` or `s3://`, and the few operations that the rest is built on.

Inputs are paths relative to the root, with forward slashes. Every write appears whole or not at all: locally through a temporary name and a
rename, on S3 as one finished upload. Exclusive creation has exactly one winner. No other module sees an OSError of a store: `storage_errors` knows
what refusals mean and asks again where that helps. Credentials and endpoint come from the standard AWS environment and profile (`s3_settings`).
"""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow.fs

from workers.errors import AccessDeniedError, ObjectNotFoundError, StorageError
from workers.s3_clients import CHOICES, CLIENT_VARIABLE, ArrowClient, BulkClient, Bytes, FolderClient, ObstoreClient, S3fsClient, obstore_works_here
from workers.s3_settings import S3Settings, resolve_s3_settings
from workers.scratch import temporary_folder
from workers.storage_errors import is_exists_error, persistently, translate_storage_error, translated

__all__ = ["AbandonedUpload", "Store", "StoredObject", "nearest_there", "open_url", "translate_storage_error", "translated"]

Answer = TypeVar("Answer")

RANGES_IN_FLIGHT = 32
"""Requests of a store's `read_ranges`. On SeaweedFS on the same machine 8 give as much as 32; a bucket further away answers later and needs more."""
_CREATION_MARK = "loupe-creation"
"""Metadata of an object that was created exclusively: a name for the call, by which it knows its own object again."""

_STAGING_PREFIX = "loupe-publish-"
"""Folders of files that are on their way to an object store."""

TEMPORARY_PREFIX = ".tmp-"
"""Files that are being written. Never listed; one that a killed process leaves behind is harmless."""


def _raise_unless_missing(error: OSError) -> None:
    """For os.walk, which would take a folder that cannot be read for an empty one."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in itself, so that following it would never end. One that is linked to twice is no such case."""
    if not folder.is_symlink():
        return False
    try:
        target = folder.stat()
        return any(os.path.samestat(target, parent.stat()) for parent in folder.parents)  # device and inode, by whatever names they are reached
    except FileNotFoundError:  # somebody removed it a moment ago
        return True


@lru_cache(maxsize=4096)  # an object of features is read once for each of its images: 10 us
def _relative(path: str) -> str:
    """A checked path below the root."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "://" in path:
        raise StorageError(f"paths in a store are relative to its root and stay below it, found {path!r}")
    return "/".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An object as a listing tells of it."""

    path: str
    """Relative to the root."""
    size_bytes: int
    modified_unix_s: float

    @property
    def is_unfinished(self) -> bool:
        """Whether it is a file that somebody is writing, or was when a process ended."""
        return PurePosixPath(self.path).name.startswith(TEMPORARY_PREFIX)


@dataclass(frozen=True, kw_only=True, slots=True)
class AbandonedUpload:
    """A multipart upload that was begun and neither finished nor dropped. Its parts cost money and are in no listing."""

    path: str
    """Of the object that it would have become, relative to the root."""
    upload_id: str
    started: datetime
    num_bytes: int
    """Of the parts that arrived."""


class Store:
    """Everything below one root URL. Cheap to make, safe to send to another process.

    Args:
        root: `file:///...`, `s3://bucket/prefix`, or a plain path, which is made absolute.

    Raises:
        StorageError: a scheme that Loupe does not know, or a URL without a bucket.
    """

    root: str
    """The root URL without a trailing slash."""

    def __init__(self, root: str) -> None:
        self.root, self._local = _normalise_root(root)
        self._made: dict[tuple[int, str], Any] = {}

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return (Store, (self.root,))

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def url(self, path: str = "") -> str:
        """The absolute URL of a path."""
        relative = _relative(path)
        if self._local is not None:
            return (self._local / relative).as_uri()
        return f"{self.root}/{relative}" if relative else self.root

    def local_path(self, path: str = "") -> Path | None:
        """The path in the local file system; None for object stores."""
        return None if self._local is None else self._local / _relative(path)

    # -- whole objects

    def read_bytes(self, path: str) -> bytes:
        """All bytes of an object.

        Args:
            path: of the object.

        Returns:
            Its bytes.

        Raises:
            ObjectNotFoundError: nothing lies there.
            StorageError: it cannot be read.
        """
        if self._local is None:
            return self._ask("read", path, lambda: bytes(self._s3fs_client.read(_relative(path))))
        with translated("read", self.url(path)):
            return (self._local / _relative(path)).read_bytes()

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Bytes]:
        """Parts of an object, many requests in flight. May be called from several threads, which share the requests in flight.

        Args:
            path: of the object.
            ranges: start and length of each part, in bytes; in any order, overlapping or not.

        Returns:
            The parts in the order of `ranges`, each with the buffer protocol: bytes, or memory of the client that is not copied once more.

        Raises:
            ObjectNotFoundError: nothing lies there.
            StorageError: it cannot be read, or ends before one of the parts does: silence would put the next bytes in the wrong place.
        """
        relative = _relative(path)
        if wrong := next((part for part in ranges if min(part) < 0), None):
            raise StorageError(f"parts of {self.url(path)} start at 0 or later and have a length of 0 or more, found start and length {wrong}")
        client = self._range_client

        def read(part: tuple[int, int]) -> Bytes:
            start, length = part
            if length == 0:
                return b""
            if self._local is None:
                data = self._ask("read", path, lambda: client.read_range(relative, start, length))
            else:
                with translated("read", self.url(path)):
                    data = client.read_range(relative, start, length)
            if len(data) != length:
                raise StorageError(
                    f"cannot read {self.url(path)}: it ends before the part asked for does, {length} bytes from {start} on; found {len(data)} of them"
                )
            return data

        if len(ranges) == 1:
            return [read(ranges[0])]
        return list(self._threads.map(read, ranges))

    def read_into(self, path: str, start: int, buffers: Sequence[np.ndarray]) -> None:
        """Fill buffers, one behind the other, with an object's bytes from a place on. One read.

        Args:
            path: of the object.
            start: of the first byte.
            buffers: uint8, one-dimensional, contiguous.

        Raises:
            ObjectNotFoundError: nothing lies there.
            StorageError: it cannot be read, or ends before the buffers do.
        """
        wanted = sum(len(buffer) for buffer in buffers)
        if self._local is None:
            data, place = np.frombuffer(self.read_ranges(path, [(start, wanted)])[0], dtype=np.uint8), 0
            for buffer in buffers:
                buffer[:] = data[place : place + len(buffer)]
                place += len(buffer)
            return
        with translated("read", lambda: self.url(path)):
            file = os.open(f"{self._local}/{_relative(path)}", os.O_RDONLY)
            try:
                got = os.preadv(file, [buffer.data for buffer in buffers], start) if wanted else 0
                # Linux reads 2 GiB at most in one call, and network file systems may give less than is there.
                while 0 < got < wanted and (count := os.preadv(file, _behind(buffers, got), start + got)):
                    got += count
            finally:
                os.close(file)
        if got != wanted:
            raise StorageError(f"cannot read {self.url(path)}: it ends {wanted - got} bytes before what was looked for; it was cut short")

    def read_reference(self, reference: str) -> bytes:
        """All bytes of an object below this root, or anywhere when `reference` is an absolute URL.

        Args:
            reference: a path below the root, or a URL.

        Returns:
            Its bytes.

        Raises:
            ObjectNotFoundError: nothing lies there.
            StorageError: it cannot be read.
        """
        if "://" not in reference:
            return self.read_bytes(reference)
        store, name = open_url(reference)
        return store.read_bytes(name)

    def reference_url(self, reference: str) -> str:
        """The absolute URL of what `read_reference` would read."""
        return reference if "://" in reference else self.url(reference)

    def exists(self, path: str) -> bool:
        """Whether an object lies at this path. Folders are not objects."""
        if self._local is None:
            try:
                # isfile() takes every failure for a no
                return self._ask("look for", path, lambda: bool(self._s3.info(self._key(path))["type"] == "file"))
            except ObjectNotFoundError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return False
                raise
        with translated("look for", self.url(path)):
            return (self._local / _relative(path)).is_file()

    def list(self, prefix: str = "") -> list[str]:
        """Paths of all objects in a folder and below, sorted. Empty when there is no such folder."""
        if self._local is None:
            return sorted(self._listed(prefix))
        with translated("list", self.url(prefix)):
            files = self._files(prefix)
            return sorted(file.relative_to(self._local).as_posix() for file in files if not file.name.startswith(TEMPORARY_PREFIX))

    def list_objects(self, prefix: str = "") -> Sequence[StoredObject]:
        """All objects in a folder and below with size and age, sorted by path; of a local folder also files that were never finished.

        Args:
            prefix: the folder.

        Raises:
            StorageError: it cannot be listed.
        """
        if self._local is None:
            found = [
                StoredObject(path=path, size_bytes=item["size"], modified_unix_s=item["LastModified"].timestamp())
                for path, item in self._listed(prefix).items()
            ]
        else:
            found = []
            with translated("list", self.url(prefix)):
                for file in self._files(prefix):
                    with contextlib.suppress(FileNotFoundError):  # it was finished, or dropped, a moment ago
                        status = file.stat()
                        path = file.relative_to(self._local).as_posix()
                        found.append(StoredObject(path=path, size_bytes=status.st_size, modified_unix_s=status.st_mtime))
        return sorted(found, key=lambda item: item.path)

    def _files(self, prefix: str) -> Iterator[Path]:
        """Every file of a local folder and below, also where a folder is a link to one elsewhere: features may lie on a larger disk."""
        assert self._local is not None
        for directory, folders, names in os.walk(self._local / _relative(prefix), onerror=_raise_unless_missing, followlinks=True):
            yield from (Path(directory) / name for name in names)
            folders[:] = [name for name in folders if not _leads_back(Path(directory) / name)]

    def _listed(self, prefix: str) -> dict[str, dict[str, Any]]:
        """What a bucket says of every object in a folder and below, by path."""
        base, folder = self._key("") + "/", self._key(prefix) + "/"

        def find() -> dict[str, dict[str, Any]]:
            try:
                details: dict[str, dict[str, Any]] = self._s3.find(self._key(prefix), detail=True)
            except FileNotFoundError:
                return {}
            return details

        # A search for a folder that is not there may answer with the folder's own name.
        return {key.removeprefix(base): item for key, item in self._ask("list", prefix, find).items() if key.startswith(folder) and key != folder}

    def write_bytes(self, path: str, data: bytes, *, sync: bool = True) -> None:
        """Put an object there, whole, whatever lay there before.

        Args:
            path: where.
            data: all of it.
            sync: whether it must survive a power cut from now on. Without, it survives killed processes only until `sync` is called for it:
                ten times faster for many small files.

        Raises:
            StorageError: it cannot be written; what lay there before is still whole.
        """
        if self._local is None:
            self._ask("write", path, lambda: self._s3.pipe_file(self._key(path), data))
            return
        with translated("write", self.url(path)):
            target = self._local / _relative(path)
            with self._temporary(target) as temporary:
                if sync:
                    _write_synced(temporary, data)
                else:
                    temporary.write_bytes(data)
                os.replace(temporary, target)  # noqa: PTH105 - the atomicity is the point
            if sync:
                _sync_folder(target.parent)

    def sync(self, paths: Sequence[str]) -> None:
        """Make objects that were written without `sync` survive a power cut."""
        if self._local is None:
            return
        folders = set()
        for path in paths:
            target = self._local / _relative(path)
            with translated("write", self.url(path)), target.open("rb") as file:
                os.fsync(file.fileno())
            folders.add(target.parent)
        for folder in sorted(folders):
            _sync_folder(folder)

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Put an object there unless one is there already. Of any number of callers exactly one wins.

        Args:
            path: where.
            data: all of it.

        Returns:
            Whether this call created it.

        Raises:
            StorageError: it can neither be written nor found.
        """
        if self._local is None:
            return self._create_object(path, data)
        with translated("create", self.url(path)):
            target = self._local / _relative(path)
            try:
                with self._temporary(target) as temporary:
                    _write_synced(temporary, data)
                    os.link(temporary, target)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
        return True

    def _create_object(self, path: str, data: bytes) -> bool:
        """Create an object in S3 by a conditional request.

        A try whose answer was lost may have won, and then the next one finds the object there. Its bytes would not tell whose it is, since two
        workers create the same record with the same bytes; so each call marks its object, and looks for its mark where it finds one.
        """
        mark = uuid.uuid4().hex

        def create() -> bool:
            try:
                self._s3.pipe_file(self._key(path), data, mode="create", Metadata={_CREATION_MARK: mark})
            except Exception as error:
                if is_exists_error(error):
                    return self._creation_mark(path) == mark
                raise
            return True

        return self._ask("create", path, create)

    def _creation_mark(self, path: str) -> str | None:
        bucket, _, key = self._key(path).partition("/")
        try:
            answer = self._s3.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None  # it was there a moment ago, and somebody deleted it
        mark: str | None = answer["Metadata"].get(_CREATION_MARK)
        return mark

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens when there is none."""
        if self._local is None:
            with contextlib.suppress(ObjectNotFoundError):
                self._ask("delete", path, lambda: self._s3.rm_file(self._key(path)))
            return
        with translated("delete", self.url(path)), contextlib.suppress(FileNotFoundError):
            (self._local / _relative(path)).unlink()

    # -- JSON

    def read_json(self, path: str) -> Any:
        """An object as JSON.

        Args:
            path: of the object.

        Returns:
            The parsed value.

        Raises:
            ObjectNotFoundError: nothing lies there.
            StorageError: it is no JSON.
        """
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.url(path)} should be JSON but is not ({error}); delete it and run again") from error

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as JSON, whole, whatever lay there before."""
        self.write_bytes(path, _json_bytes(value))

    def create_json(self, path: str, value: Any) -> bool:
        """Write a value as JSON unless something lies there; whether this call created it."""
        return self.create_bytes(path, _json_bytes(value))

    # -- files and folders

    @contextlib.contextmanager
    def publishing(self, path: str) -> Iterator[Path]:
        """A local file to write to, published at `path` whole when the block ends well, and dropped when it raises.

        Bulk output is written this way because an exception inside an open S3 stream still commits what was written so far.

        Args:
            path: where the finished file shall lie.

        Yields:
            A path in the local file system that does not exist yet.

        Raises:
            StorageError: the file cannot be published.
        """
        if self._local is not None:
            target = self._local / _relative(path)
            with translated("write", self.url(path)), self._temporary(target) as temporary:
                yield temporary
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
                os.replace(temporary, target)  # noqa: PTH105
                _sync_folder(target.parent)
        else:
            with self._staged(path) as temporary:
                yield temporary

                def upload() -> None:
                    self._upload_client.write_file(_relative(path), temporary)

                try:
                    self._ask("write", path, upload)
                except ObjectNotFoundError:
                    # A client asks for the completion of an upload again when the answer is lost. AWS says once more that it is complete; MinIO, that
                    # there is no such upload.
                    self._ask("write", path, upload)

    @contextlib.contextmanager
    def _staged(self, path: str) -> Iterator[Path]:
        """A place for a file on its way to the object store, in the folder of temporary files; errors of that folder name it."""
        by_way = f"{self.url(path)} by way of "
        with translated("write", f"{by_way}a folder of temporary files"):
            parent = tempfile.gettempdir()
        with (
            translated("write", f"{by_way}{parent}", more_room=f"Free some space in {parent}, or name another folder by TMPDIR"),
            temporary_folder(_STAGING_PREFIX, Path(parent)) as folder,
        ):
            yield folder / PurePosixPath(path).name

    def download_folder(self, path: str, local: Path) -> None:
        """Copy every object below `path` into a local folder.

        Args:
            path: the folder in the store.
            local: where the files shall lie; made when it is not there.

        Raises:
            ObjectNotFoundError: there is nothing below `path`.
        """
        found = self.list(path)
        if not found:
            raise ObjectNotFoundError(f"{self.url(path)} holds nothing to copy")
        prefix = _relative(path)
        for item in found:
            target = local / item.removeprefix(f"{prefix}/" if prefix else "")
            with translated("read", self.url(item)):
                target.parent.mkdir(parents=True, exist_ok=True)
                if self._local is not None:
                    shutil.copyfile(self._local / item, target)
                    continue
            self._ask("read", item, partial(self._s3.get_file, self._key(item), str(target)))

    # -- uploads that were never finished

    def abandoned_uploads(self, prefix: str = "", *, before: datetime | None = None) -> Sequence[AbandonedUpload]:
        """Multipart uploads in a folder and below that were begun and neither finished nor dropped, oldest first. Folders have none.

        One of them may still be under way in another process: its age tells.

        Args:
            prefix: the folder.
            before: those alone that were begun by then; None is all.

        Returns:
            The uploads.

        Raises:
            StorageError: they cannot be listed.
        """
        if self._local is not None:
            return []
        bucket, _, folder = f"{self._key(prefix)}/".partition("/")
        base = f"{self._key('')}/".partition("/")[2]
        found = []
        marker: dict[str, str] = {}
        while True:
            page = self._ask(
                "list the uploads below",
                prefix,
                partial(self._s3.call_s3, "list_multipart_uploads", Bucket=bucket, Prefix=folder, **marker),
            )
            for upload in page.get("Uploads", []):
                if before is not None and upload["Initiated"] >= before:
                    continue
                path = upload["Key"].removeprefix(base)
                with contextlib.suppress(ObjectNotFoundError):  # it was finished, or dropped, a moment ago
                    num_bytes = self._uploaded_bytes(path, upload["UploadId"])
                    found.append(AbandonedUpload(path=path, upload_id=upload["UploadId"], started=upload["Initiated"], num_bytes=num_bytes))
            if not page.get("IsTruncated"):
                return sorted(found, key=lambda upload: (upload.started, upload.path))
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _uploaded_bytes(self, path: str, upload_id: str) -> int:
        bucket, _, key = self._key(path).partition("/")
        total: int = 0
        marker: dict[str, int] = {}
        while True:
            page = self._ask(
                "list the upload to", path, partial(self._s3.call_s3, "list_parts", Bucket=bucket, Key=key, UploadId=upload_id, **marker)
            )
            total += sum(part["Size"] for part in page.get("Parts", []))
            if not page.get("IsTruncated"):
                return total
            marker = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def abort_upload(self, upload: AbandonedUpload) -> None:
        """Drop an upload and its parts; nothing happens when it is finished or dropped already.

        Args:
            upload: one of `abandoned_uploads`.

        Raises:
            StorageError: it cannot be dropped.
        """
        bucket, _, key = self._key(upload.path).partition("/")
        with contextlib.suppress(ObjectNotFoundError):
            self._ask(
                "drop the upload to",
                upload.path,
                partial(self._s3.call_s3, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.upload_id),
            )

    # -- the root as a whole

    def free_bytes(self) -> int | None:
        """Free space for new files; None where there is no such limit (object stores)."""
        if self._local is None:
            return None
        with translated("measure", self.root):
            return shutil.disk_usage(nearest_there(self._local)).free

    def free_staging_bytes(self) -> int | None:
        """Free space for files on their way to an object store, in this machine's folder of temporary files; None where none are."""
        if self._local is not None:
            return None
        with translated("measure", "the folder of temporary files"):
            return shutil.disk_usage(tempfile.gettempdir()).free

    def check_writable(self) -> None:
        """Prove that an object can be written, read and deleted here.

        Raises:
            StorageError: it cannot; the message names the root and says what to do.
        """
        self.check_place()
        path = f".writable-{uuid.uuid4().hex}"
        try:
            self.write_bytes(path, b"loupe")
            found = self.read_bytes(path)
            self.delete(path)
        except StorageError as error:
            advice = ", or change its permissions" if isinstance(error, AccessDeniedError) else ""
            raise type(error)(
                f"the root {self.root} cannot be written. Expected a folder or bucket where files can be created and deleted; found: "
                f"{str(error).rstrip('.')}. Choose another place with --root{advice}."
            ) from error
        if found != b"loupe":
            raise StorageError(f"the root {self.root} gives back other bytes than were written; choose another place with --root")

    def check_place(self) -> None:
        """Look whether this root could be written, without writing. An object store is not asked.

        Raises:
            AccessDeniedError: the folder, or the nearest one above it that is there, may not be written.
            StorageError: a file stands where the root or a folder above it should be.
        """
        if self._local is None:
            return
        there = nearest_there(self._local)
        if not there.is_dir():
            raise StorageError(f"the root {self.root} cannot be written: {there} is a file. Choose another place with --root.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise AccessDeniedError(
                f"the root {self.root} cannot be written: this user may not write to {there}. Choose another place with --root, or change its "
                "permissions."
            )

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """Arrow's file system for bulk reading, with `fs_path`."""
        return self._own("arrow", self._make_arrow_filesystem)

    def fs_path(self, path: str = "") -> str:
        """A path as `filesystem` wants it."""
        if self._local is not None:
            return str(self._local / _relative(path))
        return self._key(path)

    @property
    def delta_options(self) -> dict[str, str]:
        """Storage options for deltalake and polars. They hold keys only where those are fsspec's own; all others come from the environment."""
        return {} if self._local is not None else self._s3_settings.delta_options(self._bucket)

    @property
    def delta_root(self) -> str:
        """The root as deltalake, polars and DuckDB want it: a plain path for folders, else the URL."""
        return self.root if self._local is None else str(self._local)

    # -- inside

    def _key(self, path: str) -> str:
        base = self.root.removeprefix("s3://")
        relative = _relative(path)
        return f"{base}/{relative}" if relative else base

    @property
    def _bucket(self) -> str:
        return urlsplit(self.root).netloc

    def _ask(self, doing: str, path: str, ask: Callable[[], Answer]) -> Answer:
        """What the object store answers."""
        return persistently(ask, doing, self.url(path))

    def _own(self, name: str, make: Callable[[], Answer]) -> Answer:
        """What this process makes of a kind, once: connections and threads do not survive a fork.

        Two threads may both make one; the first is kept. A lock would be held for ever in a child that was forked meanwhile.
        """
        key = (os.getpid(), name)
        if key not in self._made:
            with translated("reach", self.root):
                self._made.setdefault(key, make())
        made: Answer = self._made[key]
        return made

    @property
    def _s3_settings(self) -> S3Settings:
        return self._own("settings", lambda: resolve_s3_settings(self._bucket))

    @property
    def _s3(self) -> Any:
        return self._own("s3fs", self._s3_settings.s3fs)

    @property
    def _threads(self) -> ThreadPoolExecutor:
        return self._own("threads", lambda: ThreadPoolExecutor(RANGES_IN_FLIGHT, thread_name_prefix="loupe-ranges"))

    @property
    def _s3fs_client(self) -> S3fsClient:
        return S3fsClient(self._s3, self._key(""))

    @property
    def _obstore_client(self) -> ObstoreClient:
        return self._own("obstore", lambda: ObstoreClient(self._s3_settings.obstore(self._bucket), urlsplit(self.root).path.strip("/")))

    @property
    def _range_client(self) -> BulkClient:
        """What reads ranges: obstore, with 343 MB/s of 8 MiB ranges where s3fs has 237 and Arrow 182, all 32 in flight, on SeaweedFS on two cores.

        `loupe doctor storage` measures it on any root, and LOUPE_S3_CLIENT chooses. A child of a process that used obstore reads by s3fs.
        """
        return FolderClient(self._local) if self._local is not None else self._chosen_client

    @property
    def _upload_client(self) -> BulkClient:
        """What uploads files: obstore, with 24 MB/s of a 64 MiB object where s3fs has 22 (medians of five, SeaweedFS on two busy cores).

        Arrow has 27, within the spread, but its streams finish their upload when they are dropped after an error, and leave half an object.
        """
        return FolderClient(self._local) if self._local is not None else self._chosen_client

    @property
    def _chosen_client(self) -> BulkClient:
        match os.environ.get(CLIENT_VARIABLE) or CHOICES[0]:
            case "obstore":
                return self._obstore_client if obstore_works_here() else self._s3fs_client
            case "s3fs":
                return self._s3fs_client
            case other:
                raise StorageError(f"{CLIENT_VARIABLE}: found {other!r}; allowed: {' and '.join(CHOICES)}, and nothing, which is {CHOICES[0]}")

    def bulk_clients(self) -> Sequence[BulkClient]:
        """Every client that can move bulk bytes here; those that Loupe itself uses are among them."""
        if self._local is not None:
            return [FolderClient(self._local)]
        return [self._s3fs_client, ArrowClient(self.filesystem, self._key("")), self._obstore_client]

    def clients_in_use(self) -> dict[str, str]:
        """The names of the clients that move bulk bytes here, by what for."""
        whole = FolderClient(self._local) if self._local is not None else self._s3fs_client
        return {"bulk reads": whole.name, "bulk writes": self._upload_client.name, "ranged reads": self._range_client.name}

    def _make_arrow_filesystem(self) -> pyarrow.fs.FileSystem:
        return pyarrow.fs.LocalFileSystem(use_mmap=False) if self._local is not None else self._s3_settings.lasting_arrow()

    @contextlib.contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        """A name beside the target, removed at the end when it is still there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def nearest_there(path: Path) -> Path:
    """A path, or the nearest one above it that exists: what a file that is still to come depends on."""
    return next(place for place in (path, *path.parents) if place.exists())


def open_url(url: str) -> tuple[Store, str]:
    """The store and the path of one object that may lie anywhere.

    Args:
        url: `file:///...`, `s3://...` or a plain path, of an object.

    Returns:
        A store whose root is the object's folder, and the object's name in it.

    Raises:
        StorageError: the URL names no object.
    """
    folder, slash, name = url.rstrip("/").rpartition("/")
    if name and folder in ("", "file://"):
        return Store(f"{folder}{slash}" or "."), name  # in the file system's root, or in the current folder
    if not name or not folder:
        raise StorageError(f"expected the URL or path of a file, found {url!r}")
    return Store(folder), unquote(name) if url.startswith("file://") else name


def _normalise_root(root: str) -> tuple[str, Path | None]:
    scheme = urlsplit(root).scheme if "://" in root else ""
    match scheme:
        case "":
            folder = Path(root).expanduser().absolute()
            return folder.as_uri(), folder
        case "file":
            parts = urlsplit(root)
            if parts.query or parts.fragment:
                raise StorageError(f"a file URL has no query or fragment, found {root!r}; write ? as %3F and # as %23, or give a plain path")
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
                raise StorageError(f"a file root is file:// and an absolute path (three slashes), found {root!r}")
            folder = Path(unquote(parts.path))
            return folder.as_uri(), folder
        case "s3":
            if not urlsplit(root).netloc:
                raise StorageError(f"an S3 root is s3://bucket/prefix, found {root!r}")
            return root.rstrip("/"), None
        case _:
            raise StorageError(f"expected a path, a file:// URL or an s3:// URL, found {root!r}")


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _behind(buffers: Sequence[np.ndarray], num_bytes: int) -> list[memoryview]:
    """What is left of buffers behind their first bytes."""
    left = []
    for buffer in buffers:
        if num_bytes < len(buffer):
            left.append(buffer[num_bytes:].data)
        num_bytes = max(0, num_bytes - len(buffer))
    return left


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: without it a power cut may forget the name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
