"""`loupe compare`: finished evaluations side by side, on the questions that all of them were asked, with how sure each difference is.

Input: recipes or keys of evaluate stages in one root. Output: a table or JSON of means and of paired differences to the first run, with 95 %
intervals. A question is the same in two runs when image bytes, text and true answer are. Of a run with several seeds, a question's score is the mean
over them; the intervals are for other questions of other images asked of the same trained seeds, and not for other seeds.

Invariant: every figure of a row is over the same questions, and the runs are compared question by question: what makes a question hard for both runs
cancels.
"""

import io
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from model.errors import SpecError
from model.intervals import ratio_interval
from model.metrics import METRICS, MetricName, score_answer
from pipelines.errors import ComparisonError, NothingThereError
from pipelines.recipe_files import load_recipe, recipe_files
from pipelines.settings import execution_settings
from pipelines.wording import data_console, print_table
from workers.commits import from_json, to_json
from workers.evaluation import EvaluationRecord
from workers.storage import Store

__all__ = ["Comparison", "ComparisonRow", "Difference", "EvaluatedRun", "Mean", "compare_runs", "find_run", "find_runs", "print_comparison"]

_KEY = re.compile(r"[0-9a-f]{4,64}")
_SHOWN_KEYS = 8

Identity = tuple[str, str, str, int]
"""Of a question: its image's digest, its text, its true answer, and which of several such of one image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedRun:
    """A run's finished evaluations."""

    name: str
    keys: tuple[str, ...]
    """Of its evaluate stages, one per seed."""
    metrics: tuple[str, ...]
    """That were recorded, the main one first."""
    note: str
    """What there is to say of it, such as seeds that are not finished."""
    answers: tuple[tuple[dict[str, Any], ...], ...]
    """Per key: the rows of the answers' table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A run's mean score."""

    mean: float
    low: float
    """Lower end of the 95 % interval, from a bootstrap over images."""
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a run's mean score is above that of the first."""

    difference: float
    low: float
    """Lower end of the 95 % interval, from a bootstrap over images, paired by question."""
    high: float
    holds_zero: bool
    """Whether the interval holds 0: then these questions do not tell the runs apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonRow:
    """One group of questions in one mode. An empty family or detail means all of them."""

    mode: str
    family: str
    detail: str
    num_questions: int
    num_images: int
    means: tuple[Mean, ...]
    """By run."""
    differences: tuple[Difference, ...]
    """Of each run but the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedRun:
    """What is told of a run beside its scores."""

    name: str
    keys: tuple[str, ...]
    num_questions: int
    """That it was asked and the metric says something about."""
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs side by side."""

    metric: str
    runs: tuple[ComparedRun, ...]
    num_questions: int
    """In common."""
    num_images: int
    rows: tuple[ComparisonRow, ...]


def find_run(word: str, store: Store) -> EvaluatedRun:
    """The finished evaluations that a word names.

    Args:
        word: a recipe's name or path, or the key of an evaluate stage, or the beginning of one.
        store: where they are.

    Returns:
        All seeds of a recipe that are finished, or the one evaluation.

    Raises:
        NothingThereError: there is no such finished evaluation, or its key is unknown here.
        ComparisonError: several keys begin so.
        RecipeError: the recipe cannot be read.
    """
    if _KEY.fullmatch(word) and word not in recipe_files() and not Path(word).is_file():
        return _run_of_key(word, store)
    from pipelines.stages import open_experiment, shown_path

    file = load_recipe(word)
    experiment = open_experiment(file, store, execution_settings({}, file.recipe), planning=True)
    experiment.check_known(experiment.dataset)
    found: dict[str, EvaluationRecord] = {}
    missing: list[int] = []
    for seed in file.recipe.seeds:
        try:
            spec = experiment.evaluation(seed)
            experiment.check_known(spec)
            record = experiment.record("evaluate", spec)
        except SpecError:  # a schedule in epochs, and no dataset yet
            record = None
        if record is None:
            missing.append(seed)
        else:
            found[_key_of(spec)] = from_json(EvaluationRecord, record, where=f"evaluate {_key_of(spec)}")
    if not found:
        command = shlex.join(["loupe", "evaluate", word, "--root", shown_path(store.root)])
        raise NothingThereError(f"{shown_path(store.root)} holds no finished evaluation of recipe {word!r}; `{command}` makes it there")
    note = f"seeds {', '.join(map(str, missing))} are not finished" if missing else ""
    return _run(file.recipe.name, found, note, store)


def find_runs(words: Sequence[str], store: Store) -> list[EvaluatedRun]:
    """The runs that words name, at least two.

    Args:
        words: as for `find_run`.
        store: where they are.

    Returns:
        Runs in the order of the words.

    Raises:
        ComparisonError: fewer than two words.
    """
    if len(words) < 2:
        raise ComparisonError(
            f"compare: found {len(words)} run{'' if len(words) == 1 else 's'}; allowed: two or more, each a recipe or the key of an evaluation"
        )
    return [find_run(word, store) for word in words]


def _key_of(spec: Any) -> str:
    from model.specs import fingerprint

    return fingerprint(spec)[:16]


def _run_of_key(word: str, store: Store) -> EvaluatedRun:
    from pipelines.stages import shown_path

    there = sorted({path.split("/")[2] for path in store.list("runs/evaluate") if path.endswith("/COMMITTED.json")})
    keys = [key for key in there if key.startswith(word[:16])]
    if not keys:
        some = f"; there are {', '.join(there[:_SHOWN_KEYS])}{', ...' if len(there) > _SHOWN_KEYS else ''}" if there else ", and no other one either"
        raise NothingThereError(f"{shown_path(store.root)} holds no finished evaluation whose key begins with {word}{some}")
    if len(keys) > 1:
        raise ComparisonError(f"{len(keys)} evaluations have keys that begin with {word}: {', '.join(keys[:_SHOWN_KEYS])}; give more of the key")
    path = f"runs/evaluate/{keys[0]}/COMMITTED.json"
    record = from_json(EvaluationRecord, store.read_json(path), where=store.url(path))
    return _run(keys[0], {keys[0]: record}, "", store)


def _run(name: str, records: Mapping[str, EvaluationRecord], note: str, store: Store) -> EvaluatedRun:
    import pyarrow.parquet as pq

    answers = tuple(tuple(pq.read_table(io.BytesIO(store.read_bytes(record.answers))).to_pylist()) for record in records.values())
    return EvaluatedRun(name=name, keys=tuple(records), metrics=next(iter(records.values())).metrics, note=note, answers=answers)


def _scores(run: EvaluatedRun, metric: MetricName) -> tuple[dict[tuple[str, Identity], float], dict[Identity, tuple[str, str]]]:
    """A run's score of each question in each mode, the mean over its seeds; and family and detail of each question."""
    found: dict[tuple[str, Identity], list[float]] = defaultdict(list)
    groups: dict[Identity, tuple[str, str]] = {}
    for answers in run.answers:
        times: dict[tuple[str, str, str, str], int] = defaultdict(int)
        for row in sorted(answers, key=lambda row: (row["question_id"], row["mode"])):
            same = row["image_sha256"], row["question"], row["expected"]
            question: Identity = (*same, times[row["mode"], *same])
            times[row["mode"], *same] += 1
            # The answers are on record, so any metric can be had, also one that the run did not ask for.
            score = row[metric] if metric in row else score_answer(metric, row["answer"], (row["expected"],), row["question"])
            if score is not None:
                found[row["mode"], question].append(score)
                groups[question] = row["family"], row["detail"]
    return {place: sum(values) / len(values) for place, values in found.items()}, groups


