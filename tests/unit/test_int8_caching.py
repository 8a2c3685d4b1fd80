"""Caches in int8: half the bytes, calibrated first, as good as was measured, and as live features are."""

import collections
import contextlib
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.encoder import Encoder, load_encoder
from model.errors import EncoderError, SpecError
from model.quality import MapQuality
from model.quantisation import map_quality
from model.specs import CalibrationRule, CalibrationSpec, fingerprint
from tests import small_data
from tests.features import fetch_images
from workers.caching import batching, calibrate, codec
from workers.caching import build as caching_build
from workers.caching.build import cache_features
from workers.caching.calibrate import calibrate_features
from workers.caching.codec import FeatureCodec, calibration_path, calibrations_to_bytes, read_calibrations
from workers.caching.encode import ComputingThread, UnitEncoder, encode_views, load_unit_encoder
from workers.caching.layout import BRANCHES, features_table
from workers.caching.reader import CachedFeatures, LiveFeatures, SplitFeatures
from workers.caching.units import UnitJob, feature_bytes, prepare_unit
from workers.dataset.samples import read_samples
from workers.errors import CalibrationError, MissingFeaturesError
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store
from workers.sweeping import find_leftovers, note_recipe, remove_leftovers

SETTINGS = ExecutionSettings(feature_unit_bytes=20_000, encode_batch_views=5)


def cache(store, spec, settings=SETTINGS):
    return cache_features(spec, store, settings, SilentProgress(), cluster=InlineCluster())


@pytest.fixture
def built(root, tiny_encoder_folder):
    """A built dataset without a cache: (store, fp16 spec, samples)."""
    store = Store(root)
    dataset = small_data.dataset_spec()
    small_data.build(store, dataset)
    return store, small_data.feature_spec(dataset, tiny_encoder_folder), read_samples(store, fingerprint(dataset))


def calibration_of(spec, **changes):
    """How the spec's maps are measured; `changes` are of the rule."""
    rule = CalibrationRule(**({"num_images": 12, "min_snr_db": 30.0} | changes))
    encoding = dataclasses.replace(spec.encoding, precision="int8", calibration=rule)
    return CalibrationSpec(dataset_fingerprint=spec.dataset_fingerprint, encoding=encoding, global_maps=spec.global_maps, local_maps=spec.local_maps)


def calibrated(store, spec, cluster=None, **changes):
    """The spec in int8, behind a calibration of its own."""
    calibration = calibration_of(spec, **changes)
    record = calibrate_features(calibration, store, SETTINGS, SilentProgress(), cluster=cluster or InlineCluster())
    rule = calibration.encoding.calibration
    packed = dataclasses.replace(spec, precision="int8", calibration=rule, calibration_sha256=record.sha256, fp16_maps=record.fp16_maps)
    return packed, record


def rows_of(images, branch, place):
    """All tokens of a map."""
    return torch.cat([getattr(image, f"{branch}_maps").select(int(branch == "local"), place).reshape(-1, 32) for image in images])


def test_int8_is_half_of_fp16_and_reads_back_as_live_features_do(built):
    store, spec, samples = built
    packed, calibration = calibrated(store, spec)
    assert {(found.num_images, found.num_checked) for found in calibration.maps} == {(9, 2)}  # of the 11 that are trained on
    assert (calibration.num_measured, calibration.fp16_maps) == (5, ())
    assert [(found.branch, found.name) for found in calibration.maps] == [(branch, item.name) for branch in BRANCHES for item in spec.maps(branch)]
    record = cache(store, packed)
    assert feature_bytes(packed, samples) == 16 * (3 + 2 * 2) * 16 * (32 + 2)
    found = fetch_images(CachedFeatures(store, packed), samples, want_global=True, want_local=True)
    live = fetch_images(LiveFeatures(store, packed, batch_views=7), samples, want_global=True, want_local=True)
    exact = fetch_images(LiveFeatures(store, dataclasses.replace(spec, precision="fp32")), samples, want_global=True, want_local=True)
    for branch in BRANCHES:
        for place, item in enumerate(spec.maps(branch)):
            ours, theirs, computed = (rows_of(images, branch, place) for images in (found, live, exact))
            # Another batch may move a number across the middle between two codes.
            assert ((ours - theirs).abs() > 1e-4).float().mean() < 0.01
            quality = map_quality(computed, ours)
            assert quality.snr_db > 38
            told = record.quality[f"{branch}/{item.name}"]
            assert told["snr_db"] == pytest.approx(quality.snr_db, abs=3)  # of the first image of every unit
            assert told["worst_cosine"] >= quality.worst_cosine > 0.999
    CachedFeatures(store, packed).verify(samples)


