"""`loupe verify` and `loupe gc`: whether a cache is whole and true, and what in a root serves nobody. The looking itself is done in workers/."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from model.errors import first_line
from model.specs import fingerprint
from pipelines.errors import FaultsFoundError, NothingThereError, SettingError
from pipelines.progress import console_progress
from pipelines.stages import Experiment
from pipelines.wording import bytes_text, count_text, data_console, print_table
from workers.errors import StorageError, StoreUnavailableError
from workers.storage import Store
from workers.sweeping import CacheInUse, Leftover, caches_in_use, find_abandoned_uploads, find_leftovers, read_needs, remove_leftovers

__all__ = ["repair_experiment", "sweep_root", "verify_experiment"]

_MOST_HOURS = 1_000_000
"""Older than a century: nothing is."""


def verify_experiment(experiment: Experiment, *, num_encoded: int, seed: int | None = None, as_json: bool = False) -> None:
    """Look at the caches of a recipe, and print what was found.

    Args:
        experiment: the resolved recipe and its root.
        num_encoded: images that are encoded again.
        seed: which ones; None is others every time.
        as_json: as a JSON list of the recipe's caches instead of tables.

    Raises:
        SettingError: the number of images is none.
        NothingThereError: the recipe stores nothing, or its cache is not made.
        FaultsFoundError: a cache is not whole or not true; the faults are told.
    """
    from workers.caching.verify import verify_cache

    if num_encoded < 0:
        raise SettingError(f"verify --encoded: found {num_encoded}; allowed: 0 or more")

    if not experiment.caches:
        raise NothingThereError(f"recipe {experiment.file.path}: features.source is live, so there is no cache to verify")
    num_faults, told = 0, []
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    for _, features, _ in experiment.data:
        if experiment.record("cache-features", features) is None:
            raise NothingThereError(
                f"{experiment.store.root} holds no finished cache of recipe {experiment.file.recipe.name!r}; run cache-features first"
            )
        key = fingerprint(features)[:16]
        progress = console_progress()
        found = verify_cache(features, experiment.store, experiment.execution, progress, stage_key=key, seed=seed, num_encoded=num_encoded)
        num_faults += found.num_faults
        told.append({"features": key, "seed": seed, **asdict(found)})
        if as_json:
            continue
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column("fact", no_wrap=True)
        table.add_column("value", overflow="fold")
        table.add_row("features", key)
        table.add_row("images", f"{found.num_images:,}: {found.num_cached:,} with every map, {found.num_quarantined:,} in quarantine")
        table.add_row("files", f"{found.num_read:,} of {found.num_files:,} read whole, {bytes_text(found.num_bytes)}")
        skipped = found.num_faults and not (found.num_encoded or found.not_encoded)
        table.add_row("encoded again", "none, since there are faults" if skipped else f"{count_text(found.num_encoded, 'image')}, by --seed {seed}")
        for reason in found.not_encoded:
            table.add_row("not encoded", reason)
        if found.num_twice:
            table.add_row("stored twice", f"{count_text(found.num_twice, 'image')}, by two runs at once; one row of each is read")
        table.add_row("faults", f"{found.num_faults:,}" if found.num_faults else "none")
        print_table(table)
        for fault in found.faults:
            data_console().print(f"  {fault}", soft_wrap=True)
    if as_json:
        print(json.dumps(told, indent=1))
    if num_faults:
        name, count = experiment.file.recipe.name, count_text(num_faults, "fault")
        raise FaultsFoundError(
            f"{count} in the cache of recipe {name!r}. With --repair the index is made anew, and what is damaged is left to the next `loupe run` to "
            "compute"
        )


def repair_experiment(experiment: Experiment, *, as_json: bool = False) -> None:
    """Make the caches of a recipe whole out of what is left of them, and print what was done.

    Args:
        experiment: the resolved recipe and its root.
        as_json: as one JSON object for each table.

    Raises:
        NothingThereError: the recipe stores nothing.
        TableError: a table is not there, or cannot be read.
    """
    from workers.caching.repair import repair_cache

    if not experiment.caches:
        raise NothingThereError(f"recipe {experiment.file.path}: features.source is live, so there is no cache to repair")
    # Of one encoding, and so in one table, whatever the dataset.
    _, features, _ = experiment.data[0]
    found = repair_cache(features, experiment.store, experiment.execution, console_progress())
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    console = data_console()
    console.print(f"The index was made anew out of {found.num_files - len(found.dropped)} of {found.num_files} files.", soft_wrap=True)
    for fault in found.dropped:
        console.print(f"  dropped {fault}", soft_wrap=True)
    if found.reopened:
        console.print(
            f"Images are missing now from {count_text(len(found.reopened), 'cache')} ({', '.join(found.reopened)}); the next `loupe run` of a recipe "
            "that uses one computes them.",
            soft_wrap=True,
        )


def sweep_root(root: str, *, older_than_h: float, superseded: bool, delete: bool, as_json: bool = False) -> None:
    """Print what in a root serves nobody, and remove it when asked to.

    Args:
        root: as the user gave it.
        older_than_h: younger objects are left alone.
        superseded: also caches that no recipe uses any more.
        delete: remove what was found.
        as_json: print JSON instead of tables.

    Raises:
        SettingError: the age is none.
        NothingThereError: the root is a folder that does not exist.
        StorageError: the store is away, or refuses.
    """
    if not 0 <= older_than_h <= _MOST_HOURS:
        raise SettingError(f"gc --older-than: found {older_than_h:g}; allowed: hours from 0 to {_MOST_HOURS:,}")
    store = Store(root)
    folder = store.local_path()
    if folder is not None and not folder.is_dir():
        raise NothingThereError(f"gc: the root {store.root} does not exist; name the one that runs write to with --root")
    objects = store.list_objects()
    needs = read_needs(store)
    leftovers = find_leftovers(store, objects, older_than_s=older_than_h * 3600, superseded=superseded, needs=needs)
    caches = caches_in_use(store, objects, older_than_s=older_than_h * 3600, needs=needs)
    unlisted = ""
    try:
        leftovers += find_abandoned_uploads(store, older_than_s=older_than_h * 3600)
    except StoreUnavailableError:
        raise
    except StorageError as error:
        unlisted = first_line(error)
    if as_json:
        told = {
            "caches": [asdict(cache) for cache in caches],
            "leftovers": [_leftover_json(item) for item in leftovers],
            "uploads_unlisted": unlisted,
        }
        print(json.dumps(told, indent=1, default=str))
    else:
        _print_caches(caches)
        table = Table(box=None, pad_edge=False)
        for heading in ("could go", "where"):
            table.add_column(heading, overflow="fold")
        for heading in ("objects", "size"):
            table.add_column(heading, justify="right", no_wrap=True)
        for item in leftovers:
            table.add_row(item.reason, item.place, str(len(item.paths) + len(item.uploads)), bytes_text(item.size_bytes))
        if leftovers:
            print_table(table)
    total = sum(item.size_bytes for item in leftovers)
    removed = sum(item.size_bytes for item in remove_leftovers(store, leftovers)) if delete else 0
    if as_json:
        return
    console = data_console()
    if unlisted:
        console.print(f"Multipart uploads that nobody finished are not counted, since the store does not list them: {unlisted}", soft_wrap=True)
    if not leftovers:
        console.print(f"Nothing is left over that is older than {older_than_h:g} hours.", soft_wrap=True)
    elif delete:
        stayed = "" if removed == total else f" The other {bytes_text(total - removed)} came into use since they were listed, or went without this."
        console.print(f"Removed: {bytes_text(removed)}.{stayed}", soft_wrap=True)
    else:
        console.print(f"Nothing was removed. With --delete {bytes_text(total)} would go.", soft_wrap=True)


def _leftover_json(leftover: Leftover) -> dict[str, Any]:
    return {
        "reason": leftover.reason,
        "place": leftover.place,
        "size_bytes": leftover.size_bytes,
        "paths": leftover.paths,
        "records": [item.path for item in leftover.records],
        "uploads": [asdict(upload) for upload in leftover.uploads],
    }


def _print_caches(caches: Sequence[CacheInUse]) -> None:
    """Every feature table with what it weighs and who uses it."""
    if not caches:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("cache", no_wrap=True)  # to be copied
    for heading in ("encoder", "precision"):
        table.add_column(heading, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("written", no_wrap=True)
    table.add_column("used by", overflow="fold")
    for cache in caches:
        written = time.strftime("%Y-%m-%d", time.gmtime(cache.modified_unix_s)) if cache.modified_unix_s else "never"
        users = ", ".join((*cache.recipes, *cache.readers)) or "no recipe now"
        table.add_row(cache.folder, cache.encoder, cache.precision, bytes_text(cache.size_bytes), written, users)
    print_table(table)
    print()
