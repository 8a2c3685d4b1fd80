"""Stage evaluate: every held-out question asked by itself, in every mode, answered greedily, scored by exact match.

Input: a trained connector, the held-out split and its features. Output: counts per mode, family, detail and kind of question with Wilson intervals,
and a Parquet file with one row per (question, mode). `majority` stands beside the modes: the commonest training answer to the question's kind, which
needs neither image nor question. Invariant: all modes are asked the same questions of the same images, and a question's answer does not depend on the
batch it was asked in. Held-out conversations about no image are not asked: the modes would no longer be asked the same, and exact match says nothing
of a conversation.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from model.errors import ConversationError, SpecError
from model.metrics import Share, exact_match, majority_answers
from model.specs import FeatureSpec, fingerprint
from workers.commits import Stage
from workers.dataset.samples import Sample, read_samples
from workers.errors import EvaluationError
from workers.execution import ExecutionSettings, Progress
from workers.quarantine import QuarantineRow, check_budget, commit_quarantine
from workers.storage import Store
from workers.training.spec import TrainingSpec

if TYPE_CHECKING:
    from model.chat import Conversation
    from model.vision_language import Mode, VisionLanguageModel
    from workers.training.assemble import TrainingData

__all__ = ["MAX_NEW_TOKENS", "NORMALISATION", "AccuracyCount", "EvaluationRecord", "EvaluationSpec", "check_questions", "evaluate"]

NORMALISATION = "casefold, strip, collapse blanks, strip one trailing period; then equality"
"""How answers are compared, in words; the code is model.metrics.normalise_answer."""

EvaluationMode = Literal["blind", "global", "local", "both"]

MAX_NEW_TOKENS = 24
"""Enough for every answer that the drawn families have."""

_IMAGES_AT_ONCE = 32
"""Images whose features and visual tokens are in memory together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """Identity of an evaluation.

    Raises:
        SpecError: no modes, one twice, or nothing to ask.
    """

    training_fingerprint: str
    dataset_fingerprint: str
    split: Literal["held_out", "train"] = "held_out"
    modes: tuple[EvaluationMode, ...] = ("blind", "global", "local", "both")
    max_questions: int | None = None
    """At most this many, chosen by hash; None asks all."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """An answer ends here at the latest; longer true answers cannot be matched."""

    def __post_init__(self) -> None:
        if not self.modes or len(set(self.modes)) != len(self.modes) or set(self.modes) - set(get_args(EvaluationMode)):
            raise SpecError(f"evaluation.modes must name some of {list(get_args(EvaluationMode))}, each once; found {list(self.modes)}")
        if (self.max_questions is not None and self.max_questions < 1) or self.max_new_tokens < 1:
            raise SpecError(f"evaluation.max_questions and max_new_tokens must be at least 1, found {self.max_questions} and {self.max_new_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyCount:
    """Right answers among one group of questions in one mode. An empty family, detail or kind means all of them."""

    mode: str
    """A mode of the spec, or `majority`."""
    family: str
    detail: str
    kind: str
    correct: int
    total: int
    fraction: float
    low: float
    """Lower end of the 95 % Wilson score interval."""
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """What an evaluation found."""

    training_fingerprint: str
    dataset_fingerprint: str
    split: str
    modes: tuple[str, ...]
    """Those that the connector has; without a local branch, `local` and `both` are left out."""
    num_images: int
    num_questions: int
    """That were asked."""
    num_text_only: int = 0
    """Conversations of the split that are about no image, of which nothing is asked."""
    num_quarantined: int
    """Questions that cannot be asked."""
    quarantined_by_reason: dict[str, int]
    counts: tuple[AccuracyCount, ...]
    """Per mode: everything; per detail; per family; per family and detail; per family, detail and kind."""
    answers: str
    """Parquet file with a row per (question, mode), relative to the root."""
    normalisation: str
    seconds: float
    answers_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """One question about one image."""

    question_id: str
    sample: Sample
    turn: int
    kind: str
    detail: str
    text: str
    expected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """One answer."""

    question: _Question
    mode: str
    answer: str


def evaluate(spec: EvaluationSpec, training: TrainingSpec, store: Store, execution: ExecutionSettings, progress: Progress) -> EvaluationRecord:
    """Evaluate a trained connector, or find it done.

    Args:
        spec: which questions, in which modes.
        training: of the connector.
        store: where everything is.
        execution: eval_batch_size, num_cpus and device count.
        progress: told in answers.

    Returns:
        The record, committed.

    Raises:
        EvaluationError: there is nothing to ask, or the specs are of different runs.
        ErrorBudgetError: too many questions cannot be asked.
        TrainingError: the run has not ended.
    """
    stage = Stage.open(store, "evaluate", spec)
    if (done := stage.committed(EvaluationRecord)) is not None:
        return done
    if spec.training_fingerprint != fingerprint(training) or spec.dataset_fingerprint != training.dataset_fingerprint:
        raise EvaluationError("the evaluation names another training run or dataset than it was given; make both from one recipe")
    from workers.training.assemble import choose_device, load_trained, set_threads, training_data

    with stage.attempt() as timer:
        set_threads(execution)
        device = choose_device(execution.device)
        data = training_data(training, store, spec.split, device=device.type)
        questions = _chosen(data.samples, spec.max_questions)
        if not questions:
            raise EvaluationError(
                f"the {spec.split} split of dataset {spec.dataset_fingerprint[:16]} has no question whose image has features; build more images or a "
                "larger held_out_fraction"
            )
        model = load_trained(training, store, device=device)
        questions, refused = _askable(questions, model, training.features, spec.max_new_tokens, execution.max_quarantined_fraction)
        commit_quarantine(stage, refused)
        modes = tuple(mode for mode in spec.modes if training.connector.local_branch is not None or mode in ("blind", "global"))
        progress.start("asking held-out questions", len(questions) * len(modes))
        started = time.monotonic()
        given: list[_Given] = []
        right = 0
        try:
            for some in _answers(model, data, training.features, questions, modes, spec.max_new_tokens, execution.eval_batch_size):
                given += some
                right += sum(exact_match(item.answer, item.question.expected) for item in some)
                progress.advance(len(some), right=f"{right / len(given):.0%}")
        finally:
            progress.finish()
        asking_seconds = time.monotonic() - started
        majority = majority_answers(
            (turn.kind, turn.answer) for sample in read_samples(store, spec.dataset_fingerprint, "train") for turn in sample.turns
        )
        baseline = [_Given(question=question, mode="majority", answer=majority.get(question.kind, "")) for question in questions]
        _write_answers(store, stage.path("answers.parquet"), given)
        record = EvaluationRecord(
            training_fingerprint=spec.training_fingerprint,
            dataset_fingerprint=spec.dataset_fingerprint,
            split=spec.split,
            modes=modes,
            num_images=len({question.sample.sample_id for question in questions}),
            num_questions=len(questions),
            num_text_only=sum(sample.text_only for sample in data.samples),
            num_quarantined=len(refused),
            quarantined_by_reason=dict(sorted(Counter(row.reason for row in refused).items())),
            counts=_counts([*given, *baseline], (*modes, "majority")),
            answers=stage.path("answers.parquet"),
            normalisation=NORMALISATION,
            seconds=timer.seconds,
            answers_per_second=len(given) / max(asking_seconds, 1e-9),
        )
    return stage.commit(record)


def check_questions(samples: Sequence[Sample], model: "VisionLanguageModel", features: FeatureSpec, execution: ExecutionSettings) -> None:
    """Tokenise every question, so that an evaluation that would be refused is told before a training run and not after it.

    Args:
        samples: of the split that will be asked.
        model: that will be asked; trained or not.
        features: tell how many local views an image has.
        execution: max_quarantined_fraction counts.

    Raises:
        ErrorBudgetError: too many of them cannot be asked.
    """
    _askable(_chosen(samples, None), model, features, MAX_NEW_TOKENS, execution.max_quarantined_fraction)


def _askable(
    questions: Sequence[_Question], model: "VisionLanguageModel", features: FeatureSpec, max_new_tokens: int, max_quarantined_fraction: float
) -> tuple[list[_Question], list[QuarantineRow]]:
    """The questions that can be asked, and a quarantine row for each of the others."""
    askable: list[_Question] = []
    refused: dict[str, list[QuarantineRow]] = {}
    for question in questions:
        sample = question.sample
        try:
            _prompt(model, question, features, max_new_tokens)
        except ConversationError as error:
            row = QuarantineRow(
                reason=error.reason, source=sample.source, item=question.question_id, index=sample.index, bytes_sha256=None, detail=str(error)
            )
            refused.setdefault(sample.source, []).append(row)
        else:
            askable.append(question)
    check_budget(refused, Counter(question.sample.source for question in questions), max_quarantined_fraction)
    return askable, [row for rows in refused.values() for row in rows]


def _prompt(model: "VisionLanguageModel", question: _Question, features: FeatureSpec, max_new_tokens: int) -> "Conversation":
    from model.chat import tokenise_question
    from model.vision_language import room_for_text
    from workers.caching.units import view_plan

    room = room_for_text(model.max_tokens - max_new_tokens, model.connector, view_plan(features, question.sample))
    return tokenise_question(model.tokenizer, question.text, room)


def _chosen(samples: Sequence[Sample], max_questions: int | None) -> list[_Question]:
    """All questions about images in frozen order, or those with the smallest hashes."""
    questions = [
        _Question(
            question_id=f"{sample.sample_id}#{number}",
            sample=sample,
            turn=number,
            kind=turn.kind,
            detail=turn.detail,
            text=turn.question,
            expected=turn.answer,
        )
        for sample in samples
        if not sample.text_only
        for number, turn in enumerate(sample.turns)
    ]
    if max_questions is None or len(questions) <= max_questions:
        return questions
    kept = set(sorted((hashlib.sha256(question.question_id.encode()).hexdigest(), question.question_id) for question in questions)[:max_questions])
    names = {name for _, name in kept}
    return [question for question in questions if question.question_id in names]


def _answers(
    model: "VisionLanguageModel",
    data: "TrainingData",
    features: FeatureSpec,
    questions: Sequence[_Question],
    modes: Sequence["Mode"],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[list[_Given]]:
    """Answers, a batch at a time. An image's visual tokens are computed once for all of its questions and modes."""
    from model.vision_language import lay_out_images, plan_sequences
    from workers.caching.units import view_plan
    from workers.training.batches import needed_maps, stack_maps

    global_maps, local_maps = needed_maps(model.connector.spec)
    want_global = any(mode in ("global", "both") for mode in modes)
    want_local = bool(local_maps) and any(mode in ("local", "both") for mode in modes)
    images = list({question.sample.sample_id: question.sample for question in questions}.values())
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        chosen = images[start : start + _IMAGES_AT_ONCE]
        place = {sample.sample_id: number for number, sample in enumerate(chosen)}
        found = data.source.fetch(chosen, want_global=want_global, want_local=want_local)
        globals_ = [image.global_maps for image in found if image.global_maps is not None]
        locals_ = [image.local_maps for image in found if image.local_maps is not None]
        plans = [None if image.local_maps is None else view_plan(features, sample) for image, sample in zip(found, chosen, strict=True)]
        layout = lay_out_images(model.connector, [image.global_maps is not None for image in found], plans)
        maps = plan_sequences(
            [],
            [],
            [],
            layout,
            global_maps=stack_maps(globals_, global_maps) if globals_ else None,
            local_maps=stack_maps(locals_, local_maps) if locals_ else None,
        ).to(model.device)
        visual = model.visual_tokens_without_gradient(maps)
        for mode in modes:
            mine = [(question, _prompt(model, question, features, max_new_tokens)) for question in questions if question.sample.sample_id in place]
            mine.sort(key=lambda pair: pair[1].num_text_tokens)  # little padding
            for first in range(0, len(mine), batch_size):
                some = mine[first : first + batch_size]
                batch = plan_sequences(
                    [conversation for _, conversation in some],
                    [mode] * len(some),
                    [place[question.sample.sample_id] for question, _ in some],
                    layout,
                    pad_left=True,
                    selects=model.connector.spec.selector is not None,
                ).to(model.device)
                tokens = model.generate(batch, max_new_tokens, visual)
                yield [
                    _Given(question=question, mode=mode, answer=model.tokenizer.decode(ids, skip_special_tokens=True).strip())
                    for (question, _), ids in zip(some, tokens, strict=True)
                ]


