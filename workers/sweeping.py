"""What lies in a root and serves nobody: leftovers of killed processes, files that no table knows, caches that no recipe uses any more.

Input: a root. Output: what could go, with its size and the reason; and, asked a second time, the root without it. Invariant: what is younger than a
day is left alone unless told otherwise, since a run may be about to commit it; what a table names is only removed with the whole cache.

    unfinished   files that a killed process was writing, and multipart uploads that nobody finished
    orphan       files of a feature table or its index that no commit names and no run that will go on: of a unit that was killed, or put together
                 into a larger one a day ago; centres and scales that no cache and no calibration names
    superseded   caches that no recipe uses, by the last cache that it finished or the one that it began behind it, and that no training and no
                 evaluation may be reading

Runs go on meanwhile, and a root of millions of objects takes minutes to list. So what is needed is read after that: recipes, runs, tables. Before
anything is removed it is read again, and then each folder is listed again just before its objects go. Whoever comes to need an object behind that
reading has written it anew before, so it is not the one that was listed, and stays.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar

import pyarrow as pa

from model.specs import CalibrationSpec, FeatureSpec, fingerprint
from workers.caching.calibrate import CalibratedMap, CalibrationRecord, is_map_record
from workers.caching.codec import calibration_path
from workers.caching.layout import encoding_folder
from workers.caching.units import read_outcome
from workers.commits import StageName, from_json
from workers.errors import RecordError
from workers.storage import AbandonedUpload, Store, StoredObject
from workers.tables import Table

__all__ = [
    "CacheInUse",
    "FeatureReader",
    "Leftover",
    "Needs",
    "cache_runs",
    "caches_in_use",
    "find_abandoned_uploads",
    "find_leftovers",
    "note_recipe",
    "read_needs",
    "remove_leftovers",
]

Spec = TypeVar("Spec")

DAY_S = 86_400.0

_SILENT_S = 30 * DAY_S
"""For so long a training or an evaluation that is not done is taken for one that goes on. A training writes its metrics every few seconds while it
steps, but nothing while it waits for GPUs; an evaluation writes nothing between its spec and its answers; and who takes up either again after a week
writes nothing at first."""

_REQUESTS_AT_ONCE = 16

_CALIBRATIONS = "calibrations"

Reason = Literal["unfinished", "orphan", "superseded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """Objects that could go together."""

    reason: Reason
    place: str
    """Of what: a path relative to the root."""
    objects: tuple[StoredObject, ...] = ()
    """As they were listed: what is another one by now stays."""
    records: tuple[StoredObject, ...] = ()
    """That say that those are there, and go before them."""
    uploads: tuple[AbandonedUpload, ...] = ()
    before_unix_s: float
    """All of it was written, and left its table, before then."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the objects without the records, relative to the root."""
        return tuple(item.path for item in self.objects)

    @property
    def size_bytes(self) -> int:
        """Of all of it."""
        return sum(item.size_bytes for item in (*self.records, *self.objects)) + sum(upload.num_bytes for upload in self.uploads)


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
    readers: list[str] = field(default_factory=list)
    """Trainings and evaluations that may be reading it, such as `train-connector 0123456789abcdef, unfinished`."""
    modified_unix_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureReader:
    """A training or an evaluation on record, and the feature table that it reads."""

    stage: StageName
    key: str
    folder: str
    """Of the table."""
    is_done: bool
    modified_unix_s: float
    """When something was last written to the run's own folder."""

    def may_go_on(self, before_unix_s: float) -> bool:
        """Whether the table may still be read: by the run, or where that is done by the next one of its recipe, another seed or the evaluation.

        Args:
            before_unix_s: a run that is done is one of the past when it was done before then.
        """
        return self.modified_unix_s >= (before_unix_s if self.is_done else min(before_unix_s, time.time() - _SILENT_S))


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What the recipes and runs of a root have on record, as of one reading."""

    recipes: Mapping[str, frozenset[str]]
    """Folders of feature tables, by the recipe that uses them."""
    readers: tuple[FeatureReader, ...]
    calibrations: Mapping[str, CalibrationSpec]
    """Of the calibrate-features runs, done or not, by key. Those of an older format, whose tables have other names, are left out."""
    caches: Mapping[str, FeatureSpec]
    """Likewise of the cache-features runs."""
    paths: tuple[str, ...]
    """Of everything in the folders of these runs."""


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


def read_needs(store: Store) -> Needs:
    """Read what the recipes and runs of a root have on record.

    Args:
        store: of the root.

    Raises:
        RecordError: the record of a recipe is damaged.
        StorageError: a record cannot be read.
    """
    # A recipe is on record before its training is, and a training before its evaluation: so none of them is missed that begins meanwhile.
    recipes, readers = _recipes(store), tuple(_readers(store))
    calibrated, cached = store.list("runs/calibrate-features"), store.list("runs/cache-features")
    return Needs(
        recipes=recipes,
        readers=readers,
        calibrations=dict(_specs(store, CalibrationSpec, calibrated)),
        caches=dict(_specs(store, FeatureSpec, cached)),
        paths=(*calibrated, *cached),
    )


def cache_runs(store: Store) -> Iterator[FeatureSpec]:
    """The specs of all cache-features runs of a root, done or not; those of an older format are left out.

    Args:
        store: of the root.
    """
    for _, spec in _specs(store, FeatureSpec, store.list("runs/cache-features")):
        yield spec


def caches_in_use(store: Store, objects: Sequence[StoredObject], *, older_than_s: float = DAY_S, needs: Needs | None = None) -> list[CacheInUse]:
    """Every feature table of a root, with its size, the runs that it serves, and the recipes, trainings and evaluations that use it now.

    Args:
        store: of the root.
        objects: all of the root's, as `Store.list_objects` gives them. Listing takes a request for every thousand, so it is done once.
        older_than_s: a training or an evaluation that was done longer ago does not count.
        needs: what is on record, read behind that listing; None reads it.

    Raises:
        RecordError: a record is damaged.
    """
    needs = needs or read_needs(store)
    before = time.time() - older_than_s
    found: dict[str, CacheInUse] = {}
    for key, spec in needs.caches.items():
        folder = encoding_folder(spec.encoding)
        cache = found.setdefault(folder, CacheInUse(folder=folder, encoder=spec.encoder.model, precision=spec.precision))
        cache.runs.append(key)
    for cache in found.values():
        cache.recipes, cache.readers = _users(needs, cache.folder, before)
    for item in objects:
        folder = _owner(item.path)
        if folder in found:
            found[folder].size_bytes += item.size_bytes
            found[folder].modified_unix_s = max(found[folder].modified_unix_s, item.modified_unix_s)
    return sorted(found.values(), key=lambda cache: cache.folder)


def find_leftovers(
    store: Store, objects: Sequence[StoredObject], *, older_than_s: float = DAY_S, superseded: bool = False, needs: Needs | None = None
) -> list[Leftover]:
    """What could go.

    Args:
        store: of the root.
        objects: all of the root's, as `Store.list_objects` gives them. Tables are asked behind it, so what they name is not taken for an orphan.
        older_than_s: younger objects are left alone.
        superseded: also whole caches that no recipe uses any more.
        needs: what is on record, read behind that listing; None reads it.

    Returns:
        Leftovers by reason and place.

    Raises:
        StorageError: the store is away.
        RecordError: a record is damaged.
        TableError: a table cannot be read, so that nothing can be told of its files.
    """
    needs = needs or read_needs(store)
    before = time.time() - older_than_s
    old = [item for item in objects if item.modified_unix_s < before]
    caches = caches_in_use(store, objects, older_than_s=older_than_s, needs=needs) if superseded else []
    unused = [cache.folder for cache in caches if not cache.recipes and not cache.readers and cache.modified_unix_s < before]
    whole = [_whole_cache(needs, folder, objects, before) for folder in unused]
    going = {item for leftover in whole for item in leftover.objects}
    found = [*_grouped("unfinished", (item for item in old if item.is_unfinished and item not in going), before), *whole]
    files: dict[str, list[StoredObject]] = {}
    for item in old:
        folder = _owner(item.path)
        table, is_file, _ = item.path.partition("/branch=")
        if is_file and folder.startswith("features/") and table in (folder, f"{folder}/_index") and folder not in unused and not item.is_unfinished:
            files.setdefault(table, []).append(item)
    promised = _promised(store, needs) if files else set()
    for table, own in sorted(files.items()):
        found += _grouped("orphan", _unneeded(store, table, own, promised, before), before, place=table)
    calibrations = [item for item in old if item.path.startswith(f"{_CALIBRATIONS}/") and not item.is_unfinished]
    if calibrations:
        named = _named_calibrations(store, needs, {_owner(item.path) for item in objects if is_map_record(item.path)}, gone=frozenset(unused))
        found += _grouped("orphan", (item for item in calibrations if item.path not in named), before, place=_CALIBRATIONS)
    return found


def find_abandoned_uploads(store: Store, *, older_than_s: float = DAY_S) -> list[Leftover]:
    """Multipart uploads that nobody finished, as a leftover.

    Args:
        store: of the root.
        older_than_s: younger ones are left alone.

    Raises:
        StorageError: the store does not tell; not every server and not every user may list them.
    """
    before = time.time() - older_than_s
    uploads = store.abandoned_uploads(before=datetime.fromtimestamp(before, UTC))
    return [Leftover(reason="unfinished", place="multipart uploads", uploads=tuple(uploads), before_unix_s=before)] if uploads else []


def remove_leftovers(store: Store, leftovers: Sequence[Leftover]) -> list[Leftover]:
    """Look once more, and remove what still serves nobody: nothing that was written or came into use since it was listed.

    Args:
        store: of the root.
        leftovers: as `find_leftovers` gave them.

    Returns:
        What of them was removed.

    Raises:
        StorageError: one cannot be removed; those before it are gone.
        RecordError: a record is damaged.
        TableError: a table cannot be read.
    """
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        # Whole caches first: what they alone name serves nobody once they are gone, and serves them where they stay.
        removed = [_remove_cache(store, leftover, pool) for leftover in leftovers if leftover.reason == "superseded"]
        orphans = [leftover.place for leftover in leftovers if leftover.reason == "orphan"]
        needs = read_needs(store) if orphans else None
        promised = _promised(store, needs) if needs is not None and orphans != [_CALIBRATIONS] else set()
        for leftover in leftovers:
            if leftover.reason == "superseded":
                continue
            left: Sequence[StoredObject] = leftover.objects
            if leftover.reason == "orphan" and needs is not None:
                if leftover.place == _CALIBRATIONS:
                    named = _named_calibrations(store, needs)
                    left = [item for item in left if item.path not in named]
                else:
                    left = _unneeded(store, leftover.place, left, promised, leftover.before_unix_s)
            folders: dict[str, list[StoredObject]] = {}
            for item in left:
                folders.setdefault(item.path.rpartition("/")[0], []).append(item)
            gone = [item for items in pool.map(partial(_remove_unchanged, store), folders, folders.values()) for item in items]
            for upload in leftover.uploads:
                store.abort_upload(upload)
            removed.append(replace(leftover, objects=tuple(gone)))
    return [item for item in removed if item.objects or item.records or item.uploads]


def _grouped(reason: Reason, items: Iterable[StoredObject], before: float, place: str | None = None) -> list[Leftover]:
    """Leftovers by the folder that they lie in, or all as of one place."""
    folders: dict[str, list[StoredObject]] = {}
    for item in items:
        folders.setdefault(place or "/".join(item.path.split("/")[:2]), []).append(item)
    return [Leftover(reason=reason, place=folder, objects=tuple(own), before_unix_s=before) for folder, own in sorted(folders.items())]


def _unneeded(store: Store, table: str, items: Iterable[StoredObject], promised: set[str], before: float) -> list[StoredObject]:
    """Files of a table that no run promises and that the table does not hold, nor held until a moment ago: whoever opened it may be reading them."""
    there = Table(store, table, pa.schema([]), ("branch", "maps"))
    held = promised | {f"{table}/{file.path}" for file in there.files()}
    left = [item for item in items if item.path not in held]
    if not left:
        return []
    let_go = {f"{table}/{path}" for path, removed_unix_s in there.removals().items() if removed_unix_s >= before}
    return [item for item in left if item.path not in let_go]


def _promised(store: Store, needs: Needs) -> set[str]:
    """Files that runs have on record and may not have committed yet: whoever completes such a run commits them, and encodes nothing again."""
    runs = [path.split("/") for path in needs.paths if path.startswith("runs/cache-features/")]
    done = {parts[2] for parts in runs if parts[3:] == ["COMMITTED.json"]}
    folders = {key: encoding_folder(spec.encoding) for key, spec in needs.caches.items() if key not in done}
    units = ["/".join(parts) for parts in runs if parts[2] in folders and parts[3:4] == ["units"]]
    promised: set[str] = set()
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for path, outcome in zip(units, pool.map(partial(read_outcome, store), units), strict=True):
            folder = folders[path.split("/")[2]]
            promised |= {f"{folder}/{file.path}" for file in outcome.files} | {f"{folder}/_index/{file.path}" for file in outcome.index_files}
    return promised


def _named_calibrations(store: Store, needs: Needs, tables: Iterable[str] = (), gone: AbstractSet[str] = frozenset()) -> set[str]:
    """Files of centres and scales that a cache was made with, or that are on record for the next one.

    Args:
        store: of the root.
        needs: tell the runs.
        tables: folders of feature tables that have maps on record, beside those of the runs.
        gone: folders of feature tables whose runs and maps do not count.
    """
    run_tables = {key: encoding_folder(spec.encoding) for key, spec in needs.calibrations.items()}
    digests = {(encoding_folder(spec.encoding), spec.calibration_sha256) for spec in needs.caches.values()}
    named = {sha256 for table, sha256 in digests if sha256 and table not in gone}
    runs = [path for path in needs.paths if path.startswith("runs/calibrate-features/") and path.endswith("/COMMITTED.json")]
    for path, stored in _read_json(store, (path for path in runs if run_tables.get(path.split("/")[2]) not in gone)):
        record = from_json(CalibrationRecord, stored, where=store.url(path))
        named |= {record.sha256, *(item.sha256 for item in record.maps)}
    folders = {*tables, *run_tables.values(), *(table for table, _ in digests)} - gone
    maps = [path for folder in sorted(folders) for path in store.list(f"{folder}/calibrations") if is_map_record(path)]
    named |= {from_json(CalibratedMap, stored, where=store.url(path)).sha256 for path, stored in _read_json(store, maps)}
    return {calibration_path(sha256) for sha256 in named}


def _users(needs: Needs, table: str, before: float) -> tuple[list[str], list[str]]:
    """The recipes and the readers of a feature table."""
    readers = [reader for reader in needs.readers if reader.folder == table and reader.may_go_on(before)]
    return (
        [recipe for recipe, tables in needs.recipes.items() if table in tables],
        [f"{reader.stage} {reader.key}{'' if reader.is_done else ', unfinished'}" for reader in readers],
    )


def _cache_folders(needs: Needs, table: str) -> set[str]:
    """A table's folder and those of the runs that it serves: their records would say that what is gone is there."""
    runs = [("cache-features", key, spec.encoding) for key, spec in needs.caches.items()]
    runs += [("calibrate-features", key, spec.encoding) for key, spec in needs.calibrations.items()]
    return {table, *(f"runs/{stage}/{key}" for stage, key, encoding in runs if encoding_folder(encoding) == table)}


