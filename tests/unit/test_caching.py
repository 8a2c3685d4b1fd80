import dataclasses
import errno
import os
import shutil

import deltalake
import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from model.encoder import describe_encoder, load_encoder
from model.errors import EncoderError, MissingMapError
from model.specs import FeatureSpec, MapSpec, fingerprint
from tests import small_data
from tests.features import fetch_images
from workers.caching import build as caching_build
from workers.caching.build import cache_features
from workers.caching.layout import BRANCHES, features_table, maps_in
from workers.caching.reader import CachedFeatures, FeatureSource, LiveFeatures
from workers.caching.units import UnitJob, feature_bytes, load_views, prepare_unit, read_outcome
from workers.commits import Stage
from workers.dataset.samples import read_samples
from workers.errors import (
    DiskSpaceError,
    ErrorBudgetError,
    IncompleteError,
    MissingFeaturesError,
    SpecChangedError,
    StaleCacheError,
    StorageError,
    StoreUnavailableError,
    TableError,
)
from workers.execution import ExecutionSettings, SilentProgress
from workers.quarantine import read_quarantine
from workers.runtime import InlineCluster
from workers.storage import Store

SETTINGS = ExecutionSettings(feature_unit_bytes=40_000, encode_batch_views=5)
"""5 images of the small dataset in a unit."""


def cache(store, spec, settings=SETTINGS, progress=None):
    return cache_features(spec, store, settings, progress or SilentProgress(), cluster=InlineCluster())


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_encoder_folder):
    """A built dataset and its cache: (store, spec, samples, record). Not to be changed."""
    store = Store(str(tmp_path_factory.mktemp("cached")))
    dataset = small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    record = cache(store, spec)
    return store, spec, read_samples(store, fingerprint(dataset)), record


@pytest.fixture
def built(root, tiny_encoder_folder):
    """A built dataset without a cache: (store, spec, samples)."""
    store = Store(root)
    dataset = small_data.dataset_spec()
    small_data.build(store, dataset)
    return store, small_data.feature_spec(dataset, tiny_encoder_folder), read_samples(store, fingerprint(dataset))


def table_rows(store, spec):
    """Every row of the table as plain values, ordered."""
    rows = []
    for branch in BRANCHES:
        table = features_table(store, spec).read({"branch": branch})
        rows += [(branch, *(value for _, value in sorted(row.items()))) for row in table.to_pylist()]
    return sorted(rows)


def test_the_books_balance(cached):
    store, spec, samples, record = cached
    assert (record.num_images, record.num_cached, record.num_quarantined) == (16, 16, 0)
    assert record.num_global_views == 16
    assert record.num_local_views == 16 * 2
    assert record.num_units == 4
    assert feature_bytes(spec, samples) == record.feature_bytes == 16 * (3 + 2 * 2) * 16 * 32 * 2
    assert record.feature_bytes < record.written_bytes
    assert record.written_bytes == sum(
        path.stat().st_size for path in store.local_path(features_table(store, spec).path).glob("branch=*/**/*.parquet")
    )


def test_files_are_laid_out_for_random_access(cached):
    store, spec, samples, _ = cached
    table = features_table(store, spec)
    for branch, views in (("global", 1), ("local", 2)):
        files = sorted(table.files({"branch": branch}), key=lambda file: -file.num_rows)
        opened = table.open_file(files[0])
        assert opened.num_row_groups == 5
        assert {opened.metadata.row_group(group).num_rows for group in range(5)} == {views}
        assert opened.schema_arrow.names[-len(spec.maps(branch)) :] == list(maps_in(files[0].partition["maps"]))
        assert sorted(maps_in(files[0].partition["maps"])) == sorted(item.name for item in spec.maps(branch))
        field = opened.schema_arrow.field("layer_5")
        for group in range(5):  # one page, so that numbers lie in the file as in memory
            column = opened.metadata.row_group(group).column(opened.schema_arrow.names.index("layer_5"))
            assert column.total_compressed_size < views * 16 * 32 * 2 + 100
        assert str(field.type) == f"fixed_size_binary[{16 * 32 * 2}]"
        assert field.metadata == {b"map": b"layer_5", b"layers": b"[5]", b"dtype": b"float16", b"pool": b"1", b"shape": b"[16, 32]"}
        assert opened.schema_arrow.metadata[b"loupe.encoding"].decode() == fingerprint(spec.encoding)
        rows = opened.read(columns=["image_sha256", "view_index"]).to_pylist()
        assert [row["view_index"] for row in rows[:views]] == ([0] if branch == "global" else [1, 2])
        found = {tuple(table.open_file(file).read(columns=["image_sha256"]).column(0).to_pylist()[::views]) for file in files}
        assert found == {tuple(sample.image_sha256 for sample in samples[start : start + 5]) for start in range(0, 16, 5)}


