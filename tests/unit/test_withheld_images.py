"""Images that cannot be read for a while: an outage costs a run its time, never an image; one that is gone is refused, and costs a look."""

import contextlib
import dataclasses
import errno
import time

import pytest

from model.specs import fingerprint
from tests import small_data
from workers.caching import build as caching_build
from workers.caching.build import CacheRecord, cache_features
from workers.caching.repair import repair_cache
from workers.caching.units import UnitJob, prepare_unit, read_outcome
from workers.caching.verify import verify_cache
from workers.commits import Stage
from workers.dataset.samples import read_samples
from workers.errors import AccessDeniedError, CredentialsError, ObjectNotFoundError, StoreUnavailableError
from workers.execution import ExecutionSettings, SilentProgress
from workers.quarantine import QuarantineRow, can_be_read_now, look_again, read_quarantine
from workers.runtime import InlineCluster
from workers.storage import Store

SETTINGS = ExecutionSettings(feature_unit_bytes=40_000, encode_batch_views=5)
"""5 images of the small dataset in a unit, which is as many as may be refused."""


@pytest.fixture
def built(tmp_path, tiny_encoder_folder):
    """16 images of a folder beside the root, and no cache of them: (store, spec, samples, the folder)."""
    store, names = Store(str(tmp_path / "root")), [f"{number}.png" for number in range(16)]
    records = [{"image": name, "conversations": small_data.conversation("<image>\nq?", "a")} for name in names]
    source = small_data.write_llava(tmp_path / "llava", records, {name: small_data.png(number) for number, name in enumerate(names)})
    dataset = small_data.dataset_spec(sources=(source,))
    small_data.build(store, dataset)
    return store, small_data.feature_spec(dataset, tiny_encoder_folder), read_samples(store, fingerprint(dataset)), tmp_path / "llava" / "images"


@contextlib.contextmanager
def away(folder):
    """A folder that nobody sees."""
    aside = folder.rename(folder.with_name("aside"))
    try:
        yield
    finally:
        aside.rename(folder)


class Outage(InlineCluster):
    """A cluster whose machines do not see the folder for some units: `blind` for those that prepare alone, else for the driver too."""

    def __init__(self, folder, units, *, blind):
        self.folder, self.units, self.blind = folder, units, blind
        self.prepared = []

    def pipeline(self, prepare, finisher, jobs, **numbers):
        finish = finisher()
        for job in jobs:
            self.prepared.append(len(job.samples))
            with contextlib.ExitStack() as gone:
                if job.number in self.units:
                    gone.enter_context(away(self.folder))
                prepared = prepare(job)
                if self.blind:
                    gone.close()
                yield finish(prepared)


def cache(store, spec, cluster=None):
    return cache_features(spec, store, SETTINGS, SilentProgress(), cluster=cluster or InlineCluster())


def assert_whole(store, spec, num_quarantined=0):
    key = fingerprint(spec)[:16]
    assert len(read_quarantine(store, "cache-features", key)) == num_quarantined
    found = verify_cache(spec, store, SETTINGS, SilentProgress(), stage_key=key, cluster=InlineCluster(), seed=0, num_encoded=2)
    assert found.faults == ()
    assert (found.num_cached, found.num_twice) == (16 - num_quarantined, 0)


def outcomes_of(stage):
    return [read_outcome(stage.store, path) for path in stage.store.list(stage.path("units"))]


def test_a_machine_that_does_not_see_the_images_is_not_believed(built):
    store, spec, _, folder = built
    with pytest.raises(StoreUnavailableError, match=r"prepared unit 1 found it refused \(missing_file: .*here it can be read.*mounts") as told:
        cache(store, spec, Outage(folder, {1}, blind=True))
    assert told.value.retryable
    stage = Stage.open(store, "cache-features", spec)
    assert [(outcome.number, outcome.quarantined) for outcome in outcomes_of(stage)] == [(0, ())]
    again = Outage(folder, set(), blind=True)
    record = cache(store, spec, again)
    assert again.prepared == [5, 5, 1]  # what was done is kept
    assert (record.num_cached, record.num_quarantined) == (16, 0)
    assert_whole(store, spec)


def test_a_machine_that_sees_no_image_at_all_is_told_as_such_and_not_as_bad_images(built):
    store, spec, _, folder = built
    with pytest.raises(StoreUnavailableError, match="one has lost a mount"):
        cache(store, spec, Outage(folder, set(range(4)), blind=True))