def _owner(path: str) -> str:
    """The folder of the run or the table that an object belongs to."""
    parts = path.split("/")
    return "/".join(parts[: 3 if parts[0] == "runs" else 2])


def _whole_cache(needs: Needs, table: str, objects: Sequence[StoredObject], before: float) -> Leftover:
    """A table with the runs that it serves."""
    folders = _cache_folders(needs, table)
    own = [item for item in objects if _owner(item.path) in folders]
    records = [item for item in own if item.path.endswith("/COMMITTED.json")]
    others = [item for item in own if not item.path.endswith("/COMMITTED.json")]
    return Leftover(reason="superseded", place=table, objects=tuple(others), records=tuple(records), before_unix_s=before)


def _remove_cache(store: Store, leftover: Leftover, pool: ThreadPoolExecutor) -> Leftover:
    """Remove a whole cache, or nothing where somebody has written to it or uses it by now."""
    listed = {*leftover.records, *leftover.objects}
    folders = {_owner(item.path) for item in listed}
    there = {item for found in pool.map(store.list_objects, folders) for item in found}
    # Who comes to read a cache leaves no mark on it, so what is needed is read last.
    needs = read_needs(store)
    in_use = any(_users(needs, leftover.place, leftover.before_unix_s)) or not _cache_folders(needs, leftover.place) <= folders
    if in_use or not there <= listed:
        return replace(leftover, objects=(), records=())
    records = [item for item in leftover.records if item in there]
    objects = [item for item in leftover.objects if item in there]
    for item in records:
        store.delete(item.path)
    for _ in pool.map(store.delete, (item.path for item in objects)):
        pass
    return replace(leftover, objects=tuple(objects), records=tuple(records))


