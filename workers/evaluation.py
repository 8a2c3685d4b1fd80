"""Stage evaluate: every held-out question asked by itself, in every mode, answered greedily, scored by each metric that was asked for.

Input: a trained connector, and a dataset with its features: the held-out split of the one that was trained on, or another one. Output: scores per
metric, mode, family, detail and kind of question with 95 % intervals, and a Parquet file with one row per (question, mode) and a column per metric.
`majority` stands beside the modes: the commonest training answer to the question's kind, which needs neither image nor question.

Invariants: all modes are asked the same questions of the same images; a question's answer does not depend on the batch it was asked in; no image of
the run's training split is asked (of another dataset such images are left out, counted and listed). So conversations about no image are not asked,
but counted: they would be blind's alone.
"""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from model.errors import ConversationError, SpecError
from model.metrics import METRICS, MetricName, Share, is_zero_or_one, majority_answers, metric_words, read_yes_no, score_answer
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

__all__ = [
    "MAX_NEW_TOKENS",
    "ClassificationFigure",
    "EvaluationRecord",
    "EvaluationSpec",
    "Score",
    "asked_features",
    "check_other_dataset",
    "check_questions",
    "evaluate",
]

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
    """Of the dataset that is asked."""
    split: Literal["held_out", "train"] = "held_out"
    modes: tuple[EvaluationMode, ...] = ("blind", "global", "local", "both")
    max_questions: int | None = None
    """At most this many, chosen by hash; None asks all."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """An answer ends here at the latest; longer true answers cannot be matched."""
    metrics: tuple[MetricName, ...] = ("exact_match",)
    """The first is the one that reports show."""

    def __post_init__(self) -> None:
        if not self.modes or len(set(self.modes)) != len(self.modes) or set(self.modes) - set(get_args(EvaluationMode)):
            raise SpecError(f"evaluation.modes must name some of {list(get_args(EvaluationMode))}, each once; found {list(self.modes)}")
        if not self.metrics or len(set(self.metrics)) != len(self.metrics) or set(self.metrics) - set(METRICS):
            raise SpecError(f"evaluation.metrics must name some of {list(METRICS)}, each once; found {list(self.metrics)}")
        if (self.max_questions is not None and self.max_questions < 1) or self.max_new_tokens < 1:
            raise SpecError(f"evaluation.max_questions and max_new_tokens must be at least 1, found {self.max_questions} and {self.max_new_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one metric says of one group of questions in one mode. An empty family, detail or kind means all of them."""

    metric: str
    mode: str
    """A mode of the spec, or `majority`."""
    family: str
    detail: str
    kind: str
    total: int
    """Questions that the metric says something about."""
    points: float
    """The sum of their scores: of metrics that know right and wrong alone, the number of right answers."""
    fraction: float
    """Points over total."""
    low: float
    """Lower end of the 95 % interval: Wilson's where there is right and wrong alone, else from a bootstrap over images."""
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationFigure:
    """What `yes_no` says of all questions in one mode beside its accuracy; `yes` is what is looked for."""

    metric: str
    name: Literal["precision", "recall", "f1", "yes_share", "unclear_share"]
    """The last two are shares of all answers: that say yes, and that say neither yes nor no or both."""
    mode: str
    fraction: float
    low: float
    """Lower end of the 95 % interval, from a bootstrap over images."""
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """What an evaluation found."""

    training_fingerprint: str
    dataset_fingerprint: str
    """Of the dataset that was asked."""
    of_training_dataset: bool
    """Whether that is the one whose train split was trained on."""
    split: str
    modes: tuple[str, ...]
    """Those that the connector has; without a local branch, `local` and `both` are left out."""
    metrics: tuple[str, ...]
    """The first is the main one."""
    rules: dict[str, str]
    """What each metric counts, in words."""
    num_images: int
    num_questions: int
    """That were asked."""
    num_text_only: int = 0
    """Conversations of the split that are about no image, of which nothing is asked."""
    num_missing: int = 0
    """Images whose features were gone or damaged, and were computed again (`missing_features`)."""
    num_quarantined: int
    """Questions that cannot be asked."""
    quarantined_by_reason: dict[str, int]
    num_images_trained_on: int
    """Images of the asked dataset that were left out, since the run was trained on them: the same bytes."""
    num_questions_trained_on: int
    """Questions about them."""
    trained_on: str
    """JSON file that lists those images, relative to the root; empty when there are none."""
    scores: tuple[Score, ...]
    """Per metric and mode: everything; per detail; per family; per family and detail; per family, detail and kind."""
    figures: tuple[ClassificationFigure, ...]
    """Of `yes_no`, where it is among the metrics."""
    answers: str
    """Parquet file with a row per (question, mode), relative to the root; a column per metric, null where it says nothing about the question."""
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

    def score(self, metric: MetricName) -> float | None:
        """What a metric says of it; None where it says nothing about such a question."""
        return score_answer(metric, self.answer, (self.question.expected,), self.question.text)