def test_maps_that_int8_is_not_good_enough_for_stay_fp16(built):
    store, spec, samples = built
    _, first = calibrated(store, spec)
    between = sorted(found.snr_db for found in first.maps)[1] + 1e-6  # the two worst fall short of it
    mixed, second = calibrated(store, spec, min_snr_db=between)
    assert len(second.fp16_maps) == 2
    assert second.sha256 == first.sha256  # what was measured is the same; what follows from it is not
    record = cache(store, mixed)
    table = features_table(store, mixed)
    for branch in BRANCHES:
        schema = table.open_file(table.files({"branch": branch})[0]).schema_arrow
        for item in spec.maps(branch):
            fp16 = f"{branch}/{item.name}" in second.fp16_maps
            assert schema.field(item.name).metadata[b"dtype"] == (b"float16" if fp16 else b"int8")
            assert (f"{item.name}__steps" in schema.names) == (not fp16)
            assert (record.quality[f"{branch}/{item.name}"]["snr_db"] > 60) == fp16
    found = fetch_images(CachedFeatures(store, mixed), samples, want_global=True, want_local=True)
    exact = fetch_images(LiveFeatures(store, dataclasses.replace(spec, precision="fp32")), samples, want_global=True, want_local=True)
    for branch in BRANCHES:
        for place, item in enumerate(spec.maps(branch)):
            quality = map_quality(rows_of(exact, branch, place), rows_of(found, branch, place))
            assert quality.snr_db > (60 if f"{branch}/{item.name}" in second.fp16_maps else 38)


def test_global_views_alone_are_calibrated_and_stored(built):
    store, spec, samples = built
    packed, record = calibrated(store, spec.only("global"), min_snr_db=60.0)  # which no map reaches
    assert {item.branch for item in record.maps} == {"global"}
    assert record.fp16_maps == packed.fp16_maps == packed.only("global").fp16_maps
    assert packed.fp16_maps
    assert packed.only("local").fp16_maps == ()
    cache(store, packed)
    whole = dataclasses.replace(packed, local_maps=spec.local_maps)  # what training sees
    assert whole.only("global") == packed
    split = SplitFeatures(CachedFeatures(store, whole.only("global")), LiveFeatures(store, whole.only("local").unpacked()))
    exact = LiveFeatures(store, dataclasses.replace(spec, precision="fp32"))
    ours, theirs = (source.fetch(dict.fromkeys(BRANCHES, samples)) for source in (split, exact))
    for branch in BRANCHES:
        for name, packed in theirs[branch].items():
            assert map_quality(packed.dense().flatten(0, 1), ours[branch][name].dense().flatten(0, 1)).snr_db > 60


def test_a_calibration_is_the_same_however_its_units_arrive(built):
    store, spec, _ = built

    class Backwards(InlineCluster):
        def pipeline(self, prepare, finisher, jobs, **numbers):
            yield from reversed(list(super().pipeline(prepare, finisher, jobs, **numbers)))

    _, forwards = calibrated(store, spec)
    _, backwards = calibrated(store, spec, cluster=Backwards(), min_snr_db=29.0)
    assert backwards.sha256 == forwards.sha256
    assert calibrated(store, spec, seed=1)[1].sha256 != forwards.sha256


