from dataclasses import dataclass

import pytest

from model.specs import MapSpec
from model.views import ViewSpec
from workers.commits import Stage, from_json, to_json
from workers.dataset.spec import DatasetSpec, LegibilitySpec, LlavaJsonSourceSpec, RenderedSourceSpec
from workers.errors import RecordError, SpecChangedError
from workers.storage import Store


@dataclass(frozen=True, kw_only=True)
class Record:
    count: int
    seconds: float
    by_name: dict[str, int]
    names: tuple[str, ...] = ()


def dataset_spec(**changes):
    fields = {
        "sources": (
            RenderedSourceSpec(family="charts", num_images=3),
            LlavaJsonSourceSpec(records="a.json", images="images", records_sha256="0" * 64),
        ),
        "seed": 0,
        "held_out_fraction": 0.25,
        "view_px": 56,
        "views": ViewSpec(),
        "legibility": LegibilitySpec(local_min_px=7.0, global_max_px=4.0),
    }
    return DatasetSpec(**(fields | changes))


def test_a_stage_is_done_once_its_record_is_written(root):
    store = Store(root)
    stage = Stage.open(store, "evaluate", ViewSpec())
    assert stage.committed(Record) is None
    first = stage.commit(Record(count=1, seconds=2, by_name={"a": 3}))
    assert Stage.open(store, "evaluate", ViewSpec()).committed(Record) == first
    # Of two processes that finish, the first record stands for both.
    assert stage.commit(Record(count=9, seconds=9, by_name={})) == first


def test_another_spec_in_the_folder_is_refused_field_by_field(root):
    store = Store(root)
    stage = Stage.open(store, "evaluate", ViewSpec(max_slices=6))
    stored = store.read_json(stage.path("spec.json"))
    stored["spec"]["max_slices"] = 9
    store.write_json(stage.path("spec.json"), stored)
    with pytest.raises(SpecChangedError, match=r"spec\.max_slices: recorded 9, asked 6") as caught:
        Stage.open(store, "evaluate", ViewSpec(max_slices=6))
    assert caught.value.differences == ("spec.max_slices: recorded 9, asked 6",)


def test_seconds_add_up_over_attempts(root):
    stage = Stage.open(Store(root), "evaluate", ViewSpec())
    with pytest.raises(KeyboardInterrupt), stage.attempt():
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), stage.attempt():
        _ = 1 / 0
    accounts = [stage.store.read_json(path) for path in stage.store.list(stage.path("attempts"))]
    assert sorted(account["outcome"] for account in accounts) == ["failed: ZeroDivisionError", "interrupted"]
    with stage.attempt() as timer:
        assert timer.seconds >= sum(account["seconds"] for account in accounts)


@pytest.mark.parametrize("spec", [ViewSpec(), MapSpec(layers=(1, 2)), dataset_spec()])
def test_specs_survive_json(spec):
    assert from_json(type(spec), to_json(spec)) == spec


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"count": "1", "seconds": 1, "by_name": {}}, r"value\.count: expected int, found '1'"),
        ({"count": 1, "seconds": 1}, "needs the field 'by_name'"),
        ({"count": 1, "seconds": 1, "by_name": {}, "x": 1}, "has no field 'x'"),
        ({"count": 1, "seconds": True, "by_name": {}}, "expected float"),
        ({"count": 1, "seconds": 1.0, "by_name": {"a": None}}, r"value\.by_name\.a"),
        ([], "expected the fields of Record"),
    ],
)
def test_a_record_of_another_shape_is_refused(value, message):
    with pytest.raises(RecordError, match=message):
        from_json(Record, value)


def test_a_union_is_told_apart_by_its_kind():
    broken = to_json(dataset_spec())
    broken["sources"][0]["kind"] = "unheard of"
    with pytest.raises(RecordError, match=r"sources\[0\]: fits none"):
        from_json(DatasetSpec, broken)


def test_what_is_no_plain_value_is_no_record():
    with pytest.raises(RecordError, match="found object"):
        to_json({"a": object()})
