"""Plans of caches: the arithmetic by hand, bytes against files that were written, sizes against images that are there."""

import io
import json
import math
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from model.architectures import encoder_flops, known_encoder
from model.errors import ImageError
from model.images import decode_image, shown_size
from model.specs import CalibrationRule, CalibrationSpec, MapSpec, UnknownDigest, fingerprint
from model.views import ViewSpec
from pipelines import cli
from pipelines.cache_plan import ImageSizes, _readable, cache_options, make_cache_plan, note_cache_plan, planned_cache
from pipelines.cache_plan_text import OPTION_HEADINGS, CachePlan, plan_text, print_cache_plan
from pipelines.costs import CacheOption, Cluster, Prices, Work, cache_costs, recommend
from pipelines.errors import NothingThereError, SettingError
from pipelines.plan_tables import PlanCluster
from pipelines.recipe_files import load_recipe
from pipelines.settings import size_from_word
from pipelines.stages import Experiment, open_experiment
from pipelines.wording import bytes_text
from tests import small_data
from tests.tiny import tiny_recipe
from workers.caching.build import cache_features
from workers.caching.calibrate import calibrate_features
from workers.caching.sizing import file_overhead
from workers.dataset.build import build_dataset
from workers.dataset.samples import read_images, read_samples
from workers.dataset.scanning import scan_images
from workers.dataset.spec import DatasetSpec, LegibilitySpec, LlavaJsonSourceSpec, RenderedSourceSpec
from workers.devices import usable_cores
from workers.execution import ExecutionSettings, SilentProgress
from workers.language_models import planned_shape
from workers.probing import probe_machine
from workers.runtime import InlineCluster
from workers.storage import Store

RULE = CalibrationRule(num_images=12, min_snr_db=30.0)
FP16 = CacheOption(name="fp16", precision="fp16", global_view_bytes=3_000_000, local_view_bytes=1_000_000)
RATES = {"global": 8000.0, "local": 8000.0}
EIGHT = Cluster(devices=8, views_per_s=RATES, cores=100, encoders=8, network_bytes_per_s=10e9, shares_cores=False)
WORK = Work(num_images=1_000_000, num_local_views=6_000_000, prepare_core_s=0.05, num_fetched=0, file_bytes=0, num_calibrated=0, shown={"both": 1.0})
PRICES = Prices(storage_gb_month=0.02, put_thousand=0.005, get_thousand=0.0004, device_hour=3.0, core_hour=0.04)


def costs(option=FP16, work=WORK, **changes):
    values = {
        "overhead_bytes": 4000.0,
        "file_bytes": 7000.0,
        "unit_bytes": 90_000_000,
        "most_images": 10**6,
        "months": 2.0,
        "cluster": EIGHT,
        "prices": PRICES,
        "on_disk": False,
    }
    return cache_costs(option, work, **(values | changes))


def test_a_plan_by_hand():
    found = costs()
    assert found.total_bytes == 1_000_000 * 3_004_000 + 6_000_000 * 1_000_000 + 100_000 * 7000
    assert found.image_bytes == 9_004_700
    assert found.num_objects == 2 * 100_000  # 10 images of 9 MB in a unit, an object for each branch
    # 45 MB in 6 parts of 8 MiB, begun and completed; a file of the index for each object, a record for each unit.
    assert found.num_puts == 200_000 * (6 + 2) + 200_000 + 100_000
    assert found.num_gets_pass == 2_000_000
    assert found.hours.prepare == pytest.approx(1_000_000 * 0.05 / 100 / 3600)
    assert found.hours.encode == pytest.approx(7_000_000 / 8000 / 3600)
    assert found.hours.network == pytest.approx(9.0047e12 / 10e9 / 3600)
    assert (found.hours.total, found.hours.bottleneck) == (found.hours.network, "network")
    compute = 50_000 / 3600 * 0.04 + 900.47 / 3600 * 8 * 3  # devices as long as it takes, and the network takes longest
    assert found.compute_usd == pytest.approx(compute)
    live = 50_000 / 3600 * 0.04 + 875 / 3600 * 8 * 3  # nothing is stored: the 875 s of encoding take longer than 500 s of decoding
    assert found.live_pass_usd == pytest.approx(live)
    assert found.storage_usd_month == pytest.approx(9004.7 * 0.02)
    once = compute + 1900 * 0.005 + 2 * 9004.7 * 0.02
    gets = 2000 * 0.0004  # the maps of both branches
    assert found.break_even_passes == pytest.approx(once / (live - gets))
    assert found.break_even_passes > 50  # what the module says: keeping is dear, computing is cheap


