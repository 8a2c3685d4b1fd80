"""Stage export: trained weights, language model, encoder and a model card written from the run's records, as one folder that `loupe ask` can use.

Input: committed training and evaluation records. Output: exports/<key>/ (see model/export.py for what lies there). Invariant: the folder is loaded
and asked before it is committed, and the manifest is uploaded last.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from model.errors import ConversationError
from model.specs import LocalBranchSpec, LoraSpec, fingerprint
from workers.commits import Stage, from_json
from workers.dataset.samples import read_samples
from workers.errors import ExportingError
from workers.evaluation import MAX_NEW_TOKENS, EvaluationRecord
from workers.execution import ExecutionSettings, Progress
from workers.language_models import PACKAGED, verified_folder
from workers.storage import Store
from workers.training.spec import TrainingRecord, TrainingSpec

if TYPE_CHECKING:
    from torch import nn

    from model.export import AdapterConfig, ExportConfig, ExportedModel
    from workers.dataset.samples import Sample, Turn

Decoded = TypeVar("Decoded")

__all__ = ["ExportRecord", "ExportSpec", "committed_record", "export", "export_config", "model_card", "publish_folder"]

ASK = 'Ask it: `loupe ask THIS_FOLDER IMAGE "question"`.'
"""How the standard export's card says to use it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSpec:
    """Identity of an export."""

    training_fingerprint: str
    evaluation_fingerprint: str
    merge: bool = False
    """Whether trained adapters are added to the language model's weights; else they lie beside their base."""
    format_version: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRecord:
    """What was exported."""

    training_fingerprint: str
    folder: str
    """Relative to the root."""
    url: str
    """Where the folder was when it was written."""
    files: dict[str, str]
    """sha256 by path inside the folder."""
    num_bytes: int
    load_seconds: float
    """Of the check that loads the folder and asks it a question."""
    check_image: str
    """The held-out image that the check asked about: a path below the root, or a URL."""
    check_question: str
    check_expected: str
    check_answer: str
    seconds: float


def export(spec: ExportSpec, training: TrainingSpec, store: Store, execution: ExecutionSettings, progress: Progress) -> ExportRecord:
    """Export a trained connector, or find it done.

    Args:
        spec: which.
        training: of the connector.
        store: where its weights and records are.
        execution: num_cpus counts.
        progress: told in steps of work.

    Returns:
        The record, committed.

    Raises:
        ExportingError: the run is not trained and evaluated yet, or the folder does not pass its check.
    """
    stage = Stage.open(store, "export", spec)
    if (done := stage.committed(ExportRecord)) is not None:
        return done
    if spec.training_fingerprint != fingerprint(training):
        raise ExportingError("the export names another training run than it was given; make both from one recipe")
    trained = committed_record(store, "train-connector", spec.training_fingerprint, TrainingRecord)
    evaluated = committed_record(store, "evaluate", spec.evaluation_fingerprint, EvaluationRecord)
    from model.export import load_export
    from workers.training.assemble import set_threads

    set_threads(execution)
    target = f"exports/{stage.key}"
    with stage.attempt() as timer, tempfile.TemporaryDirectory(prefix="loupe-export-") as temporary:
        folder = Path(temporary)
        progress.start("exporting", 4)
        try:
            files = _write(folder, training, trained, evaluated, store, merge=spec.merge)
            progress.advance()
            started = time.monotonic()
            exported = load_export(folder)
            load_seconds = time.monotonic() - started
            progress.advance()
            sample, turn, answer = _check(exported, training, store)
            progress.advance()
            publish_folder(store, folder, target, files)
            progress.advance()
        finally:
            progress.finish()
        record = ExportRecord(
            training_fingerprint=spec.training_fingerprint,
            folder=target,
            url=store.url(target),
            files=files,
            num_bytes=sum((folder / name).stat().st_size for name in files),
            load_seconds=load_seconds,
            check_image=sample.image_path,
            check_question=turn.question,
            check_expected=turn.answer,
            check_answer=answer,
            seconds=timer.seconds,
        )
    return stage.commit(record)


