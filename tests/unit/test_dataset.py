import dataclasses
import errno
import json
from pathlib import Path

import pytest

from model.errors import SpecError
from model.specs import fingerprint
from tests import small_data
from workers.commits import Stage
from workers.dataset.build import build_dataset, merge_duplicates, samples_table
from workers.dataset.samples import ImageRef, Sample, Turn, conversation_sha256, read_images, read_samples, samples_from_table, samples_to_table
from workers.dataset.sources import describe_llava_json, normalise_conversation, split_of
from workers.dataset.spec import LegibilitySpec, LlavaJsonSourceSpec, RenderedSourceSpec
from workers.errors import ErrorBudgetError, IncompleteError, SourceError, StorageError, TableError, WorkerError
from workers.execution import ExecutionSettings, SilentProgress
from workers.quarantine import read_quarantine
from workers.runtime import InlineCluster
from workers.storage import Store
from workers.tables import Table


@pytest.fixture
def store(root):
    return Store(root)


def quarantine_of(store, spec):
    return read_quarantine(store, "build-dataset", fingerprint(spec)[:16])


def test_a_rendered_dataset_is_complete_ordered_and_addressed_by_content(store):
    spec = small_data.dataset_spec()
    record = small_data.build(store, spec)
    samples = read_samples(store, fingerprint(spec))
    assert [sample.index for sample in samples] == list(range(16))
    assert [sample.sample_id for sample in samples[:2]] == ["noise-000000", "noise-000001"]
    assert record.num_samples == record.num_items == 16
    assert record.num_train + record.num_held_out == 16
    assert record.samples_by_family == {"grain": 6, "noise": 10}
    assert record.num_small_turns == record.num_turns == 32
    assert record.num_units == 4
    for sample in samples:
        assert sample.image_path == f"images/{sample.image_sha256[:2]}/{sample.image_sha256}.png"
        assert store.exists(sample.image_path)
    assert record.image_bytes == sum(len(store.read_bytes(path)) for path in store.list("images"))
    assert samples[0].turns == small_data.render_noise("noise", 0, spec).turns
    assert read_samples(store, record.dataset_fingerprint[:16], "held_out") == [sample for sample in samples if sample.split == "held_out"]


def test_a_committed_dataset_is_returned_without_work(store):
    spec = small_data.dataset_spec()
    record = small_data.build(store, spec)

    def never(family, number, spec):
        raise AssertionError("rendered again")

    again = build_dataset(spec, store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster(), renderer=never)
    assert again == record
    assert store.list(f"runs/build-dataset/{fingerprint(spec)[:16]}/staged") == []


def test_an_interrupted_build_goes_on_where_it_was(store):
    spec = small_data.dataset_spec()
    drawn = []

    def stops(family, number, spec):
        drawn.append((family, number))
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return small_data.render_noise(family, number, spec)

    def continues(family, number, spec):
        drawn.append((family, number))
        return small_data.render_noise(family, number, spec)

    settings = ExecutionSettings(images_per_build_unit=4)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(spec, store, settings, SilentProgress(), cluster=InlineCluster(), renderer=stops)
    with pytest.raises(TableError, match="holds no dataset"):
        read_samples(store, fingerprint(spec))
    drawn.clear()
    # Another unit size now: the plan on record counts.
    other = dataclasses.replace(settings, images_per_build_unit=5)
    build_dataset(spec, store, other, SilentProgress(), cluster=InlineCluster(), renderer=continues)
    assert len(drawn) == 12
    assert len(read_samples(store, fingerprint(spec))) == 16