def compare_runs(runs: Sequence[EvaluatedRun], metric: MetricName | None = None) -> Comparison:
    """Compare runs on the questions that all of them were asked.

    Args:
        runs: two or more; each is compared with the first.
        metric: to compare by; None is the first run's main one.

    Returns:
        Means and differences per mode, over all questions, by detail and by family.

    Raises:
        ComparisonError: nothing in common to compare.
    """
    chosen: MetricName = next(name for name in METRICS if name == (metric or runs[0].metrics[0]))
    scored = [_scores(run, chosen) for run in runs]
    asked = [{question for _, question in scores} for scores, _ in scored]
    for run, questions in zip(runs, asked, strict=True):
        if not questions:
            raise ComparisonError(f"compare: {chosen} says nothing about any question of {run.name}; give another --metric")
    common = set.intersection(*asked)
    if not common:
        raise ComparisonError(
            f"compare: {', '.join(run.name for run in runs)} share no question (the same image, text and true answer), so nothing can be said of "
            "their difference; evaluate them on one dataset, for example by the same [evaluation.dataset]"
        )
    both = set.intersection(*({mode for mode, _ in scores} for scores, _ in scored))
    modes = [mode for mode in ("blind", "global", "local", "both") if mode in both]
    if not modes:
        raise ComparisonError("compare: the runs were asked in no mode in common; evaluate them in the same evaluation.modes")
    groups = scored[0][1]
    rows = []
    for family, detail in _row_groups({groups[question] for question in common}):
        for mode in modes:
            alike = sorted(
                question
                for question in common
                if all((mode, question) in scores for scores, _ in scored)
                and family in ("", groups[question][0])
                and detail in ("", groups[question][1])
            )
            if alike:
                rows.append(_row(mode, family, detail, alike, [[scores[mode, question] for question in alike] for scores, _ in scored]))
    return Comparison(
        metric=chosen,
        runs=tuple(
            ComparedRun(name=run.name, keys=run.keys, num_questions=len(questions), note=run.note) for run, questions in zip(runs, asked, strict=True)
        ),
        num_questions=len(common),
        num_images=len({image for image, *_ in common}),
        rows=tuple(rows),
    )