def asked_features(spec: EvaluationSpec, training: TrainingSpec) -> FeatureSpec:
    """The features that an evaluation reads: the connector's, of the dataset that is asked."""
    return replace(training.features, dataset_fingerprint=spec.dataset_fingerprint)


def evaluate(spec: EvaluationSpec, training: TrainingSpec, store: Store, execution: ExecutionSettings, progress: Progress) -> EvaluationRecord:
    """Evaluate a trained connector, or find it done.

    Args:
        spec: which questions, in which modes.
        training: of the connector.
        store: where everything is.
        execution: eval_batch_size, num_cpus, device and missing_features count; `substitute` means `encode` here, since no other image can stand in
            for the one that a question is about.
        progress: told in answers.

    Returns:
        The record, committed.

    Raises:
        EvaluationError: there is nothing to ask, a metric says nothing about any question, or the specs are of different runs.
        ErrorBudgetError: too many questions cannot be asked.
        TrainingError: the run has not ended.
        MissingFeaturesError: an image's features are gone or damaged, and missing_features is `fail`.
    """
    stage = Stage.open(store, "evaluate", spec)
    if (done := stage.committed(EvaluationRecord)) is not None:
        return done
    if spec.training_fingerprint != fingerprint(training):
        raise EvaluationError("the evaluation names another training run than it was given; make both from one recipe")
    from workers.devices import choose_device
    from workers.training.assemble import load_trained, set_threads, training_data

    with stage.attempt() as timer:
        set_threads(execution)
        device = choose_device(execution.device)
        # The same connector and encoder over the images that are asked.
        over_asked = replace(training, dataset_fingerprint=spec.dataset_fingerprint, features=asked_features(spec, training))
        trained = read_samples(store, training.dataset_fingerprint, "train")
        reading = replace(execution, missing_features="encode") if execution.missing_features == "substitute" else execution
        data = training_data(over_asked, store, spec.split, reading, device=str(device))
        shown = _about_images(data.samples)
        samples, left_out = (shown, []) if _of_training_dataset(spec, training) else _without_trained(shown, trained)
        questions = _chosen(samples, spec.max_questions)
        _check_there_is_something_to_ask(spec, questions, left_out)
        model = load_trained(training, store, device=device)
        questions, refused = _askable(questions, model, over_asked.features, spec.max_new_tokens, execution.max_quarantined_fraction)
        commit_quarantine(stage, refused)
        modes = tuple(mode for mode in spec.modes if training.connector.local_branch is not None or mode in ("blind", "global"))
        progress.start("asking held-out questions", len(questions) * len(modes))
        started = time.monotonic()
        given: list[_Given] = []
        points: list[float] = []
        try:
            for some in _answers(
                model, data, training.features, questions, modes, spec.max_new_tokens, execution.eval_batch_size, selects=training.selects
            ):
                given += some
                points += [score for item in some if (score := item.score(spec.metrics[0])) is not None]
                progress.advance(len(some), **({_progress_word(spec.metrics[0]): f"{sum(points) / len(points):.0%}"} if points else {}))
        finally:
            progress.finish()
        asking_seconds = time.monotonic() - started
        majority = majority_answers((turn.kind, turn.answer) for sample in trained for turn in sample.turns)
        baseline = [_Given(question=question, mode="majority", answer=majority[question.kind]) for question in questions if question.kind in majority]
        _write_answers(store, stage.path("answers.parquet"), given, spec.metrics)
        if left_out:
            listed = [{"sample_id": sample.sample_id, "image_sha256": sample.image_sha256} for sample in left_out]
            store.write_json(stage.path("trained_on.json"), listed)
        record = EvaluationRecord(
            training_fingerprint=spec.training_fingerprint,
            dataset_fingerprint=spec.dataset_fingerprint,
            of_training_dataset=_of_training_dataset(spec, training),
            split=spec.split,
            modes=modes,
            metrics=spec.metrics,
            rules={metric: metric_words(metric) for metric in spec.metrics},
            num_images=len({question.sample.sample_id for question in questions}),
            num_questions=len(questions),
            num_text_only=len(data.samples) - len(shown),
            num_missing=data.source.num_encoded_live,
            num_quarantined=len(refused),
            quarantined_by_reason=dict(sorted(Counter(row.reason for row in refused).items())),
            num_images_trained_on=len(left_out),
            num_questions_trained_on=sum(len(sample.turns) for sample in left_out),
            trained_on=stage.path("trained_on.json") if left_out else "",
            scores=tuple(score for metric in spec.metrics for score in _scores(metric, [*given, *baseline], (*modes, "majority"))),
            figures=_yes_no_figures(given, modes) if "yes_no" in spec.metrics else (),
            answers=stage.path("answers.parquet"),
            seconds=timer.seconds,
            answers_per_second=len(given) / max(asking_seconds, 1e-9),
        )
    return stage.commit(record)