def publish_folder(store: Store, folder: Path, target: str, files: Iterable[str]) -> None:
    """Put an export's files in place, its manifest last.

    Args:
        store: where to.
        folder: with the files and their manifest.
        target: relative to the root.
        files: paths inside the folder.
    """
    from model.export import MANIFEST

    for name in [*sorted(files), MANIFEST]:
        with store.publishing(f"{target}/{name}") as file:
            shutil.copyfile(folder / name, file)


def committed_record(store: Store, stage: str, full: str, kind: type[Decoded]) -> Decoded:
    """The record of a finished run that an export is written from.

    Args:
        store: where it is.
        stage: of the run.
        full: its fingerprint.
        kind: of its record.

    Returns:
        The record.

    Raises:
        ExportingError: the run is not finished.
    """
    path = f"runs/{stage}/{full[:16]}/COMMITTED.json"
    if not store.exists(path):
        raise ExportingError(f"{store.url(path)} is not there; an export is written from finished runs, so run {stage} first")
    return from_json(kind, store.read_json(path), where=store.url(path))


def export_config(training: TrainingSpec, trained: TrainingRecord, adapter: "AdapterConfig | None" = None) -> "ExportConfig":
    """What an export of a run computes.

    Args:
        training: the run.
        trained: its record.
        adapter: adapters that lie beside their base; None where there are none, or where they are merged.

    Returns:
        The config.
    """
    from model.export import ExportConfig

    tuned_whole = "language_model.safetensors" in trained.files and training.lora is None
    return ExportConfig(
        connector=training.connector,
        encoder=training.features.encoder,
        views=training.features.views,
        # int8 is how a cache is kept small; an export computes its features, and needs neither rounding nor calibration.
        feature_precision="fp32" if training.features.precision == "int8" else training.features.precision,
        precision=training.precision,
        language_model_precision="fp32" if tuned_whole else training.precision,
        adapter=adapter,
        selects=training.selects,
        feature_compute=training.features.compute,
    )


def _write(
    folder: Path, training: TrainingSpec, trained: TrainingRecord, evaluated: EvaluationRecord, store: Store, *, merge: bool
) -> dict[str, str]:
    """Everything that an export holds; file digests by path."""
    import torch

    from model.encoder import encoder_folder
    from model.export import write_config, write_manifest
    from model.language_model import hold_in
    from model.lora import merge_adapters
    from workers.training.assemble import load_trained

    model, lora = load_trained(training, store), training.lora
    network = model.language_model
    adapter = None if lora is None or merge else _write_adapter(folder, network, lora, training)
    config = export_config(training, trained, adapter)
    write_config(folder, config)
    (folder / "connector.safetensors").write_bytes(store.read_bytes(f"{trained.folder}/connector.safetensors"))
    if adapter is None:
        if lora is not None:
            merge_adapters(network)
        hold_in(network, torch.bfloat16 if config.language_model_precision == "bf16" else torch.float32)
        network.save_pretrained(folder / "language_model")  # type: ignore[operator]
        model.tokenizer.save_pretrained(folder / "language_model")
    _copy_encoder(encoder_folder(training.features.encoder.model), folder / "encoder")
    licences = sorted({sample.licence for sample in read_samples(store, training.dataset_fingerprint)})
    (folder / "README.md").write_text(model_card(training, trained, evaluated, licences, merged=adapter is None))
    return write_manifest(folder)


def _write_adapter(folder: Path, network: "nn.Module", lora: LoraSpec, training: TrainingSpec) -> "AdapterConfig":
    """The base model's own files, as they were trained on, and the adapters beside them."""
    from model.export import AdapterConfig
    from model.language_model import copy_model, describe_folder
    from model.lora import save_adapters

    base = training.language_model
    copy_model(verified_folder(base), folder / "language_model")
    save_adapters(network, lora, folder / "adapter", base.model)
    digest = describe_folder(folder / "language_model", base.model).weights_sha256
    return AdapterConfig(lora=lora, base_model=base.model, base_sha256=digest, template=base.template)