@pytest.mark.parametrize("moment", ["quarantine", "samples", "record"])
def test_a_kill_between_commits_leaves_each_row_once(store, monkeypatch, tmp_path, moment):
    images = {f"{number}.png": small_data.png(number) for number in range(6)}
    records = [{"id": str(number), "image": f"{number}.png", "conversations": small_data.conversation("q?", "a")} for number in range(8)]
    spec = small_data.dataset_spec(sources=(small_data.write_llava(tmp_path / "llava", records, images),))
    commit, commit_record = Table.commit, Stage.commit

    def killed_after(self, files):
        result = commit(self, files)
        if self.path == moment:
            raise KeyboardInterrupt
        return result

    def killed_before_the_record(self, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "commit", killed_after)
        if moment == "record":
            patch.setattr(Stage, "commit", killed_before_the_record)
        with pytest.raises(KeyboardInterrupt):
            small_data.build(store, spec)
    # Repairing the refused records now is too late: the tables are being written.
    (tmp_path / "llava" / "images" / "6.png").write_bytes(small_data.png(6))
    assert Stage.commit is commit_record
    record = small_data.build(store, spec)
    assert (record.num_samples, record.num_quarantined) == (6, 2)
    assert len(read_samples(store, fingerprint(spec))) == 6
    assert [row.index for row in quarantine_of(store, spec)] == [6, 7]


def test_rows_that_the_table_does_not_hold_are_no_complete_dataset(store, monkeypatch):
    spec = small_data.dataset_spec()
    with monkeypatch.context() as patch:
        patch.setattr(Table, "commit", lambda self, files: None)
        with pytest.raises(IncompleteError, match=r"samples of dataset \w+ were written, the table holds 0"):
            small_data.build(store, spec)
    assert small_data.build(store, spec).num_samples == 16


def test_two_runs_at_once_that_see_different_images_agree(store, monkeypatch, tmp_path):
    """One run misses an image that lies there a moment later. Whichever freezes its units first decides, and the other one takes them."""
    images = {f"{number}.png": small_data.png(number) for number in range(5)}
    records = [{"id": str(number), "image": f"{number}.png", "conversations": small_data.conversation("q?", "a")} for number in range(6)]
    spec = small_data.dataset_spec(sources=(small_data.write_llava(tmp_path / "llava", records, images),))
    create = Store.create_json
    inner = []

    def races(self, path, value):
        if path.endswith("frozen.json") and not inner:
            inner.append(None)
            (tmp_path / "llava" / "images" / "5.png").write_bytes(small_data.png(5))
            inner.append(small_data.build(store, spec))  # the whole of the other run, between this one's last unit and its freezing
        return create(self, path, value)

    monkeypatch.setattr(Store, "create_json", races)
    outer = small_data.build(store, spec)
    assert outer == inner[1]
    assert (outer.num_samples, outer.num_quarantined) == (6, 0)
    assert len(read_samples(store, fingerprint(spec))) == 6
    assert quarantine_of(store, spec) == []


def test_duplicates_of_an_image_become_one_sample_with_all_questions(store, tmp_path):
    images = {"a.png": small_data.png(1), "copy of a.png": small_data.png(1), "b.png": small_data.png(2)}
    records = [
        {"id": "first", "image": "a.png", "conversations": small_data.conversation("<image>\none?", "1")},
        {"id": "b", "image": "b.png", "conversations": small_data.conversation("b?\n<image>", "b")},
        {"id": "second", "image": "copy of a.png", "conversations": small_data.conversation("one?", "another answer", "two?", "2")},
        {"id": "third", "image": "a.png", "conversations": small_data.conversation("three?", "3")},
    ]
    spec = small_data.dataset_spec(sources=(small_data.write_llava(tmp_path / "llava", records, images),))
    record = small_data.build(store, spec, images_per_build_unit=1)
    samples = read_samples(store, fingerprint(spec))
    assert [(sample.sample_id, sample.index) for sample in samples] == [("records-0000000", 0), ("records-0000001", 1)]
    assert [(turn.question, turn.answer) for turn in samples[0].turns] == [("one?", "1"), ("two?", "2"), ("three?", "3")]
    assert (record.num_items, record.num_samples, record.num_duplicates) == (4, 2, 2)
    assert store.list("images") == []
    assert store.read_reference(samples[0].image_path) == small_data.png(1)


