"""Stage export, other forms: a run's connector as a folder that transformers loads by itself, compared with the run before anyone sees it.

Input: committed training and evaluation records. Output: exports/<key>/, one for every form of a run, beside the standard export. Invariant: what is
published was loaded as its readers load it, and gave Loupe's own logits and answers on held-out questions, from the bytes of their pictures; a form
that does not is refused, and nothing is published. The manifest is uploaded last, the record after it.

What is compared, in fp32: the form, and the same weights in Loupe's own code on features that are not rounded to what a cache stores, since stock
models do not round. How far the run as it was evaluated is from that (fp16 features, bf16 products) is on record beside it. A form of Loupe's own
classes rounds as the run did, and is compared with it as it is. Adapters are merged into every form, and compared as merged; what that moves is in
the same figure on record.
"""

import dataclasses
import hashlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import ConversationError
from model.specs import ExportForm, deepest_layer, fingerprint
from workers.commits import Stage
from workers.dataset.samples import read_samples
from workers.errors import ExportingError
from workers.evaluation import MAX_NEW_TOKENS, EvaluationRecord
from workers.execution import ExecutionSettings, Progress
from workers.exporting import committed_record, export_config, model_card, publish_folder
from workers.storage import Store
from workers.training.spec import TrainingRecord, TrainingSpec

if TYPE_CHECKING:
    from torch import Tensor

    from model.export import ExportedModel
    from model.llava_hf import AutoLoaded
    from workers.dataset.samples import Sample, Turn

__all__ = ["FormExportRecord", "FormExportSpec", "export_form"]

TOLERANCE = 1e-4
"""Largest difference of a logit in fp32, as a share of the largest logit, or of 1. Rounding grows with the logits: with the models that come with
Loupe, whose largest is 15, the difference was 6e-5; with the projector's weights rounded to fp16 it would have been 6e-2."""

_LLAVA_USAGE = """\
Files as the authors' code of LLaVA, Dense Connector and SliME saves and loads them: `mm_projector.bin`, of SliME also `sampler.bin`, plain tensors
that `torch.load(weights_only=True)` reads, and the `mm_*` fields of `config.json`. Give them to that code as its projector, beside the language model
that this run was trained with: `language_model/` here where the run trained it, the one named below where it did not. `loupe import-weights` reads
them too."""

_NUM_PROMPTS = 3
_LAST_POSITIONS = 256
"""Positions of a prompt that are compared: all of the text behind the picture, and visual tokens before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormExportSpec:
    """Identity of an export in a form other than the standard one."""

    training_fingerprint: str
    evaluation_fingerprint: str
    form: ExportForm
    format_version: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class FormExportRecord:
    """What was exported, and how it compares."""

    training_fingerprint: str
    form: str
    folder: str
    """Relative to the root."""
    url: str
    files: dict[str, str]
    """sha256 by path inside the folder."""
    num_bytes: int
    num_prompts: int
    """Held-out questions that were compared, each about another picture."""
    num_redecoded: int
    """Pictures whose files Pillow by itself decodes otherwise than Loupe; they were compared as PNG files of Loupe's pixels."""
    max_abs_logit_error: float
    """Of what was published, against what `compared` says."""
    tolerance: float
    compared: str
    max_abs_logit_rounding: float
    """How far the run as it was evaluated is from that."""
    same_answers_as_evaluated: int
    """Prompts whose greedy answer is that of the run as it was evaluated."""
    check_image: str
    """The first picture: a path below the root, or a URL."""
    check_question: str
    check_expected: str
    check_answer: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    """One held-out question, and what Loupe itself says to it."""

    sample: "Sample"
    turn: "Turn"
    image_bytes: bytes
    redecoded: bool
    logits: "Tensor"
    answer: str