_ENCODER_FILES = ("config.json", "preprocessor_config.json", "README.md", "LICENSE")


def _copy_encoder(source: Path, target: Path) -> None:
    """What loading an encoder needs, one weights file or many with their index, and what tells of it."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and (file.name.endswith((".safetensors", ".safetensors.index.json")) or file.name in _ENCODER_FILES):
            shutil.copyfile(file, target / file.name)


def _check(exported: "ExportedModel", training: TrainingSpec, store: Store) -> tuple["Sample", "Turn", str]:
    """Ask the finished folder one held-out question, about a small detail where there is one, from the image's bytes."""
    samples = [sample for sample in read_samples(store, training.dataset_fingerprint) if not sample.text_only]
    last: ConversationError | None = None
    for sample in [sample for sample in samples if sample.split == "held_out"] or samples:
        data = store.read_reference(sample.image_path)
        if hashlib.sha256(data).hexdigest() != sample.image_sha256:
            raise ExportingError(f"image {sample.image_path} is not the one that the dataset was built from; build it again")
        for turn in sorted(sample.turns, key=lambda turn: turn.detail != "small"):
            try:
                # Without a local branch `both` is the global view.
                return sample, turn, exported.ask(data, turn.question, "both", max_new_tokens=MAX_NEW_TOKENS).text
            except ConversationError as error:  # the evaluation has put it into the quarantine
                last = error
    raise ExportingError(f"dataset {training.dataset_fingerprint[:16]} holds no question that the export can be asked ({last}); build another")


def model_card(
    training: TrainingSpec,
    trained: TrainingRecord,
    evaluated: EvaluationRecord,
    licences: list[str],
    usage: str = ASK,
    *,
    merged: bool = True,
) -> str:
    """The card: what it is, how it was trained, how good it is, what it is made of. From records alone.

    Args:
        training: of the run.
        trained: its record.
        evaluated: its evaluation's record.
        licences: of the training images.
        usage: how to ask it.
        merged: whether adapters, where the run trained any, are in the language model's weights.

    Returns:
        Markdown.
    """
    features, connector = training.features, training.connector
    local, lora = connector.local_branch, training.lora
    place = "merged into it" if merged else "in `adapter/`"
    lines = [
        "# A Loupe vision-language connector",
        "",
        f"A {connector.global_branch.fusion.kind} / {connector.global_branch.adapters.kind} connector between the vision encoder "
        f"`{features.encoder.model}` ({features.encoder.view_px} px views, {features.encoder.num_patches} patches) and the language model "
        f"`{training.language_model.model}`. " + _local_words(local, features.encoder.num_patches),
        "",
        usage,
        "",
        "## Accuracy",
        "",
        (
            f"{evaluated.num_questions} questions about {evaluated.num_images} images of "
            + (f"the {evaluated.split} split" if evaluated.of_training_dataset else f"dataset `{evaluated.dataset_fingerprint[:16]}`")
            + ", each asked by itself. Intervals are of 95 %: Wilson's where an answer is right or wrong, else from a bootstrap over images."
            + (" `majority` always gives the commonest training answer to the question's kind." if _has_majority(evaluated) else "")
            + (
                f" {evaluated.num_images_trained_on} more images were not asked, since they are in the training split."
                if evaluated.num_images_trained_on
                else ""
            )
        ),
        "",
        *(line for metric in evaluated.metrics for line in _accuracy_table(evaluated, metric)),
        *_figures_table(evaluated),
        "## Training",
        "",
        *([] if training.initial_weights_sha256 is None else [f"It starts from weights of sha256 `{training.initial_weights_sha256}`.", ""]),
        *(_training_lines(training, trained) if trained.phases else ["Nothing was trained: these are those weights.", ""]),
        "## Made of",
        "",
        f"- dataset `{training.dataset_fingerprint[:16]}`; licences of its images: {', '.join(licences)}",
        f"- encoder `{features.encoder.model}`, weights sha256 `{features.encoder.weights_sha256[:16]}`",
        f"- language model `{training.language_model.model}`, sha256 `{training.language_model.weights_sha256[:16]}`"
        + (f", {PACKAGED[training.language_model.model].licence}" if training.language_model.model in PACKAGED else "")
        + ("" if lora is None else f"; fine-tuned by adapters of rank {lora.rank}, alpha {lora.alpha:g}, {place}"),
        f"- training run `{trained.training_fingerprint[:16]}`",
        "- " + ", ".join(f"{name} {number}" for name, number in sorted(trained.versions.items())),
        "",
    ]
    return "\n".join(lines)