def test_an_outage_for_everybody_that_ends_before_the_run_does_costs_no_image(built):
    store, spec, _, folder = built
    cluster = Outage(folder, {1}, blind=False)
    record = cache(store, spec, cluster)
    # The new plan has those alone that were refused, as its unit 0.
    assert cluster.prepared == [5, 5, 5, 1, 5]
    assert (record.num_cached, record.num_quarantined, record.num_units, record.num_held) == (16, 0, 1, 11)
    assert_whole(store, spec)


def test_an_outage_that_ends_after_the_run_was_stopped_costs_no_image(built):
    store, spec, _, folder = built

    class Stops(SilentProgress):
        def advance(self, count=1, **facts):
            if len(outcomes_of(Stage.open(store, "cache-features", spec))) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_features(spec, store, SETTINGS, Stops(), cluster=Outage(folder, {1}, blind=False))
    assert len(read_quarantine(store, "cache-features", fingerprint(spec)[:16])) == 5
    again = Outage(folder, set(), blind=True)
    assert cache(store, spec, again).num_quarantined == 0
    assert again.prepared == [5, 5, 1]
    assert_whole(store, spec)


def test_an_outage_that_outlasts_the_run_is_over_by_a_repair(built):
    store, spec, _, folder = built
    gone = [folder / f"{number}.png" for number in (2, 7, 8)]
    aside = [path.rename(path.with_suffix(".aside")) for path in gone]
    assert cache(store, spec).num_quarantined == 3
    assert repair_cache(spec, store, SETTINGS, SilentProgress(), cluster=InlineCluster()).reopened == ()
    assert_whole(store, spec, 3)
    aside[0].rename(gone[0])
    aside[1].rename(gone[1])
    assert cache(store, spec).num_quarantined == 3  # found done: what is committed is not looked at by a run
    assert repair_cache(spec, store, SETTINGS, SilentProgress(), cluster=InlineCluster()).reopened == (fingerprint(spec)[:16],)
    cluster = Outage(folder, set(), blind=True)
    record = cache(store, spec, cluster)
    assert cluster.prepared == [3]
    assert (record.num_cached, record.num_held, record.num_quarantined) == (15, 13, 1)
    assert_whole(store, spec, 1)


def test_images_that_are_gone_are_looked_for_once_and_found_gone(built, monkeypatch):
    store, spec, _, folder = built
    for number in (2, 7, 8):
        (folder / f"{number}.png").unlink()
    (folder / "11.png").write_bytes(small_data.png(99))
    record = cache(store, spec)
    assert record.quarantined_by_reason == {"content_changed": 1, "missing_file": 3}
    stage = Stage.open(store, "cache-features", spec)
    asked, read = [], Store.read_reference
    monkeypatch.setattr(Store, "read_reference", lambda store, reference: asked.append(reference) or read(store, reference))
    monkeypatch.setattr(caching_build, "_run", lambda *_: pytest.fail("computed again"))
    assert cache(store, spec) == record
    assert asked == []
    stage.reopen()  # as if killed just before its commit
    assert dataclasses.replace(cache(store, spec), seconds=record.seconds) == record
    assert sorted(path.rpartition("/")[2] for path in asked) == ["2.png", "7.png", "8.png"]


def test_a_source_that_is_away_does_not_keep_a_finished_run_from_its_end(built, monkeypatch):
    store, spec, _, folder = built
    (folder / "2.png").unlink()
    cache(store, spec)
    Stage.open(store, "cache-features", spec).reopen()

    def fail(store, reference):
        raise StoreUnavailableError("the store did not answer")

    monkeypatch.setattr(Store, "read_reference", fail)
    assert cache(store, spec).num_quarantined == 1


@pytest.mark.parametrize("error", [StoreUnavailableError("it did not answer"), CredentialsError("they expired")])
def test_a_refusal_is_not_believed_where_it_cannot_be_checked(built, error):
    store, spec, _, folder = built

    class Fails(Outage):
        def pipeline(self, *arguments, **numbers):
            for outcome in super().pipeline(*arguments, **numbers):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Store, "read_reference", fail)
                    yield outcome

    def fail(store, reference):
        raise error

    with pytest.raises(type(error), match=str(error)):
        cache(store, spec, Fails(folder, {1}, blind=True))
    assert [outcome.number for outcome in outcomes_of(Stage.open(store, "cache-features", spec))] == [0]


