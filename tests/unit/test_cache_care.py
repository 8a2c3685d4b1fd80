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
from tests.tiny_training import tiny_connector_spec, tiny_training_spec
from workers.caching.build import cache_features
from workers.caching.index import compact_index
from workers.caching.layout import BRANCHES, encoding_folder, features_table, index_table
from workers.caching.reader import CachedFeatures
from workers.caching.repair import repair_cache
from workers.caching.units import num_views, read_outcome
from workers.caching.verify import verify_cache
from workers.commits import Stage, from_json
from workers.dataset.samples import read_samples
from workers.errors import AccessDeniedError, ObjectNotFoundError, RecordError, StorageError, TableError
from workers.evaluation import EvaluationSpec
from workers.execution import ExecutionSettings, SilentProgress
from workers.quarantine import read_quarantine
from workers.runtime import InlineCluster
from workers.storage import Store
from workers.storage_errors import is_damage, translated
from workers.sweeping import DAY_S, caches_in_use, find_leftovers, note_recipe, remove_leftovers
from workers.training.spec import TrainingSpec

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


def test_an_unfinished_file_of_a_cache_that_goes_whole_is_counted_once(cached):
    store, spec = cached
    path = f"{features_table(store, spec).path}/.tmp-1234"
    store.local_path(path).write_bytes(b"12345")
    found = find_leftovers(store, store.list_objects(), older_than_s=-1e6, superseded=True)
    assert [(item.reason, item.paths.count(path)) for item in found] == [("superseded", 1)]
    assert remove_leftovers(store, found) == found


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


def superseded(store, **options):
    """The places of caches that could go whole, whatever their age."""
    found = find_leftovers(store, store.list_objects(), **({"older_than_s": -1e6, "superseded": True} | options))
    return [item.place for item in found if item.reason == "superseded"]


def readers(store, **options):
    (cache,) = caches_in_use(store, store.list_objects(), **options)
    return cache.readers


def training_of(spec, language_model_folder, **changes):
    """A training that reads the cache of a spec."""
    maps = tiny_connector_spec().global_branch.fusion.maps
    return tiny_training_spec(language_model_folder, features=dataclasses.replace(spec, global_maps=maps, local_maps=maps), **changes)


def done(stage):
    stage.store.write_json(stage.path("COMMITTED.json"), {})


def test_a_cache_that_a_training_reads_is_in_use_though_its_recipe_uses_another(cached, tiny_language_model_folder):
    """The recipe was edited while its training goes on, and training leaves no mark on the table."""
    store, spec = cached
    note_recipe(store, "mine", spec, finished=True)
    training = Stage.open(store, "train-connector", training_of(spec, tiny_language_model_folder))
    note_recipe(store, "mine", dataclasses.replace(spec, precision="fp32"), finished=True)
    assert superseded(store) == []
    assert readers(store) == [f"train-connector {training.key}, unfinished"]
    done(training)
    # Another seed of its recipe, or its evaluation, may be about to begin.
    assert readers(store) == [f"train-connector {training.key}"]
    for path in store.list(features_table(store, spec).path):
        age(store, path, 2)
    assert superseded(store, older_than_s=DAY_S) == []
    for path in store.list(training.folder):
        age(store, path, 2)
    assert readers(store) == []
    assert superseded(store, older_than_s=DAY_S) == [features_table(store, spec).path]


def test_a_cache_that_an_evaluation_reads_is_in_use_whichever_dataset_is_asked(cached, tiny_language_model_folder):
    store, spec = cached
    training_spec = training_of(spec, tiny_language_model_folder)
    done(Stage.open(store, "train-connector", training_spec))
    asked = EvaluationSpec(training_fingerprint=fingerprint(training_spec), dataset_fingerprint="e" * 64)
    evaluation = Stage.open(store, "evaluate", asked)
    assert superseded(store) == []
    assert f"evaluate {evaluation.key}, unfinished" in readers(store)
    done(evaluation)
    assert superseded(store) == [features_table(store, spec).path]


def test_a_training_on_live_features_or_on_another_table_keeps_no_cache(cached, tiny_language_model_folder):
    store, spec = cached
    live = training_of(spec, tiny_language_model_folder, feature_source="live")
    Stage.open(store, "train-connector", live)
    Stage.open(store, "evaluate", EvaluationSpec(training_fingerprint=fingerprint(live), dataset_fingerprint=spec.dataset_fingerprint))
    Stage.open(store, "train-connector", training_of(dataclasses.replace(spec, precision="fp32"), tiny_language_model_folder))
    assert readers(store) == []
    assert superseded(store) == [features_table(store, spec).path]


