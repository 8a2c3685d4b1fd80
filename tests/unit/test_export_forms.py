"""A trained tiny run written in transformers' forms through the real stages: compared, published whole, found done, and loaded without our code."""

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.errors import ExportError, FoldingError
from model.export import load_export
from model.language_model import multiplies_bf16
from model.specs import (
    BranchMix,
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    GlobalBranchSpec,
    LocalBranchSpec,
    LoraSpec,
    MLPSpec,
    PhaseSpec,
    ScheduleSpec,
    SingleSpec,
    TextGuidedSelectorSpec,
    fingerprint,
)
from model.views import ViewSpec
from tests.tiny_training import build_small_store, tiny_schedule
from workers.commits import Stage
from workers.dataset.samples import read_samples
from workers.errors import ExportingError
from workers.evaluation import EvaluationSpec, evaluate
from workers.execution import ExecutionSettings, SilentProgress
from workers.export_forms import FormExportSpec, export_form
from workers.exporting import ExportSpec, export
from workers.training.run import train_connector, train_stage

pytestmark = pytest.mark.slow  # trains with DeepSpeed

EXECUTION = ExecutionSettings(device="cpu", num_cpus=1, checkpoint_every_steps=100, eval_batch_size=5)
FUSION = DCISpec(base=5, groups=((0, 2), (3, 5)))
ANYRES = ViewSpec.anyres(grids=((2, 1), (1, 2), (2, 2)))


def schedule(*, sft: bool, local: bool) -> ScheduleSpec:
    both = BranchMix(both=1.0) if local else BranchMix(global_only=1.0)
    rates = {"steps": 2, "batch_size": 4, "learning_rate": 2e-3}
    align = PhaseSpec(name="align", train=("global_mlp",), branch=both, **rates)
    blocks = ("global_mlp", *(("newline",) if local else ()), "language_model")
    return ScheduleSpec(align=(align,), sft=PhaseSpec(name="sft", train=blocks, branch=both, **rates) if sft else None)


def global_only() -> ConnectorSpec:
    return ConnectorSpec(global_branch=GlobalBranchSpec(fusion=FUSION, adapters=MLPSpec()), local_branch=None)


def anyres() -> ConnectorSpec:
    local = LocalBranchSpec(fusion=FUSION, compression=None, merge="spatial_unpad", newline=True)
    return ConnectorSpec(global_branch=GlobalBranchSpec(fusion=FUSION, adapters=MLPSpec()), local_branch=local, separator=None)


class Run:
    """A trained and evaluated run."""

    def __init__(self, store, training) -> None:
        self.store, self.training = store, training
        for stage in ("align", "sft"):
            if stage == "align" or training.schedule.sft is not None:
                train_stage(training, store, EXECUTION, stage, threads=1)
        train_connector(training, store, EXECUTION, SilentProgress())
        self.asked = EvaluationSpec(
            training_fingerprint=fingerprint(training), dataset_fingerprint=training.dataset_fingerprint, modes=("blind", "global"), max_new_tokens=4
        )
        evaluate(self.asked, training, store, EXECUTION, SilentProgress())

    def spec(self, form: str) -> FormExportSpec:
        return FormExportSpec(training_fingerprint=fingerprint(self.training), evaluation_fingerprint=fingerprint(self.asked), form=form)

    def export(self, form: str):
        return export_form(self.spec(form), self.training, self.store, EXECUTION, SilentProgress())

    def folder(self, record) -> Path:
        return self.store.local_path(record.folder)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """A global branch alone, its language model frozen in bf16."""
    root = str(tmp_path_factory.mktemp("frozen") / "root")
    changes = {"schedule": schedule(sft=False, local=False), "connector": global_only(), "precision": "bf16"}
    return Run(*build_small_store(root, tiny_encoder_folder, tiny_language_model_folder, **changes))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """AnyRes, its language model trained."""
    root = str(tmp_path_factory.mktemp("tuned") / "root")
    changes = {"schedule": schedule(sft=True, local=True), "connector": anyres(), "views": ANYRES}
    return Run(*build_small_store(root, tiny_encoder_folder, tiny_language_model_folder, **changes))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """A mixture with compressed local views: no stock model computes it."""
    root = str(tmp_path_factory.mktemp("mixed") / "root")
    return Run(*build_small_store(root, tiny_encoder_folder, tiny_language_model_folder, schedule=tiny_schedule(steps=2)))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """LLaVA's connector, its language model tuned by adapters on a base in bf16."""
    root = str(tmp_path_factory.mktemp("adapted") / "root")
    lora = LoraSpec(rank=4, alpha=8.0, dropout=0.05)
    llava = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=SingleSpec(layer=5), adapters=MLPSpec()), local_branch=None)
    changes = {"schedule": schedule(sft=True, local=False), "connector": llava, "precision": "bf16", "lora": lora}
    changes["views"] = ViewSpec.slime(max_slices=2, global_fit="pad")  # as LLaVA's code shows CLIP a picture
    return Run(*build_small_store(root, tiny_encoder_folder, tiny_language_model_folder, **changes))


