"""One table for all datasets and maps of an encoding: what is there is never computed again, and files that were written stay as they are."""

import dataclasses
import hashlib

import deltalake
import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.specs import CalibrationRule, CalibrationSpec, MapSpec, fingerprint
from tests import small_data
from tests.features import fetch_images
from workers.caching import build as caching_build
from workers.caching import index as caching_index
from workers.caching.build import cache_features
from workers.caching.calibrate import calibrate_features
from workers.caching.codec import FeatureCodec
from workers.caching.encode import UnitEncoder
from workers.caching.index import FeatureIndex, compact_index
from workers.caching.layout import BRANCHES, check_table, encoding_folder, features_table, index_table, map_set, map_sets, maps_in
from workers.caching.reader import CachedFeatures, LiveFeatures
from workers.caching.repair import repair_cache
from workers.caching.sorted_rows import SortedRows
from workers.caching.units import UnitSize
from workers.caching.verify import verify_cache
from workers.commits import Stage
from workers.dataset.samples import read_images, read_samples
from workers.errors import IncompleteError, MissingFeaturesError, SpecChangedError, TableError
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store
from workers.tables import Table

SETTINGS = ExecutionSettings(feature_unit_bytes=40_000, encode_batch_views=5)
FEW = small_data.NOISE_SOURCES[:1]
MORE = MapSpec(layers=(2,))


def cache(store, spec, settings=SETTINGS):
    return cache_features(spec, store, settings, SilentProgress(), cluster=InlineCluster())


def data_files(store, spec):
    """Every feature file with its digest."""
    folder = store.local_path(features_table(store, spec).path)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("branch=*/**/*.parquet")}


@pytest.fixture
def datasets(root, tiny_encoder_folder):
    """A store with a dataset and one that holds it and more: (store, spec of the small one, spec of the large one)."""
    store = Store(root)
    small, large = small_data.dataset_spec(sources=FEW), small_data.dataset_spec()
    for dataset in (small, large):
        small_data.build(store, dataset)
    return store, small_data.feature_spec(small, tiny_encoder_folder), small_data.feature_spec(large, tiny_encoder_folder)


def assert_reads_as_live(store, spec, relative=2**-10):
    samples = read_samples(store, spec.dataset_fingerprint)
    ours = fetch_images(CachedFeatures(store, spec), samples, want_global=True, want_local=True)
    theirs = fetch_images(LiveFeatures(store, spec), samples, want_global=True, want_local=True)
    for cached, live in zip(ours, theirs, strict=True):
        torch.testing.assert_close(cached.global_maps, live.global_maps, rtol=relative, atol=2e-5)
        torch.testing.assert_close(cached.local_maps, live.local_maps, rtol=relative, atol=2e-5)


def test_another_map_is_added_and_nothing_is_rewritten(datasets):
    store, _, spec = datasets
    first = cache(store, spec)
    before = data_files(store, spec)
    wider = dataclasses.replace(spec, global_maps=(MORE, *spec.global_maps), local_maps=spec.local_maps[:1])
    record = cache(store, wider)
    assert record.feature_fingerprint != first.feature_fingerprint
    after = data_files(store, wider)
    assert before.items() < after.items()
    added = {path.split("/")[1] for path in after.keys() - before.keys()}
    assert added == {"maps=layer_2"}  # of the global views alone: the local ones have all that is asked for
    assert record.feature_bytes == 16 * (4 + 2) * 16 * 32 * 2
    assert record.num_held == 0
    assert_reads_as_live(store, wider)
    assert_reads_as_live(store, spec)
    mixed = CachedFeatures(store, wider, global_maps=(spec.global_maps[2], MORE))
    samples = read_samples(store, spec.dataset_fingerprint)
    whole = fetch_images(CachedFeatures(store, wider), samples[4:5], want_global=True, want_local=False)[0].global_maps
    assert torch.equal(fetch_images(mixed, samples[4:5], want_global=True, want_local=False)[0].global_maps, whole[[3, 0]])


def test_other_images_are_added_and_those_that_are_there_are_left(datasets):
    store, small, large = datasets
    assert cache(store, small).num_images == 10
    before = data_files(store, small)
    record = cache(store, large)
    assert (record.num_images, record.num_held, record.num_cached) == (16, 10, 16)
    after = data_files(store, large)
    assert before.items() < after.items()
    assert record.written_bytes == sum(
        (store.local_path(features_table(store, large).path) / path).stat().st_size for path in after.keys() - before.keys()
    )
    assert_reads_as_live(store, large)
    assert_reads_as_live(store, small)