def _counts(given: Sequence[_Given], modes: Sequence[str]) -> tuple[AccuracyCount, ...]:
    """Counts over everything, by detail, by family, by family and detail, and by kind."""
    right: Counter[tuple[str, str, str, str]] = Counter()
    asked: Counter[tuple[str, str, str, str]] = Counter()
    for item in given:
        family, detail, kind = item.question.sample.family, item.question.detail, item.question.kind
        for group in (("", "", ""), ("", detail, ""), (family, "", ""), (family, detail, ""), (family, detail, kind)):
            asked[item.mode, *group] += 1
            right[item.mode, *group] += exact_match(item.answer, item.question.expected)
    counts = []
    for mode, family, detail, kind in sorted(asked, key=lambda key: (modes.index(key[0]), key[1:])):
        share = Share(correct=right[mode, family, detail, kind], total=asked[mode, family, detail, kind])
        low, high = share.interval
        counts.append(
            AccuracyCount(
                mode=mode,
                family=family,
                detail=detail,
                kind=kind,
                correct=share.correct,
                total=share.total,
                fraction=share.fraction,
                low=low,
                high=high,
            )
        )
    return tuple(counts)


def _write_answers(store: Store, path: str, given: Sequence[_Given]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(given, key=lambda item: (item.question.sample.index, item.question.turn, item.mode))
    columns = {
        "question_id": [item.question.question_id for item in ordered],
        "sample_id": [item.question.sample.sample_id for item in ordered],
        "turn": [item.question.turn for item in ordered],
        "image_sha256": [item.question.sample.image_sha256 for item in ordered],
        "family": [item.question.sample.family for item in ordered],
        "kind": [item.question.kind for item in ordered],
        "detail": [item.question.detail for item in ordered],
        "mode": [item.mode for item in ordered],
        "question": [item.question.text for item in ordered],
        "expected": [item.question.expected for item in ordered],
        "answer": [item.answer for item in ordered],
        "correct": [exact_match(item.answer, item.question.expected) for item in ordered],
    }
    with store.publishing(path) as file:
        pq.write_table(pa.table(columns), file)