def _of_training_dataset(spec: EvaluationSpec, training: TrainingSpec) -> bool:
    return spec.dataset_fingerprint == training.dataset_fingerprint


def _progress_word(metric: MetricName) -> str:
    return "right" if is_zero_or_one(metric) else metric


def _about_images(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.text_only]


def _without_trained(samples: Sequence[Sample], trained: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples whose image the run was not trained on, and those whose image it was."""
    seen = {sample.identity for sample in trained}
    return [sample for sample in samples if sample.image_sha256 not in seen], [sample for sample in samples if sample.image_sha256 in seen]


def _check_there_is_something_to_ask(spec: EvaluationSpec, questions: Sequence[_Question], left_out: Sequence[Sample]) -> None:
    if not questions and left_out:
        raise EvaluationError(
            f"dataset {spec.dataset_fingerprint[:16]} has nothing to ask: the run was trained on all of its {len(left_out)} images; evaluate on "
            "images that are not in its training split"
        )
    if not questions:
        raise EvaluationError(
            f"the {spec.split} split of dataset {spec.dataset_fingerprint[:16]} has no question whose image has features; build more images or a "
            "larger held_out_fraction"
        )
    for metric in spec.metrics:
        if all(score_answer(metric, "", (question.expected,), question.text) is None for question in questions):
            example = questions[0]
            raise EvaluationError(
                f"evaluation.metrics: {metric} says nothing about any of the {len(questions)} questions of dataset {spec.dataset_fingerprint[:16]}, "
                f"such as {example.text!r} with the answer {example.expected!r}; take another metric, or another dataset"
            )


@runtime_checkable
class _Asker(Protocol):
    """What decides whether a question can be asked: a model, or as much of one as is known before training."""

    @property
    def tokenizer(self) -> Any:
        """With a chat template."""

    @property
    def max_tokens(self) -> int:
        """The language model's longest sequence."""

    @property
    def connector(self) -> Any:
        """Tells how many tokens a view makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Untrained:
    """A model without the language model's weights."""

    tokenizer: Any
    max_tokens: int
    connector: Any


def check_other_dataset(spec: EvaluationSpec, training: TrainingSpec, store: Store, execution: ExecutionSettings) -> None:
    """Find out before the training run whether a dataset that is not its own can be asked afterwards, without any weights.

    Args:
        spec: of the evaluation.
        training: of the run.
        store: holds both datasets.
        execution: max_quarantined_fraction counts.

    Raises:
        ErrorBudgetError: too many questions cannot be asked.
        EvaluationError: all images are in the run's training split, or a metric says nothing about any question.
    """
    from model.connector import build_connector
    from model.language_model import context_tokens, load_tokenizer
    from workers.language_models import language_model_folder, language_model_hidden

    trained = read_samples(store, training.dataset_fingerprint, "train")
    samples, left_out = _without_trained(_about_images(read_samples(store, spec.dataset_fingerprint, spec.split)), trained)
    _check_there_is_something_to_ask(spec, _chosen(samples, spec.max_questions), left_out)
    name = training.language_model.model
    connector = build_connector(training.connector, training.features.encoder, hidden=language_model_hidden(name), embedding_rms=1.0, seed=0)
    folder = language_model_folder(name)
    asker = _Untrained(tokenizer=load_tokenizer(folder, training.language_model.template), max_tokens=context_tokens(folder), connector=connector)
    check_questions(samples, asker, asked_features(spec, training), execution)


def check_questions(samples: Sequence[Sample], model: _Asker, features: FeatureSpec, execution: ExecutionSettings) -> None:
    """Tokenise every question, so that an evaluation that would be refused is told before a training run and not after it.

    Args:
        samples: of the split that will be asked.
        model: that will be asked; trained or not.
        features: tell how many local views an image has.
        execution: max_quarantined_fraction counts.

    Raises:
        ErrorBudgetError: too many of them cannot be asked.
    """
    _askable(_chosen(_about_images(samples), None), model, features, MAX_NEW_TOKENS, execution.max_quarantined_fraction)


def _askable(
    questions: Sequence[_Question], model: _Asker, features: FeatureSpec, max_new_tokens: int, max_quarantined_fraction: float
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


def _prompt(model: _Asker, question: _Question, features: FeatureSpec, max_new_tokens: int) -> "Conversation":
    from model.chat import tokenise_question
    from model.vision_language import room_for_text
    from workers.caching.units import view_plan

    room = room_for_text(model.max_tokens - max_new_tokens, model.connector, view_plan(features, question.sample))
    return tokenise_question(model.tokenizer, question.text, room)


def _chosen(samples: Sequence[Sample], max_questions: int | None) -> list[_Question]:
    """All questions in frozen order, or those with the smallest hashes."""
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
    *,
    selects: bool,
) -> Iterator[list[_Given]]:
    """Answers, a batch at a time. An image's visual tokens are computed once for all of its questions and modes."""
    from model.vision_language import lay_out_images, plan_sequences
    from workers.caching.units import view_plan
    from workers.training.batches import needed_maps

    _, local_maps = needed_maps(model.connector.spec)
    want_global = any(mode in ("global", "both") for mode in modes)
    want_local = bool(local_maps) and any(mode in ("local", "both") for mode in modes)
    images = list({question.sample.sample_id: question.sample for question in questions}.values())
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        chosen = images[start : start + _IMAGES_AT_ONCE]
        place = {sample.sample_id: number for number, sample in enumerate(chosen)}
        found = data.source.fetch({"global": chosen if want_global else [], "local": chosen if want_local else []})
        plans = [view_plan(features, sample) if "local" in found else None for sample in chosen]
        layout = lay_out_images(model.connector, ["global" in found] * len(chosen), plans)
        maps = plan_sequences([], [], [], layout, global_maps=found.get("global"), local_maps=found.get("local")).to(model.device)
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
                    selects=selects,
                ).to(model.device)
                tokens = model.generate(batch, max_new_tokens, visual)
                yield [
                    _Given(question=question, mode=mode, answer=model.tokenizer.decode(ids, skip_special_tokens=True).strip())
                    for (question, _), ids in zip(some, tokens, strict=True)
                ]