def export_form(spec: FormExportSpec, training: TrainingSpec, store: Store, execution: ExecutionSettings, progress: Progress) -> FormExportRecord:
    """Export a trained connector in a form, or find it done.

    Args:
        spec: which run, which form.
        training: of the connector.
        store: where its weights and records are.
        execution: num_cpus counts.
        progress: told in steps of work.

    Returns:
        The record, committed.

    Raises:
        ExportingError: the run is not trained and evaluated yet, or the form does not compute what the run does.
        FoldingError: the form has no place for this connector.
    """
    stage = Stage.open(store, "export", spec)
    if (done := stage.committed(FormExportRecord)) is not None:
        return done
    if spec.training_fingerprint != fingerprint(training):
        raise ExportingError("the export names another training run than it was given; make both from one recipe")
    trained = committed_record(store, "train-connector", spec.training_fingerprint, TrainingRecord)
    evaluated = committed_record(store, "evaluate", spec.evaluation_fingerprint, EvaluationRecord)
    from model.export import write_manifest
    from model.llava_hf import AutoLoaded
    from model.lora import merge_adapters
    from workers.training.assemble import set_threads

    set_threads(execution)
    target = f"exports/{stage.key}"
    with stage.attempt() as timer, tempfile.TemporaryDirectory(prefix="loupe-export-") as temporary:
        folder = Path(temporary)
        progress.start(f"exporting as {spec.form}", 4)
        try:
            run = _open_run(training, trained, store)
            as_evaluated = list(_ask_prompts(run, _choose(training, store)))
            if not as_evaluated:
                raise ExportingError(f"dataset {training.dataset_fingerprint[:16]} holds no question that an export can be asked; build another")
            progress.advance()
            products = run.model.products
            if training.lora is not None:
                merge_adapters(run.model.language_model)
            changed = _hold_as_written(run) or training.lora is not None
            _write(folder, spec.form, run, trains_language_model="language_model.safetensors" in trained.files)
            licences = sorted({sample.licence for sample in read_samples(store, training.dataset_fingerprint)})
            (folder / "README.md").write_text(model_card(training, trained, evaluated, licences, _usage(spec.form)))
            progress.advance()
            rounds = spec.form == "loupe"
            compared = run if rounds else _without_rounding(run)
            expected = _ask_again(compared, as_evaluated) if changed or not rounds else as_evaluated
            tolerance = TOLERANCE * max(1.0, *(float(prompt.logits.abs().max()) for prompt in expected))
            written = _Reimported.load(folder, compared) if spec.form == "llava" else AutoLoaded.load(folder)
            error = _compare(spec.form, written, expected, tolerance)
            progress.advance()
            files = write_manifest(folder)
            publish_folder(store, folder, target, files)
            progress.advance()
        finally:
            progress.finish()
        first = expected[0]
        record = FormExportRecord(
            training_fingerprint=spec.training_fingerprint,
            form=spec.form,
            folder=target,
            url=store.url(target),
            files=files,
            num_bytes=sum((folder / name).stat().st_size for name in files),
            num_prompts=len(expected),
            num_redecoded=sum(prompt.redecoded for prompt in expected),
            max_abs_logit_error=error,
            tolerance=tolerance,
            compared=_compared(spec.form, run, products, merged=training.lora is not None, packed=training.features.precision == "int8"),
            max_abs_logit_rounding=max(_distance(ours.logits, exact.logits) for ours, exact in zip(as_evaluated, expected, strict=True)),
            same_answers_as_evaluated=sum(ours.answer == exact.answer for ours, exact in zip(as_evaluated, expected, strict=True)),
            check_image=first.sample.image_path,
            check_question=first.turn.question,
            check_expected=first.turn.answer,
            check_answer=first.answer,
            seconds=timer.seconds,
        )
    return stage.commit(record)


def _open_run(training: TrainingSpec, trained: TrainingRecord, store: Store) -> "ExportedModel":
    """The trained model as it was evaluated, adapters beside their base."""
    from model.encoder import compute_dtype, load_encoder
    from model.export import ExportedModel
    from workers.training.assemble import load_trained

    config = export_config(training, trained)
    maps = [*config.connector.global_branch.fusion.maps]
    if config.connector.local_branch is not None:
        maps += config.connector.local_branch.fusion.maps
    deepest = deepest_layer(maps)
    encoder = load_encoder(config.encoder, deepest, dtype=compute_dtype(config.feature_compute, "cpu", or_wider=True))
    return ExportedModel(config=config, model=load_trained(training, store), encoder=encoder)


def _hold_as_written(run: "ExportedModel") -> bool:
    """Numbers of bf16 are held in fp32 where the device has no products of bf16; their files are of bf16 all the same. Whether anything changed."""
    import torch

    from model.language_model import hold_in

    network = run.model.language_model
    held: Tensor = network.get_input_embeddings().weight  # type: ignore[operator]
    if run.config.language_model_precision == "fp32" or held.dtype == torch.bfloat16:
        return False
    hold_in(network, torch.bfloat16)
    return True


def _choose(training: TrainingSpec, store: Store) -> Iterator[tuple["Sample", "Turn", bytes]]:
    """Held-out questions with their pictures' bytes, those about a small detail first."""
    samples = [sample for sample in read_samples(store, training.dataset_fingerprint) if not sample.text_only]
    for sample in [sample for sample in samples if sample.split == "held_out"] or samples:
        data = store.read_reference(sample.image_path)
        if hashlib.sha256(data).hexdigest() != sample.image_sha256:
            raise ExportingError(f"image {sample.image_path} is not the one that the dataset was built from; build it again")
        for turn in sorted(sample.turns, key=lambda turn: turn.detail != "small"):
            yield sample, turn, data