def test_devices_that_are_cores_take_turns_with_decoding():
    here = Cluster(devices=1, views_per_s={"global": 100.0, "local": 100.0}, cores=2, encoders=1, network_bytes_per_s=None, shares_cores=True)
    found = costs(cluster=here)
    write_s = found.total_bytes / 1.3e8
    assert found.hours.write == pytest.approx(write_s / 3600)
    assert costs(cluster=replace(here, encoders=4)).hours.write == pytest.approx(write_s / 4 / 3600)  # each writes its own
    assert found.hours.total == pytest.approx(found.hours.prepare + found.hours.encode + write_s / 3600)
    assert (found.hours.network, found.hours.bottleneck) == (None, "encoding")
    assert found.compute_usd == pytest.approx((25_000 + 70_000 + write_s) / 3600 * 2 * 0.04)
    assert found.live_pass_usd == pytest.approx((25_000 + 70_000) / 3600 * 2 * 0.04)  # which writes nothing


def test_devices_are_paid_while_they_wait():
    slow = costs(work=replace(WORK, prepare_core_s=0.2))
    assert slow.hours.prepare > slow.hours.encode
    assert slow.compute_usd == pytest.approx(2000 / 3600 * 8 * 3 + 200_000 / 3600 * 0.04)


def test_small_objects_are_put_at_once_and_units_hold_no_more_images_than_travel():
    small = costs(replace(FP16, global_view_bytes=30_000, local_view_bytes=10_000), unit_bytes=900_000)
    assert (small.num_objects, small.num_puts) == (200_000, 2 * 200_000 + 100_000)
    assert costs(most_images=4).num_objects == 2 * 250_000


def test_a_cache_without_local_views_leaves_them_to_every_pass():
    alone = costs(replace(FP16, name="global", local_view_bytes=0, holds_local=False))
    assert alone.total_bytes == 1_000_000 * 3_004_000 + 33_334 * 7000
    assert alone.num_objects == 33_334  # 30 images in each
    left_out = 50_000 / 3600 * 0.04 + 750 / 3600 * 8 * 3
    assert alone.pass_usd == pytest.approx(1000 * 0.0004 + left_out)
    assert alone.live_pass_usd == pytest.approx(costs().live_pass_usd)


def test_branches_are_encoded_as_deep_as_their_own_maps():
    found = costs(cluster=replace(EIGHT, views_per_s={"global": 1000.0, "local": 6000.0}, network_bytes_per_s=None))
    assert found.hours.encode == pytest.approx((1000 + 1000) / 3600)
    alone = replace(FP16, name="global", local_view_bytes=0, holds_local=False)
    assert costs(alone, cluster=replace(EIGHT, views_per_s={"global": 1000.0, "local": 6000.0})).hours.encode == pytest.approx(1000 / 3600)


def test_images_from_a_bucket_are_asked_for_whenever_they_are_encoded():
    far = replace(WORK, num_fetched=500_000.0, file_bytes=200_000.0)
    found, near = costs(work=far), costs()
    asked = 500 * 0.0004
    assert found.hours.network == pytest.approx(near.hours.network + 500_000 * 200_000 / 10e9 / 3600)
    waiting = (found.hours.total - near.hours.total) * 8 * 3  # the network takes longest here
    assert found.compute_usd == pytest.approx(near.compute_usd + waiting)
    assert found.once_usd == pytest.approx(near.once_usd + waiting + asked)
    assert found.live_pass_usd == pytest.approx(near.live_pass_usd + asked)
    assert found.pass_usd == near.pass_usd
    alone = replace(FP16, name="global", local_view_bytes=0, holds_local=False)
    assert costs(alone, work=far).pass_usd == pytest.approx(costs(alone).pass_usd + asked)


def test_int8_encodes_once_more_what_it_is_measured_on():
    int8 = replace(FP16, name="int8", precision="int8")
    some = replace(WORK, num_calibrated=50_000)
    found, plain = costs(int8, work=some), costs(int8)
    assert found.hours.calibrate == pytest.approx(0.05 * max(plain.hours.prepare, plain.hours.encode))
    assert found.hours.total == pytest.approx(plain.hours.total + found.hours.calibrate)
    assert costs(FP16, work=some) == costs(FP16)


def test_a_disk_of_the_users_own_costs_nothing_but_the_work():
    found, paid = costs(on_disk=True), costs()
    assert (found.storage_usd_month, found.pass_usd) == (0, 0)
    assert found.once_usd == found.compute_usd == paid.compute_usd
    assert found.live_pass_usd == paid.live_pass_usd


def test_passes_that_show_one_branch_read_and_encode_that_alone():
    shown = {"both": 0.5, "global": 1.5, "local": 1 / 3}  # (0.5 * 7 + 1.5 + 2) views of the 7
    found, alone = (
        costs(work=replace(WORK, shown=shown)),
        costs(replace(FP16, local_view_bytes=0, holds_local=False), work=replace(WORK, shown=shown)),
    )

    def usd(views: int) -> float:
        return 50_000 / 3600 * 0.04 + max(views / 8000, 500) / 3600 * 8 * 3

    assert found.live_pass_usd == pytest.approx(0.5 * usd(7_000_000) + 1.5 * usd(1_000_000) + usd(6_000_000) / 3)
    assert found.num_gets_pass == round(1e6 * (0.5 * 2 + 1.5 + 1 / 3))
    assert alone.num_gets_pass == 2_000_000
    assert alone.pass_usd == pytest.approx(2000 * 0.0004 + (0.5 + 1 / 3) * usd(6_000_000))
    assert alone.live_pass_usd == pytest.approx(found.live_pass_usd)