@pytest.mark.parametrize(("precision", "relative", "absolute"), [("fp32", 0.0, 2e-5), ("fp16", 2**-10, 2e-5)])
def test_cached_equals_live_equals_the_encoder_for_every_map(cached, root, precision, relative, absolute):
    store, spec, samples, _ = cached
    if precision == "fp32":
        spec = dataclasses.replace(spec, precision="fp32")
        cache(store, spec)
    source, live = CachedFeatures(store, spec), LiveFeatures(store, spec, batch_views=7)
    assert isinstance(source, FeatureSource)
    ours = fetch_images(source, samples[:6], want_global=True, want_local=True)
    theirs = fetch_images(live, samples[:6], want_global=True, want_local=True)
    encoder = load_encoder(spec.encoder, 5)
    for sample, cached_image, live_image in zip(samples[:6], ours, theirs, strict=True):
        assert cached_image.global_maps.shape == (3, 16, 32)
        assert cached_image.local_maps.shape == (2, 2, 16, 32)
        torch.testing.assert_close(cached_image.global_maps, live_image.global_maps, rtol=relative, atol=absolute)
        torch.testing.assert_close(cached_image.local_maps, live_image.local_maps, rtol=relative, atol=absolute)
        views = torch.from_numpy(load_views(spec, sample, store))
        for place, item in enumerate(spec.global_maps):
            torch.testing.assert_close(cached_image.global_maps[place], encoder(views[:1], [item])[item.name][0], rtol=relative, atol=absolute)
        for place, item in enumerate(spec.local_maps):
            torch.testing.assert_close(cached_image.local_maps[:, place], encoder(views[1:], [item])[item.name], rtol=relative, atol=absolute)


def test_a_cache_of_bf16_equals_live_features_of_bf16(built):
    store, spec, samples = built
    half = dataclasses.replace(spec, compute="bf16", precision="fp32")
    cache(store, half)
    ours = fetch_images(CachedFeatures(store, half), samples[:4], want_global=True, want_local=True)
    live = fetch_images(LiveFeatures(store, half), samples[:4], want_global=True, want_local=True)
    exact = fetch_images(LiveFeatures(store, dataclasses.replace(spec, precision="fp32")), samples[:4], want_global=True, want_local=True)
    for cached_image, live_image, exact_image in zip(ours, live, exact, strict=True):
        for branch in ("global_maps", "local_maps"):
            stored, now, whole = (getattr(image, branch) for image in (cached_image, live_image, exact_image))
            # Other batches sum in another order, and hidden states are rounded to 8 bits: a step of the largest value at most.
            torch.testing.assert_close(stored, now, rtol=0, atol=2**-7 * float(whole.abs().max()))
            assert 1e-4 < float((stored - whole).norm() / whole.norm()) < 3e-2
    CachedFeatures(store, half).verify(samples)


def test_an_encoder_of_fp16_is_refused_on_a_cpu(built):
    store, spec, samples = built
    half = dataclasses.replace(spec, compute="fp16")
    with pytest.raises(EncoderError, match=r"features\.compute = 'fp16' needs a GPU"):
        cache(store, half)
    with pytest.raises(EncoderError, match=r"features\.compute = 'fp16' needs a GPU"):
        fetch_images(LiveFeatures(store, half), samples[:1], want_global=True, want_local=False)