ASK = """
    import json, sys

    class OursAway:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"model", "workers", "pipelines"}:
                raise ModuleNotFoundError(f"blocked: {name}", name=name)

    sys.meta_path.insert(0, OursAway())
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, image, question = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.open(image).convert("RGB"), text=prompt, return_tensors="pt")
    last = model(**inputs).logits[0, -1]
    answer = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(answer, skip_special_tokens=True).strip()
    print(json.dumps([type(model).__name__, text, last.tolist(), sorted(name for name in sys.modules if name in {"model", "workers", "pipelines"})]))
"""


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    [("frozen", "llava-hf", "Llava"), ("tuned", "llava-next-hf", "LlavaNext"), ("adapted", "llava-hf", "Llava")],
)
def test_a_form_answers_as_the_run_without_any_code_of_ours(request, name, form, kind):
    run = request.getfixturevalue(name)
    record = run.export(form)
    assert record.num_prompts == 3
    assert record.max_abs_logit_error <= 1e-5 < record.tolerance < 1e-3
    assert record.num_redecoded == 0
    folder = run.folder(record)
    image = str(run.store.local_path(record.check_image))
    program = [sys.executable, "-c", textwrap.dedent(ASK), str(folder), image, record.check_question]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found, text, last, ours = json.loads(done.stdout.splitlines()[-1])
    assert (found, text, ours) == (f"{kind}ForConditionalGeneration", record.check_answer, [])
    standard = standard_export(run)
    logits = standard.prompt_logits(Path(image).read_bytes(), record.check_question)[-1].tolist()
    assert last[: len(logits)] == pytest.approx(logits, abs=record.max_abs_logit_rounding + 1e-5)


def standard_export(run):
    wanted = ExportSpec(training_fingerprint=fingerprint(run.training), evaluation_fingerprint=fingerprint(run.asked))
    return load_export(run.folder(export(wanted, run.training, run.store, EXECUTION, SilentProgress())))


def test_what_was_compared_is_on_record(frozen, tuned):
    assert "its weights are bf16 numbers" in frozen.export("llava-hf").compared
    assert "bf16" not in tuned.export("llava-next-hf").compared
    # What the run rounds and the stock model does not: features to fp16, and here products to bf16.
    assert 1e-5 < frozen.export("llava-hf").max_abs_logit_rounding < 0.1