def test_a_calibration_is_found_done(built, monkeypatch):
    store, spec, _ = built
    packed, record = calibrated(store, spec)
    monkeypatch.setattr("workers.caching.calibrate.prepare_unit", lambda _: pytest.fail("measured again"))
    assert calibrated(store, spec) == (packed, record)


def test_a_calibration_that_is_gone_or_another_is_told(built):
    store, spec, _ = built
    packed, record = calibrated(store, spec)
    cache(store, packed)
    whole = store.read_bytes(record.path)
    store.write_bytes(record.path, whole[:-4] + b"1234")
    with pytest.raises(MissingFeaturesError, match="does not have the digest that it is named by"):
        CachedFeatures(store, packed)
    store.delete(record.path)
    with pytest.raises(MissingFeaturesError, match="is gone: without its centres and scales"):
        LiveFeatures(store, packed)


def test_centres_and_scales_are_left_over_when_nothing_names_them_any_more(built):
    store, spec, _ = built
    everything = {"older_than_s": -1e6, "superseded": True}
    packed, record = calibrated(store, spec)
    calibrations = set(store.list("calibrations"))
    # One of each map, and the one that they are put together in.
    assert calibrations == {calibration_path(sha256) for sha256 in (record.sha256, *(item.sha256 for item in record.maps))}
    cache(store, packed)
    note_recipe(store, "one", packed, finished=True)
    stray = calibration_path("0" * 64)
    store.write_bytes(stray, b"of a run that was killed before it put them on record")
    assert find_leftovers(store, store.list_objects()) == []  # written a moment ago
    found = find_leftovers(store, store.list_objects(), **everything)
    assert [(item.reason, item.place, item.paths) for item in found] == [("orphan", "calibrations", (stray,))]
    remove_leftovers(store, found)
    # With the cache goes what it was stored behind; what the next one is stored behind stays.
    looser, _ = calibrated(store, spec, num_images=8)
    kept = set(store.list("calibrations")) - calibrations
    cache(store, looser)
    note_recipe(store, "one", looser, finished=True)
    found = find_leftovers(store, store.list_objects(), **everything)
    assert {item.reason for item in found} == {"superseded", "orphan"}
    remove_leftovers(store, found)
    assert kept
    assert set(store.list("calibrations")) == kept
    CachedFeatures(store, looser).verify(read_samples(store, looser.dataset_fingerprint))
    assert find_leftovers(store, store.list_objects(), **everything) == []


def test_centres_and_scales_of_maps_that_are_on_record_since_the_listing_are_kept(built):
    """Of a calibration that is under way: its first maps are on record."""
    store, spec, _ = built
    calibrated(store, spec)
    objects = [item for item in store.list_objects() if not item.path.startswith(("features/", "runs/"))]
    (commit,) = [path for path in store.list("runs/calibrate-features") if path.endswith("/COMMITTED.json")]
    put_together = store.read_json(commit)["path"]
    store.delete(commit)
    found = find_leftovers(store, objects, older_than_s=-1e6)
    assert [item.paths for item in found] == [(put_together,)]


def test_a_record_of_a_calibration_names_the_files_of_its_maps_too(built):
    store, spec, _ = built
    calibrated(store, spec)
    for path in store.list("features"):
        store.delete(path)
    assert find_leftovers(store, store.list_objects(), older_than_s=-1e6) == []


def test_centres_and_scales_that_came_on_record_since_they_were_found_stay(built):
    store, spec, _ = built
    calibrated(store, spec)
    (commit,) = [path for path in store.list("runs/calibrate-features") if path.endswith("/COMMITTED.json")]
    record = store.read_json(commit)
    store.delete(commit)
    found = find_leftovers(store, store.list_objects(), older_than_s=-1e6)
    assert [item.paths for item in found] == [(record["path"],)]
    store.write_json(commit, record)
    assert remove_leftovers(store, found) == []
    assert store.exists(record["path"])