def test_pooled_local_maps_are_cached_at_a_quarter(built):
    store, spec, samples = built
    local = tuple(dataclasses.replace(item, pool=2) for item in spec.local_maps)
    pooled = dataclasses.replace(spec, local_maps=local)
    cache(store, pooled)
    assert feature_bytes(pooled, samples) == 16 * (3 * 16 + 2 * 2 * 4) * 32 * 2
    found = fetch_images(CachedFeatures(store, pooled), samples[:3], want_global=True, want_local=True)
    live = fetch_images(LiveFeatures(store, dataclasses.replace(spec, precision="fp32")), samples[:3], want_global=True, want_local=True)
    for ours, theirs in zip(found, live, strict=True):
        torch.testing.assert_close(ours.global_maps, theirs.global_maps, rtol=2**-10, atol=2e-5)
        squares = theirs.local_maps.reshape(2, 2, 2, 2, 2, 2, 32).mean(dim=(3, 5)).flatten(2, 3)
        torch.testing.assert_close(ours.local_maps, squares, rtol=2**-10, atol=2e-5)
    CachedFeatures(store, pooled).verify(samples)


def test_only_the_wanted_maps_are_read_in_the_wanted_order(cached):
    store, spec, samples, _ = cached
    whole = fetch_images(CachedFeatures(store, spec), samples[3:4], want_global=True, want_local=True)[0]
    chosen = CachedFeatures(store, spec, global_maps=spec.global_maps[::-2], local_maps=spec.local_maps[1:])
    part = fetch_images(chosen, samples[3:4], want_global=True, want_local=True)[0]
    assert torch.equal(part.global_maps, whole.global_maps[[2, 0]])
    assert torch.equal(part.local_maps, whole.local_maps[:, 1:])
    alone = fetch_images(chosen, [samples[3], samples[3]], want_global=False, want_local=True)
    assert alone[0].global_maps is None
    assert torch.equal(alone[1].local_maps, part.local_maps)
    assert fetch_images(chosen, [], want_global=True, want_local=True) == []
    with pytest.raises(MissingMapError, match=r"hold the global maps .*\['layer_6'\] are needed"):
        CachedFeatures(store, spec, global_maps=[MapSpec(layers=(6,))])


def test_the_table_is_read_by_duckdb_and_polars(cached):
    store, spec, _, _ = cached
    table = features_table(store, spec)
    frame = pl.read_delta(table.uri)
    assert frame.height == 48
    values = np.frombuffer(frame.filter(pl.col("branch") == "global")["layer_5"][0], dtype=np.float16)
    assert values.shape == (16 * 32,)
    features = deltalake.DeltaTable(table.uri).to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    query = "select branch, count(*), count(distinct image_sha256), sum(octet_length(layer_5)) from features group by branch order by branch"
    assert duckdb.sql(query).fetchall() == [("global", 16, 16, 16 * 1024), ("local", 32, 16, 32 * 1024)]


def test_a_finished_cache_is_found_without_work(cached, monkeypatch):
    store, spec, _, record = cached
    monkeypatch.setattr(caching_build, "_run", None)
    assert cache(store, spec) == record


def test_an_interrupted_cache_goes_on_and_equals_an_undisturbed_one(built, tmp_path, monkeypatch):
    store, spec, _ = built

    class Interrupts(SilentProgress):
        def advance(self, count=1, **facts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache(store, spec, progress=Interrupts())
    assert len(store.list(Stage.open(store, "cache-features", spec).path("units"))) == 1

    class Counts(SilentProgress):
        def __init__(self):
            self.calls = []

        def start(self, what, total, done=0):
            self.calls.append((total, done))

        def advance(self, count=1, **facts):
            self.calls.append(count)

    counts = Counts()
    # Another unit size now: the plan on record counts, and nobody is asked for one.
    with monkeypatch.context() as patch:
        patch.setattr(caching_build, "encodes_on_gpu", lambda _: pytest.fail("asked"))
        cache(store, spec, dataclasses.replace(SETTINGS, feature_unit_bytes=None), progress=counts)
    assert counts.calls == [(16, 5), 5, 5, 1]
    other = Store(str(tmp_path / "undisturbed"))
    small_data.build(other, small_data.dataset_spec())
    cache(other, spec)
    assert table_rows(store, spec) == table_rows(other, spec)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])  # Ray's own handler of SIGTERM raises the latter