def test_every_bad_record_is_a_row_with_its_reason(store, tmp_path):
    good = small_data.conversation("<image>\nq?", "a")
    images = {"good.png": small_data.png(1), "page.png": b"<html>", "half.png": small_data.png(2)[:500], "deep/in er.png": small_data.png(3)}
    records = [
        {"id": "ok", "image": "good.png", "conversations": good},
        {"id": "deep", "image": "deep/in er.png", "conversations": good},
        {"id": "text", "conversations": good},
        {"id": "gone", "image": "gone.png", "conversations": good},
        {"id": "html", "image": "page.png", "conversations": good},
        {"id": "half", "image": "half.png", "conversations": good},
        {"id": "away", "image": "../records.json", "conversations": good},
        {"id": "odd", "image": "good.png", "conversations": small_data.conversation("q?", "a", "q?")},
        "no record",
        {"id": "nul", "image": "go\0od.png", "conversations": good},
        {"id": "half a pair", "image": "good\ud800.png", "conversations": good},
        {"id": "half a pair", "image": "good.png", "conversations": small_data.conversation("q\ud800?", "a")},
    ]
    spec = small_data.dataset_spec(sources=(small_data.write_llava(tmp_path / "llava", records, images),))
    record = small_data.build(store, spec, max_quarantined_fraction=0.9)
    assert record.num_text_only == 0
    reasons = {row.index: row.reason for row in quarantine_of(store, spec)}
    assert reasons == {
        2: "placeholder_without_image",
        3: "missing_file",
        4: "not_an_image",
        5: "truncated",
        6: "bad_path",
        7: "bad_conversation",
        8: "bad_record",
    } | {
        9: "bad_path",
        10: "bad_path",
        11: "bad_conversation",
    }
    assert record.num_samples + record.num_quarantined == record.num_items == 12
    assert record.quarantined_by_reason["missing_file"] == 1
    by_index = {row.index: row for row in quarantine_of(store, spec)}
    assert by_index[4].bytes_sha256 is not None
    assert by_index[3].item == "gone.png"


@pytest.mark.parametrize("failure", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "no memory")])
def test_a_failure_of_the_process_is_no_image_s_fault(store, tmp_path, monkeypatch, failure):
    records = [{"id": str(number), "image": f"{number}.png", "conversations": small_data.conversation("q?", "a")} for number in range(12)]
    source = small_data.write_llava(tmp_path / "llava", records, {f"{number}.png": small_data.png(number) for number in range(12)})
    spec = small_data.dataset_spec(sources=(source,))
    read = Path.read_bytes

    def sometimes(path):
        if path.name == "7.png":
            raise failure
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", sometimes)
        with pytest.raises(StorageError, match=r"cannot read file://.*7\.png"):
            small_data.build(store, spec)
    assert small_data.build(store, spec).num_samples == 12
    assert quarantine_of(store, spec) == []


def test_too_many_bad_records_stop_the_stage_and_a_repair_resumes_it(store, tmp_path):
    records = [{"id": str(number), "image": f"{number}.png", "conversations": small_data.conversation("q?", "a")} for number in range(12)]
    source = small_data.write_llava(tmp_path / "llava", records, {"0.png": small_data.png(0)})
    spec = small_data.dataset_spec(sources=(source,))
    with pytest.raises(ErrorBudgetError, match=r"source llava_json/records: \d+ of 12 .*missing_file.*max_quarantined_fraction"):
        small_data.build(store, spec)
    for number in range(12):
        (tmp_path / "llava" / "images" / f"{number}.png").write_bytes(small_data.png(number))
    assert small_data.build(store, spec).num_samples == 12


@pytest.mark.parametrize("text", ["[]", '"records"', '{"id": 1}', "7", "no JSON", '{"id": 1}\n{"id": 2}'])
def test_records_that_are_no_array_are_refused_with_the_recipe(tmp_path, text):
    (tmp_path / "images").mkdir()
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(SourceError, match=r"records\.json should be a JSON array of "):
        describe_llava_json(str(tmp_path / "records.json"), str(tmp_path / "images"))