def test_what_is_there_takes_no_work_at_all(datasets, monkeypatch):
    store, small, large = datasets
    cache(store, large)
    monkeypatch.setattr(caching_build, "_run", lambda *_: pytest.fail("encoded again"))
    fewer = dataclasses.replace(small, global_maps=small.global_maps[:1])
    record = cache(store, fewer)
    assert (record.num_units, record.num_held, record.num_cached, record.written_bytes) == (0, 10, 10, 0)
    assert record.feature_bytes == 10 * (1 + 2 * 2) * 16 * 32 * 2
    assert record.quality == {}
    assert_reads_as_live(store, fewer)


def test_an_image_of_several_samples_is_cached_once(root, tmp_path, tiny_encoder_folder):
    store = Store(root)
    records = [{"image": f"{number % 3}.png", "conversations": small_data.conversation("<image>\nq?", f"a {number}")} for number in range(7)]
    source = small_data.write_llava(tmp_path / "llava", records, {f"{number}.png": small_data.png(number) for number in range(3)})
    dataset = small_data.dataset_spec(sources=(source,))
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    record = cache(store, spec)
    assert (record.num_images, record.num_cached, record.num_global_views) == (3, 3, 3)
    assert sum(file.num_rows for file in features_table(store, spec).files({"branch": "global"})) == 3
    samples = read_samples(store, fingerprint(dataset))
    twice = [*samples, *(dataclasses.replace(sample, sample_id=f"{sample.sample_id} again", turns=()) for sample in samples)]
    assert CachedFeatures(store, spec).holds(twice) == [True] * len(twice)
    assert_reads_as_live(store, spec)


def test_int8_is_extended_behind_the_centres_that_are_on_record(datasets):
    store, small, large = datasets

    def calibrated(spec):
        rule = CalibrationRule(num_images=8, min_snr_db=30.0)
        encoding = dataclasses.replace(spec.encoding, precision="int8", calibration=rule)
        asked = CalibrationSpec(
            dataset_fingerprint=spec.dataset_fingerprint, encoding=encoding, global_maps=spec.global_maps, local_maps=spec.local_maps
        )
        record = calibrate_features(asked, store, SETTINGS, SilentProgress(), cluster=InlineCluster())
        packed = dataclasses.replace(spec, precision="int8", calibration=rule, calibration_sha256=record.sha256, fp16_maps=record.fp16_maps)
        return packed, record

    packed, first = calibrated(small)
    cache(store, packed)
    before = data_files(store, packed)
    again, second = calibrated(large)
    assert (second.num_measured, second.sha256) == (0, first.sha256)  # so the numbers that are there keep their meaning
    assert cache(store, again).num_held == 10
    wider, third = calibrated(dataclasses.replace(large, global_maps=(*large.global_maps, MORE)))
    assert third.num_measured == 1
    assert {found.name: found.sha256 for found in third.maps if found.branch == "global"}.items() > {
        found.name: found.sha256 for found in first.maps if found.branch == "global"
    }.items()
    cache(store, wider)
    assert before.items() < data_files(store, wider).items()
    CachedFeatures(store, wider).verify(read_samples(store, large.dataset_fingerprint), num_images=16)


def test_two_runs_that_encode_the_same_images_leave_one_row_that_counts(datasets):
    """Each planned before the other committed, so both computed the images that they share."""
    store, small, large = datasets
    Stage.open(store, "cache-features", small)
    plans = {}
    for spec in (small, large):
        stage = Stage.open(store, "cache-features", spec)
        images = read_images(store, spec.dataset_fingerprint)
        caching_build._Books(store, spec).ensure()
        held = caching_build._held(store, spec, images)
        unit_bytes = 40_000 if spec is large else 24_000
        plans[spec] = caching_build.plan_units(
            stage, spec, images, lambda held=held: held, lambda size=unit_bytes: UnitSize(feature_bytes=size, pixel_bytes=10**9)
        )
    assert sum(len(unit.images) for plan in plans.values() for unit in plan.units) == 26
    cache(store, large)
    samples = read_samples(store, small.dataset_fingerprint)
    before = fetch_images(CachedFeatures(store, small), samples, want_global=True, want_local=True)
    cache(store, small)
    assert sum(file.num_rows for file in features_table(store, small).files({"branch": "global"})) == 26
    for spec in (small, large):
        assert_reads_as_live(store, spec)
    again = fetch_images(CachedFeatures(store, small), samples, want_global=True, want_local=True)
    assert all(torch.allclose(one.global_maps, other.global_maps, atol=2e-3) for one, other in zip(before, again, strict=True))


