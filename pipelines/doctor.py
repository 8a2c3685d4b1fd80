"""`loupe doctor storage`: what a root gives, measured with real objects below a temporary prefix that is removed whatever happens.

Every client that can reach the root does the same work; the table says how fast each is, and a line which is best for what. The one thing that a
store must have, exclusive creation with a single winner, is tried with Loupe's own call, since work that two workers claim depends on it.
"""

import contextlib
import json
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median

from rich.table import Table

from pipelines.errors import SettingError
from pipelines.wording import bytes_text, data_console, print_table
from workers.errors import StorageError, StoreUnavailableError
from workers.s3_clients import CHOICES, CLIENT_VARIABLE, BulkClient, Bytes
from workers.storage import Store, nearest_there, translated

__all__ = ["Measurement", "StorageReport", "examine_storage", "print_storage_report"]

MIB = 2**20
RANGE_BYTES = (MIB, 8 * MIB)
IN_FLIGHT = (1, 8, 32)
_BULK_TRIES = 3
_SMALL_OBJECTS = 32
_SMALL_BYTES = 4096
_SMALL_IN_FLIGHT = 8
_LISTS = 5
_FILES_AT_ONCE = 3
"""Of the large object's size: the file itself, what is written of it, and some air."""
_RACES, _CALLERS = 8, 8
_LEAST_RANGES = 12
"""So many ranges are read one after the other at least: a 95th percentile of fewer says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One kind of request by one client."""

    client: str
    operation: str
    """`write`, `read`, `range`, `create`, `create if absent` or `list`."""
    request_bytes: int
    """Of each request's payload; 0 where there is none."""
    in_flight: int
    num_requests: int
    seconds: float
    median_ms: float
    p95_ms: float

    @property
    def mb_per_s(self) -> float:
        """Payload in millions of bytes per second."""
        return self.request_bytes * self.num_requests / self.seconds / 1e6

    @property
    def requests_per_s(self) -> float:
        """Requests finished per second."""
        return self.num_requests / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageReport:
    """What a root gives."""

    root: str
    object_bytes: int
    """Of the large object."""
    measurements: tuple[Measurement, ...]
    wins: tuple[int, ...]
    """Of each race of several callers to create one object, how many were told that they had won; 1 is right."""
    best: dict[str, str]
    """The fastest client for `bulk reads`, `bulk writes` and `ranged reads`."""
    used: dict[str, str]
    """The client that Loupe uses for them."""

    @property
    def creates_exclusively(self) -> bool:
        """Whether exactly one caller won each race."""
        return all(wins == 1 for wins in self.wins)


def examine_storage(root: str, megabytes: int) -> StorageReport:
    """Measure a root with every client that can reach it.

    Args:
        root: URL or path.
        megabytes: size of the large object, in MiB.

    Returns:
        The measurements, and which client is best.

    Raises:
        SettingError: the large object is smaller than the largest range, or larger than what it would be written to.
        StorageError: the root is not there, may not be written, or credentials are missing.
    """
    least = max(RANGE_BYTES) // MIB
    if megabytes < least:
        raise SettingError(f"doctor storage --megabytes: found {megabytes}; allowed: {least} or more, as ranges of {least} MiB are read")
    store = Store(root)
    free = {"the folder of temporary files": shutil.disk_usage(tempfile.gettempdir()).free, store.root: store.free_bytes()}
    for place, num_bytes in free.items():
        if num_bytes is not None and megabytes * MIB * _FILES_AT_ONCE > num_bytes:
            raise SettingError(
                f"doctor storage --megabytes: found {megabytes}; allowed: what {place} has room for, which has {bytes_text(num_bytes)}"
            )
    folder = f".doctor-{uuid.uuid4().hex}"
    with _removed(store, folder), tempfile.TemporaryDirectory(prefix="loupe-doctor-") as local:
        store.check_writable()
        file = Path(local) / "large"
        _write_noise(file, megabytes)
        measurements: list[Measurement] = []
        for client in store.bulk_clients():
            with translated(f"measure {client.name} on", store.url(folder)):
                measurements += _measure_client(client, f"{folder}/{client.name}", file)
        wins, racing = _race(store, folder)
    return StorageReport(
        root=store.root,
        object_bytes=megabytes * MIB,
        measurements=(*measurements, racing),
        wins=wins,
        best={
            "bulk reads": _fastest(measurements, "read"),
            "bulk writes": _fastest(measurements, "write"),
            "ranged reads": _fastest(measurements, "range"),
        },
        used=store.clients_in_use(),
    )


