"""Where everything durable lies: one root URL, `file://` or `s3://`, and the few operations that the rest is built on.

Inputs are paths relative to the root, with forward slashes. Every write appears whole or not at all: locally through a temporary name and a
rename, on S3 as one finished upload. Exclusive creation has exactly one winner. This module owns credentials, endpoint, retries and the
translation of foreign errors; no other module sees an OSError of a store. Credentials come from the standard AWS environment and profile chain,
the endpoint from AWS_ENDPOINT_URL.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs

from workers.errors import AccessDeniedError, CredentialsError, ObjectNotFoundError, StorageError, StoreFullError, StoreUnavailableError

__all__ = ["Store", "is_damage", "nearest_there", "open_url", "translate_storage_error", "translated"]

TEMPORARY_PREFIX = ".tmp-"
"""Files that are being written. Never listed; one that a killed process leaves behind is harmless."""

_DENIED_CODES = frozenset({"AccessDenied", "AllAccessDisabled", "Forbidden", "401", "403"})
_CREDENTIAL_CODES = frozenset(
    {
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSignature",
        "InvalidToken",
        "MissingAuthenticationToken",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClient",
    }
)
_MISSING_CODES = frozenset({"KeyTooLongError", "NoSuchBucket", "NoSuchKey", "NotFound", "ResourceNotFound", "404"})
_BUSY_CODES = frozenset(
    {
        "InternalError",
        "InternalFailure",
        "NetworkConnection",
        "OperationAborted",
        "RequestTimeTooSkewed",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "429",
        "500",
        "502",
        "503",
        "504",
    }
)
_DENIED_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_OBJECT = {
    errno.ENOTDIR: "a file stands where one of its folders should be",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENAMETOOLONG: "its name is too long for a file",
    errno.ELOOP: "its links lead in a circle",
}
_MISSING_ERRNOS = frozenset({errno.ENOENT, *_NO_OBJECT})
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BUSY_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETUNREACH,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_BUSY_TYPES = frozenset(
    {
        "ClientConnectorError",
        "ClientPayloadError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "ConnectionError",
        "EndpointConnectionError",
        "HTTPClientError",
        "IncompleteReadError",
        "ProtocolError",
        "ReadTimeoutError",
        "ResponseStreamingError",
        "ServerDisconnectedError",
        "ServerTimeoutError",
        "TimeoutError",
    }
)
_MESSAGE_CHARS = 300
_CREDENTIAL_TYPES = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"})


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: s3fs wraps botocore's errors in OSErrors that tell less."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


# Arrow's S3 client and delta-rs have no error types to ask, only texts:
#   AWS Error SLOW_DOWN during HeadObject operation: ...    AWS Error UNKNOWN (HTTP status 503) during ...
#   Server returned non-2xx status code  403 Forbidden  <?xml ...><Error><Code>ExpiredToken</Code>...    HTTP error  error sending request
_ARROW_CODE = re.compile(r"AWS Error ([A-Z_]+)(?: \(HTTP status (\d{3})\))? during")
_DELTA_CODE = re.compile(r"<Code>(\w+)</Code>")
_DELTA_STATUS = re.compile(r"non-2xx status code\W+(\d{3})\b")
_DELTA_UNSENT = re.compile(r"HTTP error\W+error sending request")


def _plain(text: str) -> str:
    """A message on one line: delta-rs draws its own as a tree, in colours."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|<\?xml[^>]*\?>|\u21b3", " ", text)).strip()


