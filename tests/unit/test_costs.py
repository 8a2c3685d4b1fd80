"""Plans of caches: the arithmetic by hand, bytes against files that were written, sizes against images that are there."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.architectures import encoder_flops, known_encoder
from model.specs import CalibrationRule, CalibrationSpec, MapSpec, UnknownDigest, fingerprint
from model.views import ViewSpec
from pipelines import cli
from pipelines.cache_plan import cache_options, make_cache_plan, note_cache_plan, planned_cache
from pipelines.cache_plan_text import OPTION_HEADINGS, plan_text, print_cache_plan
from pipelines.costs import CacheOption, Cluster, Prices, cache_costs, recommend
from pipelines.errors import NothingThereError, SettingError
from pipelines.plan_tables import PlanCluster
from pipelines.recipe_files import load_recipe
from pipelines.settings import size_from_word
from pipelines.stages import Experiment, open_experiment
from tests import small_data
from tests.tiny import tiny_recipe
from workers.caching.build import cache_features
from workers.caching.calibrate import calibrate_features
from workers.caching.sizing import file_overhead
from workers.dataset.build import build_dataset
from workers.dataset.samples import read_images, read_samples
from workers.dataset.scanning import scan_images
from workers.dataset.spec import DatasetSpec, LegibilitySpec, LlavaJsonSourceSpec, RenderedSourceSpec
from workers.execution import ExecutionSettings, SilentProgress
from workers.language_models import planned_shape
from workers.runtime import InlineCluster
from workers.storage import Store

RULE = CalibrationRule(num_images=12, min_snr_db=30.0)
FP16 = CacheOption(name="fp16", precision="fp16", global_view_bytes=3_000_000, local_view_bytes=1_000_000)
EIGHT = Cluster(devices=8, views_per_s=8000.0, cores=100, network_bytes_per_s=10e9, shares_cores=False)
PRICES = Prices(storage_gb_month=0.02, put_thousand=0.005, get_thousand=0.0004, device_hour=3.0, core_hour=0.04)


def costs(option=FP16, **changes):
    values = {
        "num_images": 1_000_000,
        "num_local_views": 6_000_000,
        "prepare_core_s": 0.05,
        "overhead_bytes": 4000.0,
        "file_bytes": 7000.0,
        "unit_bytes": 90_000_000,
        "most_images": 10**6,
        "months": 2.0,
        "cluster": EIGHT,
        "prices": PRICES,
    }
    return cache_costs(option, **(values | changes))


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
    here = Cluster(devices=1, views_per_s=100.0, cores=2, network_bytes_per_s=None, shares_cores=True)
    found = costs(cluster=here)
    write_s = found.total_bytes / 1.3e8
    assert found.hours.total == pytest.approx(found.hours.prepare + found.hours.encode + write_s / 3600)
    assert (found.hours.network, found.hours.bottleneck) == (None, "encoding")
    assert found.compute_usd == pytest.approx((25_000 + 70_000 + write_s) / 3600 * 2 * 0.04)
    assert found.live_pass_usd == pytest.approx((25_000 + 70_000) / 3600 * 2 * 0.04)  # which writes nothing


def test_devices_are_paid_while_they_wait():
    slow = costs(prepare_core_s=0.2)
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
    some = scan_images(dataset, 2)
    assert some == scan_images(dataset, 2)
    assert sum(some.weights) == pytest.approx(some.num_images, abs=1)


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
    plan = make_cache_plan(experiment)
    sees = re.findall(r"(?m)^steps = .*$", text)
    assert sees
    train = plan.num_images * (1 - experiment.dataset.held_out_fraction)
    path = tmp_path / "epochs.toml"
    one = """
[[schedule.align]]
train = ["global_mlp"]
branch = "global"
epochs = 2
learning_rate = 1e-3
"""
    path.write_text(text[: text.index("[[schedule.align]]")] + one)
    planned = make_cache_plan(open_experiment(load_recipe(str(path)), experiment.store, ExecutionSettings(device="cpu"), planning=True))
    seeds = len(experiment.file.recipe.seeds)
    assert planned.passes == pytest.approx(2 * train * seeds / planned.num_views)  # two epochs of one view of each image


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
    assert plan["train_images_per_s"] == pytest.approx(2 * 100e12 * 989 / 67 * 0.5 / (4 * parameters * tokens))
    assert plan["options"][0]["storage_usd_month"] == pytest.approx(plan["options"][0]["total_bytes"] / 1e9 * 0.023)
    cli.main(["plan", str(path), "--root", str(tmp_path / "root"), "--images", "1000", "--size", "640x480"])
    out = capsys.readouterr().out
    assert "stored as" in out
    assert "Recommended: " in out
    assert not (tmp_path / "root").exists()


def test_stated_hardware_computes_at_the_peak_of_the_encoders_type() -> None:
    stated = PlanCluster(devices=2, device_share=0.5)
    assert stated.cluster(10**12, "fp32").views_per_s == pytest.approx(67)
    assert stated.cluster(10**12, "bf16").views_per_s == stated.cluster(10**12, "fp16").views_per_s == pytest.approx(989)
    assert PlanCluster(devices=2, device_share=0.5, device_tflops=100).cluster(10**12, "bf16").views_per_s == pytest.approx(100)


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
    note_cache_plan(experiment)
    noted = planned_cache(experiment)
    assert noted is not None
    assert noted.seconds is None
    assert noted.num_views == plan.num_views
    assert noted.total_bytes == pytest.approx(plan.options[0].total_bytes, rel=0.02)  # in units of another size
