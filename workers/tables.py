"""Delta tables of Parquet files: files first, one atomic commit last.

A file that no commit names does not exist for any reader. File names are functions of content and frozen order, so a file may be written and
committed any number of times: the table holds it once. DuckDB, Polars and Spark read the tables as they are.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import first_line
from workers.errors import StoreUnavailableError, TableError
from workers.storage import Store
from workers.storage_errors import persistently, translated

__all__ = ["Table", "TableFile", "read_partition"]

_COMMIT_TRIES = 8
_LARGEST_PAGE_BYTES = 2**31 - 1
_MOST_PAGE_ROWS = 2**31 - 1
_READS_AT_ONCE = 16
_LOG_NAME = re.compile(r"([0-9]{20})\.(?:json|checkpoint\.parquet)")
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFile:
    """One Parquet file of a table."""

    path: str
    """Relative to the table."""
    num_rows: int
    size_bytes: int
    partition: dict[str, str] = field(default_factory=dict)


def _partition_folder(partition_by: Sequence[str], partition: Mapping[str, str]) -> str:
    for key, value in partition.items():
        if not _SAFE_VALUE.fullmatch(value):
            raise TableError(f"partition values are letters, digits, dot, dash and underscore; found {key}={value!r}")
    return "/".join(f"{key}={partition[key]}" for key in partition_by)


def _column_text(column: Any) -> str:
    return f"{column.name} or null" if column.nullable else str(column.name)


def _alike(one: Any, other: Any) -> bool:
    return bool(one.type == other.type and one.nullable == other.nullable)


class Table:
    """One Delta table in a store.

    Args:
        store: where it lies.
        path: its folder, relative to the root.
        schema: columns of its files, without the partition columns.
        partition_by: names of the partition columns (strings).
        grows: whether others may have added nullable columns, as this one may; else its columns are those of the schema.
    """

    def __init__(self, store: Store, path: str, schema: pa.Schema, partition_by: Sequence[str] = (), *, grows: bool = False) -> None:
        self.store = store
        self.path = path
        self.schema = schema
        self.partition_by = tuple(partition_by)
        self._grows = grows
        self._delta: Any = None
        self._held: set[str] = set()
        """Paths of the files that it holds at `_held_version`."""
        self._held_version = -1
        self._added: set[str] = set()
        """Paths of the version behind that one, where it was committed here."""

    @property
    def uri(self) -> str:
        """As deltalake and polars want it."""
        return f"{self.store.delta_root.rstrip('/')}/{self.path}"

    def ensure(self) -> None:
        """Create the table unless it is there, and add the columns that it lacks.

        Raises:
            TableError: it is there with a column of another type, or other partitions.
        """
        import deltalake

        whole = self.schema
        for name in self.partition_by:
            whole = whole.append(pa.field(name, pa.string(), nullable=False))
        found = self._open()
        if found is None:
            persistently(lambda: self._create(whole), "create the table", self.store.url(self.path))
            found = self._open()
        assert found is not None
        asked, there = deltalake.Schema.from_arrow(whole).fields, {column.name: column for column in found.schema().fields}
        expected, columns = [_column_text(column) for column in asked], [_column_text(column) for column in there.values()]
        missing = [column for column in asked if column.name not in there]
        wrong = [column for column in asked if column.name in there and not _alike(column, there[column.name])]
        strange = [column for column in there.values() if column not in asked and not (self._grows and column.nullable)]
        if wrong or strange or (missing and not self._grows) or found.metadata().partition_columns != list(self.partition_by):
            types = f", the type {there[wrong[0].name].type} of {wrong[0].name} where {wrong[0].type} is expected" if wrong else ""
            raise TableError(
                f"{self.store.url(self.path)} has the columns {columns}{types}, expected {expected}: it was made by another version of Loupe. "
                "Use another root, or remove the table."
            )
        self._add_columns(missing)

    def _create(self, schema: pa.Schema) -> None:
        """Make the table unless it is there."""
        import deltalake

        partition_by, options = list(self.partition_by) or None, self.store.delta_options or None
        try:
            deltalake.DeltaTable.create(self.uri, schema, mode="ignore", partition_by=partition_by, storage_options=options)
        except deltalake.exceptions.DeltaError as error:
            # Somebody may have created it between our look and our try; then theirs is compared.
            if self._open() is None:
                raise TableError(f"{self.store.url(self.path)} cannot be created: {error}") from error

    def _add_columns(self, columns: Sequence[Any]) -> None:
        """Files that were written before have nulls there."""
        import deltalake

        last: Exception | None = None
        for attempt in range(_COMMIT_TRIES):
            found = self._open()
            names = {column.name for column in found.schema().fields}
            missing = [column for column in columns if column.name not in names]
            if not missing:
                return
            if required := [column.name for column in missing if not column.nullable]:
                raise TableError(
                    f"{self.store.url(self.path)} has no column {required[0]}: it was made by another version of Loupe. Use another root, or remove "
                    "the table."
                )
            try:
                with translated("add columns to", self.store.url(self.path)):
                    found.alter.add_columns(missing)
            except (deltalake.exceptions.DeltaError, StoreUnavailableError) as error:  # another writer was faster, or the answer was lost
                last = error
                self._delta = None
                time.sleep(0.05 * 2**attempt)
        raise self._in_vain("add columns", last)

    def _in_vain(self, what: str, last: Exception | None) -> Exception:
        """After the last try."""
        if isinstance(last, StoreUnavailableError):
            return last
        return TableError(
            f"{self.store.url(self.path)}: {_COMMIT_TRIES} tries to {what} failed, the last with: {last}. Run again when fewer writers are at it."
        )

    def write_file(
        self,
        partition: Mapping[str, str],
        name: str,
        row_groups: Iterable[pa.Table],
        *,
        blobs: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> TableFile:
        """Write one Parquet file; it belongs to the table only once it is committed.

        Args:
            partition: value of every partition column.
            name: file name, a function of what is in it.
            row_groups: tables of the file's columns (a subset of the table's); each becomes one row group.
            blobs: columns of large opaque values: stored plain, uncompressed, without dictionary and statistics.
            metadata: key-value metadata of the file.

        Returns:
            What `commit` wants to know of it.

        Raises:
            StorageError: it cannot be written.
        """
        return self.write_mapped_file(partition, name, row_groups, blobs=blobs, metadata=metadata)[0]

    def write_mapped_file(
        self,
        partition: Mapping[str, str],
        name: str,
        row_groups: Iterable[pa.Table],
        *,
        blobs: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[TableFile, pq.FileMetaData]:
        """Write a file as `write_file` does, and tell where its parts lie.

        Args:
            partition: value of every partition column.
            name: file name, a function of what is in it.
            row_groups: tables of the file's columns (a subset of the table's); each becomes one row group.
            blobs: columns of large opaque values: stored plain, uncompressed, without dictionary and statistics, a chunk being one page.
            metadata: key-value metadata of the file.

        Returns:
            What `commit` wants to know of it, and its footer.

        Raises:
            StorageError: it cannot be written.
        """
        relative = "/".join(part for part in (_partition_folder(self.partition_by, partition), name) if part)
        num_rows = 0
        with self.store.publishing(f"{self.path}/{relative}") as local:
            writer: pq.ParquetWriter | None = None
            try:
                for group in row_groups:
                    if writer is None:
                        schema = group.schema.with_metadata(dict(metadata or {}))
                        small = [column for column in schema.names if column not in blobs]
                        writer = pq.ParquetWriter(
                            local,
                            schema,
                            compression={column: "NONE" if column in blobs else "ZSTD" for column in schema.names} if blobs else "ZSTD",
                            use_dictionary=False,
                            write_statistics=small if blobs else True,
                            write_page_checksum=True,
                            data_page_size=_LARGEST_PAGE_BYTES if blobs else None,
                            max_rows_per_page=_MOST_PAGE_ROWS if blobs else None,
                            store_schema=True,
                        )
                    if group.num_rows:
                        writer.write_table(group, row_group_size=group.num_rows)
                    num_rows += group.num_rows
            finally:
                if writer is not None:
                    writer.close()
            if writer is None:
                raise TableError(f"{self.store.url(self.path)}/{relative}: a file needs at least one (possibly empty) row group to know its columns")
            size_bytes = local.stat().st_size
            footer = pq.read_metadata(local)
        return TableFile(path=relative, num_rows=num_rows, size_bytes=size_bytes, partition=dict(partition)), footer

    def files(self, partition: Mapping[str, str] | None = None) -> list[TableFile]:
        """The committed files, by path. Empty when the table does not exist.

        Args:
            partition: keep only files with these values.

        Returns:
            Committed files by path.
        """
        found = self._open()
        return [] if found is None else self._files_of(found, partition)

    def _files_of(self, found: Any, partition: Mapping[str, str] | None) -> list[TableFile]:
        with translated("read the table", self.store.url(self.path)):
            rows = pa.table(found.get_add_actions(flatten=True)).to_pylist()
        files = []
        for row in rows:
            values = {name: row[f"partition.{name}"] for name in self.partition_by}
            if partition is None or all(values[key] == value for key, value in partition.items()):
                files.append(TableFile(path=row["path"], num_rows=row["num_records"], size_bytes=row["size_bytes"], partition=values))
        return sorted(files, key=lambda file: file.path)

    def removals(self) -> dict[str, float]:
        """When files left the table, in Unix seconds by path, as far as its log still tells: whoever opened the table before may be reading them.

        The newest checkpoint names those of the week before it (Delta's `deletedFileRetentionDuration`), the commits behind it, a hundred or fewer,
        those since. A file that neither these nor `files` name was never in the table, or left it longer ago than that.

        Raises:
            StorageError: the log cannot be read.
        """
        log: dict[str, int] = {}
        for path in self.store.list(f"{self.path}/_delta_log"):
            if found := _LOG_NAME.fullmatch(path.rpartition("/")[2]):
                log[path] = int(found[1])
        checkpoint = max((path for path in log if path.endswith(".parquet")), key=log.__getitem__, default=None)
        commits = [path for path in log if path.endswith(".json") and (checkpoint is None or log[path] > log[checkpoint])]
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            removed = [action for actions in pool.map(self._removed_by, commits) for action in actions]
        if checkpoint is not None:
            removed += self._removed_before(checkpoint)
        # A file may have come back and left again.
        times: dict[str, float] = {}
        for action in removed:
            path = unquote(action["path"])
            times[path] = max(times.get(path, 0.0), (action.get("deletionTimestamp") or 0) / 1000)
        return times

    def _removed_by(self, commit: str) -> list[dict[str, Any]]:
        """The remove actions of a commit."""
        found = [json.loads(line) for line in self.store.read_bytes(commit).splitlines() if b'"remove"' in line]
        return [action["remove"] for action in found if "remove" in action]

    def _removed_before(self, checkpoint: str) -> list[dict[str, Any]]:
        """The remove actions that a checkpoint names."""

        def read() -> pa.Table:
            opened = pq.ParquetFile(self.store.fs_path(checkpoint), filesystem=self.store.filesystem)
            return opened.read(columns=["remove.path", "remove.deletionTimestamp"])

        return [action for action in persistently(read, "read", self.store.url(checkpoint)).column("remove").to_pylist() if action is not None]

    def commit(self, files: Sequence[TableFile]) -> int:
        """Add files to the table in one atomic transaction. Files that it holds already are left as they are.

        Args:
            files: written by `write_file`, here or in another process.

        Returns:
            How many were new.

        Raises:
            TableError: other writers won every try.
        """
        import deltalake

        last: Exception | None = None
        tried: Collection[str] = ()
        for attempt in range(_COMMIT_TRIES):
            table = self._open()
            if table is None:
                self.ensure()
                continue
            held = self._held_paths(table)
            new = {file.path: file for file in files if file.path not in held}
            if not new:
                return len(tried)
            actions = [_add_action(file) for file in new.values()]
            before, tried = table.version(), new.keys()
            try:
                with translated("commit to", self.store.url(self.path)):
                    table.create_write_transaction(actions, mode="append", schema=table.schema(), partition_by=list(self.partition_by) or None)
            except (deltalake.exceptions.DeltaError, StoreUnavailableError) as error:
                # Where the answer was lost, the next look at the table tells whether the commit was.
                last = error
                self._delta = None
                time.sleep(0.05 * 2**attempt)
                continue
            if self._held_version == before:
                self._added = set(new)
            return len(new)
        raise self._in_vain("commit", last)

    def replace(self, files: Sequence[TableFile], partition: Mapping[str, str] | None = None) -> None:
        """Let the table, or a partition of it, hold these files and no others, in one transaction. What others add meanwhile stays.

        Args:
            files: written by `write_file`, none of which it holds.
            partition: value of every partition column; None is all.

        Raises:
            TableError: the transaction failed.
            StorageError: the store is away.
        """
        import deltalake

        self._delta = None
        found = self._open()
        if found is None:
            self.commit(files)
            return
        try:
            self._overwrite(found, files, partition)
        except deltalake.exceptions.DeltaError as error:
            raise TableError(f"{self.store.url(self.path)}: its files cannot be replaced: {first_line(error)}. Run again.") from error

    def merge(self, partition: Mapping[str, str], merged: Callable[[Sequence[TableFile]], TableFile]) -> None:
        """Put a file in the place of all that a partition holds, in one transaction.

        What others add meanwhile stays; where others take something away, nothing is done. The old files lie there until they are swept, for whoever
        is reading them.

        Args:
            partition: value of every partition column.
            merged: writes a file that holds what the given ones hold.

        Raises:
            StorageError: the store is away.
        """
        import deltalake

        self._delta = None
        found = self._open()
        files = [] if found is None else self._files_of(found, partition)
        if not files:
            return
        # Where somebody else is merging the same files, theirs or the next one's serves as well.
        with contextlib.suppress(deltalake.exceptions.CommitFailedError):
            self._overwrite(found, [merged(files)], partition)

    def _overwrite(self, found: Any, files: Sequence[TableFile], partition: Mapping[str, str] | None) -> None:
        """Let files stand for those that the table, as it was found, holds."""
        filters = None if partition is None else [(name, "=", value) for name, value in partition.items()]
        try:
            with translated("write to", self.store.url(self.path)):
                found.create_write_transaction(
                    [_add_action(file) for file in files],
                    mode="overwrite",
                    schema=found.schema(),
                    partition_by=list(self.partition_by) or None,
                    partition_filters=filters,
                )
        finally:
            self._delta = None

    def drop(self, files: Sequence[TableFile]) -> None:
        """Remove files, and from the table all that are not there.

        Args:
            files: of the table.

        Raises:
            StorageError: one cannot be removed.
        """
        for file in files:
            self.store.delete(f"{self.path}/{file.path}")
        self._delta = None
        found = self._open()
        if found is not None:
            with translated("write to", self.store.url(self.path)):
                found.repair()
        self._delta = None

    def read(self, partition: Mapping[str, str] | None = None, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Rows of the committed files, in path order.

        Args:
            partition: only files with these values.
            columns: only these columns.

        Returns:
            An Arrow table of file columns, or None when no file matches.

        Raises:
            StorageError: a file cannot be read, or a page of it does not match its checksum.
        """
        files = self.files(partition)
        if not files:
            return None
        tables = [self.read_file(file, columns) for file in files]
        return pa.concat_tables([table.replace_schema_metadata(None) for table in tables], promote_options="default")

    def read_file(self, file: TableFile, columns: Sequence[str] | None = None) -> pa.Table:
        """One committed file, whole.

        Args:
            file: which.
            columns: only these.

        Raises:
            StorageError: it cannot be read, or a page of it does not match its checksum.
        """
        wanted = None if columns is None else list(columns)
        return persistently(lambda: self.open_file(file).read(columns=wanted), "read", self.file_url(file))

    def file_url(self, file: TableFile) -> str:
        """Where one of its files lies."""
        return self.store.url(f"{self.path}/{file.path}")

    def open_file(self, file: TableFile) -> pq.ParquetFile:
        """One committed file, opened for reading with its page checksums verified."""
        location = self.store.fs_path(f"{self.path}/{file.path}")
        with translated("read", self.file_url(file)):
            return pq.ParquetFile(location, filesystem=self.store.filesystem, page_checksum_verification=True)

    def _held_paths(self, table: Any) -> set[str]:
        """Told anew only when somebody else wrote: listing all files at every commit would take time that grows with the square of their number."""
        version = table.version()
        if self._added and version == self._held_version + 1:  # nobody else wrote since
            self._held, self._held_version = self._held | self._added, version
        elif version != self._held_version:
            rows = pa.table(table.get_add_actions(flatten=True))
            self._held, self._held_version = set(rows.column("path").to_pylist()), version
        self._added = set()
        return self._held

    def _open(self) -> Any:
        """The table as it is now; None when there is none."""
        # delta-rs asks again by itself where a store is busy, and not where an answer is cut off.
        return persistently(self._opened, "open the table", self.store.url(self.path))

    def _opened(self) -> Any:
        import deltalake

        try:
            if self._delta is not None:
                self._delta.update_incremental()
            else:
                self._delta = deltalake.DeltaTable(self.uri, storage_options=self.store.delta_options or None)
        except deltalake.exceptions.TableNotFoundError:
            self._delta = None
        except deltalake.exceptions.DeltaError as error:
            self._delta = None
            raise TableError(f"{self.store.url(self.path)} should be a Delta table but cannot be read: {error}") from error
        return self._delta


def _add_action(file: TableFile) -> Any:
    from deltalake.transaction import AddAction

    statistics = json.dumps({"numRecords": file.num_rows})
    return AddAction(file.path, file.size_bytes, dict(file.partition), int(time.time() * 1000), True, statistics)


def read_partition(store: Store, path: str, partition: Mapping[str, str], columns: Sequence[str] | None = None) -> pa.Table | None:
    """Rows of one partition of any Loupe table.

    Args:
        store: where the table lies.
        path: its folder.
        partition: value of each of its partition columns, in their order.
        columns: only these columns.

    Returns:
        An Arrow table without the partition columns, or None when nothing was committed there.
    """
    return Table(store, path, pa.schema([]), tuple(partition)).read(partition, columns)