def _service_codes(error: BaseException) -> set[str]:
    """What the service answered, as S3 error codes or HTTP statuses: as the error's field, else out of its text."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and (code := response.get("Error", {}).get("Code")):
            return {str(code)}
    text = _plain(str(error))
    if found := _ARROW_CODE.search(text):
        code, status = found.groups()
        return {status or code.title().replace("_", "")}
    if named := _DELTA_CODE.search(text):
        return {named.group(1)}
    if status_only := _DELTA_STATUS.search(text):
        return {status_only.group(1)}
    return {"NetworkConnection"} if _DELTA_UNSENT.search(text) else set()


def translate_storage_error(error: BaseException, doing: str, url: str) -> StorageError:
    """The StorageError for any foreign error. Total: what it does not know becomes a plain StorageError.

    Args:
        error: what a file system, botocore, s3fs or Arrow raised.
        doing: what was being done, e.g. "read".
        url: on which object.

    Returns:
        One of ours, with a message that says what to do.
    """
    if isinstance(error, StorageError):
        return error
    codes = _service_codes(error)
    names = {type(cause).__name__ for cause in _causes(error)}
    numbers = {number for cause in _causes(error) if (number := getattr(cause, "errno", None)) is not None}
    text = _plain(str(error))[:_MESSAGE_CHARS] or type(error).__name__
    if codes & _MISSING_CODES or (not codes and (isinstance(error, FileNotFoundError) or numbers & _MISSING_ERRNOS)):
        strange = next((_NO_OBJECT[number] for number in numbers if number in _NO_OBJECT), None)
        detail = "" if url.startswith("file:") else f" ({text})"  # a local file's error says the path once more, and no more than that
        return ObjectNotFoundError(f"cannot {doing} {url}: {strange or f'nothing lies there{detail}'}")
    if codes & _CREDENTIAL_CODES or names & _CREDENTIAL_TYPES:
        return CredentialsError(
            f"cannot {doing} {url}: the credentials are missing, expired or wrong ({text}). Renew them in the AWS environment or profile."
        )
    if codes & _DENIED_CODES or (not codes and (isinstance(error, PermissionError) or numbers & _DENIED_ERRNOS)):
        return AccessDeniedError(
            f"cannot {doing} {url}: access was denied ({text}). Check the folder's owner and permissions, or for S3 the AWS environment or profile."
        )
    if numbers & _FULL_ERRNOS:
        return StoreFullError(f"cannot {doing} {url}: no space is left ({text}). Free some space or choose another --root, then run again.")
    if codes & _BUSY_CODES or names & _BUSY_TYPES or numbers & _BUSY_ERRNOS:
        return StoreUnavailableError(f"cannot {doing} {url}: the store did not answer ({text}). Check the endpoint and the network, then run again.")
    return StorageError(f"cannot {doing} {url}: {type(error).__name__}: {text}")


def is_damage(error: StorageError) -> bool:
    """Whether an object is gone or holds something else, as far as can be told; a store that is away or refuses us says nothing of it.

    Arrow reports damage without a number of the operating system; what has one (too many open files) is not the file's fault.
    """
    return isinstance(error, ObjectNotFoundError) or (type(error) is StorageError and getattr(error.__cause__, "errno", None) is None)


def _is_exists_error(error: BaseException) -> bool:
    """Whether an exclusive create lost.

    s3fs turns the 412 into FileExistsError only when the answer names the condition (AWS does); from other servers it comes as OSError(EINVAL).
    """
    return isinstance(error, FileExistsError) or bool(_service_codes(error) & {"PreconditionFailed", "ConditionalRequestConflict", "412"})


@contextlib.contextmanager
def translated(doing: str, url: str) -> Iterator[None]:
    """Foreign errors of a store leave the block as StorageErrors; all others as they are.

    Args:
        doing: what is being done, e.g. "read".
        url: on which object.

    Yields:
        Nothing.

    Raises:
        StorageError: for what the store raised.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise translate_storage_error(error, doing, url) from error
    except Exception as error:
        # botocore's errors share no base with OSError, and importing botocore for local roots costs 0.2 s.
        if type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec"}:
            raise translate_storage_error(error, doing, url) from error
        raise