def test_an_image_folder_that_is_not_there_is_refused_with_the_recipe(tmp_path):
    (tmp_path / "records.json").write_text('[{"id": 1}]')
    with pytest.raises(SourceError, match=r"expected a folder with its images at .*, found nothing"):
        describe_llava_json(str(tmp_path / "records.json"), str(tmp_path / "images"))
    with pytest.raises(SourceError, match=r"it is a folder, not a file"):
        describe_llava_json(str(tmp_path), str(tmp_path))


def test_edited_records_are_refused(store, tmp_path):
    source = small_data.write_llava(tmp_path / "llava", [{"id": "1"}], {})
    assert describe_llava_json(source.records, source.images) == source
    (tmp_path / "llava" / "records.json").write_text("[]")
    with pytest.raises(SourceError, match="records were edited after the recipe"):
        small_data.build(store, small_data.dataset_spec(sources=(source,)))
    gone = LlavaJsonSourceSpec(records=str(tmp_path / "gone.json"), images=source.images, records_sha256="0" * 64)
    with pytest.raises(SourceError, match=r"gone\.json"):
        small_data.build(store, small_data.dataset_spec(sources=(gone,)))


def test_an_unknown_family_is_refused_before_work(store):
    with pytest.raises(SourceError, match="unknown family 'noise'; rendered sources can draw charts"):
        build_dataset(small_data.dataset_spec(), store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())


def test_a_fault_of_the_store_is_no_quarantine_row(store, monkeypatch):
    def fails(self, path, data, *, sync=True):
        raise WorkerError("the disk is full")

    monkeypatch.setattr(Store, "write_bytes", fails)
    with pytest.raises(WorkerError, match="the disk is full"):
        small_data.build(store, small_data.dataset_spec())


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("<image>\nwhat?", "this"), [("what?", "this")]),
        (("what?\n<image>", "this", "and?", "that"), [("what?", "this"), ("and?", "that")]),
        (("no placeholder", "fine"), [("no placeholder", "fine")]),
    ],
)
def test_conversations_are_normalised(texts, expected):
    assert [(turn.question, turn.answer) for turn in normalise_conversation(small_data.conversation(*texts))] == expected


def test_a_leading_answer_is_skipped():
    turns = normalise_conversation([{"from": "gpt", "value": "hello"}, *small_data.conversation("q?", "a")])
    assert [turn.question for turn in turns] == ["q?"]


@pytest.mark.parametrize(
    "conversations",
    [
        [],
        small_data.conversation("q?"),
        small_data.conversation("<image>", "empty question"),
        small_data.conversation("q?", "  "),
        small_data.conversation("<image> <image> two?", "a"),
        small_data.conversation("q?", "an answer with <image>"),
        [{"from": "human", "value": "q?"}, {"from": "human", "value": "q?"}],
        [{"from": "system", "value": "q?"}],
        [{"from": "human"}],
        ["q?"],
    ],
)
def test_other_conversations_are_refused(conversations):
    with pytest.raises(Exception, match=r"turn|alternate|stand once") as caught:
        normalise_conversation(conversations)
    assert caught.value.reason == "bad_conversation"


IMAGE = ImageRef(sha256="a" * 64, path="images/aa/a.png", width_px=4, height_px=3)


def sample(**changes):
    fields = {
        "sample_id": "s",
        "index": 0,
        "image": IMAGE,
        "family": "f",
        "source": "rendered/f",
        "split": "train",
        "licence": "CC0-1.0",
        "detail_score": 0.5,
        "turns": (
            Turn(question="q", answer="a", kind="k", detail="large"),
            Turn(question="r", answer="b", kind="k", detail="small", evidence=(1.0, 2.0, 3.0, 4.0)),
        ),
    }
    return Sample(**(fields | changes))