def _ask_prompts(run: "ExportedModel", questions: Iterator[tuple["Sample", "Turn", bytes]]) -> Iterator[_Prompt]:
    """One question about each of a few pictures, as Loupe answers it."""
    from model.images import decode_image
    from model.llava_hf import decodes_alike

    asked: set[str] = set()
    for sample, turn, data in questions:
        if sample.sample_id in asked:
            continue
        alike = decodes_alike(data)
        image_bytes = data
        if not alike:
            file = io.BytesIO()
            decode_image(data).save(file, "PNG")
            image_bytes = file.getvalue()
        try:
            answer = run.ask(image_bytes, turn.question, max_new_tokens=MAX_NEW_TOKENS).text
        except ConversationError:
            continue  # it cannot be asked of any export; another turn, or another picture, can
        logits = run.prompt_logits(image_bytes, turn.question, last=_LAST_POSITIONS)
        yield _Prompt(sample=sample, turn=turn, image_bytes=image_bytes, redecoded=not alike, logits=logits, answer=answer)
        asked.add(sample.sample_id)
        if len(asked) == _NUM_PROMPTS:
            return


def _write(folder: Path, form: ExportForm, run: "ExportedModel", *, trains_language_model: bool) -> None:
    match form:
        case "llava":
            from model.released_export import write_llava_layout

            model = run.model
            write_llava_layout(folder, model.connector, encoder=run.config.encoder, views=run.config.views, separator_id=model.separator_id)
            if trains_language_model:
                model.language_model.save_pretrained(folder / "language_model")  # type: ignore[operator]
                model.tokenizer.save_pretrained(folder / "language_model")
        case "llava-hf" | "llava-next-hf":
            from model.llava_hf import write_llava

            write_llava(folder, form, run.model, encoder=run.config.encoder, views=run.config.views)
        case "loupe":
            from model.auto import write_loupe

            write_loupe(folder, run.config, run.model)
        case "folder":
            raise ExportingError("the form folder is the standard export; `loupe export RECIPE` without --to writes it")


def _without_rounding(run: "ExportedModel") -> "ExportedModel":
    """The run in fp32 throughout; its own model becomes fp32 for it."""
    import torch

    from model.encoder import load_encoder
    from model.export import ExportedModel
    from model.language_model import hold_in

    hold_in(run.model.language_model, torch.float32)
    encoder = run.encoder if run.encoder.dtype == torch.float32 else load_encoder(run.config.encoder, run.encoder.deepest_layer)
    run.model.precision = "fp32"
    return ExportedModel(
        config=dataclasses.replace(run.config, feature_precision="fp32", feature_compute="fp32", precision="fp32", language_model_precision="fp32"),
        model=run.model,
        encoder=encoder,
    )