def test_a_language_model_held_in_bf16_is_written_so_and_loaded_exactly(frozen):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    folder = frozen.folder(frozen.export("llava-hf"))
    stored = load_file(folder / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    assert {dtype for name, dtype in dtypes.items() if "language_model" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "language_model" not in name} == {torch.float32}
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("form", ["llava-hf", "loupe", "llava"])
def test_adapters_are_merged_into_a_form(adapted, form):
    """Every adapted weight is W + (alpha / rank) B A, rounded to the base's type once; no trace of adapters is left."""
    import torch
    from safetensors.torch import load, load_file

    record = adapted.export(form)
    assert "adapters merged" in record.compared
    # Merging rounds the weights once more, so the form is near the run as evaluated, and not it.
    assert 1e-5 < record.max_abs_logit_rounding < 0.1
    folder = adapted.folder(record)
    stored = {name: tensor for file in folder.rglob("*.safetensors") for name, tensor in load_file(file).items()}
    assert not any("lora" in name or "base_layer" in name for name in stored)
    trained = load(adapted.store.read_bytes(f"checkpoints/{fingerprint(adapted.training)[:16]}/final/language_model.safetensors"))
    base = load_file(f"{adapted.training.language_model.model}/model.safetensors")
    stems = [name.removesuffix(".lora_A.default.weight") for name in trained if ".lora_A." in name]
    assert len(stems) == 2 * 7
    for stem in stems:
        (name,) = [name for name in stored if name.endswith(f"{stem.removeprefix('model.')}.weight") and "vision" not in name]
        delta = 8.0 / 4 * trained[f"{stem}.lora_B.default.weight"] @ trained[f"{stem}.lora_A.default.weight"]
        plain = base[f"{stem}.weight"].to(torch.bfloat16)
        assert torch.equal(stored[name], (plain.float() + delta).to(torch.bfloat16)), stem
        assert not torch.equal(stored[name], plain), stem
    assert "adapters of rank 4, alpha 8, merged into it" in (folder / "README.md").read_text()


def test_forms_live_beside_each_other_and_are_found_done(tuned, monkeypatch):
    records = {form: tuned.export(form) for form in ("llava-next-hf", "loupe")}
    assert len({record.folder for record in records.values()}) == 2
    monkeypatch.setattr("workers.training.assemble.load_trained", lambda *_: pytest.fail("it was exported again"))
    for form, record in records.items():
        assert tuned.export(form) == record
        written = json.loads((tuned.folder(record) / "manifest.json").read_text())["files"]
        assert written == record.files
        assert set(record.files) >= {"config.json", "generation_config.json", "chat_template.jinja", "processor_config.json", "README.md"}


@pytest.mark.parametrize("name", ["frozen", "mixed"])
def test_loupe_s_own_form_takes_every_connector(request, name):
    run = request.getfixturevalue(name)
    record = run.export("loupe")
    assert record.max_abs_logit_error == 0
    # Files are of bf16, and the run multiplies in fp32 where the device has no products of bf16.
    assert record.max_abs_logit_rounding == 0 or (not multiplies_bf16("cpu") and record.max_abs_logit_rounding < 0.05)
    assert record.same_answers_as_evaluated == record.num_prompts == 3
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import model.auto  # noqa: F401 - registers

    folder, standard = run.folder(record), standard_export(run)
    loaded, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for sample in read_samples(run.store, run.training.dataset_fingerprint, "held_out")[:4]:
        data = run.store.read_bytes(sample.image_path)
        for turn in sample.turns:
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.question}]}]
            inputs = processor(images=data, text=processor.apply_chat_template(messages, add_generation_prompt=True))
            answer = loaded.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
            assert processor.decode(answer, skip_special_tokens=True).strip() == standard.ask(data, turn.question, max_new_tokens=4).text


def test_what_cannot_be_folded_is_refused_and_nothing_is_written(mixed, frozen):
    for run, form in ((mixed, "llava-hf"), (mixed, "llava-next-hf"), (frozen, "llava-next-hf")):
        with pytest.raises(FoldingError, match="does not compute this connector"):
            run.export(form)
        stage = Stage.open(run.store, "export", run.spec(form))
        assert not run.store.exists(stage.path("COMMITTED.json"))
        assert not run.store.list(f"exports/{stage.key}")


def test_logits_that_are_off_keep_a_form_from_being_published(tuned, monkeypatch, tmp_path):
    from model import llava_hf

    real = llava_hf.fold_connector

    def wrong(connector):
        folded = real(connector)
        return replace(folded, bias_1=folded.bias_1 + 0.01)

    copy = type(tuned.store)(str(shutil.copytree(tuned.store.local_path(), tmp_path / "root")))
    stage = Stage.open(copy, "export", tuned.spec("llava-next-hf"))
    for folder in (f"exports/{stage.key}", stage.folder):
        shutil.rmtree(copy.local_path(folder), ignore_errors=True)
    monkeypatch.setattr(llava_hf, "fold_connector", wrong)
    with pytest.raises(ExportingError, match=r"logits are up to .* from Loupe's own, and 0\.000\d+ is allowed; nothing was published"):
        export_form(tuned.spec("llava-next-hf"), tuned.training, copy, EXECUTION, SilentProgress())
    assert not copy.list(f"exports/{stage.key}")
    assert not copy.exists(stage.path("COMMITTED.json"))