def _training_lines(training: TrainingSpec, trained: TrainingRecord) -> list[str]:
    return [
        (
            f"{trained.num_images} images, {trained.samples} conversations in {trained.steps} steps, {trained.seconds:.0f} s on {trained.workers} "
            "worker(s) "
            f"with {trained.threads} thread(s) on {trained.device}; matrix products in {trained.products}, seed {training.schedule.seed}."
        ),
        "",
        "| phase | trained | steps | batch | learning rate | first loss | last loss |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {record.name} | {', '.join(record.train)} | {record.steps} | {phase.batch_size} | {phase.learning_rate:g} | {record.first_loss:.3f} "
            "| "
            f"{record.last_loss:.3f} |"
            for record, phase in zip(trained.phases, training.schedule.phases, strict=True)
        ),
        "",
        "Every block that a phase does not train was proven unchanged by it, byte for byte."
        + ("" if training.lora is None else " So was the language model below its adapters."),
        "",
    ]


def _local_words(local: LocalBranchSpec | None, num_patches: int) -> str:
    if local is None:
        return "It has no local branch."
    kept = "" if local.selector is None else f" A {local.selector.kind} selector keeps those that the question needs."
    how = "kept at" if local.compression is None else "compressed to"
    return f"Local views are fused by {local.fusion.kind} and {how} {local.view_tokens(num_patches)} tokens each.{kept}"


def _has_majority(evaluated: EvaluationRecord) -> bool:
    return any(score.mode == "majority" for score in evaluated.scores)


def _accuracy_table(evaluated: EvaluationRecord, metric: str) -> list[str]:
    scores = [score for score in evaluated.scores if score.metric == metric and not score.kind]
    modes = (*evaluated.modes, *(("majority",) if any(score.mode == "majority" for score in scores) else ()))
    groups = sorted({(score.family, score.detail) for score in scores})
    rows = [f"`{metric}`: {evaluated.rules[metric]}.", "", "| questions | number | " + " | ".join(modes) + " |", "|---|---|" + "---|" * len(modes)]
    for family, detail in groups:
        found = {score.mode: score for score in scores if (score.family, score.detail) == (family, detail)}
        name = ", ".join([family or "all", *([f"{detail} detail"] if detail else [])])
        cells = [f"{found[mode].fraction:.1%} ({found[mode].low:.0%} to {found[mode].high:.0%})" if mode in found else "-" for mode in modes]
        rows.append(f"| {name} | {found[modes[0]].total} | " + " | ".join(cells) + " |")
    return [*rows, ""]


def _figures_table(evaluated: EvaluationRecord) -> list[str]:
    if not evaluated.figures:
        return []
    rows = [
        "Of the answers to questions of yes and no:",
        "",
        "| figure | " + " | ".join(evaluated.modes) + " |",
        "|---|" + "---|" * len(evaluated.modes),
    ]
    for name in dict.fromkeys(figure.name for figure in evaluated.figures):
        found = {figure.mode: figure for figure in evaluated.figures if figure.name == name}
        cells = [f"{found[mode].fraction:.1%} ({found[mode].low:.0%} to {found[mode].high:.0%})" for mode in evaluated.modes]
        rows.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return [*rows, ""]