def test_the_global_view_alone_is_cached_where_it_is_seen_much_oftener():
    """Its maps are small, and local views are seen so seldom that keeping theirs never pays."""
    work = replace(WORK, shown={"both": 0.0, "global": 6.5, "local": 0.5 / 6})
    small = replace(FP16, global_view_bytes=30_000)
    alone = replace(small, name="fp16, global view only", local_view_bytes=0, holds_local=False)
    options = [costs(option, work=work, months=1.0) for option in (small, alone)]
    found = recommend(options, 40.0)
    assert found.choice == "cache fp16, global view only"
    totals = [cost.once_usd + 40 * cost.pass_usd for cost in options]
    assert totals[1] < min(totals[0], 40 * options[0].live_pass_usd)


def test_nothing_pays_where_a_request_costs_more_than_the_work():
    found = costs(prices=replace(PRICES, get_thousand=1000.0))
    assert found.break_even_passes == math.inf


@pytest.mark.parametrize(("passes", "choice"), [(1, "do not cache"), (10, "do not cache"), (40, "cache int8"), (10_000, "cache int8")])
def test_the_cheapest_is_recommended_with_its_reason(passes, choice):
    half = replace(FP16, name="int8", precision="int8", global_view_bytes=1_500_000, local_view_bytes=500_000)
    options = (costs(), costs(half))
    found = recommend(options, passes)
    assert found.choice == choice
    live, packed = passes * options[0].live_pass_usd, options[1].once_usd + passes * options[1].pass_usd
    assert f"{live:,.2f}" in found.reason
    assert f"{packed:,.2f}" in found.reason


def test_what_costs_the_same_stays_as_the_recipe_says():
    free = {"prices": replace(PRICES, storage_gb_month=0.0, put_thousand=0.0), "cluster": replace(EIGHT, network_bytes_per_s=None)}
    half = replace(FP16, name="int8", precision="int8", global_view_bytes=1_500_000, local_view_bytes=500_000)
    assert recommend((costs(**free), costs(half, **free)), 3).choice == "cache fp16"


def test_what_is_dearer_than_no_cache_by_nothing_that_can_be_measured_is_not_recommended():
    own, half = costs(), costs(replace(FP16, name="int8", precision="int8"))
    own = replace(own, once_usd=100.9, pass_usd=0.0, live_pass_usd=100.5)
    found = recommend((own, replace(half, once_usd=100.0, pass_usd=0.0, live_pass_usd=100.5)), 1)
    assert found.choice == "cache int8"
    none = recommend((own, replace(half, once_usd=100.6, pass_usd=0.0, live_pass_usd=100.5)), 1)
    assert none.choice == "do not cache"
    assert "the cheapest cache (int8) $100.60" in none.reason


def test_operations_of_a_view_are_those_of_the_published_arithmetic():
    clip = known_encoder("openai/clip-vit-large-patch14-336")
    blocks = 2 * 24 * (577 * 12 * 1024**2 + 2 * 577**2 * 1024)
    assert encoder_flops(clip, 24) == blocks + 2 * 576 * 3 * 14**2 * 1024
    assert encoder_flops(clip, 24) / 1e9 == pytest.approx(382, abs=1)
    assert encoder_flops(clip, 12) < encoder_flops(clip, 24) / 1.9


