"""From a trained tiny run to counts, an export folder and an answer, in one process."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from model.errors import ConversationError, ExportError, ImageError, SpecError
from model.export import load_export
from model.metrics import exact_match
from model.specs import fingerprint
from tests.tiny_training import build_small_store, draw_spoilt_square, tiny_schedule
from workers.dataset.samples import read_samples
from workers.errors import ErrorBudgetError, EvaluationError, ExportingError, TrainingError
from workers.evaluation import EvaluationSpec, evaluate
from workers.execution import ExecutionSettings, SilentProgress
from workers.exporting import ExportSpec, export
from workers.quarantine import read_quarantine
from workers.storage import Store
from workers.training.assemble import load_trained
from workers.training.run import train_connector, train_stage

pytestmark = pytest.mark.slow  # trains with DeepSpeed

EXECUTION = ExecutionSettings(device="cpu", num_cpus=1, checkpoint_every_steps=100, eval_batch_size=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """A run whose stages ran in this process; `train_connector` finds them done and needs no Ray."""
    root = tmp_path_factory.mktemp("run") / "root"
    store, spec = build_small_store(str(root), tiny_encoder_folder, tiny_language_model_folder, schedule=tiny_schedule(steps=2))
    for stage in ("align", "sft"):
        train_stage(spec, store, EXECUTION, stage, threads=1)
    record = train_connector(spec, store, EXECUTION, SilentProgress())
    return store, spec, record


def evaluation_spec(spec, **changes):
    values = {"training_fingerprint": fingerprint(spec), "dataset_fingerprint": spec.dataset_fingerprint, "max_new_tokens": 4}
    return EvaluationSpec(**(values | changes))


@pytest.fixture(scope="module")
def evaluated(trained):
    store, spec, _ = trained
    wanted = evaluation_spec(spec)
    return wanted, evaluate(wanted, spec, store, EXECUTION, SilentProgress())


@pytest.fixture(scope="module")
def exported(trained, evaluated):
    store, spec, _ = trained
    wanted = ExportSpec(training_fingerprint=fingerprint(spec), evaluation_fingerprint=fingerprint(evaluated[0]))
    return wanted, export(wanted, spec, store, EXECUTION, SilentProgress())


def test_the_training_record(trained):
    store, spec, record = trained
    assert record.steps == 10
    assert record.num_images == len(read_samples(store, spec.dataset_fingerprint, "train"))
    assert record.files.keys() == {"connector.safetensors", "language_model.safetensors"}
    assert train_connector(spec, store, EXECUTION, SilentProgress()) == record


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """A run over a dataset with questions that can be neither trained on nor asked, in both splits, asked in another template than aligned."""
    root = tmp_path_factory.mktemp("spoilt") / "root"
    store, spec = build_small_store(
        str(root), tiny_encoder_folder, tiny_language_model_folder, num_images=40, renderer=draw_spoilt_square, schedule=tiny_schedule(steps=1)
    )
    spec = replace(
        spec,
        schedule=replace(spec.schedule, sft=replace(spec.schedule.sft, template="vicuna_v1")),
        language_model=replace(spec.language_model, template="vicuna_v1"),
    )
    for stage in ("align", "sft"):
        train_stage(spec, store, EXECUTION, stage, threads=1)
    record = train_connector(spec, store, EXECUTION, SilentProgress())
    wanted = evaluation_spec(spec)
    return store, spec, record, wanted, evaluate(wanted, spec, store, EXECUTION, SilentProgress())


def test_questions_that_cannot_be_asked_are_refused_and_counted(spoilt):
    store, spec, record, wanted, evaluated = spoilt
    held_out = read_samples(store, spec.dataset_fingerprint, "held_out")
    bad = [sample for sample in held_out if "<|end|>" in sample.turns[1].question]
    assert bad
    assert evaluated.num_quarantined == len(bad)
    assert evaluated.quarantined_by_reason == {"conversation_marks": len(bad)}
    assert evaluated.num_questions + evaluated.num_quarantined == sum(len(sample.turns) for sample in held_out)
    rows = read_quarantine(store, "evaluate", fingerprint(wanted)[:16])
    assert [(row.item, row.index, row.reason) for row in rows] == [(f"{sample.sample_id}#1", sample.index, "conversation_marks") for sample in bad]
    assert "'<|end|>', which has a meaning of its own" in rows[0].detail
    answered = {row["question_id"] for row in pq.read_table(store.local_path(evaluated.answers)).to_pylist()}
    assert not answered & {row.item for row in rows}
    assert len(answered) == evaluated.num_questions
    assert record.num_images + record.num_quarantined == len(read_samples(store, spec.dataset_fingerprint, "train"))
    assert record.num_quarantined > 0


def test_the_export_speaks_the_language_model_s_template(spoilt):
    """And it is checked with a question that can be asked, whatever the first one is."""
    store, spec, _, wanted, evaluated = spoilt
    made = export(
        ExportSpec(training_fingerprint=fingerprint(spec), evaluation_fingerprint=fingerprint(wanted)), spec, store, EXECUTION, SilentProgress()
    )
    assert "<|end|>" not in made.check_question
    model = load_export(store.local_path(made.folder))
    assert "ASSISTANT:" in model.model.tokenizer.chat_template
    images = {sample.sample_id: store.read_bytes(sample.image_path) for sample in read_samples(store, spec.dataset_fingerprint, "held_out")}
    rows = pq.read_table(store.local_path(evaluated.answers)).to_pylist()
    for row in rows[:8]:
        assert model.ask(images[row["sample_id"]], row["question"], row["mode"], max_new_tokens=4).text == row["answer"]


def test_an_export_is_checked_with_the_first_question_that_can_be_asked(spoilt):
    from workers.exporting import _check

    store, spec, *_ = spoilt

    class Asked:
        """Refuses all questions but one, as an export refuses marks."""

        def __init__(self, allowed):
            self.allowed = allowed

        def ask(self, data, question, mode, *, max_new_tokens):
            if question != self.allowed:
                raise ConversationError("conversation_marks", "a mark")
            return SimpleNamespace(text="yes")

    _, turn, answer = _check(Asked("Which colour?"), spec, store)
    assert (turn.question, answer) == ("Which colour?", "yes")
    with pytest.raises(ExportingError, match="no question that the export can be asked"):
        _check(Asked("nothing"), spec, store)


def test_too_many_questions_that_cannot_be_asked_stop_the_run_before_its_first_step(trained, tmp_path, monkeypatch):
    from workers import evaluation
    from workers.training import run

    _, spec, _ = trained
    store = Store(str(tmp_path / "root"))
    shutil.copytree(trained[0].local_path(), store.local_path())
    for folder in ("checkpoints", "runs/train-connector"):
        shutil.rmtree(store.local_path(folder))
    real = evaluation.read_samples

    def all_spoilt(*arguments):
        samples = list(real(*arguments))
        if arguments[-1] == "held_out":
            samples = [replace(sample, turns=tuple(replace(turn, question="what does <image> mean?") for turn in sample.turns)) for sample in samples]
        return samples

    monkeypatch.setattr("workers.dataset.samples.read_samples", all_spoilt)
    with pytest.raises(ErrorBudgetError, match=r"(\d+) of \1 inputs were refused.*conversation_marks.*#0: the question .*<image>.*remove it"):
        run.train_stage(spec, store, EXECUTION, "align", threads=1)
    assert not store.list("checkpoints")


def test_an_encoder_in_several_files_is_exported_whole(tiny_encoder_folder, tmp_path):
    import json

    from transformers import CLIPVisionModel

    from model.encoder import describe_encoder, load_encoder
    from workers.exporting import _copy_encoder

    CLIPVisionModel.from_pretrained(tiny_encoder_folder).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    for name in ("preprocessor_config.json", "README.md"):
        if (tiny_encoder_folder / name).exists():
            shutil.copyfile(tiny_encoder_folder / name, tmp_path / "sharded" / name)
    (tmp_path / "sharded" / "pytorch_model.bin").write_bytes(b"a pickle")
    _copy_encoder(tmp_path / "sharded", tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert "pytorch_model.bin" not in names
    weight_map = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) <= names
    spec = describe_encoder(str(tmp_path / "copy"))
    assert spec.weights_sha256 == describe_encoder(str(tmp_path / "sharded")).weights_sha256
    load_encoder(spec, 2, "cpu")


def test_counts_add_up_and_answers_are_on_record(trained, evaluated):
    store, spec, _ = trained
    _, record = evaluated
    held_out = read_samples(store, spec.dataset_fingerprint, "held_out")
    assert record.num_questions == sum(len(sample.turns) for sample in held_out)
    rows = pq.read_table(store.local_path(record.answers)).to_pylist()
    assert len(rows) == 4 * record.num_questions
    assert len({(row["question_id"], row["mode"]) for row in rows}) == len(rows)
    assert all(row["correct"] == exact_match(row["answer"], row["expected"]) for row in rows)
    for mode in (*record.modes, "majority"):
        by_group = {(count.family, count.detail, count.kind): count for count in record.counts if count.mode == mode}
        assert by_group["", "", ""].total == record.num_questions
        assert by_group["", "", ""].correct == by_group["", "small", ""].correct + by_group["", "large", ""].correct
        kinds = [count for key, count in by_group.items() if key[2]]
        assert sum(count.total for count in kinds) == record.num_questions
        if mode != "majority":
            assert sum(count.correct for count in kinds) == sum(row["correct"] for row in rows if row["mode"] == mode)
        assert all(0 <= count.low <= count.fraction <= count.high <= 1 for count in by_group.values())


def test_answers_do_not_depend_on_the_batch(trained, evaluated, tmp_path):
    store, spec, _ = trained
    wanted, record = evaluated
    copy = type(store)(str(shutil.copytree(store.local_path(), tmp_path / "root")))
    shutil.rmtree(copy.local_path("runs/evaluate"))
    evaluate(wanted, spec, copy, replace(EXECUTION, eval_batch_size=1), SilentProgress())
    assert pq.read_table(copy.local_path(record.answers)).to_pylist() == pq.read_table(store.local_path(record.answers)).to_pylist()


def test_fewer_questions_are_a_part_of_all(trained, evaluated):
    store, spec, _ = trained
    record = evaluate(evaluation_spec(spec, max_questions=3, modes=("blind",)), spec, store, EXECUTION, SilentProgress())
    assert record.num_questions == 3
    some = {row["question_id"]: row["answer"] for row in pq.read_table(store.local_path(record.answers)).to_pylist()}
    every = {row["question_id"]: row["answer"] for row in pq.read_table(store.local_path(evaluated[1].answers)).to_pylist() if row["mode"] == "blind"}
    assert some.items() <= every.items()


def test_an_evaluation_of_another_run_is_refused(trained):
    store, spec, _ = trained
    with pytest.raises(EvaluationError, match="another training run"):
        evaluate(evaluation_spec(spec, training_fingerprint="0" * 64), spec, store, EXECUTION, SilentProgress())
    with pytest.raises(SpecError, match="each once"):
        evaluation_spec(spec, modes=("blind", "blind"))
    other = replace(spec, schedule=tiny_schedule(steps=2, seed=5))
    with pytest.raises(TrainingError, match="no whole trained weights"):
        evaluate(evaluation_spec(other), other, store, EXECUTION, SilentProgress())


def test_an_export_answers_as_the_evaluation_did(trained, evaluated, exported):
    store, spec, _ = trained
    folder = store.local_path(exported[1].folder)
    model = load_export(folder)
    rows = pq.read_table(store.local_path(evaluated[1].answers)).to_pylist()
    images = {sample.sample_id: store.read_bytes(sample.image_path) for sample in read_samples(store, spec.dataset_fingerprint, "held_out")}
    for row in rows[:12]:
        answer = model.ask(images[row["sample_id"]], row["question"], row["mode"], max_new_tokens=4)
        assert answer.text == row["answer"]
        assert answer.num_visual_tokens == {"blind": 0, "global": 16, "local": 8, "both": 25}[row["mode"]]
    with pytest.raises(ImageError):
        model.ask(b"no image", "What?")
    assert exported[1].check_answer == model.ask(images[rows[0]["sample_id"]], exported[1].check_question).text


def test_the_card_tells_what_the_records_hold(trained, evaluated, exported):
    store, _, record = trained
    card = (store.local_path(exported[1].folder) / "README.md").read_text()
    total = next(count for count in evaluated[1].counts if count.mode == "both" and not (count.family or count.detail or count.kind))
    assert f"| all | {total.total} |" in card
    assert f"{total.fraction:.1%}" in card
    for phase in record.phases:
        assert f"| {phase.name} | {', '.join(phase.train)} | {phase.steps} |" in card
    assert "Apache-2.0" in card
    assert all(character.isascii() for character in card)


def test_stock_transformers_reads_the_language_model(trained, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store, spec, _ = trained
    folder = store.local_path(exported[1].folder) / "language_model"
    import torch

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_trained(spec, store).language_model
    ids = torch.arange(10)[None]
    assert torch.equal(network(ids).logits, ours(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("file", ["connector.safetensors", "README.md", "language_model/model.safetensors", "encoder/config.json"])
def test_a_damaged_export_is_refused(trained, exported, tmp_path, file):
    folder = shutil.copytree(trained[0].local_path(exported[1].folder), tmp_path / "export")
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(bytes(data))
    with pytest.raises(ExportError, match="sha256 differs"):
        load_export(folder)
    (folder / file).unlink()
    with pytest.raises(ExportError, match=f"lacks {file}"):
        load_export(folder)


def test_half_an_export_is_refused(trained, exported, tmp_path):
    folder = shutil.copytree(trained[0].local_path(exported[1].folder), tmp_path / "export")
    (folder / "manifest.json").unlink()
    with pytest.raises(ExportError, match=r"no manifest\.json"):
        load_export(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        load_export(folder)


def test_a_config_of_another_version_is_refused(trained, exported, tmp_path):
    from model.export import write_manifest

    folder = shutil.copytree(trained[0].local_path(exported[1].folder), tmp_path / "export")
    config = json.loads((folder / "loupe_config.json").read_text())
    (folder / "loupe_config.json").write_text(json.dumps(config | {"format_version": config["format_version"] + 1}))
    write_manifest(folder)
    with pytest.raises(ExportError, match=f"format version {config['format_version'] + 1}, this Loupe reads {config['format_version']}"):
        load_export(folder)
    (folder / "loupe_config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "views"}))
    write_manifest(folder)
    with pytest.raises(ExportError, match="ExportConfig needs the field 'views'"):
        load_export(folder)


def test_an_export_needs_finished_runs(trained):
    store, spec, _ = trained
    wanted = ExportSpec(training_fingerprint=fingerprint(spec), evaluation_fingerprint="0" * 64)
    with pytest.raises(ExportingError, match="run evaluate first"):
        export(wanted, spec, store, EXECUTION, SilentProgress())


def test_live_features_train_to_the_same_losses(trained, tmp_path):
    """Cached maps are fp16, and so are the live ones after rounding: the same bytes but for batch shapes in the encoder."""
    store, spec, _ = trained
    copy = type(store)(str(shutil.copytree(store.local_path(), tmp_path / "root")))
    live = replace(spec, feature_source="live")
    train_stage(live, copy, EXECUTION, "align", threads=1)

    def losses(where, what):
        text = where.read_bytes(f"runs/train-connector/{fingerprint(what)[:16]}/metrics.jsonl").decode()
        return [json.loads(line)["loss"] for line in text.splitlines()][:8]

    assert losses(copy, live) == pytest.approx(losses(store, spec), rel=1e-4)