def _row_groups(groups: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """All questions, then by detail, then by family; a part that is everything is not said twice."""
    details = [detail for detail in ("small", "large") if any(detail == other for _, other in groups)]
    families = sorted({family for family, _ in groups})
    found = [("", "")]
    found += [("", detail) for detail in details] if len(details) > 1 else []
    found += [(family, "") for family in families] if len(families) > 1 else []
    return found


def _row(mode: str, family: str, detail: str, questions: Sequence[Identity], by_run: Sequence[Sequence[float]]) -> ComparisonRow:
    images = [image for image, *_ in questions]
    ones = [1.0] * len(questions)
    means = []
    for scores in by_run:
        low, high = ratio_interval(scores, ones, images)
        means.append(Mean(mean=sum(scores) / len(scores), low=low, high=high))
    differences = []
    for scores in by_run[1:]:
        above = [score - first for score, first in zip(scores, by_run[0], strict=True)]
        low, high = ratio_interval(above, ones, images, lowest=-1.0, highest=1.0)
        differences.append(Difference(difference=sum(above) / len(above), low=low, high=high, holds_zero=low <= 0 <= high))
    return ComparisonRow(
        mode=mode,
        family=family,
        detail=detail,
        num_questions=len(questions),
        num_images=len(set(images)),
        means=tuple(means),
        differences=tuple(differences),
    )


def print_comparison(comparison: Comparison, *, as_json: bool = False) -> None:
    """Print a comparison.

    Args:
        comparison: to print.
        as_json: as one JSON object instead of a table; shares are from 0 to 1 there.
    """
    if as_json:
        print(json.dumps(to_json(comparison), indent=1))
        return
    console = data_console()
    for number, run in enumerate(comparison.runs, 1):
        note = f"; {run.note}" if run.note else ""
        console.print(f"{number}. {run.name}: {run.num_questions} questions, evaluate {', '.join(run.keys)}{note}", soft_wrap=True)
    console.print(
        f"{comparison.num_questions} questions about {comparison.num_images} images in common, by {comparison.metric}, in percent (95 % interval "
        "from a bootstrap over images; differences paired by question)",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("questions", "number", "mode"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "number" else "left")
    for number in range(1, len(comparison.runs) + 1):
        table.add_column(f"run {number}", overflow="fold")
    for number in range(2, len(comparison.runs) + 1):
        table.add_column(f"run {number} less run 1", overflow="fold")
    shown = ""
    for row in comparison.rows:
        name = row.family or (f"{row.detail} detail" if row.detail else "all")
        means = [f"{100 * mean.mean:.1f} ({100 * mean.low:.1f} to {100 * mean.high:.1f})" for mean in row.means]
        table.add_row("" if name == shown else name, str(row.num_questions), row.mode, *means, *map(_difference_text, row.differences))
        shown = name
    print_table(table)
    differences = [difference for row in comparison.rows for difference in row.differences]
    unsure = sum(difference.holds_zero for difference in differences)
    if unsure:
        console.print(
            f"{unsure} of {len(differences)} differences have an interval that holds 0: these questions do not tell the runs apart there.",
            soft_wrap=True,
        )


def _difference_text(difference: Difference) -> str:
    text = f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    return f"{text}, holds 0" if difference.holds_zero else text