def _remove_unchanged(store: Store, folder: str, items: Sequence[StoredObject]) -> list[StoredObject]:
    """Remove those objects of a folder that are what they were when they were listed, and tell which."""
    there = set(store.list_objects(folder))
    unchanged = [item for item in items if item in there]
    for item in unchanged:
        store.delete(item.path)
    return unchanged


def _recipes(store: Store) -> dict[str, frozenset[str]]:
    """The folders of feature tables, among other words, that the record of each recipe names."""
    found = {}
    for path, record in _read_json(store, (path for path in store.list("recipes") if path.endswith(".json"))):
        if not isinstance(record, dict):
            raise RecordError(f"{store.url(path)}: expected an object that names a recipe's cache, found {type(record).__name__}; remove it")
        found[path.removeprefix("recipes/").removesuffix(".json")] = frozenset(str(value) for value in record.values())
    return found


def _readers(store: Store) -> Iterator[FeatureReader]:
    """The trainings and evaluations that read feature tables."""
    stages: tuple[StageName, ...] = ("train-connector", "evaluate")
    listed = {stage: store.list_objects(f"runs/{stage}") for stage in stages}
    tables: dict[str, str] = {}
    """By a training's key."""
    for stage, objects in listed.items():
        modified: dict[str, float] = {}
        for item in objects:
            modified[_owner(item.path)] = max(modified.get(_owner(item.path), 0.0), item.modified_unix_s)
        paths = {item.path for item in objects}
        for path, stored in _read_json(store, _spec_paths(paths)):
            run = _owner(path)
            key = run.rpartition("/")[2]
            try:
                if stage == "train-connector":
                    # Its features alone are decoded: a training that another version of Loupe began counts too.
                    features = from_json(FeatureSpec, stored["spec"]["features"], where=store.url(path))
                    if stored["spec"].get("feature_source") == "live":
                        continue
                    tables[key] = folder = encoding_folder(features.encoding)
                else:
                    folder = tables[stored["spec"]["training_fingerprint"][:16]]  # whichever dataset is asked
            except (KeyError, TypeError, RecordError):
                continue
            yield FeatureReader(stage=stage, key=key, folder=folder, is_done=f"{run}/COMMITTED.json" in paths, modified_unix_s=modified[run])


def _specs(store: Store, kind: type[Spec], paths: Iterable[str]) -> Iterator[tuple[str, Spec]]:
    """The keys and specs of the runs of a stage; those of an older format, whose tables have other names, are left out."""
    for path, stored in _read_json(store, _spec_paths(paths)):
        try:
            spec = from_json(kind, stored["spec"], where=store.url(path))
        except (KeyError, TypeError, RecordError):
            continue
        yield path.split("/")[2], spec


def _spec_paths(paths: Iterable[str]) -> list[str]:
    """The specs of runs among what lies in their folders."""
    return sorted(path for path in paths if path == f"{_owner(path)}/spec.json")


def _read_json(store: Store, paths: Iterable[str]) -> list[tuple[str, Any]]:
    """Records with their paths, many requests at a time: one by one, those of many runs take minutes from an object store."""
    paths = list(paths)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(zip(paths, pool.map(store.read_json, paths), strict=True))
