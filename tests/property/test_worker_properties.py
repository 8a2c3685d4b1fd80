"""Properties that hold for every size, order and cut."""

import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from PIL import Image

from model.architectures import known_encoder
from model.images import cut_views
from model.specs import FeatureSpec, MapSpec, canonical_json
from model.views import ViewSpec, plan_views
from workers.caching.layout import BRANCHES
from workers.caching.units import UnitPlan, UnitSize, feature_bytes, num_views, plan_groups, unit_job
from workers.commits import from_json, to_json
from workers.dataset.samples import ImageRef, Sample
from workers.dataset.sources import split_of
from workers.dataset.spec import DatasetSpec, LegibilitySpec, RenderedSourceSpec
from workers.storage import Store


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), view_px=st.sampled_from([14, 28]), max_slices=st.integers(2, 9))
def test_local_views_hold_every_pixel_of_the_scaled_image_once(width, height, view_px, max_slices):
    plan = plan_views(width, height, view_px, ViewSpec(max_slices=max_slices))
    white = Image.new("RGB", (width, height), "white")
    views = cut_views(white, plan)
    assert views.shape == (1 + plan.rows * plan.columns, 3, view_px, view_px)
    assert views[0].min() == 255
    # White is the image, black the padding.
    assert np.count_nonzero(views[1:, 0]) == plan.scaled_width_px * plan.scaled_height_px


@settings(max_examples=50, deadline=None)
@given(data=st.data(), num_images=st.integers(0, 40), unit_bytes=st.integers(1, 10**7), pixel_bytes=st.integers(1, 10**7))
def test_units_compute_exactly_what_is_missing(data, num_images, unit_bytes, pixel_bytes):
    encoder = known_encoder("openai/clip-vit-base-patch32")
    maps = (MapSpec(layers=(5,)), MapSpec(layers=(0, 1)), MapSpec(layers=(7,), pool=7))
    spec = FeatureSpec(dataset_fingerprint="0" * 64, encoder=encoder, views=ViewSpec(), global_maps=maps, local_maps=maps[1:])
    asked = [(branch, item.name) for branch in BRANCHES for item in spec.maps(branch)]
    image = st.lists(st.booleans(), min_size=len(asked), max_size=len(asked))
    kinds = data.draw(st.lists(image, min_size=1, max_size=3))  # runs cache whole datasets, so that few kinds occur
    held = np.array([data.draw(st.sampled_from(kinds)) for _ in range(num_images)], dtype=bool).reshape(num_images, len(asked))
    samples = [small_sample(number) for number in range(num_images)]
    size = UnitSize(feature_bytes=unit_bytes, pixel_bytes=pixel_bytes)
    plan = plan_groups(spec, samples, {f"{branch}/{name}": held[:, place] for place, (branch, name) in enumerate(asked)}, size)
    plan = UnitPlan(num_images=num_images, samples_sha256="", num_held=0, planned_bytes=0, groups=tuple(plan))
    assert from_json(UnitPlan, to_json(plan)) == plan
    computed = held.copy()
    for unit in plan.units:
        for image in unit.images:
            for branch, names in (("global", unit.global_maps), ("local", unit.local_maps)):
                for name in names:
                    assert not computed[image, asked.index((branch, name))]
                    computed[image, asked.index((branch, name))] = True
    assert computed.all()
    assert [unit.number for unit in plan.units] == list(range(len(plan.units)))
    assert len(plan.groups) <= len({tuple(kind) for kind in kinds})
    for unit in plan.units:
        job = unit_job(spec, "", unit, samples)
        views = sum(num_views(job.spec, sample, branch) for sample in job.samples for branch in BRANCHES)
        small = feature_bytes(job.spec, job.samples) <= unit_bytes and views * 3 * encoder.view_px**2 <= pixel_bytes
        assert small or len(job.samples) == 1


def small_sample(number):
    image = ImageRef(sha256=f"{number:064x}", path=f"images/{number}", width_px=300, height_px=200)
    return Sample(sample_id=str(number), index=number, image=image, family="", source="", split="train", licence="", detail_score=0.0, turns=())


@settings(max_examples=50, deadline=None)
@given(digest=st.text("0123456789abcdef", min_size=64, max_size=64), seed=st.integers(0, 9), low=st.floats(0, 0.99), high=st.floats(0, 0.99))
def test_a_larger_held_out_share_only_adds_images(digest, seed, low, high):
    low, high = sorted((low, high))
    if split_of(digest, seed, low) == "held_out":
        assert split_of(digest, seed, high) == "held_out"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(-(2**40), 2**40), fraction=st.floats(0, 0.99), families=st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
def test_every_spec_survives_its_json(seed, fraction, families):
    spec = DatasetSpec(
        sources=tuple(RenderedSourceSpec(family=family, num_images=3) for family in families),
        seed=seed,
        held_out_fraction=fraction,
        view_px=56,
        views=ViewSpec(),
        legibility=LegibilitySpec(local_min_px=7.0, global_max_px=4.0),
    )
    assert from_json(DatasetSpec, to_json(spec)) == spec
    assert canonical_json(from_json(DatasetSpec, to_json(spec))) == canonical_json(spec)


NAMES = st.lists(st.sampled_from(["a", "b", "a b", "ab"]), min_size=1, max_size=3).map("/".join)


class StoreAgainstDict(RuleBasedStateMachine):
    """A local store does what a dict does."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="loupe-store-")
        self.store = Store(self.folder.name)
        self.expected = {}
        self.folders = set()

    def teardown(self):
        self.folder.cleanup()

    def blocked(self, name):
        """A name that is or was a folder of another, or lies below a file, exists in object stores only: a folder stays when its last file goes."""
        return name in self.folders or any(name.startswith(other + "/") for other in self.expected)

    def remember(self, name, data):
        self.expected[name] = data
        self.folders |= {name[:place] for place, letter in enumerate(name) if letter == "/"}

    @rule(name=NAMES, data=st.binary(max_size=20), sync=st.booleans())
    def write(self, name, data, sync):
        if not self.blocked(name):
            self.store.write_bytes(name, data, sync=sync)
            self.store.sync([name])
            self.remember(name, data)

    @rule(name=NAMES, data=st.binary(max_size=20))
    def create(self, name, data):
        if not self.blocked(name):
            assert self.store.create_bytes(name, data) == (name not in self.expected)
            self.remember(name, self.expected.get(name, data))

    @rule(name=NAMES)
    def delete(self, name):
        if not self.blocked(name):
            self.store.delete(name)
            self.expected.pop(name, None)

    @rule(name=NAMES)
    def list_folder(self, name):
        assert self.store.list(name) == sorted(other for other in self.expected if other.startswith(name + "/"))

    @invariant()
    def equal(self):
        assert {name: self.store.read_bytes(name) for name in self.store.list()} == self.expected


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck))
TestStoreAgainstDict = pytest.mark.timeout(60)(TestStoreAgainstDict)