def test_what_is_done_is_in_the_tables_when_a_run_is_interrupted(built, ending):
    store, spec, _ = built

    class Ends(SilentProgress):
        def advance(self, count=1, **facts):
            raise ending

    with pytest.raises(ending):
        cache(store, spec, progress=Ends())
    stage = Stage.open(store, "cache-features", spec)
    (outcome,) = [read_outcome(store, path) for path in store.list(stage.path("units"))]
    assert outcome.files
    assert features_table(store, spec).files() == sorted(outcome.files, key=lambda file: file.path)


def test_units_on_record_are_listed_once_by_each_run(built, monkeypatch):
    store, spec, _ = built
    listed = []
    list_of = Store.list
    monkeypatch.setattr(Store, "list", lambda store, prefix="": listed.append(prefix) or list_of(store, prefix))
    cache(store, spec)
    assert [prefix for prefix in listed if prefix.endswith("/units")] == [Stage.open(store, "cache-features", spec).path("units")]


def test_an_outcome_on_record_is_committed_by_the_next_run(built, monkeypatch):
    """Killed after the files were written and before the table knew of them."""
    store, spec, _ = built

    def killed(books):
        if books._pending:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caching_build._Books, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            cache(store, spec)
    assert features_table(store, spec).files() == []
    assert cache(store, spec).num_cached == 16


def test_bad_images_are_rows_and_the_rest_is_cached(built):
    store, spec, samples = built
    store.delete(samples[1].image_path)
    store.write_bytes(samples[6].image_path, small_data.png(999))
    counted = []

    class Counting(SilentProgress):
        def advance(self, count=1, **facts):
            counted.append(count)

    record = cache(store, spec, progress=Counting())
    assert sum(counted) == 16
    assert (record.num_cached, record.num_quarantined) == (14, 2)
    assert record.quarantined_by_reason == {"content_changed": 1, "missing_file": 1}
    rows = read_quarantine(store, "cache-features", fingerprint(spec)[:16])
    assert [(row.index, row.reason, row.bytes_sha256) for row in rows] == [
        (1, "missing_file", samples[1].image_sha256),
        (6, "content_changed", samples[6].image_sha256),
    ]
    source = CachedFeatures(store, spec)
    assert source.holds(samples[:3]) == [True, False, True]
    for branch in BRANCHES:
        with pytest.raises(MissingFeaturesError, match=f"no {branch} features .*may be in quarantine") as caught:
            fetch_images(source, samples[:2], want_global=branch == "global", want_local=branch == "local")
        assert (caught.value.image_sha256, caught.value.branch) == (samples[1].image_sha256, branch)


def test_too_many_bad_images_stop_the_stage_and_a_repair_resumes_it(built):
    store, spec, samples = built
    kept = {sample.image_path: store.read_bytes(sample.image_path) for sample in samples}
    for sample in samples[:10]:
        store.delete(sample.image_path)
    with pytest.raises(ErrorBudgetError, match=r"source rendered/noise: \d+ of 10"):
        cache(store, spec)
    for path, data in kept.items():
        store.write_bytes(path, data)
    record = cache(store, spec)
    assert (record.num_cached, record.num_quarantined) == (16, 0)
    assert read_quarantine(store, "cache-features", fingerprint(spec)[:16]) == []


def test_values_that_are_not_finite_are_refused(built, tmp_path, tiny_encoder_folder):
    from safetensors.torch import load_file, save_file

    store, spec, _ = built
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "overflowing")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.4.mlp.fc2.bias" in name)
    save_file({**weights, name: weights[name] + 1e6}, folder / "model.safetensors", metadata={"format": "pt"})
    overflowing = dataclasses.replace(spec, encoder=describe_encoder(str(folder)))
    # fp16 ends at 65504; the same values fit fp32.
    with pytest.raises(ErrorBudgetError, match="non_finite_features"):
        cache(store, overflowing)
    assert cache(store, dataclasses.replace(overflowing, precision="fp32")).num_cached == 16
    with pytest.raises(MissingFeaturesError, match="not finite"):
        fetch_images(LiveFeatures(store, overflowing), read_samples(store, spec.dataset_fingerprint)[:1], want_global=True, want_local=True)


