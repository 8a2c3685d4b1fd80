"""Which samples a run leaves out, and that every later look at the run leaves out the same."""

from collections import Counter
from dataclasses import replace

import pytest

from model.connector import build_connector
from model.errors import LanguageModelError
from model.specs import fingerprint
from tests.tiny_training import build_small_store, draw_spoilt_square, draw_square, fake_samples, tiny_training_spec
from workers.dataset.samples import read_samples
from workers.errors import ErrorBudgetError
from workers.execution import ExecutionSettings, SilentProgress
from workers.quarantine import read_quarantine
from workers.storage import Store
from workers.training import screening
from workers.training.screening import refusals, screen


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    root = tmp_path_factory.mktemp("screening") / "root"
    return build_small_store(str(root), tiny_encoder_folder, tiny_language_model_folder, num_images=40, renderer=draw_spoilt_square)


@pytest.fixture
def fresh(small, tmp_path):
    """The same without anything of training."""
    import shutil

    shutil.copytree(small[0].local_path(), tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "runs" / "train-connector", ignore_errors=True)
    shutil.rmtree(tmp_path / "root" / "quarantine", ignore_errors=True)
    return Store(str(tmp_path / "root")), small[1]


def screened(store, spec, **settings):
    return screen(spec, store, ExecutionSettings(**settings), SilentProgress())


def test_marked_samples_are_refused_and_no_others(fresh):
    store, spec = fresh
    found = screened(store, spec)
    train = read_samples(store, spec.dataset_fingerprint, "train")
    spoilt = [sample for sample in train if "<|end|>" in sample.turns[1].question]
    assert found.num_samples == len(train)
    assert found.refused == {sample.index for sample in spoilt}
    assert found.by_reason == {"conversation_marks": len(spoilt)}
    rows = read_quarantine(store, "train-connector", fingerprint(spec)[:16])
    assert tuple(rows) == found.rows
    assert [row.item for row in rows] == [sample.sample_id for sample in spoilt]
    assert all("in the template own: the question of turn 2 holds '<|end|>'" in row.detail for row in rows)


def test_the_first_screening_on_record_stands(fresh, monkeypatch):
    """Another version of a library may tokenise otherwise; a run that is resumed must see what it saw."""
    store, spec = fresh
    first = screened(store, spec)
    monkeypatch.setattr(screening, "_screened", lambda *arguments: pytest.fail("screened again"))
    assert screened(store, spec) == first
    assert len(read_quarantine(store, "train-connector", fingerprint(spec)[:16])) == len(first.rows)


def test_a_rank_that_was_slower_takes_what_is_on_record(fresh, monkeypatch):
    store, spec = fresh
    real = screening._screened

    def slower(*arguments):
        monkeypatch.setattr(screening, "_screened", real)
        screened(store, spec)
        return replace(real(*arguments), rows=())

    monkeypatch.setattr(screening, "_screened", slower)
    assert screened(store, spec).rows


def test_a_run_that_died_before_its_rows_were_committed_commits_them(fresh, monkeypatch):
    store, spec = fresh
    with monkeypatch.context() as patch:
        patch.setattr(screening, "commit_quarantine", lambda *arguments: None)
        first = screened(store, spec)
    assert read_quarantine(store, "train-connector", fingerprint(spec)[:16]) == []
    screened(store, spec)
    assert tuple(read_quarantine(store, "train-connector", fingerprint(spec)[:16])) == first.rows


def plain_everywhere(spec):
    """Every conversation has two turns, and `plain` takes one."""
    align = tuple(replace(phase, template="plain") for phase in spec.schedule.align if not phase.branch.blind)
    return replace(spec, schedule=replace(spec.schedule, align=align, sft=None))


def test_a_run_without_a_conversation_left_is_an_error_and_leaves_no_record(fresh):
    store, spec = fresh
    spec = plain_everywhere(spec)
    for fraction in (0.05, 1.0):
        with pytest.raises(ErrorBudgetError, match=r"(\d+) of \1 inputs were refused.*conversation_template .*plain holds one caption"):
            screened(store, spec, max_quarantined_fraction=fraction)
    assert not store.exists(f"runs/train-connector/{fingerprint(spec)[:16]}/screening.json")
    assert read_quarantine(store, "train-connector", fingerprint(spec)[:16]) == []


def test_the_budget_is_per_source_and_can_be_raised(fresh, monkeypatch):
    store, spec = fresh
    monkeypatch.setattr("workers.quarantine._ALWAYS_ALLOWED", 0)
    with pytest.raises(ErrorBudgetError, match=r"source rendered/charts: .* conversation_marks .*or raise max_quarantined_fraction"):
        screened(store, spec)
    assert screened(store, spec, max_quarantined_fraction=0.5).rows


def test_a_template_that_the_tokenizer_does_not_know_is_no_error_of_a_row(fresh):
    store, spec = fresh
    with pytest.raises(LanguageModelError, match="llama3"):
        screened(store, replace(spec, schedule=replace(spec.schedule, sft=replace(spec.schedule.sft, template="llama3"))))


def test_progress_is_told_in_samples(fresh, monkeypatch):
    store, spec = fresh
    told = []

    class Recorder(SilentProgress):
        def start(self, what, total, done=0):
            told.append((what, total, done))

        def advance(self, count=1, **facts):
            told.append((count, facts["quarantined"]))

    monkeypatch.setattr(screening, "_SAMPLES_AT_ONCE", 10)
    found = screen(spec, store, ExecutionSettings(), Recorder())
    assert told[0] == ("reading conversations", found.num_samples, 0)
    assert sum(count for count, _ in told[1:]) == found.num_samples
    assert told[-1][1] == len(found.rows)


def test_one_row_per_sample_by_the_first_template_that_refuses_it(tiny_language_model_folder, tiny_tokenizer):
    from model.chat import with_template

    spec = tiny_training_spec(tiny_language_model_folder)
    connector = build_connector(spec.connector, spec.features.encoder, hidden=1, embedding_rms=1.0, seed=0)
    samples = fake_samples()
    samples[4] = replace(samples[4], turns=(replace(samples[4].turns[0], answer="one <|user|> two"),))
    tokenizers = {template: with_template(tiny_tokenizer, template) for template in ("own", "plain")}
    phase = spec.schedule.align[0]
    phases = [phase, replace(phase, name="captions", template="plain")]
    rows = list(refusals(samples, phases, tokenizers, spec.features, connector, 2048))
    several = [sample for sample in samples if len(sample.turns) > 1]
    assert Counter(row.index for row in rows) == Counter([4, *(sample.index for sample in several)])
    by_index = {row.index: row for row in rows}
    assert by_index[4].reason == "conversation_marks"
    assert by_index[several[0].index].reason == "conversation_template"
    assert by_index[several[0].index].detail.startswith("in the template plain: ")
    long = list(refusals(samples[:1], phases[:1], {"own": tiny_tokenizer}, spec.features, connector, 40))
    assert [row.reason for row in long] == ["conversation_too_long"]
    # A phase that does not see a sample's source says nothing of it.
    elsewhere = [phase, replace(phase, name="captions", template="plain", sources=("llava_json/captions",))]
    assert {row.index for row in refusals(samples, elsewhere, tokenizers, spec.features, connector, 2048)} == {4}


def test_without_marks_nothing_is_refused(tmp_path, tiny_encoder_folder, tiny_language_model_folder):
    store, spec = build_small_store(str(tmp_path / "root"), tiny_encoder_folder, tiny_language_model_folder, num_images=10, renderer=draw_square)
    assert screened(store, spec).rows == ()
    assert read_quarantine(store, "train-connector", fingerprint(spec)[:16]) == []