def test_samples_survive_their_table():
    samples = [sample(), sample(index=1, turns=()), sample(index=2, image=None)]
    assert samples_from_table(samples_to_table(samples)) == samples


def test_merging_does_not_depend_on_the_order():
    candidates = [sample(index=2, sample_id="late"), sample(index=0), sample(index=1, image=dataclasses.replace(IMAGE, sha256="b" * 64))]
    assert merge_duplicates(candidates) == merge_duplicates(candidates[::-1])
    merged, count = merge_duplicates(candidates)
    assert ([item.index for item in merged], count) == ([0, 1], 1)


def test_the_split_follows_the_image_alone():
    sides = [split_of(f"{number:064x}", 0, 0.25) for number in range(2000)]
    assert 0.2 < sides.count("held_out") / 2000 < 0.3
    assert split_of("a" * 64, 0, 0.0) == "train"
    assert [split_of(f"{number:064x}", 1, 0.25) for number in range(2000)] != sides


@pytest.mark.parametrize(
    "change",
    [
        {"sources": ()},
        {"sources": (RenderedSourceSpec(family="a", num_images=1), RenderedSourceSpec(family="a", num_images=2))},
        {"held_out_fraction": 1.01},
        {"turns_per_image": 0},
    ],
)
def test_a_spec_that_cannot_be_right_is_refused(change):
    with pytest.raises(SpecError):
        small_data.dataset_spec(**change)
    with pytest.raises(SpecError):
        LegibilitySpec(local_min_px=3.0, global_max_px=4.0)


def test_the_samples_table_is_read_by_duckdb_and_polars(store):
    import duckdb
    import polars as pl

    spec = small_data.dataset_spec()
    small_data.build(store, spec)
    table = samples_table(store)
    frame = pl.read_delta(table.uri)
    assert frame.filter(pl.col("dataset") == fingerprint(spec)[:16]).height == 16
    assert json.dumps(frame["turns"].to_list()[0][0]["kind"]).endswith('/digit"')
    files = [store.fs_path(f"samples/{file.path}") for file in table.files()]
    counts = duckdb.sql(f"select family, count(*), sum(len(turns)) from read_parquet({files!r}) group by family order by family").fetchall()
    assert counts == [("grain", 6, 12), ("noise", 10, 20)]


def test_records_without_an_image_are_samples_of_their_own(store, tmp_path):
    """A third of the file is text alone: no row is refused, none is merged but the one that says the same again."""
    images = {f"{number}.png": small_data.png(number) for number in range(8)}
    records = [{"id": str(number), "image": f"{number}.png", "conversations": small_data.conversation("<image>\nq?", "a")} for number in range(8)]
    records += [{"id": f"t{number}", "conversations": small_data.conversation("same question?", f"answer {number}")} for number in range(5)]
    records += [{"id": "null", "image": None, "model": "", "conversations": small_data.conversation("same question?", "answer 3")}]
    spec = small_data.dataset_spec(sources=(small_data.write_llava(tmp_path / "llava", records, images),))
    record = small_data.build(store, spec, images_per_build_unit=3)
    samples = read_samples(store, fingerprint(spec))
    alone = [sample for sample in samples if sample.text_only]
    assert quarantine_of(store, spec) == []
    assert (record.num_items, record.num_samples, record.num_duplicates, record.num_text_only) == (14, 13, 1, 5)
    assert record.samples_by_family == {"llava": 8, "text": 5}
    assert record.image_bytes == sum(len(data) for data in images.values())
    assert [(sample.sample_id, sample.index) for sample in alone] == [(f"records-{number:07d}", number) for number in range(8, 13)]
    assert [sample.turns[0].answer for sample in alone] == [f"answer {number}" for number in range(5)]
    assert {sample.turns[0].kind for sample in alone} == {"llava/text"}
    train = [sample for sample in samples if sample.split == "train"]
    assert sum(record.num_train_by_source.values()) == len(train)
    assert sum(record.num_train_text_only_by_source.values()) == sum(sample.text_only for sample in train)
    assert all(sample.split == split_of(sample.identity, spec.seed, spec.held_out_fraction) for sample in samples)
    images_alone = [dataclasses.replace(sample, turns=()) for sample in samples if not sample.text_only]
    assert read_images(store, fingerprint(spec)) == images_alone
    assert read_images(store, fingerprint(spec), "train") == [sample for sample in images_alone if sample.split == "train"]


