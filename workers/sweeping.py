"""What lies in a root and serves nobody: leftovers of killed processes, files that no table knows, caches that no recipe uses any more.

Input: a root. Output: what could go, with its size and the reason; and, asked a second time, the root without it. Invariant: what is younger than a
day is left alone unless told otherwise, since a run may be about to commit it; what a table names is only removed with the whole cache.

    unfinished   files that a killed process was writing, and multipart uploads that nobody finished
    orphan       files of a feature table or its index that no commit names and no run that will go on: of a unit that was killed, or put together
                 into a larger one; centres and scales that no cache and no calibration names
    superseded   caches that no recipe uses, by the last cache that it finished or the one that it began behind it
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Literal, TypeVar

import pyarrow as pa

from model.specs import CalibrationSpec, FeatureSpec, fingerprint
from workers.caching.calibrate import CalibratedMap, CalibrationRecord, is_map_record
from workers.caching.codec import calibration_path
from workers.caching.layout import encoding_folder
from workers.caching.units import read_outcome
from workers.commits import from_json
from workers.errors import RecordError
from workers.storage import AbandonedUpload, Store, StoredObject
from workers.tables import Table

__all__ = ["CacheInUse", "Leftover", "cache_runs", "caches_in_use", "find_abandoned_uploads", "find_leftovers", "note_recipe", "remove_leftovers"]

Spec = TypeVar("Spec")

DAY_S = 86_400.0

_REQUESTS_AT_ONCE = 16

Reason = Literal["unfinished", "orphan", "superseded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """Objects that could go together."""

    reason: Reason
    place: str
    """Of what: a path relative to the root."""
    size_bytes: int
    paths: tuple[str, ...]
    """Relative to the root."""
    records: tuple[str, ...] = ()
    """That say that those are there, and go before them."""
    uploads: tuple[AbandonedUpload, ...] = ()


@dataclass(kw_only=True, slots=True)
class CacheInUse:
    """A feature table and who uses it."""

    folder: str
    encoder: str
    precision: str
    size_bytes: int = 0
    runs: list[str] = field(default_factory=list)
    """Keys of the cache-features runs that it serves."""
    recipes: list[str] = field(default_factory=list)
    """Recipes whose latest cache it holds, done or under way."""
    modified_unix_s: float = 0.0


def note_recipe(store: Store, name: str, spec: FeatureSpec, *, finished: bool) -> None:
    """Put on record which cache a recipe uses now, so that those it used before can be told.

    Args:
        store: of the root.
        name: of the recipe.
        spec: of its cache.
        finished: whether the cache is; until then the one before is in use too.
    """
    path, folder = f"recipes/{name}.json", encoding_folder(spec.encoding)
    if finished:
        store.write_json(path, {"features": fingerprint(spec), "table": folder})
        return
    before = store.read_json(path) if store.exists(path) else {}
    if folder not in before.values():
        store.write_json(path, {**before, "under_way": folder})


def cache_runs(store: Store) -> Iterator[FeatureSpec]:
    """The specs of all cache-features runs of a root, done or not; those of an older format are left out.

    Args:
        store: of the root.
    """
    for _, spec in _specs(store, "cache-features", FeatureSpec, store.list("runs/cache-features")):
        yield spec


def caches_in_use(store: Store, objects: Sequence[StoredObject]) -> list[CacheInUse]:
    """Every feature table of a root, with its size, the runs that it serves and the recipes that use it now.

    Args:
        store: of the root.
        objects: all of the root's, as `Store.list_objects` gives them. Listing takes a request for every thousand, so it is done once.

    Raises:
        RecordError: a record is damaged.
    """
    found: dict[str, CacheInUse] = {}
    for key, spec in _specs(store, "cache-features", FeatureSpec, (item.path for item in objects)):
        folder = encoding_folder(spec.encoding)
        cache = found.setdefault(folder, CacheInUse(folder=folder, encoder=spec.encoder.model, precision=spec.precision))
        cache.runs.append(key)
    for path in store.list("recipes"):  # anew: a recipe that has come to a cache since keeps it
        if not path.endswith(".json"):
            continue
        record = store.read_json(path)
        if not isinstance(record, dict):
            raise RecordError(f"{store.url(path)}: expected an object that names a recipe's cache, found {type(record).__name__}; remove it")
        for used in found.keys() & {str(value) for value in record.values()}:
            found[used].recipes.append(path.removeprefix("recipes/").removesuffix(".json"))
    for item in objects:
        folder = "/".join(item.path.split("/")[:2])
        if folder in found:
            found[folder].size_bytes += item.size_bytes
            found[folder].modified_unix_s = max(found[folder].modified_unix_s, item.modified_unix_s)
    return sorted(found.values(), key=lambda cache: cache.folder)


def find_leftovers(store: Store, objects: Sequence[StoredObject], *, older_than_s: float = DAY_S, superseded: bool = False) -> list[Leftover]:
    """What could go.

    Args:
        store: of the root.
        objects: all of the root's, as `Store.list_objects` gives them. Tables are asked behind it, so what they name is not taken for an orphan.
        older_than_s: younger objects are left alone.
        superseded: also whole caches that no recipe uses any more.

    Returns:
        Leftovers by reason and place.

    Raises:
        StorageError: the store is away.
        TableError: a table cannot be read, so that nothing can be told of its files.
    """
    before = time.time() - older_than_s
    old = [item for item in objects if item.modified_unix_s < before]
    found = _grouped("unfinished", (item for item in old if item.is_unfinished))
    gone: set[str] = set()
    if superseded:
        for cache in caches_in_use(store, objects):
            if not cache.recipes and cache.modified_unix_s < before:
                found.append(_whole_cache(store, cache, objects))
                gone.add(cache.folder)
    promised = _promised(store, objects)
    data = [item for item in old if item.path.startswith("features/") and "/branch=" in item.path]
    for folder in sorted({"/".join(item.path.split("/")[:2]) for item in data} - gone):
        for table in (folder, f"{folder}/_index"):
            held = promised | {f"{table}/{file.path}" for file in Table(store, table, pa.schema([]), ("branch", "maps")).files()}
            own = (item for item in data if item.path.startswith(f"{table}/branch=") and not item.is_unfinished)
            found += _grouped("orphan", (item for item in own if item.path not in held), place=table)
    going = {path for item in found for path in (*item.paths, *item.records)}
    calibrations = [item for item in old if item.path.startswith("calibrations/") and not item.is_unfinished]
    if calibrations:
        # Calibrations anew: one that was found on record since the listing keeps its file, which may be an old one.
        paths = {item.path for item in objects} | set(store.list("runs/calibrate-features"))
        named = _named_calibrations(store, paths - going)
        found += _grouped("orphan", (item for item in calibrations if item.path not in named), place="calibrations")
    return found


def find_abandoned_uploads(store: Store, *, older_than_s: float = DAY_S) -> list[Leftover]:
    """Multipart uploads that nobody finished, as a leftover.

    Args:
        store: of the root.
        older_than_s: younger ones are left alone.

    Raises:
        StorageError: the store does not tell; not every server and not every user may list them.
    """
    uploads = store.abandoned_uploads(before=datetime.fromtimestamp(time.time() - older_than_s, UTC))
    if not uploads:
        return []
    size = sum(upload.num_bytes for upload in uploads)
    return [Leftover(reason="unfinished", place="multipart uploads", size_bytes=size, paths=(), uploads=tuple(uploads))]


def remove_leftovers(store: Store, leftovers: Sequence[Leftover]) -> None:
    """Remove them.

    Args:
        store: of the root.
        leftovers: as `find_leftovers` gave them.

    Raises:
        StorageError: one cannot be removed; those before it are gone.
    """
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for leftover in leftovers:
            for path in leftover.records:
                store.delete(path)
            for _ in pool.map(store.delete, leftover.paths):
                pass
            for upload in leftover.uploads:
                store.abort_upload(upload)


def _grouped(reason: Reason, items: Iterable[StoredObject], place: str | None = None) -> list[Leftover]:
    """Leftovers by the folder that they lie in, or all as of one place."""
    folders: dict[str, list[StoredObject]] = {}
    for item in items:
        folders.setdefault(place or "/".join(item.path.split("/")[:2]), []).append(item)
    return [
        Leftover(reason=reason, place=folder, size_bytes=sum(item.size_bytes for item in own), paths=tuple(item.path for item in own))
        for folder, own in sorted(folders.items())
    ]


def _promised(store: Store, objects: Sequence[StoredObject]) -> set[str]:
    """Files that runs have on record and may not have committed yet: whoever completes such a run commits them, and encodes nothing again."""
    paths = [item.path for item in objects]
    done = {path.split("/")[2] for path in paths if path.startswith("runs/cache-features/") and path.endswith("/COMMITTED.json")}
    folders = {key: encoding_folder(spec.encoding) for key, spec in _specs(store, "cache-features", FeatureSpec, paths) if key not in done}
    units = [path for path in paths if path.startswith("runs/cache-features/") and path.split("/")[2] in folders and path.split("/")[3] == "units"]
    promised: set[str] = set()
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for path, outcome in zip(units, pool.map(partial(read_outcome, store), units), strict=True):
            folder = folders[path.split("/")[2]]
            promised |= {f"{folder}/{file.path}" for file in outcome.files} | {f"{folder}/_index/{file.path}" for file in outcome.index_files}
    return promised


def _named_calibrations(store: Store, paths: set[str]) -> set[str]:
    """Files of centres and scales that a cache was made with, or that are on record for the next one."""
    named = {spec.calibration_sha256 for _, spec in _specs(store, "cache-features", FeatureSpec, paths) if spec.calibration_sha256}
    for path in paths:
        if path.startswith("runs/calibrate-features/") and path.endswith("/COMMITTED.json"):
            named.add(from_json(CalibrationRecord, store.read_json(path), where=store.url(path)).sha256)
        elif is_map_record(path):
            named.add(from_json(CalibratedMap, store.read_json(path), where=store.url(path)).sha256)
    return {calibration_path(sha256) for sha256 in named}


def _whole_cache(store: Store, cache: CacheInUse, objects: Sequence[StoredObject]) -> Leftover:
    """A table with the runs that it serves: their records would say that what is gone is there. The records go first."""
    runs = [f"runs/cache-features/{key}" for key in cache.runs]
    runs += [
        f"runs/calibrate-features/{key}"
        for key, spec in _specs(store, "calibrate-features", CalibrationSpec, (item.path for item in objects))
        if encoding_folder(spec.encoding) == cache.folder
    ]
    own = [item for folder in (*runs, cache.folder) for item in objects if item.path.startswith(f"{folder}/")]
    first = [item.path for item in own if item.path.endswith("/COMMITTED.json")]
    paths = tuple(item.path for item in own if not item.path.endswith("/COMMITTED.json"))
    return Leftover(reason="superseded", place=cache.folder, size_bytes=sum(item.size_bytes for item in own), paths=paths, records=tuple(first))


def _specs(store: Store, stage: str, kind: type[Spec], paths: Iterable[str]) -> Iterator[tuple[str, Spec]]:
    """The keys and specs of a stage's runs among some paths; those of an older format, whose tables have other names, are left out."""
    for path in paths:
        if path.startswith(f"runs/{stage}/") and path.endswith("/spec.json"):
            try:
                spec = from_json(kind, store.read_json(path)["spec"], where=store.url(path))
            except (KeyError, TypeError, RecordError):
                continue
            yield path.split("/")[2], spec
