"""`loupe verify` finds every fault that can be made in a cache; `loupe gc` removes what serves nobody and nothing else."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.specs import fingerprint
from pipelines.errors import NothingThereError, SettingError
from tests import small_data
from workers.caching.build import cache_features
from workers.caching.layout import BRANCHES, encoding_folder, features_table, index_table
from workers.caching.reader import CachedFeatures
from workers.caching.repair import repair_cache
from workers.caching.units import num_views
from workers.caching.verify import verify_cache
from workers.dataset.samples import read_samples
from workers.errors import AccessDeniedError, ObjectNotFoundError, RecordError, StorageError, TableError
from workers.execution import ExecutionSettings, SilentProgress
from workers.quarantine import read_quarantine
from workers.runtime import InlineCluster
from workers.storage import Store
from workers.storage_errors import is_damage, translated
from workers.sweeping import DAY_S, caches_in_use, find_leftovers, note_recipe, remove_leftovers

SETTINGS = ExecutionSettings(feature_unit_bytes=40_000, encode_batch_views=5)


def cache(store, spec, settings=SETTINGS):
    return cache_features(spec, store, settings, SilentProgress(), cluster=InlineCluster())


def verify(store, spec, **options):
    key = fingerprint(spec)[:16]
    return verify_cache(spec, store, SETTINGS, SilentProgress(), stage_key=key, cluster=InlineCluster(), **({"seed": 0} | options))


@pytest.fixture
def cached(root, tiny_encoder_folder):
    """A store and the spec of its cache."""
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    cache(store, spec)
    return store, spec


def file_path(store, spec, branch="local"):
    table = features_table(store, spec)
    file = max(table.files({"branch": branch}), key=lambda file: file.num_rows)
    return store.local_path(f"{table.path}/{file.path}")


def test_a_whole_cache_has_no_faults(cached):
    store, spec = cached
    found = verify(store, spec, num_encoded=5)
    assert (found.faults, found.num_faults) == ((), 0)
    assert (found.num_images, found.num_cached, found.num_quarantined, found.num_files, found.num_encoded) == (16, 16, 0, 8, 5)
    assert found.num_bytes == sum(file.size_bytes for file in features_table(store, spec).files())


def test_images_whose_sources_are_gone_or_changed_are_told_and_are_no_faults(cached):
    store, spec = cached
    samples = read_samples(store, spec.dataset_fingerprint)
    store.delete(samples[0].image_path)
    store.local_path(samples[1].image_path).write_bytes(store.read_bytes(samples[2].image_path))
    found = verify(store, spec, num_encoded=16)
    assert (found.num_faults, found.num_encoded, len(found.not_encoded)) == (0, 14, 2)
    assert {reason.split(")")[0] for reason in found.not_encoded} == {f"image {item.image_sha256[:12]} ({item.sample_id}" for item in samples[:2]}
    assert any("expected bytes with sha256" in reason for reason in found.not_encoded)


def test_a_map_that_its_encoder_does_not_give_is_a_fault_whichever_image_it_is_of(cached, monkeypatch):
    store, spec = cached
    shape = (3, spec.encoder.view_px, spec.encoder.view_px)
    black = lambda spec, sample, store, branch: np.zeros((num_views(spec, sample, branch), *shape), np.uint8)  # noqa: E731
    monkeypatch.setattr("workers.caching.reader.load_views", black)
    found = verify(store, spec, num_encoded=3, seed=5)
    assert (found.num_faults, found.num_encoded) == (3, 3)
    assert all("differs from what" in fault for fault in found.faults)


def test_refused_images_are_not_missed(root, tiny_encoder_folder):
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    store.delete(read_samples(store, fingerprint(dataset))[2].image_path)
    cache(store, spec)
    found = verify(store, spec)
    assert (found.num_faults, found.num_cached, found.num_quarantined) == (0, 15, 1)


@pytest.mark.parametrize(("group", "share"), [(0, 0.0), (2, 0.5), (4, 0.99)])
def test_every_flipped_byte_of_the_numbers_is_found(cached, group, share):
    store, spec = cached
    path = file_path(store, spec)
    column = pq.read_metadata(path).row_group(group).column(9)
    data = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    data[end - 1 - int(share * 2 * 16 * 32 * 2)] ^= 1
    path.write_bytes(bytes(data))
    found = verify(store, spec)
    assert found.num_faults == 1
    assert path.name in found.faults[0]
    assert found.num_encoded == 0


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_files_that_are_gone_or_cut_are_found(cached, damage):
    store, spec = cached
    path = file_path(store, spec)
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-30] if damage == "cut" else b"")
    table = features_table(store, spec)
    (file,) = [file for file in table.files() if file.path.endswith(path.name)]
    found = verify(store, spec)
    assert found.num_faults == 1
    assert found.faults[0].startswith(f"{file.path}: ")
    assert found.faults[0].count(path.name) == 1
    assert (found.num_files, found.num_read, found.num_cached) == (8, 7, 16 - file.num_rows // 2)
    assert found.num_bytes == sum(other.size_bytes for other in table.files() if other != file)


def test_another_files_rows_under_a_name_are_found(cached):
    """Whole, with checksums of its own, and yet not what was written there."""
    store, spec = cached
    path = file_path(store, spec)
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema, compression="NONE", use_dictionary=False, write_page_checksum=True) as writer:
        for start in (2, 0, 4, 6, 8):
            writer.write_table(table.slice(start, 2))
    found = verify(store, spec)
    assert found.num_faults >= 2
    assert "the index says row group 1 with 2 views, the file has 2" in found.faults[0]


def test_rows_that_the_index_does_not_tell_of_are_missed(cached):
    store, spec = cached
    table = index_table(store, spec.encoding)
    log = sorted(store.local_path(f"{table.path}/_delta_log").glob("*.json"))
    assert len(log) == 2  # the table, and its files in one commit
    lines = log[1].read_text().splitlines()
    dropped = next(line for line in lines if '"add"' in line and "branch=global" in line)
    log[1].write_text("\n".join(line for line in lines if line != dropped))
    found = verify(store, spec)
    missing = {fault.split(" is missing")[0].split(" of ")[0] for fault in found.faults[:-1]}
    assert missing == {f"the map global/{item.name}" for item in spec.global_maps}
    assert found.num_cached < 16
    assert "1 of the table's 8 files are not in the index, first branch=global/" in found.faults[-1]


def test_an_index_that_is_gone_is_told_as_what_it_is(cached):
    store, spec = cached
    shutil.rmtree(store.local_path(index_table(store, spec.encoding).path))
    found = verify(store, spec)
    assert (found.num_cached, found.num_files) == (0, 0)
    assert "8 of the table's 8 files are not in the index, first branch=" in found.faults[-1]
    assert "--repair makes the index anew" in found.faults[-1]


def test_nothing_is_called_damaged_on_one_workers_word(cached, monkeypatch):
    """A machine of the cluster that lacks the folder finds none of the files."""
    store, spec = cached

    class Blind(InlineCluster):
        def stream(self, work, jobs, *, in_flight):
            for job in jobs:
                with monkeypatch.context() as patch:
                    patch.setattr(Store, "local_path", lambda store, path="": Path("/nowhere") / path)
                    patch.setattr("workers.tables.Table.open_file", gone)
                    result = work(job)
                assert result.fault is not None
                yield result

    def gone(*_):
        raise ObjectNotFoundError("cannot read it: nothing lies there")

    files = features_table(store, spec).files()
    found = verify_cache(spec, store, SETTINGS, SilentProgress(), stage_key=fingerprint(spec)[:16], cluster=Blind(), seed=0)
    assert (found.num_faults, found.num_read, found.num_cached) == (0, 8, 16)
    assert repair_cache(spec, store, SETTINGS, SilentProgress(), cluster=Blind()).dropped == ()
    assert features_table(store, spec).files() == files
    assert verify(store, spec).num_faults == 0


@pytest.mark.parametrize(
    ("error", "damaged"),
    [
        (OSError("AWS Error NO_SUCH_KEY during HeadObject operation: gone"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 416) during GetObject operation: beyond its end"), True),
        (pa.ArrowInvalid("Parquet magic bytes not found in footer"), True),
        (OSError("could not verify page integrity, CRC checksum verification failed for page_ordinal 0"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."), False),
        (OSError("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body."), False),
        (OSError("AWS Error UNKNOWN (HTTP status 501) during HeadObject operation: No response body."), False),
        (OSError("AWS Error SLOW_DOWN during GetObject operation: busy"), False),
    ],
)
def test_what_a_server_refuses_is_no_damage(error, damaged):
    with pytest.raises(StorageError) as told, translated("read", "s3://bucket/file"):
        raise error
    assert is_damage(told.value) is damaged


def test_a_lack_of_memory_is_no_error_of_the_store():
    with pytest.raises(pa.ArrowMemoryError, match="malloc"), translated("read", "file:///file"):
        raise pa.ArrowMemoryError("malloc of size 1 failed")


def test_a_cache_of_another_encoder_is_found(cached, tmp_path):
    from model.encoder import describe_encoder
    from tests.tiny import write_tiny_encoder

    store, spec = cached
    other = dataclasses.replace(spec, encoder=describe_encoder(str(write_tiny_encoder(tmp_path / "other", seed=7))))
    cache(store, other)
    ours, theirs = features_table(store, spec), features_table(store, other)
    # Both tables whole, and the one under the other's name: what copying the wrong folder would leave.
    store.local_path(ours.path).rename(tmp_path / "aside")
    store.local_path(theirs.path).rename(store.local_path(ours.path))
    found = verify(store, spec)
    assert found.num_faults == found.num_encoded == 8
    assert all("differs from what" in fault for fault in found.faults)


def age(store, path, days):
    file = store.local_path(path)
    stamp = file.stat().st_mtime - days * DAY_S
    os.utime(file, (stamp, stamp))


def test_leftovers_are_found_by_age_and_removed(cached):
    store, spec = cached
    table, index = features_table(store, spec), index_table(store, spec.encoding)
    before = set(store.list())
    orphans = [f"{table.path}/branch=local/maps=layer_5/aa/unit.parquet", f"{index.path}/branch=local/maps=layer_5/aa/unit.parquet"]
    unfinished = ["images/ab/.tmp-1234", f"{table.path}/branch=local/maps=layer_5/aa/.tmp-99"]
    for path in (*orphans, *unfinished):
        store.local_path(path).parent.mkdir(parents=True, exist_ok=True)
        store.local_path(path).write_bytes(b"12345")
    assert find_leftovers(store, store.list_objects()) == []  # all may belong to a run under way
    for path in (*orphans, *unfinished):
        age(store, path, 2)
    found = find_leftovers(store, store.list_objects())
    assert sorted(path for item in found for path in item.paths) == sorted([*orphans, *unfinished])
    assert {item.reason for item in found} == {"orphan", "unfinished"}
    assert sum(item.size_bytes for item in found) == 20
    remove_leftovers(store, found)
    assert set(store.list()) == before
    assert find_leftovers(store, store.list_objects(), older_than_s=-1e6) == []
    assert verify(store, spec).num_faults == 0


def test_superseded_caches_go_with_their_records(cached, root):
    store, spec = cached
    newer = dataclasses.replace(spec, precision="fp32")
    cache(store, newer)
    for name, used in (("one", spec), ("two", spec), ("one", newer)):
        note_recipe(store, name, used, finished=True)
    assert [cache.recipes for cache in caches_in_use(store, store.list_objects()) if cache.precision == "fp16"] == [["two"]]
    everything = {"older_than_s": -1e6, "superseded": True}
    assert find_leftovers(store, store.list_objects(), **everything) == []
    note_recipe(store, "two", newer, finished=True)
    found = find_leftovers(store, store.list_objects(), **everything)
    assert [(item.reason, item.place) for item in found] == [("superseded", features_table(store, spec).path)]
    assert find_leftovers(store, store.list_objects(), superseded=True) == []  # written a moment ago
    remove_leftovers(store, found)
    assert verify(store, newer).num_faults == 0
    assert [cache.precision for cache in caches_in_use(store, store.list_objects())] == ["fp32"]
    # Nothing says any more that it is there, so it can be made again.
    record = cache(store, spec)
    assert (record.num_held, record.num_cached) == (0, 16)
    CachedFeatures(store, spec).verify(read_samples(store, spec.dataset_fingerprint))


def test_a_cache_that_is_under_way_is_in_use_and_so_is_the_one_before(cached):
    store, spec = cached
    note_recipe(store, "one", spec, finished=True)
    newer = dataclasses.replace(spec, precision="fp32")
    everything = {"older_than_s": -1e6, "superseded": True}

    def left_over():
        return [item.place for item in find_leftovers(store, store.list_objects(), **everything)]

    note_recipe(store, "one", newer, finished=False)
    cache(store, newer)
    assert left_over() == []
    note_recipe(store, "one", newer, finished=True)
    assert left_over() == [features_table(store, spec).path]
    # Back to the first, and begun again, and given up for a third: what was begun and not finished is nobody's now.
    note_recipe(store, "one", spec, finished=False)
    assert left_over() == []
    note_recipe(store, "one", newer, finished=False)
    assert left_over() == []
    third = dataclasses.replace(spec, compute="bf16")
    note_recipe(store, "one", third, finished=False)
    assert left_over() == [features_table(store, spec).path]


def test_files_that_a_killed_run_has_on_record_are_left_to_it(root, tiny_encoder_folder, monkeypatch):
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    with monkeypatch.context() as patch:
        patch.setattr("workers.caching.build._Books.commit", lambda books: None)
        patch.setattr("workers.caching.build.compact_index", lambda store, spec: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache(store, spec)
    assert features_table(store, spec).files() == []
    written = set(store.list(features_table(store, spec).path))
    assert find_leftovers(store, store.list_objects(), older_than_s=-1e6) == []
    with monkeypatch.context() as patch:
        patch.setattr("workers.caching.build._run", lambda *_: 1 / 0)  # nothing is encoded again
        assert cache(store, spec).num_cached == 16
    assert written < set(store.list(features_table(store, spec).path))
    assert verify(store, spec).num_faults == 0
    assert find_leftovers(store, store.list_objects(), older_than_s=-1e6) == []


def removed_with_two_refusals(root, tiny_encoder_folder):
    """A store whose cache was removed, but for its refusals, and the spec of that cache."""
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    for sample in read_samples(store, fingerprint(dataset))[2:8:3]:
        store.delete(sample.image_path)
    assert cache(store, spec).num_quarantined == 2
    remove_leftovers(store, find_leftovers(store, store.list_objects(), older_than_s=-1e6, superseded=True))
    return store, spec


def test_a_cache_that_was_removed_is_made_again_in_units_of_another_size(root, tiny_encoder_folder):
    store, spec = removed_with_two_refusals(root, tiny_encoder_folder)
    record = cache(store, spec, ExecutionSettings(feature_unit_bytes=10**9))
    assert (record.num_units, record.num_quarantined, record.num_cached) == (1, 2, 14)
    assert len(read_quarantine(store, "cache-features", fingerprint(spec)[:16])) == 2


def test_refusals_of_an_old_plan_go_though_the_new_one_was_cut_off_before(root, tiny_encoder_folder, monkeypatch):
    store, spec = removed_with_two_refusals(root, tiny_encoder_folder)
    larger = ExecutionSettings(feature_unit_bytes=10**9)
    with monkeypatch.context() as patch:
        patch.setattr("workers.tables.Table.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache(store, spec, larger)
    assert cache(store, spec, larger).num_quarantined == 2
    assert len(read_quarantine(store, "cache-features", fingerprint(spec)[:16])) == 2


def test_what_does_not_belong_to_a_root_does_not_stop_the_sweeping(cached):
    store, _ = cached
    for path in ("features/notes.txt", "features/folder/notes.txt", "recipes/.DS_Store", "branch=local/x.parquet"):
        store.write_bytes(path, b"mine")
        age(store, path, 2)
    assert find_leftovers(store, store.list_objects()) == []
    store.write_json("recipes/odd.json", ["no", "object"])
    with pytest.raises(RecordError, match=r"odd\.json: expected an object that names a recipe's cache, found list; remove it"):
        caches_in_use(store, store.list_objects())


@pytest.mark.parametrize("hours", [-3.0, 1e8, math.inf, math.nan])
def test_an_age_that_cannot_be_removes_nothing(cached, hours):
    from pipelines.cache_care import sweep_root

    store, _ = cached
    with pytest.raises(SettingError, match=r"gc --older-than: found .*; allowed: hours from 0 to 1,000,000"):
        sweep_root(store.root, older_than_h=hours, superseded=True, delete=True)


def test_a_root_that_is_not_there_is_no_clean_one(tmp_path):
    from pipelines.cache_care import sweep_root

    with pytest.raises(NothingThereError, match="no-such-root does not exist"):
        sweep_root(str(tmp_path / "no-such-root"), older_than_h=24, superseded=False, delete=False)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_tell_what_they_found(cached, capsys, monkeypatch):
    from pipelines.cache_care import sweep_root

    store, spec = cached
    note_recipe(store, "mine", spec, finished=True)
    path = "images/ab/.tmp-1234"
    store.local_path(path).parent.mkdir(parents=True, exist_ok=True)
    store.local_path(path).write_bytes(b"12345")
    sweep_root(store.root, older_than_h=0, superseded=False, delete=False)
    said = capsys.readouterr().out
    assert "mine" in said
    assert "Nothing was removed. With --delete 5 B would go." in said
    assert store.local_path(path).exists()
    sweep_root(store.root, older_than_h=0, superseded=False, delete=True)
    assert "Removed: 5 B." in capsys.readouterr().out
    assert not store.local_path(path).exists()
    sweep_root(store.root, older_than_h=0, superseded=True, delete=False)
    assert "Nothing is left over that is older than 0 hours." in capsys.readouterr().out
    sweep_root(store.root, older_than_h=0, superseded=True, delete=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["leftovers"] == []

    def refuses(store, **options):
        raise AccessDeniedError("not for you")

    monkeypatch.setattr(Store, "abandoned_uploads", refuses)
    sweep_root(store.root, older_than_h=0, superseded=True, delete=True)
    assert "Multipart uploads that nobody finished are not counted, since the store does not list them: not for you" in capsys.readouterr().out
    sweep_root(store.root, older_than_h=0, superseded=True, delete=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["uploads_unlisted"] == "not for you"


def repair(store, spec):
    return repair_cache(spec, store, SETTINGS, SilentProgress(), cluster=InlineCluster())


def everything(store, spec):
    """What a reader gets of every image, in bytes."""
    samples = read_samples(store, spec.dataset_fingerprint)
    found = CachedFeatures(store, spec).fetch(dict.fromkeys(BRANCHES, samples))
    return {(branch, name): packed.values.numpy().tobytes() for branch, maps in found.items() for name, packed in maps.items()}


def test_nothing_is_lost_by_repairing_a_whole_cache(cached):
    store, spec = cached
    before, files = everything(store, spec), features_table(store, spec).files()
    found = repair(store, spec)
    assert (found.num_files, found.dropped, found.reopened) == (8, (), ())
    assert features_table(store, spec).files() == files
    assert everything(store, spec) == before
    assert verify(store, spec, num_encoded=3).num_faults == 0
    assert repair(store, spec) == found


@pytest.mark.parametrize("damage", ["file cut", "file gone", "numbers flipped", "index cut", "index gone", "index log gone"])
def test_what_is_damaged_is_dropped_and_computed_again(cached, damage):
    """By the next run, and nothing else is."""
    store, spec = cached
    before = everything(store, spec)
    table, index = features_table(store, spec), index_table(store, spec.encoding)
    path = file_path(store, spec)
    kept = {file.path: store.local_path(f"{table.path}/{file.path}").stat().st_mtime_ns for file in table.files()}
    damaged = path.relative_to(store.local_path(table.path)).as_posix()
    match damage:
        case "file cut":
            path.write_bytes(path.read_bytes()[:-30])
        case "file gone":
            path.unlink()
        case "numbers flipped":
            column = pq.read_metadata(path).row_group(1).column(9)
            data = bytearray(path.read_bytes())
            data[column.data_page_offset + column.total_compressed_size - 5] ^= 4
            path.write_bytes(bytes(data))
        case "index cut":
            file = store.local_path(f"{index.path}/{index.files()[0].path}")
            file.write_bytes(file.read_bytes()[:-30])
        case "index gone":
            shutil.rmtree(store.local_path(index.path))
        case "index log gone":
            (store.local_path(index.path) / "_delta_log" / "00000000000000000000.json").write_bytes(b"{")
    lost = damage.startswith(("file", "numbers"))
    found = repair(store, spec)
    assert found.num_files == 8
    assert [fault.partition(":")[0] for fault in found.dropped] == ([damaged] if lost else [])
    assert found.reopened == ((fingerprint(spec)[:16],) if lost else ())
    again = cache(store, spec)
    assert (again.num_cached, again.num_quarantined) == (16, 0)
    assert again.num_held == (16 - len(pq.read_table(path, columns=["image_sha256"])["image_sha256"].unique()) if lost else 0)
    assert everything(store, spec) == before
    assert verify(store, spec, num_encoded=3).num_faults == 0
    now = {file.path: store.local_path(f"{table.path}/{file.path}").stat().st_mtime_ns for file in features_table(store, spec).files()}
    assert {name: time for name, time in now.items() if name != damaged or not lost} == {
        name: time for name, time in kept.items() if name != damaged or not lost
    }


@pytest.mark.parametrize(("module", "read"), [("workers.caching.index.Table", "open_file"), ("workers.caching.index", "mapped_rows")])
def test_no_file_is_dropped_and_none_called_damaged_for_want_of_memory(cached, monkeypatch, module, read):
    store, spec = cached
    before = everything(store, spec)

    def starved(*_):
        raise pa.ArrowMemoryError("malloc of size 1 failed")

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{read}", starved)
        for care in (repair, verify):
            with pytest.raises(pa.ArrowMemoryError):
                care(store, spec)
    assert everything(store, spec) == before
    assert verify(store, spec).num_faults == 0


def test_other_datasets_of_the_table_are_completed_too_and_their_refusals_judged_anew(cached, tiny_encoder_folder):
    store, spec = cached
    dataset = small_data.dataset_spec(seed=1)
    small_data.build(store, dataset)
    other = small_data.feature_spec(dataset, tiny_encoder_folder)
    assert encoding_folder(other.encoding) == encoding_folder(spec.encoding)
    gone = read_samples(store, fingerprint(dataset))[2].image_path
    bytes_of_it = store.read_bytes(gone)
    store.delete(gone)
    assert cache(store, other).num_quarantined == 1
    table = features_table(store, spec)
    mine = {sample.image_sha256 for sample in read_samples(store, fingerprint(dataset))}
    paths = [store.local_path(f"{table.path}/{file.path}") for file in table.files({"branch": "global"})]
    path = next(path for path in paths if set(pq.read_table(path, columns=["image_sha256"])["image_sha256"].to_pylist()) <= mine)
    path.unlink()
    found = repair(store, spec)
    assert found.reopened == (fingerprint(other)[:16],)
    store.write_bytes(gone, bytes_of_it)
    again = cache(store, other)
    assert (again.num_cached, again.num_quarantined) == (16, 0)
    assert read_quarantine(store, "cache-features", fingerprint(other)[:16]) == []
    assert verify(store, other).num_faults == verify(store, spec).num_faults == 0


def test_a_table_that_is_not_there_is_not_repaired(root, tiny_encoder_folder):
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    with pytest.raises(TableError, match="nothing to repair; run cache-features"):
        repair(store, small_data.feature_spec(dataset, tiny_encoder_folder))