@contextlib.contextmanager
def _removed(store: Store, folder: str) -> Iterator[None]:
    """Nothing of a folder is left at the end, whatever happened in between: no objects, no uploads that were cut off, no root that was new."""
    local = store.local_path(folder)
    there = None if local is None else nearest_there(local)
    try:
        yield
    finally:
        if local is not None:
            with translated("remove", store.url(folder)):
                if local.exists():
                    shutil.rmtree(local)
            for made in local.parents:
                if made == there:
                    break
                with contextlib.suppress(OSError):  # somebody has put something there
                    made.rmdir()
        else:
            for path in store.list(folder):
                store.delete(path)
            try:
                uploads = store.abandoned_uploads(folder)
            except StoreUnavailableError:
                raise
            except StorageError:  # not every server lists them, nor may every user; what ended properly left none
                uploads = []
            for upload in uploads:
                store.abort_upload(upload)


def _write_noise(file: Path, megabytes: int) -> None:
    """A local file that no transport can compress."""
    noise = random.Random(0)
    with file.open("wb") as stream:
        for _ in range(megabytes):
            stream.write(noise.randbytes(MIB))


def _measure_client(client: BulkClient, folder: str, file: Path) -> list[Measurement]:
    """All kinds of requests by one client."""
    size = file.stat().st_size
    large = f"{folder}/large"
    measure = partial(_measure, client.name)
    found = [
        measure("write", [lambda: client.write_file(large, file)] * _BULK_TRIES, request_bytes=size),
        measure("read", [lambda: _whole(client.read(large), size)] * _BULK_TRIES, request_bytes=size),
    ]
    places = random.Random(1)
    for length in RANGE_BYTES:
        for in_flight in IN_FLIGHT:
            # As many as the object holds, so that a slow line is not kept busy for ever, but two rounds of those in flight.
            number = max(_LEAST_RANGES, 2 * in_flight, min(4 * in_flight, size // length))
            starts = [places.randrange(size - length + 1) for _ in range(number)]
            reads = [partial(_read_range, client, large, start, length) for start in starts]
            found.append(measure("range", reads, request_bytes=length, in_flight=in_flight))
    small = b"x" * _SMALL_BYTES
    writes = [partial(client.write_bytes, f"{folder}/small/{number}", small) for number in range(_SMALL_OBJECTS)]
    found.append(measure("create", writes, request_bytes=_SMALL_BYTES, in_flight=_SMALL_IN_FLIGHT))
    found.append(measure("list", [lambda: _counted(client.count(f"{folder}/small"))] * _LISTS))
    return found


def _read_range(client: BulkClient, path: str, start: int, length: int) -> None:
    _whole(client.read_range(path, start, length), length)


def _whole(data: Bytes, num_bytes: int) -> None:
    if len(data) != num_bytes:
        raise StorageError(f"the store gave {len(data)} bytes of {num_bytes}; no figure of it would mean anything")


def _counted(number: int) -> None:
    if number != _SMALL_OBJECTS:
        raise StorageError(f"the store lists {number} objects of {_SMALL_OBJECTS} that were just written; Loupe needs listings that are up to date")


def _race(store: Store, folder: str) -> tuple[tuple[int, ...], Measurement]:
    """Several callers create one object at a time, as workers that claim the same work do."""
    wins = []
    latencies_ms: list[float] = []
    started = time.perf_counter()
    with ThreadPoolExecutor(_CALLERS) as pool:
        for race in range(_RACES):
            path = f"{folder}/race/{race}"

            def create(caller: int, path: str = path) -> tuple[bool, float]:
                begun = time.perf_counter()
                won = store.create_bytes(path, b"%d" % caller)
                return won, 1e3 * (time.perf_counter() - begun)

            outcomes = list(pool.map(create, range(_CALLERS)))
            winners = [caller for caller, (won, _) in enumerate(outcomes) if won]
            # A single winner whose bytes are not there is none.
            wins.append(len(winners) if len(winners) != 1 or store.read_bytes(path) == b"%d" % winners[0] else 0)
            latencies_ms += [latency_ms for _, latency_ms in outcomes]
    seconds = time.perf_counter() - started
    return tuple(wins), _summary("loupe", "create if absent", latencies_ms, seconds, request_bytes=0, in_flight=_CALLERS)


def _measure(client: str, operation: str, requests: Sequence[Callable[[], None]], *, request_bytes: int = 0, in_flight: int = 1) -> Measurement:
    """Make requests, so many in flight, and time each."""

    def timed(request: Callable[[], None]) -> float:
        begun = time.perf_counter()
        request()
        return 1e3 * (time.perf_counter() - begun)

    with ThreadPoolExecutor(in_flight) as pool:
        started = time.perf_counter()
        latencies_ms = list(pool.map(timed, requests))
        seconds = time.perf_counter() - started
    return _summary(client, operation, latencies_ms, seconds, request_bytes=request_bytes, in_flight=in_flight)


def _summary(client: str, operation: str, latencies_ms: Sequence[float], seconds: float, *, request_bytes: int, in_flight: int) -> Measurement:
    ordered = sorted(latencies_ms)
    return Measurement(
        client=client,
        operation=operation,
        request_bytes=request_bytes,
        in_flight=in_flight,
        num_requests=len(ordered),
        seconds=seconds,
        median_ms=median(ordered),
        p95_ms=ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
    )


def _fastest(measurements: Sequence[Measurement], operation: str) -> str:
    """The client with the highest throughput in an operation; over sizes and numbers in flight, by the geometric mean."""
    clients = list(dict.fromkeys(item.client for item in measurements))
    return max(
        clients,
        key=lambda client: geometric_mean(item.mb_per_s for item in measurements if item.client == client and item.operation == operation),
    )


def print_storage_report(report: StorageReport, *, as_json: bool = False) -> None:
    """Print what was measured.

    Args:
        report: to print.
        as_json: as one JSON object instead of a table.
    """
    if as_json:
        rows = [{**asdict(item), "mb_per_s": item.mb_per_s, "requests_per_s": item.requests_per_s} for item in report.measurements]
        print(json.dumps({**asdict(report), "measurements": rows, "creates_exclusively": report.creates_exclusively}, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("client", "request"):
        table.add_column(heading, no_wrap=True)
    for heading in ("in flight", "requests", "MB/s", "requests/s", "median ms", "p95 ms"):
        table.add_column(heading, overflow="fold", justify="right")
    shown = ""
    for item in report.measurements:
        table.add_row(
            "" if item.client == shown else item.client,
            _request_text(item),
            str(item.in_flight),
            str(item.num_requests),
            f"{item.mb_per_s:.1f}" if item.request_bytes >= MIB else "",
            f"{item.requests_per_s:.1f}",
            f"{item.median_ms:.1f}",
            f"{item.p95_ms:.1f}",
        )
        shown = item.client
    print_table(table)
    console = data_console()
    is_folder = report.root.startswith("file:")
    if is_folder:
        console.print(
            "A folder has one client, the operating system. What was just written is read from its memory, not from the disk.", soft_wrap=True
        )
    for job, client in () if is_folder else report.best.items():
        used = report.used[job]
        note = "as Loupe does" if used == client else f"Loupe uses {used}"
        if used != client and job != "bulk reads" and client in CHOICES:
            note += f"; {CLIENT_VARIABLE}={client} in its environment, and in that of the cluster's machines, changes that"
        console.print(f"Best for {job}: {client}, {note}.", soft_wrap=True)
    console.print(_verdict(report), soft_wrap=True)


def _request_text(item: Measurement) -> str:
    match item.operation:
        case "write" | "read":
            return f"{item.operation} of {item.request_bytes // MIB} MiB"
        case "range":
            return f"range of {item.request_bytes // MIB} MiB"
        case "create":
            return f"write of {item.request_bytes // 1024} KiB"
        case other:
            return other


def _verdict(report: StorageReport) -> str:
    if report.creates_exclusively:
        return f"Exclusive creation holds: {len(report.wins)} races of {_CALLERS} callers, one winner each."
    wrong = sorted({wins for wins in report.wins if wins != 1})
    return (
        f"EXCLUSIVE CREATION DOES NOT HOLD: {_CALLERS} callers created one object, and {', '.join(map(str, wrong))} of them won where one should. "
        "Two workers could claim the same work and a table lose commits: do not use Loupe on this store. It must honour If-None-Match of PutObject."
    )