def test_a_training_that_was_begun_by_another_version_is_in_use_too(cached, tiny_language_model_folder):
    store, spec = cached
    training = Stage.open(store, "train-connector", training_of(spec, tiny_language_model_folder))
    stored = store.read_json(training.path("spec.json"))
    store.write_json(training.path("spec.json"), stored | {"spec": stored["spec"] | {"to_come": 1}})
    with pytest.raises(RecordError):
        from_json(TrainingSpec, store.read_json(training.path("spec.json"))["spec"])
    assert superseded(store) == []


def test_a_run_that_was_given_up_lets_go_when_its_folder_goes_or_is_silent_for_a_month(cached, tiny_language_model_folder):
    store, spec = cached
    place = features_table(store, spec).path
    training = Stage.open(store, "train-connector", training_of(spec, tiny_language_model_folder))
    age(store, training.path("spec.json"), 29)
    assert superseded(store) == []
    assert readers(store, older_than_s=0.0) == [f"train-connector {training.key}, unfinished"]
    age(store, training.path("spec.json"), 2)
    assert superseded(store) == [place]
    assert readers(store, older_than_s=40 * DAY_S) == [f"train-connector {training.key}, unfinished"]
    store.write_json(training.path("progress.json"), {"step": 3})  # taken up again
    assert superseded(store) == []
    shutil.rmtree(store.local_path(training.folder))
    assert superseded(store) == [place]


@pytest.mark.parametrize("event", ["recipe", "training", "cache run", "new file", "nothing"])
def test_a_cache_that_came_into_use_since_it_was_found_stays_whole(cached, tiny_language_model_folder, event):
    store, spec = cached
    found = find_leftovers(store, store.list_objects(), older_than_s=-1e6, superseded=True)
    assert [item.reason for item in found] == ["superseded"]
    match event:
        case "recipe":
            note_recipe(store, "mine", spec, finished=False)
        case "training":
            Stage.open(store, "train-connector", training_of(spec, tiny_language_model_folder))
        case "cache run":
            Stage.open(store, "cache-features", dataclasses.replace(spec, global_maps=spec.global_maps[:1]))
        case "new file":
            store.write_bytes(f"{features_table(store, spec).path}/branch=local/maps=layer_5/aa/unit.parquet", b"of a run under way")
    kept = set(store.list())
    removed = remove_leftovers(store, found)
    if event == "nothing":
        assert removed == found
        assert store.list(features_table(store, spec).path) == []
        return
    assert removed == []
    assert set(store.list()) == kept
    assert verify(store, spec).num_faults == 0


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