def test_an_answer_that_is_another_keeps_a_form_from_being_published(frozen, monkeypatch, tmp_path):
    from model import llava_hf

    copy = type(frozen.store)(str(shutil.copytree(frozen.store.local_path(), tmp_path / "root")))
    stage = Stage.open(copy, "export", frozen.spec("llava-hf"))
    for folder in (f"exports/{stage.key}", stage.folder):
        shutil.rmtree(copy.local_path(folder), ignore_errors=True)
    monkeypatch.setattr(llava_hf.AutoLoaded, "ask", lambda *_: "another")
    with pytest.raises(ExportingError, match="answers 'another'"):
        export_form(frozen.spec("llava-hf"), frozen.training, copy, EXECUTION, SilentProgress())
    assert not copy.list(f"exports/{stage.key}")


def test_the_card_says_how_to_ask_and_the_code_runs(frozen, mixed):
    for run, form in ((frozen, "llava-hf"), (mixed, "loupe")):
        record = run.export(form)
        card = (run.folder(record) / "README.md").read_text()
        assert "loupe ask" not in card
        assert card.isascii()
        program = card.split("```python\n")[1].split("```")[0]
        image = str(run.store.local_path(record.check_image))
        program = program.replace("THIS_FOLDER", str(run.folder(record))).replace("IMAGE", image)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_ask_points_to_what_it_reads(frozen):
    with pytest.raises(ExportError, match=r"was exported for transformers, .* without --to"):
        load_export(frozen.folder(frozen.export("llava-hf")))


def test_another_run_s_form_is_refused(frozen, tuned):
    wanted = replace(frozen.spec("llava-hf"), training_fingerprint="0" * 64)
    with pytest.raises(ExportingError, match="another training run"):
        export_form(wanted, frozen.training, frozen.store, EXECUTION, SilentProgress())
    with pytest.raises(ExportingError, match="run evaluate first"):
        export_form(replace(tuned.spec("loupe"), evaluation_fingerprint="0" * 64), tuned.training, tuned.store, EXECUTION, SilentProgress())


@pytest.fixture(scope="module")
def slime(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """What SliME's code computes on views of any size: one layer, a projector, compressed and selected local views."""
    fusion = SingleSpec(layer=5)
    local = LocalBranchSpec(fusion=fusion, compression=CompressionSpec(queries=4), merge="spatial", selector=TextGuidedSelectorSpec(top_p=0.8))
    connector = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()), local_branch=local, standardise_inputs=False)
    rates = {"steps": 2, "batch_size": 4, "learning_rate": 2e-3}
    align = PhaseSpec(name="align", train=("global_mlp", "compression"), branch=BranchMix(both=1.0), **rates)
    sft = PhaseSpec(name="sft", train=("global_mlp", "compression", "language_model"), branch=BranchMix(both=1.0), selector=True, **rates)
    root = str(tmp_path_factory.mktemp("slime") / "root")
    changes = {"schedule": ScheduleSpec(align=(align,), sft=sft), "connector": connector, "views": ViewSpec.slime()}
    return Run(*build_small_store(root, tiny_encoder_folder, tiny_language_model_folder, **changes))


def test_the_authors_files_answer_as_the_run(slime):
    record = slime.export("llava")
    folder = slime.folder(record)
    assert {"mm_projector.bin", "sampler.bin", "config.json", "language_model/model.safetensors", "README.md"} <= record.files.keys()
    assert record.max_abs_logit_error <= 1e-5
    assert torch.load(folder / "mm_projector.bin", weights_only=True).keys() == {
        f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert json.loads((folder / "config.json").read_text())["mm_vision_select_layer"] == -2
    assert "import-weights" in (folder / "README.md").read_text()
    assert slime.export("llava") == record


def test_what_the_authors_code_does_not_compute_is_refused(mixed):
    with pytest.raises(ExportError, match=r"not one that the authors' code computes: .*standardise"):
        mixed.export("llava")


def test_files_that_lost_a_number_keep_the_form_from_being_published(slime, monkeypatch, tmp_path):
    from model import released_export

    real = released_export.released_tensors

    def spoilt(connector):
        files = real(connector)
        files["mm_projector.bin"]["model.mm_projector.2.bias"] += 0.1
        return files

    monkeypatch.setattr(released_export, "released_tensors", spoilt)
    fresh = Run.__new__(Run)
    fresh.store, fresh.training, fresh.asked = slime.store, slime.training, slime.asked
    shutil.rmtree(slime.store.local_path(f"runs/export/{fingerprint(slime.spec('llava'))[:16]}"), ignore_errors=True)
    with pytest.raises(ExportingError, match=r"--to llava: .*logits are up to"):
        fresh.export("llava")
