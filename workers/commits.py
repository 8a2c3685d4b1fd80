"""One stage's run: its identity on record, its attempts, and the commit record that alone proves it done.

    runs/<stage>/<key>/spec.json        what is computed; created once, compared ever after
    runs/<stage>/<key>/attempts/*.json  seconds and outcome of every attempt that ended by itself
    runs/<stage>/<key>/COMMITTED.json   the record; written last, once

The key is the first 16 characters of the spec's fingerprint. Whoever finds COMMITTED.json returns its record and does nothing; whoever does not
may run the stage again, since every stage's work is named by its content.
"""

import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from model import decoding
from model.errors import DecodingError
from model.specs import canonical_json, fingerprint, spec_differences
from workers.errors import RecordError, SpecChangedError
from workers.storage import Store

__all__ = ["Stage", "StageName", "StageTimer", "from_json", "to_json"]

StageName = Literal["build-dataset", "calibrate-features", "cache-features", "train-connector", "evaluate", "export", "report"]

Decoded = TypeVar("Decoded")


@dataclasses.dataclass(kw_only=True, slots=True)
class StageTimer:
    """Wall seconds of a stage over all its attempts that are known."""

    seconds_before: float
    """Of earlier attempts that ended by themselves (a killed process leaves no account)."""
    started: float

    @property
    def seconds(self) -> float:
        """Up to now."""
        return self.seconds_before + time.monotonic() - self.started


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of one spec in one store. Make it with `Stage.open`."""

    store: Store
    name: StageName
    key: str
    folder: str
    """Relative to the root."""

    @classmethod
    def open(cls, store: Store, name: StageName, spec: Any) -> "Stage":
        """Find or found the stage's folder for a spec.

        Args:
            store: where runs are kept.
            name: which stage.
            spec: what it computes.

        Returns:
            The stage; its spec is on record.

        Raises:
            SpecChangedError: the folder's spec differs, field by field in the message.
        """
        key = fingerprint(spec)[:16]
        stage = cls(store=store, name=name, key=key, folder=f"runs/{name}/{key}")
        asked = {"type": type(spec).__name__, "spec": json.loads(canonical_json(spec))}
        if not store.create_json(stage.path("spec.json"), asked):
            stored = store.read_json(stage.path("spec.json"))
            differences = spec_differences(stored, asked)
            if differences:
                raise SpecChangedError(
                    f"{store.url(stage.folder)} holds work of another spec, so it cannot be resumed. Differences: {'; '.join(differences)}. "
                    "Restore the recipe, or use another root.",
                    differences,
                )
        return stage

    def path(self, name: str) -> str:
        """A path in the stage's folder, relative to the root."""
        return f"{self.folder}/{name}"

    def committed(self, record_type: type[Decoded]) -> Decoded | None:
        """The record of this stage if it is done.

        Args:
            record_type: the stage's record dataclass.

        Returns:
            The record, or None when the stage is not done.

        Raises:
            RecordError: the record on disk is not of this type.
        """
        if not self.store.exists(self.path("COMMITTED.json")):
            return None
        return from_json(record_type, self.store.read_json(self.path("COMMITTED.json")), where=self.store.url(self.path("COMMITTED.json")))

    def commit(self, record: Decoded) -> Decoded:
        """Write the record. When somebody committed before, theirs stands and is returned.

        Args:
            record: a dataclass of plain values.

        Returns:
            The record that is on disk now.
        """
        if self.store.create_json(self.path("COMMITTED.json"), to_json(record)):
            return record
        stored = self.committed(type(record))
        assert stored is not None
        return stored

    def reopen(self) -> None:
        """Let the stage be done again: what its record says is true no more."""
        self.store.delete(self.path("COMMITTED.json"))

    @contextlib.contextmanager
    def attempt(self) -> Iterator[StageTimer]:
        """Time the work of this process; the account is kept however the block ends.

        Yields:
            A timer whose `seconds` include earlier attempts.
        """
        before = sum(float(self.store.read_json(path)["seconds"]) for path in self.store.list(self.path("attempts")))
        timer = StageTimer(seconds_before=before, started=time.monotonic())
        outcome = "interrupted"
        try:
            yield timer
            outcome = "finished"
        except Exception as error:
            outcome = f"failed: {type(error).__name__}"
            raise
        finally:
            account = {"seconds": time.monotonic() - timer.started, "outcome": outcome, "ended_unix_s": time.time()}
            with contextlib.suppress(Exception) if outcome != "finished" else contextlib.nullcontext():
                # An account that cannot be written must not hide why the attempt failed.
                self.store.write_json(self.path(f"attempts/{uuid.uuid4().hex}.json"), account)


def to_json(value: Any) -> Any:
    """A dataclass of plain values as JSON values: tuples become lists, nested dataclasses objects.

    Args:
        value: a dataclass, or dicts, lists, tuples and scalars.

    Returns:
        What json.dumps takes.

    Raises:
        RecordError: something in it is no plain value.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [to_json(item) for item in value]
        case dict():
            if all(isinstance(key, str) for key in value):
                return {key: to_json(item) for key, item in value.items()}
    raise RecordError(f"a record holds numbers, strings, tuples, dicts and dataclasses only, found {type(value).__name__}")


def from_json(wanted: type[Decoded], value: Any, *, where: str = "value") -> Decoded:
    """A record's JSON values back as its dataclass; see model.decoding.

    Args:
        wanted: the dataclass.
        value: parsed JSON.
        where: what to call the value in an error.

    Returns:
        An instance; its own checks have run.

    Raises:
        RecordError: a field is missing, unknown or of another type.
    """
    try:
        return decoding.from_json(wanted, value, where=where)
    except DecodingError as error:
        raise RecordError(str(error)) from error
