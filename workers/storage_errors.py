"""What a store's refusals mean: the StorageError for whatever a file system, S3 or one of its clients raises, and asking again where it helps.

The four clients of S3 (s3fs, Arrow, delta-rs, obstore) say the same refusal in four ways; here they become one. Only errors that a store may take
back are asked again (`persistently`): it is busy, the connection broke, another create of the same name is under way.
"""

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa

from workers.errors import (
    AccessDeniedError,
    CertificateError,
    CredentialsError,
    ObjectNotFoundError,
    StorageError,
    StoreFullError,
    StoreUnavailableError,
)

__all__ = ["is_damage", "is_exists_error", "persistently", "translate_storage_error", "translated"]

Answer = TypeVar("Answer")

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
_SHORT_CODES = frozenset({"InvalidRange", "416"})
_MISSING_CODES = frozenset({"KeyTooLongError", "NoSuchBucket", "NoSuchKey", "NoSuchUpload", "NotFound", "ResourceNotFound", "404"})
_BUSY_CODES = frozenset(
    {
        "ConditionalRequestConflict",
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
        "409",
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
_CREDENTIAL_TYPES = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "UnauthenticatedError"}
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: s3fs wraps botocore's errors in OSErrors that tell less."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


# Arrow's S3 client, delta-rs and obstore have no error fields to ask, only texts:
#   AWS Error SLOW_DOWN during HeadObject operation: ...    AWS Error UNKNOWN (HTTP status 503) during ...
#   Server returned non-2xx status code  403 Forbidden  <?xml ...><Error><Code>ExpiredToken</Code>...    HTTP error  error sending request
#   HTTP error: request or response body error
_ARROW_CODE = re.compile(r"AWS Error ([A-Z_]+)(?: \(HTTP status (\d{3})\))? during")
_DELTA_CODE = re.compile(r"<Code>(\w+)</Code>")
_DELTA_STATUS = re.compile(r"non-2xx status code\W+(\d{3})\b")
# Of botocore, Arrow, delta-rs and obstore. OpenSSL's error has the number 1, which to the operating system is a permission that was refused.
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED|curlCode: 60\b|invalid peer certificate|InvalidCertificate")
_DELTA_BROKEN = re.compile(r"HTTP error\W+(error sending request|request or response body error|error decoding response body)")


def _plain(text: str) -> str:
    """A message on one line: delta-rs draws its own as a tree, in colours; obstore appends how it is built inside."""
    text = text.partition("\n\nDebug source:")[0]
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
    return {"NetworkConnection"} if _DELTA_BROKEN.search(text) else set()


_MORE_ROOM = "Free some space or choose another --root"


def translate_storage_error(error: BaseException, doing: str, url: str, *, more_room: str = _MORE_ROOM) -> StorageError:
    """The StorageError for any foreign error. Total: what it does not know becomes a plain StorageError.

    Args:
        error: what a file system, botocore, s3fs or Arrow raised.
        doing: what was being done, e.g. "read".
        url: on which object.
        more_room: what helps where no space is left.

    Returns:
        One of ours, with a message that says what to do.
    """
    if isinstance(error, StorageError):
        return error
    text = _plain(str(error))[:_MESSAGE_CHARS] or type(error).__name__
    if _UNTRUSTED.search(str(error)):
        return CertificateError(
            f"cannot {doing} {url}: the server's certificate is not trusted ({text}). Name the file with the certificates of its authority by "
            "AWS_CA_BUNDLE, or by ca_bundle of the AWS profile, and by SSL_CERT_FILE too: delta-rs, which reads and writes tables, reads that alone."
        )
    codes = _service_codes(error)
    names = {type(cause).__name__ for cause in _causes(error)}
    numbers = {number for cause in _causes(error) if (number := getattr(cause, "errno", None)) is not None}
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
        return StoreFullError(f"cannot {doing} {url}: no space is left ({text}). {more_room}, then run again.")
    if codes & _BUSY_CODES or names & _BUSY_TYPES or numbers & _BUSY_ERRNOS:
        return StoreUnavailableError(f"cannot {doing} {url}: the store did not answer ({text}). Check the endpoint and the network, then run again.")
    return StorageError(f"cannot {doing} {url}: {type(error).__name__}: {text}")


def is_exists_error(error: BaseException) -> bool:
    """Whether an exclusive create found something there. A 409 says less than that: another create is under way, and may still fail.

    s3fs turns the 412 into FileExistsError only when the answer names the condition (AWS does); from other servers it comes as OSError(EINVAL).
    """
    return isinstance(error, FileExistsError) or bool(_service_codes(error) & {"PreconditionFailed", "412"})


def is_damage(error: StorageError) -> bool:
    """Whether an object is gone or holds something else, as far as can be told; a store that is away or refuses us says nothing of it.

    Arrow reports damage without a number of the operating system; what has one (too many open files) is not the file's fault. Neither is what a
    service answered: a HEAD that is refused for a stale token or a wrong region has a bare status, 400 or 301. But for a range beyond the end.

    Args:
        error: of a read.
    """
    if type(error) is not StorageError:
        return isinstance(error, ObjectNotFoundError)
    cause = error.__cause__
    return getattr(cause, "errno", None) is None and (cause is None or _service_codes(cause) <= _SHORT_CODES)


@contextlib.contextmanager
def translated(doing: str, url: str | Callable[[], str], *, more_room: str = _MORE_ROOM) -> Iterator[None]:
    """Foreign errors of a store leave the block as StorageErrors; all others as they are, Arrow's of a lack of memory among them.

    Args:
        doing: what is being done, e.g. "read".
        url: on which object; a function where making the URL takes as long as the work.
        more_room: what helps where no space is left.

    Yields:
        Nothing.

    Raises:
        StorageError: for what the store raised.
    """
    try:
        yield
    except MemoryError:  # Arrow's own is an ArrowException too, and would be taken for damage of what was read
        raise
    except (OSError, pa.ArrowException) as error:
        raise translate_storage_error(error, doing, url() if callable(url) else url, more_room=more_room) from error
    except Exception as error:
        # botocore's errors share no base with OSError, and importing botocore for local roots costs 0.2 s.
        if type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "obstore"}:
            raise translate_storage_error(error, doing, url() if callable(url) else url, more_room=more_room) from error
        raise


_TRIES = 7
"""With pauses of 6 s in the mean and 11 s at most: a server that restarts is back by then, and one that is gone is told of soon."""
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


def persistently(ask: Callable[[], Answer], doing: str, url: str) -> Answer:
    """Ask an object store, and ask again while it is busy or cuts answers off: seven times in all, after pauses of random length (full jitter).

    Workers that were refused together would come back together without the randomness.

    Args:
        ask: one request, which may be made again.
        doing: what is being done, e.g. "read".
        url: on which object.

    Returns:
        What `ask` gives.

    Raises:
        StorageError: for what the store raised, of the last try where all were in vain.
    """
    for attempt in range(_TRIES - 1):
        try:
            with translated(doing, url):
                return ask()
        except StoreUnavailableError:
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)))
    with translated(doing, url):
        return ask()