def _ask_again(run: "ExportedModel", prompts: Sequence[_Prompt]) -> list[_Prompt]:
    """The same prompts, and what the run says to them by now."""
    return [
        dataclasses.replace(
            prompt,
            logits=run.prompt_logits(prompt.image_bytes, prompt.turn.question, last=_LAST_POSITIONS),
            answer=run.ask(prompt.image_bytes, prompt.turn.question, max_new_tokens=MAX_NEW_TOKENS).text,
        )
        for prompt in prompts
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reimported:
    """A connector as the authors' layout holds it, read back as `loupe import-weights` reads theirs, with the run's other parts."""

    model: "ExportedModel"

    @classmethod
    def load(cls, folder: Path, run: "ExportedModel") -> "_Reimported":
        import json

        import torch

        from model.connector import Connector
        from model.export import ExportedModel
        from model.language_model import LanguageModel
        from model.released_weights import load_released
        from model.specs import GatedMixtureSpec
        from model.tensor_files import open_tensor_files, weight_files
        from model.vision_language import VisionLanguageModel

        spec, encoder = run.config.connector, run.config.encoder
        branch = spec.global_branch
        if isinstance(branch.adapters, GatedMixtureSpec):
            branch = dataclasses.replace(branch, adapters=dataclasses.replace(branch.adapters, noise="authors"))
        spec = dataclasses.replace(spec, standardise_inputs=False, global_branch=branch)
        config = json.loads((folder / "config.json").read_text())
        imported = load_released(open_tensor_files(weight_files(sorted(folder.glob("*.bin")))), config, spec, encoder, run.config.views)
        connector = Connector(
            spec,
            encoder_width=encoder.width,
            num_patches=encoder.num_patches,
            hidden=run.model.connector.hidden,
            embedding_rms=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        connector.load_state_dict(imported.state)
        parts = LanguageModel(network=run.model.language_model, tokenizer=run.model.tokenizer, max_tokens=run.model.max_tokens)
        model = VisionLanguageModel(connector.to(run.model.device), parts, precision=run.model.precision)
        return cls(model=ExportedModel(config=dataclasses.replace(run.config, connector=spec), model=model, encoder=run.encoder))

    def prompt_logits(self, image_bytes: bytes, question: str, *, last: int = 0) -> "Tensor":
        """As `AutoLoaded.prompt_logits`."""
        return self.model.prompt_logits(image_bytes, question, last=last)

    def ask(self, image_bytes: bytes, question: str, max_new_tokens: int) -> str:
        """As `AutoLoaded.ask`."""
        return self.model.ask(image_bytes, question, max_new_tokens=max_new_tokens).text


def _compare(form: ExportForm, written: "AutoLoaded | _Reimported", expected: Sequence[_Prompt], tolerance: float) -> float:
    """The largest difference of a logit.

    Raises:
        ExportingError: it is too large, a prompt has another length, or an answer is another one.
    """
    worst = 0.0
    for prompt in expected:
        question = prompt.turn.question
        logits = written.prompt_logits(prompt.image_bytes, question, last=_LAST_POSITIONS)
        about = f"--to {form}: question {question!r} about image {prompt.sample.image_path}"
        if len(logits) != len(prompt.logits):
            raise ExportingError(
                f"{about}: the export's prompt has {len(logits)} tokens, Loupe's own {len(prompt.logits)}; nothing was published. Take --to loupe"
            )
        worst = max(worst, _distance(logits, prompt.logits))
        if not worst <= tolerance:  # not a number is none either
            raise ExportingError(
                f"{about}: the export's logits are up to {worst:.2g} from Loupe's own, and {tolerance:.2g} is allowed; nothing was published. Take "
                "--to loupe, and report this"
            )
        answer = written.ask(prompt.image_bytes, question, MAX_NEW_TOKENS)
        if answer != prompt.answer:
            raise ExportingError(
                f"{about}: the export answers {answer!r}, Loupe itself {prompt.answer!r}, though their logits are alike; nothing was published. Take "
                "--to loupe, and report this"
            )
    return worst


def _distance(some: "Tensor", others: "Tensor") -> float:
    """Largest difference, over the tokens that both know: a stock form has one more, for the picture's place."""
    common = min(some.shape[1], others.shape[1])
    return float((some[:, :common] - others[:, :common]).abs().max())


def _compared(form: ExportForm, run: "ExportedModel", products: str, *, merged: bool, packed: bool) -> str:
    """What the written form was compared with.

    `products`: in which type the run multiplied as it was evaluated here; `packed`: whether it was evaluated on int8 features.
    """
    adapters = ", adapters merged" if merged else ""
    if form == "loupe":
        other = "" if run.model.products == products else f", of which files are made (evaluated: {products})"
        rounded = "features not rounded (evaluated: int8)" if packed else f"features rounded to {run.config.feature_precision}"
        return f"as evaluated{adapters}: {rounded}, matrix products in {run.model.products}{other}"
    held = " (its weights are bf16 numbers)" if run.config.language_model_precision == "bf16" else ""
    return f"in fp32 throughout{adapters}: the same weights in Loupe's own code, language model included{held}, on features that are not rounded"


def _usage(form: ExportForm) -> str:
    """How the card says to ask it."""
    if form == "llava":
        return _LLAVA_USAGE
    needs_loupe = form == "loupe"
    lines = [
        "Ask it with transformers 5" + (", where Loupe is installed:" if needs_loupe else "; no code of Loupe's is needed:"),
        "",
        "```python",
        *(["import model.auto  # Loupe's classes"] if needs_loupe else []),
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'processor = AutoProcessor.from_pretrained("THIS_FOLDER", backend="pil")',
        'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")',
        'messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which number stands there?"}]}]',
        "prompt = processor.apply_chat_template(messages, add_generation_prompt=True)",
        'inputs = processor(images=Image.open("IMAGE").convert("RGB"), text=prompt, return_tensors="pt")',
        "answer = model.generate(**inputs)[0, inputs['input_ids'].shape[1] :]",
        "print(processor.decode(answer, skip_special_tokens=True))",
        "```",
        "",
        'It was trained on one picture in a conversation, before the first question. `backend="pil"` gives the pixels of training; without it, '
        "where torchvision is installed, pictures are resized by torchvision, which gives slightly other pixels."
        if not needs_loupe
        else "It was trained on one picture in a conversation, before the first question.",
        "",
        "The licences below hold for this folder: it holds the encoder's and the language model's weights.",
    ]
    return "\n".join(lines)