def test_too_few_images_cannot_be_measured(built):
    store, spec, samples = built
    for sample in samples:
        store.write_bytes(sample.image_path, b"no image")
    with pytest.raises(CalibrationError, match=r"0 of 11 images can be read and encoded .* raise features\.calibration_images"):
        calibrated(store, spec)
    with pytest.raises(SpecError, match=r"calibration_images: found 3; allowed: at least 4"):
        calibration_of(spec, num_images=3)


def test_images_unlike_those_that_were_measured_stop_the_cache(built):
    """Centres that fit nothing, which is the worst that a calibration on other pictures can give."""
    store, spec, _ = built
    packed, _ = calibrated(store, spec)
    found = read_calibrations(store, packed)
    shifted = {place: dataclasses.replace(one, centre=one.centre + 1000 * torch.arange(32.0)) for place, one in found.items()}
    data, sha256 = calibrations_to_bytes(shifted)
    store.write_bytes(calibration_path(sha256), data)
    with pytest.raises(CalibrationError, match=r"the map (global|local)/\w+ is stored with -?\d+\.\d dB of signal over rounding, below 20"):
        cache(store, dataclasses.replace(packed, calibration_sha256=sha256))


@pytest.mark.parametrize(("num_images", "snr_db", "stops"), [(15, 21.0, False), (15, 19.0, True), (16, 26.9, True), (16, 27.1, False)])
def test_what_a_cache_keeps_is_held_against_the_recipe_once_images_enough_were_read_back(built, num_images, snr_db, stops):
    packed, _ = calibrated(built[0], built[1])
    one = MapQuality(num_tokens=1, signal=1.0, error=10 ** (-snr_db / 10))
    expected = pytest.raises(CalibrationError, match=rf"below {27 if num_images == 16 else 20} .* allow less by features\.min_snr_db")
    with expected if stops else contextlib.nullcontext():
        caching_build._check_quality(packed, {packed.branch_maps[0][1].place("global"): one}, num_images)


def test_a_picture_without_anything_in_it_is_no_bad_cache(built, tiny_encoder_folder):
    """All of its tokens are alike, so around their own mean there would be no signal at all."""
    store, spec, _ = built
    packed, _ = calibrated(store, spec)
    encoder = load_encoder(spec.encoder, 5)
    blank = torch.full((1, 3, spec.encoder.view_px, spec.encoder.view_px), 255, dtype=torch.uint8)
    feature_codec = FeatureCodec(packed, read_calibrations(store, packed))
    for branch in BRANCHES:
        found = encode_views(encoder, blank.numpy(), branch, spec.maps(branch), feature_codec, 4, num_compared=1).quality
        assert all(quality.snr_db > 25 for quality in found.values()), found


def test_one_token_of_a_view_can_be_cached(built):
    """A pool as large as the grid leaves one token of a global view, and one token has no mean to stand away from."""
    store, spec, samples = built
    pooled = dataclasses.replace(spec, global_maps=tuple(dataclasses.replace(item, pool=4) for item in spec.global_maps))
    packed, _ = calibrated(store, pooled)
    record = cache(store, packed)
    assert record.num_cached == len(samples)
    assert all(told["snr_db"] > 30 for told in record.quality.values())


def test_values_that_are_not_finite_are_refused(built, monkeypatch):
    store, spec, samples = built
    packed, _ = calibrated(store, spec)
    real, seen = FeatureCodec.rounded, []

    def spoilt(self, branch, item, tokens):
        if not seen:
            tokens = tokens.clone()
            tokens[0, 3, 5] = float("nan")
        seen.append(branch)
        return real(self, branch, item, tokens)

    monkeypatch.setattr(codec.FeatureCodec, "rounded", spoilt)
    record = cache(store, packed, dataclasses.replace(SETTINGS, max_quarantined_fraction=0.5))
    assert (record.num_cached, record.quarantined_by_reason) == (15, {"non_finite_features": 1})
    assert CachedFeatures(store, packed).holds(samples) == [False] + [True] * 15