def test_a_denied_image_is_looked_at_again(built, monkeypatch):
    store, spec, *_ = built
    read, denied = Store.read_reference, True

    def refuse(store, reference):
        if denied and reference.endswith("/3.png"):
            raise AccessDeniedError("not for you")
        return read(store, reference)

    monkeypatch.setattr(Store, "read_reference", refuse)
    assert cache(store, spec).quarantined_by_reason == {"access_denied": 1}
    denied = False
    assert len(repair_cache(spec, store, SETTINGS, SilentProgress(), cluster=InlineCluster()).reopened) == 1
    assert cache(store, spec).num_quarantined == 0
    assert_whole(store, spec)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_planning_anew_may_be_cut_off_anywhere(built, monkeypatch, after):
    store, spec, _, folder = built
    path = folder / "2.png"
    aside = path.rename(folder / "aside")
    (folder / "7.png").unlink()
    assert cache(store, spec).num_quarantined == 2
    Stage.open(store, "cache-features", spec).reopen()
    aside.rename(path)
    delete, done = Store.delete, []

    def cut_off(store, path):
        if "/units" in path:
            done.append(path)
            if len(done) > after:
                raise OSError(errno.EIO, "the power is off")
        delete(store, path)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", cut_off)
        with pytest.raises(OSError, match="power"):
            cache(store, spec)
    assert store.exists(Stage.open(store, "cache-features", spec).path("units.json")) == (after == 0)
    record = cache(store, spec)
    assert (record.num_cached, record.num_quarantined) == (15, 1)
    assert_whole(store, spec, 1)


def test_what_a_driver_does_by_a_plan_that_was_forgotten_is_not_taken_for_the_new_one(built, monkeypatch):
    """It runs beside this one, and puts a unit on record after the other one has planned anew: of the same number, and other images."""
    store, spec, _, folder = built
    stage = Stage.open(store, "cache-features", spec)
    path = folder / "2.png"
    aside = path.rename(folder / "aside")
    cache(store, spec)
    stage.reopen()
    unit, refusals = "units/unit-000000.json", caching_build.quarantine_table(store)
    old, entered = store.read_json(stage.path(unit)), refusals.files()
    forget = caching_build.forget_plan

    def forgotten(stage):
        forget(stage)
        store.write_json(stage.path(unit), old)
        refusals.commit(entered)

    aside.rename(path)
    with monkeypatch.context() as patch:
        patch.setattr(caching_build, "forget_plan", forgotten)
        # Its refusals are in the books as well, so that they do not balance, this time.
        with pytest.raises(caching_build.IncompleteError, match="the quarantine holds 1"):
            cache(store, spec)
    assert stage.committed(CacheRecord) is None
    record = cache(store, spec)
    assert (record.num_cached, record.num_quarantined) == (16, 0)
    assert_whole(store, spec)


def row(number, reason="missing_file"):
    return QuarantineRow(reason=reason, source="s", item=f"{number}.png", index=number, bytes_sha256=f"{number:064x}", detail="")


def test_a_look_tells_what_the_store_says_now(root, monkeypatch):
    store = Store(root)
    store.write_bytes("1.png", b"here")
    rows = [row(0), row(1), row(2, "access_denied"), row(1, "content_changed")]
    found = {looked.index: error for looked, error in look_again(store, rows)}
    assert found.keys() == {0, 1, 2}
    assert found[1] is None
    assert all(isinstance(found[index], ObjectNotFoundError) for index in (0, 2))
    assert can_be_read_now(store, rows)
    assert not can_be_read_now(store, [row(0), row(1, "content_changed")])
    assert not can_be_read_now(store, [])


def test_a_look_ends_with_the_first_image_that_is_there(root, monkeypatch):
    asked = []

    def read(store, reference):
        asked.append(reference)
        if reference != "0.png":
            time.sleep(0.05)
            raise ObjectNotFoundError("nothing lies there")
        return b""

    monkeypatch.setattr(Store, "read_reference", read)
    assert can_be_read_now(Store(root), [row(number) for number in range(2000)])
    assert len(asked) < 1000


def test_units_know_their_plan(built):
    store, spec, samples, _ = built
    prepared = prepare_unit(UnitJob(spec=spec, root=store.root, number=0, samples=tuple(samples[:1]), plan="mine"))
    assert prepared.job.plan == "mine"
    cache(store, spec)
    stage = Stage.open(store, "cache-features", spec)
    assert {outcome.plan for outcome in outcomes_of(stage)} == {store.read_json(stage.path("units.json"))["name"]}