def cut_off(store, spec, monkeypatch, where):
    """A run that ends there, as killed."""
    with monkeypatch.context() as patch:
        for name in where:
            patch.setattr(name, (lambda books: None) if name.endswith("commit") else lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache(store, spec)


BEFORE_THE_OUTCOME = ("workers.caching.build._check_quality",)
BEFORE_THE_COMMIT = ("workers.caching.build._Books.commit", "workers.caching.build.compact_index")


@pytest.mark.parametrize("resumed", ["after the listing", "after the looking"])
def test_files_that_a_resumed_run_writes_while_a_root_is_swept_are_left_to_it(root, tiny_encoder_folder, monkeypatch, resumed):
    """The run was killed between a unit's files and its record. Its files are named by what is in them, so they are written over."""
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    cut_off(store, spec, monkeypatch, BEFORE_THE_OUTCOME)
    written = [path for path in store.list(features_table(store, spec).path) if path.endswith(".parquet")]
    assert len(written) == 4
    for path in written:
        age(store, path, 2)
    objects = store.list_objects()
    found = find_leftovers(store, objects)
    assert sorted(path for item in found for path in item.paths) == written
    cut_off(store, spec, monkeypatch, BEFORE_THE_COMMIT)
    if resumed == "after the listing":
        found = find_leftovers(store, objects)
        assert found == []
    assert remove_leftovers(store, found) == []
    assert cache(store, spec).num_cached == 16
    assert verify(store, spec).num_faults == 0


@pytest.mark.parametrize("event", ["written anew", "on record", "committed", "gone"])
def test_an_orphan_that_is_none_any_more_stays_and_the_others_go(root, tiny_encoder_folder, monkeypatch, event):
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    table = features_table(store, spec)
    cut_off(store, spec, monkeypatch, BEFORE_THE_COMMIT)
    stage = Stage.open(store, "cache-features", spec)
    units = store.list(stage.path("units"))
    outcomes = {path: store.read_bytes(path) for path in units}
    held = {f"{table.path}/{file.path}": file for file in read_outcome(store, units[0]).files}
    for path in units:
        store.delete(path)
    for path in store.list(table.path):
        age(store, path, 2)
    listed = store.list_objects()
    found = find_leftovers(store, listed)
    assert held.keys() < {path for item in found for path in item.paths}
    match event:
        case "written anew":
            for path in held:
                store.write_bytes(path, store.read_bytes(path))
        case "on record":
            store.write_bytes(units[0], outcomes[units[0]])
        case "committed":
            table.commit(list(held.values()))
        case "gone":
            for path in held:
                store.delete(path)
    removed = {path for item in remove_leftovers(store, found) for path in item.paths}
    assert removed
    assert not removed & held.keys()
    assert all(store.exists(path) != (event == "gone") for path in held)
    assert not any(store.exists(path) for path in removed)


def test_files_that_were_put_together_into_one_are_left_to_those_who_read_them(cached, monkeypatch):
    """As old as their unit is, they left the table a moment ago."""
    store, spec = cached
    index = index_table(store, spec.encoding)
    small = {f"{index.path}/{file.path}" for file in index.files()}
    for path in store.list(features_table(store, spec).path):
        age(store, path, 2)
    monkeypatch.setattr("workers.caching.index._COMPACT_ABOVE", 1)
    compact_index(store, spec)
    assert len(index_table(store, spec.encoding).files()) == 2
    assert find_leftovers(store, store.list_objects()) == []
    assert find_leftovers(store, store.list_objects(), older_than_s=3600) == []
    found = find_leftovers(store, store.list_objects(), older_than_s=0.0)
    assert {path for item in found for path in item.paths} == small
    remove_leftovers(store, found)
    assert verify(store, spec).num_faults == 0


def test_a_root_whose_features_lie_on_another_disk_is_swept_as_any_other(cached, tmp_path, capsys):
    from pipelines.cache_care import sweep_root

    store, spec = cached
    objects = {item.path for item in store.list_objects()}
    place = store.local_path("features")
    place.rename(tmp_path / "disk")
    place.symlink_to(tmp_path / "disk")
    (place / "around").symlink_to(store.local_path())
    assert {item.path for item in store.list_objects()} == objects
    (cache,) = caches_in_use(store, store.list_objects())
    assert cache.size_bytes > 0
    stray = f"{features_table(store, spec).path}/branch=local/maps=layer_5/aa/unit.parquet"
    store.write_bytes(stray, b"12345")
    age(store, stray, 2)
    sweep_root(store.root, older_than_h=24, superseded=False, delete=True)
    assert "Removed: 5 B." in capsys.readouterr().out
    assert {item.path for item in store.list_objects()} == objects


def test_every_spec_is_read_once_in_a_sweep(cached, tiny_language_model_folder, monkeypatch):
    from pipelines.cache_care import sweep_root

    store, spec = cached
    cache(store, dataclasses.replace(spec, precision="fp32"))
    Stage.open(store, "train-connector", training_of(spec, tiny_language_model_folder))
    store.write_bytes("calibrations/stray.safetensors", b"12345")
    read = []
    whole = Store.read_json
    monkeypatch.setattr(Store, "read_json", lambda store, path: read.append(path) or whole(store, path))
    sweep_root(store.root, older_than_h=0, superseded=True, delete=False)
    specs = [path for path in read if path.endswith("spec.json")]
    assert len(specs) == len(set(specs)) == 3


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


def test_the_table_of_caches_names_who_reads_them(cached, tiny_language_model_folder, capsys):
    from pipelines.cache_care import sweep_root

    store, spec = cached
    training = Stage.open(store, "train-connector", training_of(spec, tiny_language_model_folder))
    sweep_root(store.root, older_than_h=0, superseded=True, delete=True)
    said = capsys.readouterr().out
    assert "Nothing is left over that is older than 0 hours." in said
    assert f"train-connector {training.key}, unfinished" in " ".join(said.split())
    sweep_root(store.root, older_than_h=0, superseded=True, delete=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["caches"][0]["readers"] == [f"train-connector {training.key}, unfinished"]


def test_what_stayed_though_it_was_listed_is_told(cached, capsys, monkeypatch):
    from pipelines import cache_care

    store, spec = cached
    strays = [f"{features_table(store, spec).path}/branch=local/maps=layer_5/aa/{name}.parquet" for name in ("one", "two")]
    for path in strays:
        store.write_bytes(path, b"12345")
        age(store, path, 2)
    print_caches = cache_care._print_caches

    def write_meanwhile(caches):
        print_caches(caches)
        store.write_bytes(strays[0], b"54321")

    monkeypatch.setattr(cache_care, "_print_caches", write_meanwhile)
    cache_care.sweep_root(store.root, older_than_h=24, superseded=False, delete=True)
    assert "Removed: 5 B. The other 5 B came into use since they were listed, or went without this." in capsys.readouterr().out
    assert [store.exists(path) for path in strays] == [True, False]


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