def test_a_driver_whose_machine_rounds_otherwise_leaves_files_on_record_alone(datasets, monkeypatch):
    """It has planned before the other one began, and encodes a unit again that the other one has put on record meanwhile."""
    store, _, spec = datasets
    encode, rounded, before = UnitEncoder.__call__, FeatureCodec.rounded, {}

    def late(encoder, prepared):
        if not before:
            before["record"] = None
            monkeypatch.setattr(UnitEncoder, "__call__", encode)
            before["record"] = cache(store, spec)
            before["files"] = data_files(store, spec)
            monkeypatch.setattr(FeatureCodec, "rounded", lambda codec, branch, item, tokens: rounded(codec, branch, item, tokens * 1.01))
        return encode(encoder, prepared)

    monkeypatch.setattr(UnitEncoder, "__call__", late)
    assert cache(store, spec) == before["record"]
    monkeypatch.setattr(FeatureCodec, "rounded", rounded)
    assert before["files"].items() < data_files(store, spec).items()
    assert_reads_as_live(store, spec)
    found = verify_cache(spec, store, SETTINGS, SilentProgress(), stage_key=fingerprint(spec)[:16], cluster=InlineCluster(), seed=0, num_encoded=16)
    assert found.faults == ()


def test_the_index_finds_every_image_and_no_other(datasets):
    store, _, spec = datasets
    cache(store, spec)
    images = [sample.image_sha256 for sample in read_samples(store, spec.dataset_fingerprint)]
    strangers = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(50)]
    # One that begins as another does: the first eight bytes are only where the search starts.
    twin = images[3][:16] + "0" * 48
    index = FeatureIndex(store, spec)
    held = index.held([("local", spec.local_maps[0])], [*strangers, *images, twin])
    assert held["local/layer_5"].tolist() == [False] * 50 + [True] * 16 + [False]
    assert index.places("global", [MORE.name], images[:1]) == [None]
    assert index.places("global", [item.name for item in spec.global_maps], [twin]) == [None]
    for branch in BRANCHES:
        table = features_table(store, spec)
        for place in index.places(branch, [item.name for item in spec.maps(branch)], [images[5]])[0]:
            opened = table.open_file(next(file for file in table.files() if file.path == place.file))
            rows = opened.read_row_group(place.row_group, columns=["image_sha256"]).column(0).to_pylist()
            assert rows == [images[5]] * place.num_views


def test_images_that_begin_alike_are_told_apart():
    images = np.zeros((5, 32), dtype=np.uint8)
    images[:, :8] = 7
    images[:, 31] = [4, 1, 3, 0, 2]
    table = caching_index.pa.table(
        {
            "image_sha256": [image.tobytes() for image in images],
            "file": [f"{number}.parquet" for number in range(5)],
            "row_group": range(5),
            "num_views": [1] * 5,
            "offsets": [bytes(16)] * 5,
            "checksums": [bytes(8)] * 5,
        },
        schema=caching_index.INDEX_SCHEMA,
    )
    rows = SortedRows.of_table(table, 1)
    assert [place.row_group for place in rows.places(rows.rows(images), 0)] == [0, 1, 2, 3, 4]
    images[2, 30] = 1
    assert rows.rows(images)[2] == -1


def test_many_small_index_files_become_one_that_is_mapped(datasets, monkeypatch):
    store, small, spec = datasets
    cache(store, small, dataclasses.replace(SETTINGS, feature_unit_bytes=1))  # a unit for every image
    samples = read_samples(store, spec.dataset_fingerprint)
    table = index_table(store, spec.encoding)
    assert len(table.files()) == 2 * 10
    monkeypatch.setattr(caching_index, "_COMPACT_ABOVE", 4)
    asked = [(branch, [item.name for item in small.maps(branch)]) for branch in BRANCHES]
    images = [sample.image_sha256 for sample in samples]
    before = [FeatureIndex(store, small).places(branch, names, images) for branch, names in asked]
    assert sum(places is not None for places in before[0]) == 10
    compact_index(store, small)
    assert [file.path.rpartition("/")[2][:7] for file in index_table(store, spec.encoding).files()] == ["sorted-", "sorted-"]
    with monkeypatch.context() as patched:
        patched.setattr(caching_index, "_read", lambda *_: pytest.fail("a sorted file was read"))
        assert [FeatureIndex(store, small).places(branch, names, images) for branch, names in asked] == before
        assert_reads_as_live(store, small)
    # Small files beside it, and then all in one again.
    cache(store, spec, dataclasses.replace(SETTINGS, feature_unit_bytes=10**9))
    assert len(index_table(store, spec.encoding).files()) == 4
    assert_reads_as_live(store, spec)
    whole = [FeatureIndex(store, spec).places(branch, names, images) for branch, names in asked]
    monkeypatch.setattr(caching_index, "_COMPACT_ABOVE", 1)
    compact_index(store, spec)
    assert len(index_table(store, spec.encoding).files()) == 2
    assert [FeatureIndex(store, spec).places(branch, names, images) for branch, names in asked] == whole
    assert FeatureIndex(store, spec).files() == {file.path for file in features_table(store, spec).files()}