def test_one_branch_alone_can_be_cached(built):
    store, spec, samples = built
    only = dataclasses.replace(spec, local_maps=())
    record = cache(store, only)
    assert (record.num_global_views, record.num_local_views) == (16, 0)
    source = CachedFeatures(store, only)
    assert fetch_images(source, samples[:1], want_global=True, want_local=False)[0].local_maps is None
    with pytest.raises(MissingMapError, match="no local maps"):
        fetch_images(source, samples[:1], want_global=True, want_local=True)
    source.verify(samples)


def test_too_little_disk_is_told_before_work(built, monkeypatch):
    store, spec, _ = built
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    with pytest.raises(DiskSpaceError, match=r"need 0\.00 GiB, but file://.* has 0\.00 GiB free"):
        cache(store, spec)
    assert features_table(store, spec).files() == []


def test_too_little_disk_on_the_way_to_an_object_store_is_told_before_work(built, monkeypatch):
    store, spec, _ = built
    encoders = dataclasses.replace(SETTINGS, encoder_actors=2)
    monkeypatch.setattr(Store, "free_bytes", lambda self: None)
    # Units of 40 kB and less, of which either encoder may write two at once.
    monkeypatch.setattr(Store, "free_staging_bytes", lambda self: 100_000)
    with pytest.raises(DiskSpaceError, match=r"on their way to file://.* need up to 0\.00 GiB in /.* name another folder by TMPDIR"):
        cache(store, spec, encoders)
    assert features_table(store, spec).files() == []
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "there:6379")  # whose machines have folders of their own
        patch.setattr("workers.caching.build.encodes_on_gpu", lambda execution: False)
        cache(store, dataclasses.replace(spec, local_maps=()), encoders)
    monkeypatch.setattr(Store, "free_staging_bytes", lambda self: 180_000)
    assert cache(store, spec, encoders).num_cached == 16


def test_a_cache_needs_its_dataset_and_its_encoder(root, built, tiny_encoder_folder, tmp_path):
    store, spec, _ = built
    with pytest.raises(TableError, match="holds no dataset"):
        cache(store, dataclasses.replace(spec, dataset_fingerprint="f" * 64))
    with pytest.raises(EncoderError, match=r"was changed after the spec was made \(weights_sha256"):
        cache(store, dataclasses.replace(spec, encoder=dataclasses.replace(spec.encoder, weights_sha256="0" * 64)))
    with pytest.raises(MissingFeaturesError, match="holds no features"):
        CachedFeatures(store, dataclasses.replace(spec, precision="fp32"))


def test_another_spec_under_the_key_is_refused_by_field(built):
    store, spec, _ = built
    stage = Stage.open(store, "cache-features", spec)
    stored = store.read_json(stage.path("spec.json"))
    stored["spec"]["encoder"]["weights_sha256"] = "other"
    store.write_json(stage.path("spec.json"), stored)
    with pytest.raises(SpecChangedError, match=r"spec\.encoder\.weights_sha256: recorded \"other\""):
        cache(store, spec)


def test_a_lost_file_of_the_table_is_no_complete_cache(built):
    store, spec, _ = built
    cache(store, spec)
    stage = Stage.open(store, "cache-features", spec)
    store.delete(stage.path("COMMITTED.json"))
    outcome = store.read_json(stage.path("units/unit-000000.json"))
    outcome["quarantined"] = [{"reason": "missing_file", "source": "s", "item": "i", "index": 0, "bytes_sha256": "x", "detail": "d"}]
    store.write_json(stage.path("units/unit-000000.json"), outcome)
    with pytest.raises(IncompleteError):
        cache(store, spec)


def test_the_canary_passes_a_true_cache_and_refuses_a_stale_one(built, tiny_encoder_folder):
    from tests.tiny import write_tiny_encoder

    store, spec, samples = built
    cache(store, spec)
    source = CachedFeatures(store, spec)
    source.verify(samples)
    source.verify([])
    # The cache of another encoder under this spec's name: what a moved table or a wrong digest would look like.
    other = write_tiny_encoder(store.local_path("other-encoder"), seed=7)
    stale = CachedFeatures(store, spec)
    stale._live = LiveFeatures(store, dataclasses.replace(spec, encoder=describe_encoder(str(other))))
    with pytest.raises(StaleCacheError, match=r"map layer_5 of image .* differs .* by"):
        stale.verify(samples)