def _scores(metric: MetricName, given: Sequence[_Given], modes: Sequence[str]) -> Iterator[Score]:
    """One metric over everything, by detail, by family, by family and detail, and by kind."""
    groups: dict[tuple[str, str, str, str], tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))
    for item in given:
        points = item.score(metric)
        if points is None:
            continue
        family, detail, kind = item.question.sample.family, item.question.detail, item.question.kind
        for group in (("", "", ""), ("", detail, ""), (family, "", ""), (family, detail, ""), (family, detail, kind)):
            scores, images = groups[item.mode, *group]
            scores.append(points)
            images.append(item.question.sample.image_sha256)
    for mode, family, detail, kind in sorted(groups, key=lambda key: (modes.index(key[0]), key[1:])):
        scores, images = groups[mode, family, detail, kind]
        # Kinds of question that training never saw have no commonest answer; a baseline over a part of a group would be set beside all of it.
        if mode == "majority" and len(scores) < len(groups[modes[0], family, detail, kind][0]):
            continue
        low, high = _mean_interval(metric, scores, images)
        yield Score(
            metric=metric,
            mode=mode,
            family=family,
            detail=detail,
            kind=kind,
            total=len(scores),
            points=sum(scores),
            fraction=sum(scores) / len(scores),
            low=low,
            high=high,
        )


