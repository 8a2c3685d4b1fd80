"""Inputs that a stage refused: one row each, with a reason code, and a budget beyond which refusing becomes failing.

A row names its input well enough to play it again. The books of a stage balance: expected = committed + quarantined (+ duplicates, for datasets).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal, get_args

import pyarrow as pa

from model.errors import ImageError
from workers.commits import Stage
from workers.errors import AccessDeniedError, ErrorBudgetError, ObjectNotFoundError, StorageError
from workers.storage import Store
from workers.tables import Table

__all__ = [
    "QUARANTINE_SCHEMA",
    "QUARANTINE_TABLE",
    "QuarantineRow",
    "StoreReason",
    "can_be_read_now",
    "check_budget",
    "commit_quarantine",
    "image_reason",
    "look_again",
    "quarantine_table",
    "quarantine_to_table",
    "read_quarantine",
    "store_reason",
]

_ALWAYS_ALLOWED = 5
"""A handful of bad files in a small set says nothing about the rest."""

_LOOKS_AT_ONCE = 16

QUARANTINE_TABLE = "quarantine"

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("reason", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("bytes_sha256", pa.string()),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
"""Columns of a quarantine file, partitioned by `stage` and `key`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineRow:
    """One input that a stage refused."""

    reason: str
    """Closed vocabulary of the stage."""
    source: str
    item: str
    """Which input: an image's path or a record's id. With `source`, enough to play it again."""
    index: int
    """Its place in the frozen order."""
    bytes_sha256: str | None
    """Of the bytes that were refused; None when there were none to read."""
    detail: str


StoreReason = Literal["missing_file", "access_denied"]


def store_reason(error: StorageError) -> StoreReason | None:
    """The reason code when a store withholds one object; None when the failure says nothing about that object.

    Everything unknown is of the second kind (a network, a full table of open files): it stops the work, and the next run reads the object.
    """
    if isinstance(error, ObjectNotFoundError):
        return "missing_file"
    return "access_denied" if isinstance(error, AccessDeniedError) else None


def image_reason(error: ImageError | StorageError) -> str | None:
    """The reason code of what is wrong with one image; None when the failure says nothing about that image, as for `store_reason`."""
    return error.reason if isinstance(error, ImageError) else store_reason(error)


def look_again(store: Store, rows: Iterable[QuarantineRow]) -> Iterator[tuple[QuarantineRow, StorageError | None]]:
    """What a store says now, to this process, of the images that it withheld from another one or at another time.

    That nothing lies at a path is also what a machine says that has lost a mount. An image that is gone costs one request that is refused.

    Args:
        store: where relative paths start.
        rows: of images, each with its path as `item`; those that were refused for another reason are left out.

    Yields:
        A row with what reading its image raises, None where it can be read; as they come. Whoever stops early waits for those under way alone.
    """
    withheld = [row for row in rows if row.reason in get_args(StoreReason)]
    if not withheld:
        return

    def error_of(row: QuarantineRow) -> StorageError | None:
        try:
            store.read_reference(row.item)
        except StorageError as error:
            return error
        return None

    pool = ThreadPoolExecutor(_LOOKS_AT_ONCE, thread_name_prefix="loupe-look")
    try:
        looks = {pool.submit(error_of, row): row for row in withheld}
        for look in as_completed(looks):
            yield looks[look], look.result()
    finally:
        pool.shutdown(cancel_futures=True)


def can_be_read_now(store: Store, rows: Iterable[QuarantineRow]) -> bool:
    """Whether any of the images that a store withheld can be read by now: an outage is over. One that cannot be reached still is no such image.

    Args:
        store: where relative paths start.
        rows: as `look_again` takes them.
    """
    return any(error is None for _, error in look_again(store, rows))


def quarantine_table(store: Store) -> Table:
    """The table of refused inputs, partitioned by stage and by the key of the stage's spec."""
    return Table(store, QUARANTINE_TABLE, QUARANTINE_SCHEMA, ("stage", "key"))


def quarantine_to_table(rows: Sequence[QuarantineRow]) -> pa.Table:
    """The Arrow table of some quarantine rows."""
    return pa.Table.from_pylist(
        [
            {
                "reason": row.reason,
                "source": row.source,
                "item": row.item,
                "index": row.index,
                "bytes_sha256": row.bytes_sha256,
                "detail": row.detail,
            }
            for row in rows
        ],
        schema=QUARANTINE_SCHEMA,
    )


def commit_quarantine(stage: Stage, rows: Sequence[QuarantineRow]) -> None:
    """Put all rows that a stage refused into the table, in one file; again changes nothing.

    Args:
        stage: whose rows.
        rows: all of them.
    """
    if not rows:
        return
    table = quarantine_table(stage.store)
    table.ensure()
    file = table.write_file({"stage": stage.name, "key": stage.key}, "rows.parquet", [quarantine_to_table(rows)])
    table.commit([file])


def read_quarantine(store: Store, stage: str, key: str) -> list[QuarantineRow]:
    """The committed rows of one stage and spec, by index.

    Args:
        store: where the table lies.
        stage: a stage's name.
        key: first 16 characters of its spec's fingerprint.

    Returns:
        Rows by index.
    """
    table = quarantine_table(store).read({"stage": stage, "key": key}, QUARANTINE_SCHEMA.names)
    rows = [] if table is None else [QuarantineRow(**row) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: (row.index, row.reason))


def check_budget(quarantined: Mapping[str, Sequence[QuarantineRow]], expected: Mapping[str, int], max_fraction: float) -> None:
    """Stop a stage whose refusals look systematic.

    Args:
        quarantined: rows so far, by source.
        expected: inputs in all, by source.
        max_fraction: share of a source that may be refused; five rows are always allowed, unless they are the whole source.

    Raises:
        ErrorBudgetError: a source is over it. The message shows the most frequent reason with an example.
    """
    for source, rows in quarantined.items():
        total = expected[source]
        if len(rows) <= max(_ALWAYS_ALLOWED, max_fraction * total) and len(rows) < total:
            continue
        if not rows:
            continue
        reasons: dict[str, list[QuarantineRow]] = {}
        for row in rows:
            reasons.setdefault(row.reason, []).append(row)
        reason, examples = max(reasons.items(), key=lambda entry: len(entry[1]))
        raise ErrorBudgetError(
            f"source {source}: {len(rows)} of {total} inputs were refused, allowed are {max_fraction:.1%}. Most frequent reason: {reason} "
            f"({len(examples)} times), for example {examples[0].item}: {examples[0].detail}. Repair the source, or raise max_quarantined_fraction."
        )