def corrupt(path, marker, offset=0):
    data = bytearray(path.read_bytes())
    place = data.index(marker) + offset
    data[place] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "gone"])
def test_damaged_files_follow_the_policy(built, damage):
    store, spec, samples = built
    cache(store, spec)
    good = fetch_images(CachedFeatures(store, spec), samples, want_global=True, want_local=False)
    table = features_table(store, spec)
    file = max(table.files({"branch": "global"}), key=lambda file: file.num_rows)
    path = store.local_path(f"{table.path}/{file.path}")
    inside = table.open_file(file).read(columns=["image_sha256"]).column(0).to_pylist()
    if damage == "flipped bit":
        third = next(place for place, sample in enumerate(samples) if sample.image_sha256 == inside[2])
        blob = good[third].global_maps[0].to(torch.float16).numpy().tobytes()
        corrupt(path, blob[:64], 10)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])  # the first image, at most, is whole
    else:
        path.unlink()
    with pytest.raises(MissingFeaturesError, match=r"damaged|cannot be read"):
        fetch_images(CachedFeatures(store, spec), samples, want_global=True, want_local=False)
    with pytest.raises(MissingFeaturesError) as caught:
        fetch_images(CachedFeatures(store, spec, policy="substitute"), samples, want_global=True, want_local=True)
    assert (caught.value.branch, caught.value.image_sha256 in inside) == ("global", True)  # the files of the other branch are whole
    assert len(fetch_images(CachedFeatures(store, spec), samples, want_global=False, want_local=True)) == len(samples)
    lenient = CachedFeatures(store, spec, policy="encode")
    found = fetch_images(lenient, samples, want_global=True, want_local=False)
    assert lenient.num_encoded_live == (1 if damage == "flipped bit" else len(inside))
    for ours, theirs in zip(found, good, strict=True):
        torch.testing.assert_close(ours.global_maps, theirs.global_maps, rtol=2**-10, atol=2e-5)


AWAY = OSError("When reading information for key 'k' in bucket 'b': AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")


@pytest.mark.parametrize(("failure", "told"), [(AWAY, StoreUnavailableError), (OSError(errno.EMFILE, "Too many open files"), StorageError)])
def test_a_store_that_is_away_is_no_damage(cached, monkeypatch, failure, told):
    store, spec, samples, _ = cached

    def fail(*_, **__):
        raise failure

    for policy in ("fail", "encode"):
        source = CachedFeatures(store, spec, policy=policy)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(told, match="cannot read file://"):
                fetch_images(source, samples[:1], want_global=True, want_local=False)
            patch.setattr(pq.ParquetFile, "read", fail)
            with pytest.raises(told, match="cannot read file://"):
                CachedFeatures(store, spec, policy=policy)
        assert len(fetch_images(source, samples[:1], want_global=True, want_local=False)) == 1
        assert source.num_encoded_live == 0


def test_the_spec_is_what_the_key_says(cached):
    _, spec, _, record = cached
    assert isinstance(spec, FeatureSpec)
    assert record.feature_fingerprint == fingerprint(spec)
    assert record.global_maps == ("layer_5", "mean_0_2", "mean_1.4")


@pytest.fixture
def mixed(root, tmp_path, tiny_encoder_folder):
    """Seven pictures and five conversations about none, in turns: (store, spec, samples)."""
    store = Store(root)
    records = []
    for number in range(7):
        records.append({"image": f"{number}.png", "conversations": small_data.conversation("<image>\nq?", "a")})
        records += [{"conversations": small_data.conversation("q?", f"a {number}")}] if number < 5 else []
    source = small_data.write_llava(tmp_path / "llava", records, {f"{number}.png": small_data.png(number) for number in range(7)})
    dataset = small_data.dataset_spec(sources=(source,))
    small_data.build(store, dataset)
    return store, small_data.feature_spec(dataset, tiny_encoder_folder), read_samples(store, fingerprint(dataset))