def _mean_interval(metric: MetricName, scores: Sequence[float], images: Sequence[str]) -> tuple[float, float]:
    if is_zero_or_one(metric):
        return Share(correct=round(sum(scores)), total=len(scores)).interval
    from model.intervals import ratio_interval

    return ratio_interval(scores, [1.0] * len(scores), images)


def _yes_no_figures(given: Sequence[_Given], modes: Sequence[str]) -> tuple[ClassificationFigure, ...]:
    """Precision, recall and F1 of `yes`, and how often yes and neither were said, over all questions of yes and no in each mode.

    Source: POPE (arXiv 2305.10355) section 5.1.
    """
    from model.intervals import ratio_interval

    figures = []
    for mode in modes:
        asked = [item for item in given if item.mode == mode and item.score("yes_no") is not None]
        images = [item.question.sample.image_sha256 for item in asked]
        true = [read_yes_no(item.question.expected) == "yes" for item in asked]
        said = [read_yes_no(item.answer) for item in asked]
        hits = [float(truth and answer == "yes") for truth, answer in zip(true, said, strict=True)]
        claimed = [float(answer == "yes") for answer in said]
        there = [float(truth) for truth in true]
        every = [1.0] * len(asked)
        ratios: tuple[tuple[Literal["precision", "recall", "f1", "yes_share", "unclear_share"], list[float], list[float]], ...] = (
            ("precision", hits, claimed),
            ("recall", hits, there),
            ("f1", [2 * hit for hit in hits], [claim + truth for claim, truth in zip(claimed, there, strict=True)]),
            ("yes_share", claimed, every),
            ("unclear_share", [float(answer is None) for answer in said], every),
        )
        for name, tops, bottoms in ratios:
            low, high = ratio_interval(tops, bottoms, images)
            fraction = sum(tops) / sum(bottoms) if sum(bottoms) else 0.0
            figures.append(ClassificationFigure(metric="yes_no", name=name, mode=mode, fraction=fraction, low=low, high=high))
    return tuple(figures)


def _write_answers(store: Store, path: str, given: Sequence[_Given], metrics: Sequence[MetricName]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(given, key=lambda item: (item.question.sample.index, item.question.turn, item.mode))
    columns: dict[str, Any] = {
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
        **{metric: pa.array([item.score(metric) for item in ordered], pa.float64()) for metric in metrics},
    }
    with store.publishing(path) as file:
        pq.write_table(pa.table(columns), file)