def _raise_unless_missing(error: OSError) -> None:
    """For os.walk, which would take a folder that cannot be read for an empty one."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _relative(path: str) -> str:
    """A checked path below the root."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "://" in path:
        raise StorageError(f"paths in a store are relative to its root and stay below it, found {path!r}")
    return "/".join(parts)


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
        with translated("read", self.url(path)):
            if self._local is not None:
                return (self._local / _relative(path)).read_bytes()
            # One request. Asked to read in parallel, s3fs sends a HEAD before, whose refusals have no code to tell them apart.
            return bytes(self._s3.cat_file(self._key(path), max_concurrency=1))

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
        with translated("read", self.url(path)):
            if self._local is not None:
                file = os.open(self._local / _relative(path), os.O_RDONLY)
                try:
                    got = os.preadv(file, [buffer.data for buffer in buffers], start)
                finally:
                    os.close(file)
            else:
                data = np.frombuffer(self._s3.cat_file(self._key(path), start=start, end=start + wanted), dtype=np.uint8)
                got, place = len(data), 0
                for buffer in buffers if got == wanted else ():
                    buffer[:] = data[place : place + len(buffer)]
                    place += len(buffer)
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
        with translated("look for", self.url(path)):
            if self._local is not None:
                return (self._local / _relative(path)).is_file()
            try:
                return bool(self._s3.info(self._key(path))["type"] == "file")  # isfile() takes every failure for a no
            except FileNotFoundError:
                return False

    def list(self, prefix: str = "") -> list[str]:
        """Paths of all objects in a folder and below, sorted. Empty when there is no such folder."""
        relative = _relative(prefix)
        with translated("list", self.url(prefix)):
            if self._local is not None:
                local_folder = self._local / relative
                found = [
                    (Path(directory) / name).relative_to(self._local).as_posix()
                    for directory, _, names in os.walk(local_folder, onerror=_raise_unless_missing)
                    for name in names
                    if not name.startswith(TEMPORARY_PREFIX)
                ]
            else:
                base = self._key("") + "/"
                folder = self._key(prefix) + "/"
                try:
                    keys = self._s3.find(self._key(prefix))
                except FileNotFoundError:
                    keys = []
                # A search for a folder that is not there may answer with the folder's own name.
                found = [key.removeprefix(base) for key in keys if key.startswith(folder) and key != folder]
        return sorted(found)

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
        with translated("write", self.url(path)):
            if self._local is not None:
                target = self._local / _relative(path)
                with self._temporary(target) as temporary:
                    if sync:
                        _write_synced(temporary, data)
                    else:
                        temporary.write_bytes(data)
                    os.replace(temporary, target)  # noqa: PTH105 - the atomicity is the point
                if sync:
                    _sync_folder(target.parent)
            else:
                self._s3.pipe_file(self._key(path), data)

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
        with translated("create", self.url(path)):
            try:
                if self._local is not None:
                    target = self._local / _relative(path)
                    with self._temporary(target) as temporary:
                        _write_synced(temporary, data)
                        os.link(temporary, target)
                    _sync_folder(target.parent)
                else:
                    self._s3.pipe_file(self._key(path), data, mode="create")
            except Exception as error:
                if _is_exists_error(error):
                    return False
                raise
        return True

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens when there is none."""
        with translated("delete", self.url(path)), contextlib.suppress(FileNotFoundError):
            if self._local is not None:
                (self._local / _relative(path)).unlink()
            else:
                self._s3.rm_file(self._key(path))

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
            with tempfile.TemporaryDirectory(prefix="loupe-publish-") as folder:
                temporary = Path(folder) / PurePosixPath(path).name
                yield temporary
                with translated("write", self.url(path)):
                    self._s3.put_file(str(temporary), self._key(path))

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
                else:
                    self._s3.get_file(self._key(item), str(target))

    # -- the root as a whole

    def free_bytes(self) -> int | None:
        """Free space for new files; None where there is no such limit (object stores)."""
        if self._local is None:
            return None
        with translated("measure", self.root):
            return shutil.disk_usage(nearest_there(self._local)).free

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
            raise type(error)(
                f"the root {self.root} cannot be written. Expected a folder or bucket where files can be created and deleted; found: "
                f"{str(error).rstrip('.')}. "
                "Choose another place with --root, or change its permissions."
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
                f"the root {self.root} cannot be written: {there} may not be. Choose another place with --root, or change its permissions."
            )

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """Arrow's file system for bulk reading, with `fs_path`."""
        return self._arrow_filesystem

    def fs_path(self, path: str = "") -> str:
        """A path as `filesystem` wants it."""
        if self._local is not None:
            return str(self._local / _relative(path))
        return self._key(path)

    @property
    def delta_options(self) -> dict[str, str]:
        """Storage options for deltalake and polars. Holds no credentials: those come from the environment."""
        if self._local is not None:
            return {}
        options = {"aws_conditional_put": "etag"}
        endpoint = _s3_endpoint()
        if endpoint is not None:
            options["aws_endpoint"] = endpoint
            if endpoint.startswith("http://"):
                options["aws_allow_http"] = "true"
        options["aws_region"] = _s3_region()
        return options

    @property
    def delta_root(self) -> str:
        """The root as deltalake, polars and DuckDB want it: a plain path for folders, else the URL."""
        return self.root if self._local is None else str(self._local)

    # -- inside

    def _key(self, path: str) -> str:
        base = self.root.removeprefix("s3://")
        relative = _relative(path)
        return f"{base}/{relative}" if relative else base

    @cached_property
    def _s3(self) -> Any:
        import s3fs

        # Listings are never cached: another process may have written. Large reads bypass s3fs, so it needs no read-ahead either.
        return s3fs.S3FileSystem(use_listings_cache=False, default_cache_type="none", endpoint_url=_s3_endpoint())

    @cached_property
    def _arrow_filesystem(self) -> pyarrow.fs.FileSystem:
        if self._local is not None:
            return pyarrow.fs.LocalFileSystem(use_mmap=False)
        endpoint = _s3_endpoint()
        scheme, _, host = (endpoint or "").partition("://")
        options: dict[str, Any] = {"region": _s3_region()}
        if endpoint is not None:
            options |= {"endpoint_override": host, "scheme": scheme}
        return pyarrow.fs.S3FileSystem(**options)

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


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _s3_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


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