def test_of_text_alone_nothing_is_cached_and_nothing_expected(mixed):
    store, spec, samples = mixed
    shown = [sample for sample in samples if not sample.text_only]
    assert feature_bytes(spec, samples) == feature_bytes(spec, shown) == 7 * (3 + 2 * 2) * 16 * 32 * 2
    told = []

    class Listens(SilentProgress):
        def start(self, what, total, done=0):
            told.append(total)

    record = cache(store, spec, progress=Listens())
    assert told == [7]
    assert (record.num_images, record.num_cached, record.num_quarantined) == (7, 7, 0)
    assert (record.num_global_views, record.num_local_views) == (7, 14)
    assert {row[3] for row in table_rows(store, spec)} == {sample.image_sha256 for sample in shown}
    source = CachedFeatures(store, spec)
    assert all(source.holds(samples))
    source.verify(samples, num_images=12)
    with pytest.raises(AssertionError, match="is text alone"):
        fetch_images(source, [sample for sample in samples if sample.text_only][:1], want_global=True, want_local=True)


def test_an_image_that_is_gone_is_told_from_text_alone(mixed, tmp_path):
    store, spec, samples = mixed
    (tmp_path / "llava" / "images" / "3.png").unlink()
    record = cache(store, spec, dataclasses.replace(SETTINGS, max_quarantined_fraction=0.5))
    assert (record.num_images, record.num_cached, record.num_quarantined) == (7, 6, 1)
    source = CachedFeatures(store, spec)
    held = source.holds(samples)
    assert [sample.image_path.endswith("/3.png") for sample, there in zip(samples, held, strict=True) if not there] == [True]


def test_a_dataset_of_text_alone_has_an_empty_cache(root, tmp_path, tiny_encoder_folder):
    store = Store(root)
    source = small_data.write_llava(tmp_path / "llava", [{"conversations": small_data.conversation("q?", str(k))} for k in range(3)], {})
    dataset = small_data.dataset_spec(sources=(source,))
    assert small_data.build(store, dataset).num_text_only == 3
    record = cache(store, small_data.feature_spec(dataset, tiny_encoder_folder))
    assert (record.num_images, record.num_units, record.num_global_views, record.feature_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("family", ["siglip", "siglip2", "dinov2", "dinov2_with_registers"])
def test_every_family_of_encoders_is_cached_as_it_encodes(family, root, tmp_path):
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "patch_size": 14}
    kinds = {
        "siglip": ("SiglipVision", {"intermediate_size": 64, "image_size": 56}),
        "siglip2": ("Siglip2Vision", {"intermediate_size": 64, "num_patches": 16}),
        "dinov2": ("Dinov2", {"mlp_ratio": 2, "image_size": 56}),
        "dinov2_with_registers": ("Dinov2WithRegisters", {"mlp_ratio": 2, "image_size": 56}),
    }
    name, more = kinds[family]
    torch.manual_seed(0)
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**size, **more)).save_pretrained(tmp_path / "encoder")
    store = Store(root)
    dataset = small_data.dataset_spec(sources=small_data.NOISE_SOURCES[1:])
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tmp_path / "encoder", precision="fp32")
    assert spec.encoder.family == family
    cache(store, spec)
    samples = read_samples(store, fingerprint(dataset))
    ours = fetch_images(CachedFeatures(store, spec), samples, want_global=True, want_local=True)
    theirs = fetch_images(LiveFeatures(store, spec), samples, want_global=True, want_local=True)
    for cached_image, live_image in zip(ours, theirs, strict=True):
        assert tuple(cached_image.global_maps.shape) == (len(spec.global_maps), 16, 32)
        torch.testing.assert_close(cached_image.global_maps, live_image.global_maps, rtol=0, atol=1e-5)
        torch.testing.assert_close(cached_image.local_maps, live_image.local_maps, rtol=0, atol=1e-5)


def test_a_unit_is_prepared_by_many_threads_as_by_one(root, tiny_encoder_folder):
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    samples = read_samples(store, fingerprint(dataset))
    store.delete(samples[3].image_path)
    store.write_bytes(samples[7].image_path, b"no image")
    one, many = (prepare_unit(UnitJob(spec=spec, root=root, number=0, samples=tuple(samples), threads=threads)) for threads in (1, 5))
    assert one.samples == many.samples == tuple(sample for sample in samples if sample.index not in (3, 7))
    assert one.quarantined == many.quarantined
    assert [row.index for row in one.quarantined] == [3, 7]
    for branch in BRANCHES:
        assert np.array_equal(one.views(branch), many.views(branch))