def test_options_are_those_of_the_maps():
    encoder = known_encoder("openai/clip-vit-large-patch14-336")
    from model.specs import FeatureSpec

    maps = (MapSpec(layers=(23,)), MapSpec(layers=(7,)), MapSpec(layers=(15,)))
    features = FeatureSpec(
        dataset_fingerprint="0" * 64,
        encoder=encoder,
        views=ViewSpec.slime(),
        global_maps=maps,
        local_maps=tuple(replace(item, pool=2) for item in maps),
    )
    found = {option.name: (option.global_view_bytes, option.local_view_bytes) for option, _ in cache_options(features, RULE)}
    view = 3 * 576 * 1024
    assert found == {
        "fp16": (2 * view, view // 2),
        "int8": (view + 3 * 576 * 2, view // 4 + 3 * 144 * 2),
        "fp32": (4 * view, view),
        "int8, global view only": (view + 3 * 576 * 2, 0),
    }
    packed = replace(features, precision="int8", calibration=RULE, calibration_sha256=UnknownDigest("it"), local_maps=())
    assert [option.name for option, _ in cache_options(packed, RULE)] == ["int8", "fp16", "fp32"]
    alone = [option.name for option, _ in cache_options(features, RULE, global_alone=True)]
    assert alone == ["fp16, global view only", "fp16", "int8", "fp32", "int8, global view only"]
    alone = [option.name for option, _ in cache_options(replace(packed, local_maps=maps), RULE, global_alone=True)]
    assert alone == ["int8, global view only", "int8", "fp16", "fp32"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_bytes_are_planned_as_they_are_written(root, tiny_encoder_folder, precision):
    store, dataset = Store(root), small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    settings = ExecutionSettings(feature_unit_bytes=40_000)
    samples = read_samples(store, fingerprint(dataset))
    if precision == "int8":
        spec = replace(spec, precision="int8", calibration=RULE, calibration_sha256=UnknownDigest("it"))
        overhead = file_overhead(spec, 112, 56)
        calibration = CalibrationSpec(
            dataset_fingerprint=spec.dataset_fingerprint, encoding=spec.encoding, global_maps=spec.global_maps, local_maps=spec.local_maps
        )
        record = calibrate_features(calibration, store, settings, SilentProgress(), cluster=InlineCluster())
        spec = replace(spec, calibration_sha256=record.sha256)
    else:
        overhead = file_overhead(spec, 112, 56)
    made = cache_features(spec, store, settings, SilentProgress(), cluster=InlineCluster())
    maps = sum(spec.view_bytes(branch) * (made.num_global_views if branch == "global" else made.num_local_views) for branch in ("global", "local"))
    planned = maps + sum(part.image_bytes * len(samples) + part.file_bytes * made.num_units for part in overhead.values())
    assert planned == pytest.approx(made.written_bytes, rel=0.005)
    assert maps == made.feature_bytes


def test_sources_without_readable_images_count_nothing(tmp_path):
    from hashlib import sha256

    records = [{"image": "../up.jpg", "conversations": []}, {"image": "gone.jpg", "conversations": []}, {"conversations": []}]
    (tmp_path / "records.json").write_text(json.dumps(records))
    digest = sha256((tmp_path / "records.json").read_bytes()).hexdigest()
    source = LlavaJsonSourceSpec(records=str(tmp_path / "records.json"), images=str(tmp_path), records_sha256=digest)
    dataset = DatasetSpec(
        sources=(source,),
        seed=0,
        held_out_fraction=0.1,
        view_px=56,
        views=ViewSpec.slime(),
        legibility=LegibilitySpec(local_min_px=6.5, global_max_px=6.0),
    )
    found = scan_images(dataset, 100)
    assert (found.num_images, found.sizes_px, found.weights, found.num_looked_at, found.num_unreadable) == (0, (), (), 1, 1)


def write_images(folder: Path, sizes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number, (width, height, orientation) in enumerate(sizes):
        image = Image.fromarray(generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(folder / f"{number}.jpg", exif=exif)
    cut = folder / f"{len(sizes) - 1}.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])  # its header is whole


def test_headers_tell_sizes_as_they_are_seen(tmp_path):
    write_images(tmp_path / "images", [(60, 40, 1), (30, 90, 3), (60, 40, 6)])
    (tmp_path / "images" / "3.jpg").write_bytes(b"no image")
    records = [{"id": str(number), "image": f"{number}.jpg", "conversations": []} for number in range(5)]
    records += [{"id": "again", "image": "0.jpg", "conversations": []}, {"id": "text", "conversations": []}, "nothing"]
    (tmp_path / "records.json").write_text(json.dumps(records))
    from hashlib import sha256

    source = LlavaJsonSourceSpec(
        records=str(tmp_path / "records.json"),
        images=str(tmp_path / "images"),
        records_sha256=sha256((tmp_path / "records.json").read_bytes()).hexdigest(),
    )
    dataset = DatasetSpec(
        sources=(RenderedSourceSpec(family="charts", num_images=7), source),
        seed=0,
        held_out_fraction=0.1,
        view_px=56,
        views=ViewSpec.slime(),
        legibility=LegibilitySpec(local_min_px=6.5, global_max_px=6.0),
    )
    found = scan_images(dataset, 100)
    assert (found.num_images, found.num_looked_at, found.num_unreadable) == (7 + 3, 5, 2)  # one is gone, one is no image
    assert sorted(zip(found.sizes_px, found.weights, strict=True)) == [((30, 90), 1), ((40, 60), 1), ((60, 40), 1), ((672, 448), 7)]
    assert found.by_source == {"rendered/charts": 7, "llava_json/records": 3}
    assert sorted(shown_size(Store(str(tmp_path)).read_reference(reference)) for reference in found.references) == [(30, 90), (40, 60), (60, 40)]
    files = _readable(Store(str(tmp_path)), found.references)
    assert sorted(decode_image(file).size for file in files) == [(30, 90), (60, 40)]  # the other one's pixels are cut off
    some = scan_images(dataset, 2)
    assert some == scan_images(dataset, 2)
    assert sum(some.weights) == pytest.approx(some.num_images, abs=1)


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, size=(40, 60, 3), dtype=np.uint8)).save(file, kind, **options)
    return file.getvalue()


def orientation(value) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", [1, 3, 6, 8, 9])
def test_a_header_tells_the_size_that_decoding_finds(kind, value):
    data = encoded(kind, exif=orientation(value))
    assert shown_size(data) == decode_image(data).size == ((40, 60) if value in {6, 8} else (60, 40))


def test_a_header_is_enough(monkeypatch):
    """A PNG's own method would decode its pixels, to look for EXIF behind them."""
    whole = encoded("PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert shown_size(whole[: len(whole) // 2]) == (60, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_is_no_accident(kind):
    entry = struct.pack("<HHI4s", 0x0112, 2, 2, b"6\x00")  # as text
    text = encoded(kind, exif=b"Exif\x00\x00II*\x00" + struct.pack("<IH", 8, 1) + entry + bytes(4))
    assert Image.open(io.BytesIO(text)).getexif()[0x0112] == "6"
    assert shown_size(text) == decode_image(text).size == (60, 40)
    broken = encoded(kind, exif=b"Exif\x00\x00no TIFF at all")
    if kind == "JPEG":  # whose plugin looks away
        assert shown_size(broken) == decode_image(broken).size
        return
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(broken)
    with pytest.raises(ImageError, match="cannot be decoded"):
        shown_size(broken)


def test_decoding_is_planned_by_the_mean_of_images_and_not_by_the_image_in_the_middle():
    sizes = ImageSizes(num_images=100, sizes_px=((640, 480), (4000, 3000), (2600, 2100)), weights=(55.0, 44.0, 1.0), by_source={}, source="")
    assert sizes.mean_pixels == pytest.approx(0.55 * 640 * 480 + 0.44 * 12e6 + 0.01 * 2600 * 2100)
    assert sizes.typical_px == (2600, 2100)


def test_a_probe_knows_the_time_of_larger_images_than_it_decoded(tiny_encoder_folder, monkeypatch):
    spec = small_data.feature_spec(small_data.dataset_spec(), tiny_encoder_folder)
    ticks = iter(range(1000))
    monkeypatch.setattr("workers.probing.time.thread_time", lambda: next(ticks))
    monkeypatch.setattr("workers.probing._ENOUGH_S", 3.5)
    options = {"device": "cpu", "cores": 1, "encoder_cores": None, "batch_views": None, "encodes": False}
    files = [encoded("JPEG")]
    found = probe_machine(spec, files, (60, 40), 10 * 2400.0, **options)
    # Asked for the time before, and then until 3.5 s are over: of three images it takes 5 ticks.
    assert found.prepare_core_s == pytest.approx(10 * 5 / 3)
    assert found.file_bytes == pytest.approx(10 * len(files[0]))
    assert not found.made_up
    assert probe_machine(spec, [], (60, 40), 2400.0, **options).made_up
    assert found.views_per_s is found.products_flop_s is None


def test_cores_are_those_that_a_container_has_time_for(tmp_path):
    there = usable_cores(tmp_path)
    assert there == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == there
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text(f"{100000 * (there + 1)} 100000\n")
    assert usable_cores(tmp_path) == there
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores(tmp_path) == there
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    assert usable_cores(tmp_path) == 1


@pytest.fixture
def experiment(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr("workers.probing._ENOUGH_S", 0.01)
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder))
    return open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings(device="cpu"), planning=True)


def test_a_recipe_is_planned_from_what_it_will_draw(experiment: Experiment) -> None:
    plan = make_cache_plan(experiment)
    drawn = sum(source.num_images for source in experiment.dataset.sources)
    assert (plan.num_images, plan.images_from) == (drawn, "pictures to be drawn")
    assert sum(plan.local_views.values()) == drawn
    assert plan.num_views == drawn + sum(count * number for count, number in plan.local_views.items())
    assert plan.prepare_core_s > 0
    assert plan.views_per_s > 0
    assert "probed with this encoder" in plan.hardware
    assert [cost.option.name for cost in plan.options] == ["fp16", "int8", "fp32", "int8, global view only"]
    assert plan.options[0].total_bytes > plan.options[1].total_bytes > 0
    assert plan.options[0].storage_usd_month == 0  # a disk of this machine
    assert experiment.store.list() == []


def test_images_may_be_given(experiment: Experiment) -> None:
    plan = make_cache_plan(experiment, images=5000, size_px=(200, 50))
    assert (plan.num_images, plan.images_from, sum(plan.local_views.values())) == (5000, "as given", 5000)
    with pytest.raises(SettingError, match="--images and --size go together"):
        make_cache_plan(experiment, images=5000)
    with pytest.raises(SettingError, match="--images: found 0; allowed: 1 to 1,000,000,000,000"):
        make_cache_plan(experiment, images=0, size_px=(200, 50))
    with pytest.raises(SettingError, match="--size: found 20000x20000; images of more than 64,000,000 pixels are refused"):
        make_cache_plan(experiment, images=5, size_px=(20_000, 20_000))
    with pytest.raises(SettingError, match="--size: found 66000x1; images of which one side is more than 100 times the other are refused"):
        make_cache_plan(experiment, images=5, size_px=(66_000, 1))
    with pytest.raises(SettingError, match="--images: found a number of more than 15 digits"):
        make_cache_plan(experiment, images=10**400, size_px=(200, 50))
    longest = make_cache_plan(experiment, images=5, size_px=(66_000, 660))  # longer than a JPEG can be
    assert longest.prepare_core_s > 0


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_figure_of_a_plan_is_shown_however_narrow_the_terminal(
    experiment: Experiment, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_cache_plan(experiment, images=5000, size_px=(200, 50))
    monkeypatch.setenv("COLUMNS", str(width))
    print_cache_plan(plan, as_json=False)
    out = capsys.readouterr().out
    assert all(len(line) <= width for line in out.splitlines() if not line.startswith("Recommended"))
    shown = set(re.split(r"  +|\n", out))
    assert "\u2026" not in out
    for row in plan_text(plan).options:
        assert set(row) <= shown
    assert set(OPTION_HEADINGS) <= shown


def test_passes_are_of_what_phases_see(tmp_path: Path, experiment: Experiment) -> None:
    text = experiment.file.text
    train, local = 16 * 0.6, sum(count * number for count, number in make_cache_plan(experiment).local_views.items()) / 16

    def passes(phases: str) -> tuple[float, CachePlan]:
        path = tmp_path / "phases.toml"
        path.write_text(text[: text.index("[[schedule.align]]")] + phases)
        plan = make_cache_plan(open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings(device="cpu"), planning=True))
        return plan.passes, plan

    one = "[[schedule.align]]\ntrain = ['global_mlp']\nbranch = 'global'\nepochs = 2\nlearning_rate = 1e-3\n"
    views = 16 * (1 + local)
    found, plan = passes(one)
    assert found == pytest.approx(2 * 2 * train / views)  # two seeds, two epochs of one view of each image
    assert [rate.mode for rate in plan.train_rates] == ["global"]
    two = "[[schedule.align]]\ntrain = ['compression']\nbranch = 'local'\nsteps = 5\nbatch_size = 8\nlearning_rate = 1e-3\nsources = ['charts']\n"
    mix = "{ both = 0.5, global = 0.25, blind = 0.25 }"
    last = f"[schedule.sft]\ntrain = ['language_model']\nbranch = {mix}\nepochs = 3\nlearning_rate = 1e-3\nsources = ['pages']\n"
    found, plan = passes(f"[schedule]\nrepeats = 3\n{one}{two}{last}")
    aligned = 3 * (2 * train + 5 * 8 * local)
    assert found == pytest.approx(2 * (aligned + 3 * train / 2 * (0.75 + 0.5 * local)) / views)
    assert [rate.mode for rate in plan.train_rates] == ["both", "global", "local"]


def test_training_reads_fastest_where_phases_show_local_views_alone(tmp_path: Path, experiment: Experiment) -> None:
    path = tmp_path / "local.toml"
    path.write_text(experiment.file.text.replace('branch = "global"', 'branch = "local"').replace('["global_mlp"]', '["compression"]'))
    plan = make_cache_plan(open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings(device="cpu"), planning=True))
    both, alone = plan.train_rates
    assert (both.mode, alone.mode) == ("both", "local")
    connector, patches, local = experiment.connector, experiment.encoder.num_patches, (plan.num_views - 16) / 16
    tokens = [connector.global_tokens(patches) + 4 * local + 150, 4 * local + 150]
    assert alone.images_per_s / both.images_per_s == pytest.approx(tokens[0] / tokens[1])
    own = plan.options[0].option
    assert alone.read_bytes_per_s["fp16"] == pytest.approx(alone.images_per_s * local * own.local_view_bytes)
    facts = dict(plan_text(plan).facts)
    most = max(rate.read_bytes_per_s["fp16"] for rate in plan.train_rates)
    assert " images/s, in phases that show local views alone, by its language model's" in facts["training"]
    assert f"it reads at most fp16 {bytes_text(round(most))}/s, int8 " in facts["training"]
    assert "global view only" not in facts["training"]
    assert facts["encoding anew"].endswith("for a pass without a cache")
    assert facts["calibration"].startswith("of int8, on 16 images: ")


@pytest.mark.parametrize(("passes", "shown"), [(0.04, "0.04 "), (5.8123, "5.81 "), (1500, "1,500 "), (123_456, "123,456 ")])
def test_figures_have_no_exponents(experiment: Experiment, passes: float, shown: str) -> None:
    plan = replace(make_cache_plan(experiment), passes=passes, views_per_s=12_968.4)
    facts = dict(plan_text(plan).facts)
    assert facts["passes"].startswith(shown)
    assert "12,968 views/s" in facts["rates"]


def test_an_encoder_that_is_not_here_is_planned_by_its_shape_and_on_stated_hardware(
    tmp_path: Path, tiny_language_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workers.probing._ENOUGH_S", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text = tiny_recipe(Path("openai/clip-vit-base-patch32"), tiny_language_model_folder).replace("queries = 4", "queries = 49")
    path = tmp_path / "clip.toml"
    path.write_text(text + "\n[plan]\npasses = 3\nmonths = 6\n[plan.cluster]\ndevices = 2\ndevice_tflops = 100\ndevice_share = 0.5\ncores = 10\n")
    cli.main(["plan", str(path), "--root", str(tmp_path / "root"), "--images", "1000", "--size", "640x480", "--json"])
    plan = json.loads(capsys.readouterr().out)
    encoder = known_encoder("openai/clip-vit-base-patch32")
    deepest = 11
    assert plan["views_per_s"] == pytest.approx(2 * 100e12 * 0.5 / encoder_flops(encoder, deepest))
    assert plan["hardware"].startswith("2 devices of 100 TFLOP/s in fp32 at 50%, 10 cores, 100 Gbit/s at 80%")
    assert (plan["passes"], plan["months"], plan["num_images"]) == (3, 6, 1000)
    # The language model frozen: two operations for each parameter and token, forward and back; tokens of both branches, and of text.
    (local_views,) = map(int, plan["local_views"])
    tokens = 49 + 49 * local_views + 150
    parameters = planned_shape(str(tiny_language_model_folder)).num_parameters
    flop_s = 2 * 100e12 * 989 / 67 * 0.5
    rates = {rate["mode"]: rate for rate in plan["train_rates"]}
    assert rates["both"]["images_per_s"] == pytest.approx(flop_s / (4 * parameters * tokens))
    own = plan["options"][0]["option"]
    both_bytes = own["global_view_bytes"] + local_views * own["local_view_bytes"]
    assert rates["both"]["read_bytes_per_s"]["fp16"] == pytest.approx(rates["both"]["images_per_s"] * both_bytes)
    assert plan["options"][0]["storage_usd_month"] == pytest.approx(plan["options"][0]["total_bytes"] / 1e9 * 0.023)
    cli.main(["plan", str(path), "--root", str(tmp_path / "root"), "--images", "1000", "--size", "640x480"])
    out = capsys.readouterr().out
    assert "stored as" in out
    assert "Recommended: " in out
    assert not (tmp_path / "root").exists()


def test_stated_hardware_computes_at_the_peak_of_the_encoders_type() -> None:
    stated = PlanCluster(devices=2, device_share=0.5)
    flops = {"global": 10**12, "local": 10**11}
    assert stated.cluster(flops, "fp32").views_per_s == pytest.approx({"global": 67, "local": 670})
    assert stated.cluster(flops, "bf16").views_per_s == stated.cluster(flops, "fp16").views_per_s == pytest.approx({"global": 989, "local": 9890})
    assert PlanCluster(devices=2, device_share=0.5, device_tflops=100).cluster(flops, "bf16").views_per_s["global"] == pytest.approx(100)


def test_training_multiplies_in_bf16_whatever_the_encoder_computes_in() -> None:
    plain = PlanCluster()
    assert [plain.peak_train_tflops(compute) for compute in ("fp32", "bf16", "fp16")] == pytest.approx([989, 989, 989])
    stated = PlanCluster(device_tflops=67)  # what is the default anyway changes nothing
    assert stated.peak_train_tflops("fp32") == pytest.approx(989)
    assert PlanCluster(device_tflops=312).peak_train_tflops("bf16") == 312
    assert PlanCluster(device_tflops=19.5, train_tflops=312).peak_train_tflops("fp32") == 312


def test_devices_that_wait_for_the_network_are_paid_for() -> None:
    fast, slow = costs(), costs(cluster=replace(EIGHT, network_bytes_per_s=1e8))
    assert slow.hours.bottleneck == "network"
    assert slow.hours.network == pytest.approx(slow.total_bytes / 1e8 / 3600)
    assert slow.compute_usd - fast.compute_usd == pytest.approx((slow.hours.total - fast.hours.total) * 8 * 3.0)
    assert slow.live_pass_usd == fast.live_pass_usd  # nothing is stored
    assert costs(cluster=replace(EIGHT, network_bytes_per_s=None)).hours.network is None


def test_what_is_cheaper_by_nothing_that_can_be_measured_does_not_change_the_recipe() -> None:
    own, other = costs(), costs(replace(FP16, name="other"))
    assert recommend([own, replace(other, once_usd=own.once_usd * 0.995)], 100.0).choice == "cache fp16"
    assert recommend([own, replace(other, once_usd=own.once_usd * 0.9)], 100.0).choice == "cache other"


def test_records_that_are_not_here_need_a_number(experiment: Experiment, tmp_path: Path) -> None:
    text = experiment.file.text
    start = text.index("sources = [")
    path = tmp_path / "far.toml"
    far = "sources = [{ kind = 'llava_json', records = 'far.json', images = 'far' }]"
    path.write_text(text[:start] + far + text[text.index("]", start) + 1 :])
    planned = open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings(device="cpu"), planning=True)
    with pytest.raises(NothingThereError, match=r"plan: records far\.json cannot be read, so .*; give --images N --size WxH"):
        make_cache_plan(planned)


@pytest.mark.parametrize("word", ["1024", "1024x", "x768", "0x5", "-1x5", "1024 x 768", "axb"])
def test_sizes_that_are_none(word: str) -> None:
    with pytest.raises(SettingError, match="allowed: width and height in pixels, such as 1024x768"):
        size_from_word(word)


def test_a_size_is_width_and_height() -> None:
    assert size_from_word("1024x768") == (1024, 768)


def test_a_run_that_is_about_to_cache_notes_what_it_expects(experiment: Experiment) -> None:
    """Also with an image that cannot be read among those that decoding is measured on."""
    build_dataset(experiment.dataset, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    experiment.store.delete(read_images(experiment.store, fingerprint(experiment.dataset))[0].image_path)
    note_cache_plan(experiment)
    noted = planned_cache(experiment)
    assert noted is not None
    plan = make_cache_plan(experiment)
    assert noted.num_views == plan.num_views
    assert noted.total_bytes == pytest.approx(plan.options[0].total_bytes, rel=1e-4)  # a file's own overhead is measured each time
    assert noted.seconds is not None
    assert noted.seconds > 0
    assert "this machine" in noted.hardware
    assert "writing 130 MB/s in between, probed with" in noted.hardware
    assert not plan.is_made
    cache_features(experiment.features, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    made = make_cache_plan(experiment)
    assert made.is_made
    assert ("made", "already: a run finds this cache and adds nothing to it") in plan_text(made).facts
    assert not make_cache_plan(experiment, images=5, size_px=(60, 40)).is_made


@pytest.mark.parametrize("running", [False, True])
def test_a_run_that_has_to_start_ray_expects_to_take_longer(experiment: Experiment, monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    build_dataset(experiment.dataset, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    plan = make_cache_plan(experiment)
    monkeypatch.setattr("pipelines.cache_plan.make_cache_plan", lambda *_, **__: plan)
    monkeypatch.setattr("workers.runtime.ray_is_running", lambda: running)
    note_cache_plan(experiment)
    noted = planned_cache(experiment)
    assert noted is not None
    assert noted.seconds == pytest.approx(plan.options[0].hours.total * 3600 + (8 if running else 16))


def test_of_a_cluster_elsewhere_bytes_alone_are_expected_and_no_encoder_is_tried(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    build_dataset(experiment.dataset, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    plan = make_cache_plan(experiment)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("workers.probing.probe_machine", lambda *_, **__: pytest.fail("probed"))
    monkeypatch.setattr("pipelines.cache_plan._readable", lambda *_: pytest.fail("read images that nobody decodes"))
    note_cache_plan(experiment)
    noted = planned_cache(experiment)
    assert noted is not None
    assert noted.seconds is None
    assert noted.num_views == plan.num_views
    assert noted.total_bytes == pytest.approx(plan.options[0].total_bytes, rel=0.02)  # in units of another size


def test_a_branch_with_shallower_maps_takes_fewer_operations(tmp_path: Path, experiment: Experiment) -> None:
    assert dict(plan_text(make_cache_plan(experiment)).facts)["encoder"].endswith("GFLOP a view")
    head, tail = experiment.file.text.split("[connector.local]")
    path = tmp_path / "shallow.toml"
    tail = tail.replace('{ kind = "dci", groups = 2 }', '{ kind = "single", layer = 1 }', 1)
    path.write_text(f"{head}[connector.local]\nprojector = 'own'{tail}")
    plan = make_cache_plan(open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings(device="cpu"), planning=True))
    deepest = experiment.features.deepest_layer
    assert plan.view_gflop == {"global": encoder_flops(experiment.encoder, deepest) / 1e9, "local": encoder_flops(experiment.encoder, 1) / 1e9}
    # The probe's rate is of local views; the global ones take as much longer as they take more operations.
    total_s = plan.options[0].hours.encode * 3600
    ratio = plan.view_gflop["global"] / plan.view_gflop["local"]
    local_views_per_s = (16 * ratio + plan.num_views - 16) / total_s
    assert plan.views_per_s == pytest.approx(plan.num_views / total_s)
    assert plan.views_per_s < local_views_per_s
    shown = dict(plan_text(plan).facts)["encoder"]
    assert " GFLOP a global view and " in shown
    assert shown.endswith(" GFLOP a local view")


def test_a_recipe_that_stores_global_views_alone_is_planned_as_it_stores(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "global.toml"
    path.write_text(experiment.file.text + '\n[features]\nsource = "global_cached"\n')
    split = open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings(device="cpu"))
    build_dataset(split.dataset, split.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    note_cache_plan(split)
    made = cache_features(split.cache, split.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    noted = planned_cache(split)
    assert noted is not None
    assert noted.text is not None
    assert noted.text.options[0][0] == "fp16, global view only"
    assert noted.num_views == made.num_global_views == 16
    assert made.num_local_views == 0
    assert noted.total_bytes == pytest.approx(made.written_bytes, rel=0.02)
    assert make_cache_plan(split).is_made
    assert not make_cache_plan(experiment).is_made


def test_as_many_sizes_as_images_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    mean = ImageSizes.mean_pixels.fget
    monkeypatch.setattr(ImageSizes, "mean_pixels", property(lambda sizes: asked.append(1) or mean(sizes)))
    sizes = ImageSizes(num_images=1000, sizes_px=tuple((side, side) for side in range(1, 1001)), weights=(1.0,) * 1000, by_source={}, source="")
    assert sizes.typical_px == (578, 578)
    assert len(asked) == 1