def test_int8_and_its_calibration_go_together(built):
    _, spec, _ = built
    for changes in ({"precision": "int8"}, {"calibration_sha256": "0" * 64}, {"fp16_maps": ("local/layer_5",)}):
        with pytest.raises(SpecError, match="int8 needs a calibration, and nothing else has one"):
            dataclasses.replace(spec, **changes)


def test_an_encoder_is_loaded_once_for_all_threads_of_its_process(built, monkeypatch):
    """Two units reach a process at once; loaded by both, transformers was imported by two threads, and one saw half of it."""
    store, spec, samples = built
    loads = []

    def load(*arguments):
        loads.append(arguments)
        time.sleep(0.3)
        return load_unit_encoder(*arguments)

    monkeypatch.setattr(calibrate, "load_unit_encoder", load)
    measurer = calibrate._Measurer(spec, SETTINGS, None, None)
    units = [prepare_unit(UnitJob(spec=spec, root=store.root, number=number, samples=tuple(samples[number : number + 2]))) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert [measured.num_images for measured in pool.map(measurer, units)] == [2, 2]
    assert len(loads) == 1


@pytest.mark.parametrize("finisher", ["measurer", "encoder"])
def test_one_thread_of_a_process_computes_whoever_calls(built, monkeypatch, finisher):
    """Else OpenMP has more teams than there are cores, and lets their members sleep at every barrier."""
    store, spec, samples = built
    threads = collections.defaultdict(set)

    def noted(name, function):
        def call(*arguments, **options):
            threads[name].add(threading.get_ident())
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(Encoder, "forward", noted("forward", Encoder.forward))
    monkeypatch.setattr(FeatureCodec, "rounded", noted("rounded", FeatureCodec.rounded))
    monkeypatch.setattr(batching, "map_quality", noted("compared", map_quality))
    monkeypatch.setattr(calibrate.ChannelMoments, "update", noted("measured", calibrate.ChannelMoments.update))
    finish = calibrate._Measurer(spec, SETTINGS, None, None) if finisher == "measurer" else UnitEncoder(spec, store.root, SETTINGS, None)
    units = [prepare_unit(UnitJob(spec=spec, root=store.root, number=number, samples=tuple(samples[number : number + 2]))) for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        assert [found.num_images for found in pool.map(finish, units)] == [2] * 4
    assert set(threads) == ({"forward", "measured"} if finisher == "measurer" else {"forward", "rounded", "compared"})
    assert len(set.union(*threads.values())) == 1
    assert threading.get_ident() not in threads["forward"]


def test_where_memory_ended_in_a_check_is_remembered(built, monkeypatch, caplog):
    store, spec, samples = built
    packed, _ = calibrated(store, spec)
    batches, forward = [], Encoder.forward

    def tight(encoder, views, maps):
        batches.append(len(views))
        if len(views) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return forward(encoder, views, maps)

    monkeypatch.setattr(Encoder, "forward", tight)
    settings = dataclasses.replace(SETTINGS, encode_batch_views=None)
    measurer = calibrate._Measurer(spec, settings, None, read_calibrations(store, packed))
    monkeypatch.setattr("model.encoder_execution._CPU_ROWS", 8 * 17)
    units = [prepare_unit(UnitJob(spec=spec, root=store.root, number=number, samples=tuple(samples[4 * number :][:4]))) for number in range(2)]
    first = measurer(units[0])
    assert batches == [4, 4, 2, 2, 2, 2, 2, 2]  # in batches of 8 and of 4, then of 2, global views and then local ones
    batches.clear()
    second = measurer(units[1])
    assert batches == [2] * 6
    said = [record.getMessage().partition(" (")[0] for record in caplog.records]
    assert said == [f"automatic batches of {size} views run out of memory" for size in (8, 4)]
    assert all(quality.num_tokens for found in (first, second) for quality in found.quality.values())


def test_an_encoder_that_cannot_be_loaded_is_told_with_every_unit():
    def load():
        raise EncoderError("it is gone")

    computing = ComputingThread(load)
    for _ in range(2):
        with pytest.raises(EncoderError, match="it is gone"):
            computing.run(lambda _loaded: None)