@pytest.mark.parametrize("read", [read_samples, read_images])
def test_a_dataset_that_holds_an_image_twice_is_refused(store, read):
    table = samples_table(store)
    table.ensure()
    rows = samples_to_table([sample(), sample(index=1)])
    table.commit([table.write_file({"dataset": "a" * 16}, "part.parquet", [rows])])
    with pytest.raises(TableError, match=f"holds the image {'a' * 64} more than once"):
        read(store, "a" * 64)


def test_the_tables_say_null_where_there_is_no_image(store, tmp_path):
    import duckdb

    records = [{"image": "0.png", "conversations": small_data.conversation("q?", "a")}, {"conversations": small_data.conversation("q?", "a")}]
    spec = small_data.dataset_spec(sources=(small_data.write_llava(tmp_path / "llava", records, {"0.png": small_data.png(0)}),))
    small_data.build(store, spec)
    files = [store.fs_path(f"samples/{file.path}") for file in samples_table(store).files()]
    columns = "image_sha256 is null, image_path is null, width_px is null, height_px is null"
    assert duckdb.sql(f'select "index", {columns} from read_parquet({files!r}) order by 1').fetchall() == [(0, *[False] * 4), (1, *[True] * 4)]


def test_a_question_that_shows_an_image_that_the_record_does_not_name_is_refused():
    with pytest.raises(Exception, match=r"turn 2 asks about an image by <image>, but the record names none; give the record its `image`") as caught:
        normalise_conversation(small_data.conversation("hello", "hello", "and <image>?", "yes"), has_image=False)
    assert caught.value.reason == "placeholder_without_image"
    with pytest.raises(Exception, match="stand once") as caught:
        normalise_conversation(small_data.conversation("hello", "<image>"), has_image=False)
    assert caught.value.reason == "bad_conversation"


def test_text_alone_has_no_image_to_be_asked_for():
    alone = sample(image=None)
    assert alone.identity == conversation_sha256(alone.turns) != sample().identity == "a" * 64
    for name in ("image_sha256", "image_path", "width_px", "height_px"):
        with pytest.raises(AssertionError, match=r"sample s \(rendered/f\) is text alone, but its image was asked for"):
            getattr(alone, name)


def test_what_is_said_and_in_which_turn_makes_a_conversation():
    def turns(*texts):
        return tuple(Turn(question=texts[k], answer=texts[k + 1], kind="k", detail="large") for k in range(0, len(texts), 2))

    different = [turns("a", "b"), turns("ab", ""), turns("b", "a"), turns("a", "b", "c", "d"), turns("a", 'b","c'), turns("a b", "c")]
    assert len({conversation_sha256(one) for one in different}) == len(different)
    assert conversation_sha256((dataclasses.replace(turns("a", "b")[0], kind="other", detail="small"),)) == conversation_sha256(turns("a", "b"))


def test_a_samples_table_that_knows_no_text_alone_is_refused(store):
    import pyarrow as pa

    from workers.dataset.samples import SAMPLES_SCHEMA

    older = pa.schema([field.with_nullable(field.name == "turns") for field in SAMPLES_SCHEMA])
    Table(store, "samples", older, ("dataset",)).ensure()
    with pytest.raises(
        TableError, match=r"expected \['sample_id', 'index', 'image_sha256 or null'.*made by another version of Loupe. Use another root"
    ):
        small_data.build(store, small_data.dataset_spec())