def test_rows_that_were_put_together_are_not_entered_again(datasets, monkeypatch):
    """Of a run that was killed, whose small files another run has put together by the time it goes on."""
    store, small, _ = datasets
    many = dataclasses.replace(SETTINGS, feature_unit_bytes=1)
    monkeypatch.setattr(caching_index, "_COMPACT_ABOVE", 4)
    with monkeypatch.context() as patch:
        patch.setattr("workers.caching.build._balance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache(store, small, many)
    table = index_table(store, small.encoding)
    entered = [[*table.files()], rows_of_index(table)]
    assert [len(files) for files in entered] == [2, 2 * 10]
    cache(store, small, many)
    assert [[*index_table(store, small.encoding).files()], rows_of_index(table)] == entered


def test_rows_that_are_there_twice_are_put_together_as_one(datasets, monkeypatch):
    """Entered by two drivers of one cache, by the second after the first one's had been put together."""
    store, small, _ = datasets
    table = index_table(store, small.encoding)
    cache(store, small, dataclasses.replace(SETTINGS, feature_unit_bytes=1))
    before, files = rows_of_index(table), table.files()
    monkeypatch.setattr(caching_index, "_COMPACT_ABOVE", 4)
    compact_index(store, small)
    table.commit(files)
    assert sorted(rows_of_index(table)) == sorted(before * 2)
    compact_index(store, small)
    assert sorted(rows_of_index(table)) == sorted(before)
    assert_reads_as_live(store, small)


def rows_of_index(table):
    """What each row tells of."""
    found = []
    for file in table.files():
        rows = pq.read_table(table.store.local_path(f"{table.path}/{file.path}"), partitioning=None)
        found += [(file.partition["branch"], *row.values()) for row in rows.select(["image_sha256", "file", "row_group"]).to_pylist()]
    return sorted(found)


def test_a_damaged_index_is_told(datasets):
    store, _, spec = datasets
    cache(store, spec)
    table = index_table(store, spec.encoding)
    store.write_bytes(f"{table.path}/{table.files()[0].path}", b"nothing")
    with pytest.raises(MissingFeaturesError, match="of the index is damaged or gone"):
        CachedFeatures(store, spec)


def test_the_record_of_an_encoding_is_held_against_it(datasets):
    store, small, large = datasets
    cache(store, small)
    path = f"{encoding_folder(small.encoding)}/spec.json"
    stored = store.read_json(path)
    stored["spec"]["encoder"]["mean"][0] = 0.25
    store.write_json(path, stored)
    with pytest.raises(SpecChangedError, match=r"are of another encoding\. Differences: spec\.encoder\.mean: recorded \[0\.25"):
        cache(store, large)


def test_a_file_that_the_table_does_not_hold_is_no_complete_cache(datasets):
    store, _, spec = datasets
    cache(store, spec)
    stage = Stage.open(store, "cache-features", spec)
    store.delete(stage.path("COMMITTED.json"))
    for path in store.list(f"{features_table(store, spec).path}/_delta_log"):
        if not path.endswith("0000.json"):
            store.delete(path)
    outcomes = store.list(stage.path("units"))
    store.delete(outcomes[0])
    unit = store.read_json(outcomes[1])
    store.write_json(outcomes[0], {**unit, "number": 0, "files": [], "index_files": []})
    with pytest.raises(IncompleteError, match="the index tells of 2 files that the table does not hold"):
        cache(store, spec)


def cut_off_between_its_commits(store, spec):
    """A run that was killed when its rows were in the index and its files not yet in the table."""
    commit = Table.commit

    def cut_off(table, files):
        if table.path == features_table(store, spec).path:
            raise ProcessLookupError
        return commit(table, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Table, "commit", cut_off)
        with pytest.raises(ProcessLookupError):
            cache(store, spec)
    assert FeatureIndex(store, spec).files() - {file.path for file in features_table(store, spec).files()}


def verify(store, spec):
    key = fingerprint(spec)[:16]
    return verify_cache(spec, store, SETTINGS, SilentProgress(), stage_key=key, cluster=InlineCluster(), seed=0, num_encoded=2)


def test_another_datasets_run_between_its_two_commits_is_no_fault_of_this_one(datasets, tiny_encoder_folder):
    store, _, ours = datasets
    dataset = small_data.dataset_spec(seed=1)
    small_data.build(store, dataset)
    theirs = small_data.feature_spec(dataset, tiny_encoder_folder)
    assert features_table(store, theirs).path == features_table(store, ours).path
    cut_off_between_its_commits(store, theirs)
    record = cache(store, ours)
    assert (record.num_cached, record.num_held) == (16, 0)
    found = verify(store, ours)
    assert found.faults == ()
    assert (found.num_cached, found.num_files, found.num_read) == (16, 8, 8)
    assert cache(store, theirs).num_cached == 16
    for spec in (ours, theirs):
        assert verify(store, spec).faults == ()
        assert_reads_as_live(store, spec)


def test_files_of_this_datasets_images_that_the_table_does_not_hold_are_told_and_repaired(datasets):
    """By another run of the same images: the index has them, so that nobody else computes them, and the table never got them."""
    store, small, large = datasets
    cut_off_between_its_commits(store, large)
    with pytest.raises(IncompleteError, match=r"the index tells of 4 files that the table does not hold.*`loupe verify --repair`"):
        cache(store, small)
    assert [fault for fault in verify(store, small).faults if "is in the index and not in the table" in fault] != []
    repair_cache(small, store, SETTINGS, SilentProgress(), cluster=InlineCluster())
    assert cache(store, small).num_cached == 10
    assert cache(store, large).num_cached == 16
    for spec in (small, large):
        assert verify(store, spec).faults == ()
        assert_reads_as_live(store, spec)


def test_a_table_with_another_type_in_a_column_is_refused(datasets):
    store, _, spec = datasets
    table = features_table(store, spec)
    wrong = deltalake.Schema.from_arrow(
        caching_index.pa.schema([("image_sha256", caching_index.pa.int32()), ("branch", "string"), ("maps", "string")])
    )
    deltalake.DeltaTable.create(table.uri, wrong, partition_by=["branch", "maps"])
    with pytest.raises(TableError, match=r"the type PrimitiveType\(\"integer\"\) of image_sha256 where PrimitiveType\(\"string\"\) is expected"):
        cache(store, spec)


def test_portions_of_maps_have_names_that_fit_a_path():
    maps = [MapSpec(layers=tuple(range(first, first + 9, 2))) for first in range(30)]
    portions = list(map_sets(maps[::-1]))
    assert [item for portion in portions for item in portion] == maps
    assert all(len(map_set(portion)) <= 180 for portion in portions)
    assert len(portions) > 1
    assert maps_in(map_set(portions[0])) == tuple(item.name for item in portions[0])
    assert list(map_sets([])) == []


def test_duckdb_reads_the_maps_side_by_side(datasets):
    store, _, spec = datasets
    cache(store, spec)
    wider = dataclasses.replace(spec, global_maps=(MORE, *spec.global_maps))
    cache(store, wider)
    features = deltalake.DeltaTable(features_table(store, wider).uri).to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    query = (
        "select count(*), min(octet_length(old.layer_5)), min(octet_length(new.layer_2)) from features old join features new "
        "using (image_sha256, branch, view_index) where old.layer_5 is not null and new.layer_2 is not null"
    )
    assert duckdb.sql(query).fetchall() == [(16, 1024, 1024)]


def test_a_recipe_that_names_its_table_is_refused_where_its_features_would_lie_in_another(datasets):
    """With what differs, before anything is computed."""
    store, spec, _ = datasets
    cache(store, spec)
    folder = encoding_folder(spec.encoding)
    check_table(store, folder, spec.encoding)
    other = dataclasses.replace(spec, compute="bf16", precision="fp32").encoding
    with pytest.raises(SpecChangedError, match=rf"{folder}, but .* would lie in {encoding_folder(other)}.*compute.*fp32.*bf16.*precision") as caught:
        check_table(store, folder, other)
    assert len(caught.value.differences) == 2
    with pytest.raises(SpecChangedError, match=r"features/0000000000000000, which .* does not hold.*loupe gc"):
        check_table(store, "features/0000000000000000", spec.encoding)
