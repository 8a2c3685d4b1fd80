"""Delta tables of Parquet files: files first, one atomic commit last.

A file that no commit names does not exist for any reader. File names are functions of content and frozen order, so a file may be written and
committed any number of times: the table holds it once. DuckDB, Polars and Spark read the tables as they are.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workers.errors import TableError
from workers.storage import Store, translated

__all__ = ["Table", "TableFile", "read_partition"]

_COMMIT_TRIES = 8
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


def _column_text(name: str, *, nullable: bool) -> str:
    return f"{name} or null" if nullable else name


class Table:
    """One Delta table in a store.

    Args:
        store: where it lies.
        path: its folder, relative to the root.
        schema: columns of its files, without the partition columns.
        partition_by: names of the partition columns (strings).
    """

    def __init__(self, store: Store, path: str, schema: pa.Schema, partition_by: Sequence[str] = ()) -> None:
        self.store = store
        self.path = path
        self.schema = schema
        self.partition_by = tuple(partition_by)

    @property
    def uri(self) -> str:
        """As deltalake and polars want it."""
        return f"{self.store.delta_root.rstrip('/')}/{self.path}"

    def ensure(self) -> None:
        """Create the table unless it is there.

        Raises:
            TableError: it is there with other columns.
        """
        import deltalake

        whole = self.schema
        for name in self.partition_by:
            whole = whole.append(pa.field(name, pa.string(), nullable=False))
        found = self._open()
        if found is None:
            with translated("create the table", self.store.url(self.path)):
                try:
                    deltalake.DeltaTable.create(
                        self.uri, whole, mode="ignore", partition_by=list(self.partition_by) or None, storage_options=self.store.delta_options or None
                    )
                except deltalake.exceptions.DeltaError as error:
                    # Somebody may have created it between our look and our try; then theirs is compared below.
                    if self._open() is None:
                        raise TableError(f"{self.store.url(self.path)} cannot be created: {error}") from error
            found = self._open()
        assert found is not None
        columns = [_column_text(column.name, nullable=column.nullable) for column in found.schema().fields]
        expected = [_column_text(column.name, nullable=column.nullable) for column in whole]
        if columns != expected:
            raise TableError(
                f"{self.store.url(self.path)} has the columns {columns}, expected {expected}: it was made by another version of Loupe. "
                "Use another root, or remove the table."
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
        return TableFile(path=relative, num_rows=num_rows, size_bytes=size_bytes, partition=dict(partition))

    def files(self, partition: Mapping[str, str] | None = None) -> list[TableFile]:
        """The committed files, by path. Empty when the table does not exist.

        Args:
            partition: keep only files with these values.

        Returns:
            Committed files by path.
        """
        found = self._open()
        if found is None:
            return []
        with translated("read the table", self.store.url(self.path)):
            rows = pa.table(found.get_add_actions(flatten=True)).to_pylist()
        files = []
        for row in rows:
            values = {name: row[f"partition.{name}"] for name in self.partition_by}
            if partition is None or all(values[key] == value for key, value in partition.items()):
                files.append(TableFile(path=row["path"], num_rows=row["num_records"], size_bytes=row["size_bytes"], partition=values))
        return sorted(files, key=lambda file: file.path)

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
        from deltalake.transaction import AddAction

        last: Exception | None = None
        for attempt in range(_COMMIT_TRIES):
            table = self._open()
            if table is None:
                self.ensure()
                continue
            known = {file.path for file in self.files()}
            new = {file.path: file for file in files if file.path not in known}
            if not new:
                return 0
            actions = [
                AddAction(file.path, file.size_bytes, dict(file.partition), int(time.time() * 1000), True, json.dumps({"numRecords": file.num_rows}))
                for file in new.values()
            ]
            try:
                with translated("commit to", self.store.url(self.path)):
                    table.create_write_transaction(actions, mode="append", schema=table.schema(), partition_by=list(self.partition_by) or None)
            except deltalake.exceptions.DeltaError as error:
                last = error
                time.sleep(0.05 * 2**attempt)
                continue
            return len(new)
        raise TableError(
            f"{self.store.url(self.path)}: {_COMMIT_TRIES} tries to commit failed, the last with: {last}. Run again when fewer writers are at it."
        )

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
        tables = []
        for file in files:
            with translated("read", self.file_url(file)):
                tables.append(self.open_file(file).read(columns=None if columns is None else list(columns)))
        return pa.concat_tables([table.replace_schema_metadata(None) for table in tables], promote_options="default")

    def file_url(self, file: TableFile) -> str:
        """Where one of its files lies."""
        return self.store.url(f"{self.path}/{file.path}")

    def open_file(self, file: TableFile) -> pq.ParquetFile:
        """One committed file, opened for reading with its page checksums verified."""
        location = self.store.fs_path(f"{self.path}/{file.path}")
        with translated("read", self.file_url(file)):
            return pq.ParquetFile(location, filesystem=self.store.filesystem, page_checksum_verification=True)

    def _open(self) -> Any:
        import deltalake

        with translated("open the table", self.store.url(self.path)):
            try:
                return deltalake.DeltaTable(self.uri, storage_options=self.store.delta_options or None)
            except deltalake.exceptions.TableNotFoundError:
                return None
            except deltalake.exceptions.DeltaError as error:
                raise TableError(f"{self.store.url(self.path)} should be a Delta table but cannot be read: {error}") from error


def read_partition(store: Store, path: str, partition: Mapping[str, str]) -> pa.Table | None:
    """Rows of one partition of any Loupe table.

    Args:
        store: where the table lies.
        path: its folder.
        partition: value of each of its partition columns, in their order.

    Returns:
        An Arrow table without the partition columns, or None when nothing was committed there.
    """
    return Table(store, path, pa.schema([]), tuple(partition)).read(partition)
