"""Scores of answers: how one answer is judged against those that are accepted, and how sure a share of right answers is.

Standard library alone. Input: the answer given, the answers accepted and, where options are listed, the question. Output: a number from 0 to 1, or
None where a metric says nothing about a question (`yes_no` about "How many?"). Every metric is a pure function of its arguments, and the best of
several accepted answers counts.

Normalisation, stated once: case folded, blanks at the ends removed, runs of blanks made one, one trailing period removed.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, assert_never, get_args

__all__ = [
    "METRICS",
    "MetricName",
    "Share",
    "anls",
    "exact_match",
    "is_zero_or_one",
    "majority_answers",
    "metric_words",
    "multiple_choice",
    "normalise_answer",
    "read_choice",
    "read_number",
    "read_yes_no",
    "relaxed_accuracy",
    "score_answer",
    "yes_no",
]

MetricName = Literal["exact_match", "relaxed_accuracy", "multiple_choice", "anls", "yes_no"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

RELAXED_TOLERANCE = Fraction(1, 20)
ANLS_THRESHOLD = 0.5


def normalise_answer(text: str) -> str:
    """An answer as it is compared: casefold, strip, collapse blanks, strip one trailing period.

    Args:
        text: an answer, given or expected.

    Returns:
        The normalised text.
    """
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def score_answer(metric: MetricName, given: str, accepted: tuple[str, ...], question: str = "") -> float | None:
    """What a metric says of an answer.

    Args:
        metric: which.
        given: the model's answer.
        accepted: the true ones, at least one.
        question: as it was asked; `multiple_choice` reads the options that it lists.

    Returns:
        From 0 to 1; None where the metric says nothing about such a question.
    """
    match metric:
        case "exact_match":
            return exact_match(given, accepted)
        case "relaxed_accuracy":
            return relaxed_accuracy(given, accepted)
        case "multiple_choice":
            return multiple_choice(given, accepted, question)
        case "anls":
            return anls(given, accepted)
        case "yes_no":
            return yes_no(given, accepted)
        case _:
            assert_never(metric)


def is_zero_or_one(metric: MetricName) -> bool:
    """Whether a metric knows right and wrong alone, so that its mean is a share."""
    return metric != "anls"


def metric_words(metric: MetricName) -> str:
    """What a metric counts, in one clause for people."""
    match metric:
        case "exact_match":
            return "equal to the true answer after casefold, strip, collapse blanks, strip one trailing period"
        case "relaxed_accuracy":
            return "a number within 5 % of the true one (a percent sign divides by 100, thousands separators are read); text by exact match"
        case "multiple_choice":
            return "the letter of the right option, or its text; more than one letter is wrong"
        case "anls":
            return "1 less the edit distance over the longer answer's length, 0 from half of it on"
        case "yes_no":
            return "yes or no as the true answer has it; neither or both is wrong"
        case _:
            assert_never(metric)


def exact_match(given: str, accepted: tuple[str, ...]) -> float:
    """Whether an answer is an accepted one after normalisation. Nothing partial counts.

    Args:
        given: the model's answer.
        accepted: the true ones.

    Returns:
        1 when it equals one of them, else 0.
    """
    return float(normalise_answer(given) in {normalise_answer(answer) for answer in accepted})


_NUMBER = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?\s*(%?)", re.ASCII)
_LONGEST_NUMBER = 64


def read_number(text: str) -> Fraction | None:
    """A whole answer as a number: sign, thousands separators, decimals, an exponent, a percent sign that divides by 100.

    Args:
        text: an answer.

    Returns:
        Its exact value; None when it is anything else than one number.
    """
    bare = text.strip().casefold()
    if len(bare) > _LONGEST_NUMBER:
        return None
    found = _NUMBER.fullmatch(bare.removesuffix(".") if bare.endswith("%.") else bare)
    if found is None:
        return None
    sign, digits, exponent, percent = found.groups()
    value = Fraction(sign + digits.replace(",", "").removesuffix(".") + (exponent or ""))
    return value / 100 if percent else value


def relaxed_accuracy(given: str, accepted: tuple[str, ...]) -> float:
    """ChartQA's measure: a number may be 5 % off, text may not.

    Args:
        given: the model's answer.
        accepted: the true ones.

    Returns:
        1 when the answer is within 5 % of an accepted number, or equals an accepted text after normalisation, else 0.

    Source: ChartQA (arXiv 2203.10244) section 5.1, after PlotQA (arXiv 1909.00997).
    Differs: the border of 5 % is exact, in fractions, where floats call 1.05 too far from 1; `1,234` is read as 1234; a true zero is right as any
        zero (`0.0`, `0 %`), where the authors' code falls back to comparing text.
    """
    if exact_match(given, accepted):
        return 1.0
    number = read_number(given)
    for answer in accepted if number is not None else ():
        true = read_number(answer)
        if true is not None and number is not None and abs(number - true) <= RELAXED_TOLERANCE * abs(true):
            return 1.0
    return 0.0


def _edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and replacements of characters that turn one text into the other."""
    row = list(range(len(second) + 1))
    for place, character in enumerate(first, 1):
        above, row = row, [place]
        for column, other in enumerate(second, 1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (character != other)))
    return row[-1]


def anls(given: str, accepted: tuple[str, ...]) -> float:
    """Normalised Levenshtein similarity of one answer; its mean over questions is ANLS.

    Args:
        given: the model's answer.
        accepted: the true ones.

    Returns:
        The best of 1 - distance / length of the longer text, where the distance is less than half of it, else 0.

    Source: ST-VQA (arXiv 1905.13648) equation 1, with the threshold 0.5.
    Differs: normalisation is Loupe's, which strips a trailing period as well.
    """
    text, best = normalise_answer(given), 0.0
    for answer in accepted:
        true = normalise_answer(answer)
        longest = max(len(text), len(true))
        if longest == 0:
            return 1.0
        if abs(len(text) - len(true)) >= ANLS_THRESHOLD * longest:
            continue  # the distance is no less than that, and an endless answer costs nothing
        away = _edit_distance(text, true) / longest
        if away < ANLS_THRESHOLD:
            best = max(best, 1 - away)
    return best


_CLAUSE_END = re.compile(r"[.,;:!?\n]+")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def read_yes_no(text: str) -> Literal["yes", "no"] | None:
    """Whether a free answer says yes or no.

    The first clause that holds one of them decides: `yes`, or `no`, `not` or a verb with `n't`. A clause with both says neither.

    Args:
        text: an answer.

    Returns:
        What it says; None when it says neither or both.
    """
    for clause in _CLAUSE_END.split(text.casefold().replace("\u2019", "'")):
        words = set(_WORD.findall(clause))
        says_yes = "yes" in words
        says_no = bool(words & {"no", "not"}) or any(word.endswith("n't") for word in words)
        if says_yes and says_no:
            return None
        if says_yes or says_no:
            return "yes" if says_yes else "no"
    return None


def yes_no(given: str, accepted: tuple[str, ...]) -> float | None:
    """POPE's accuracy: whether an answer says yes or no as the true one does.

    Args:
        given: the model's answer.
        accepted: the true ones.

    Returns:
        1 or 0; None when no accepted answer is plainly yes or no.

    Source: POPE (arXiv 2305.10355) section 5.1.
    Differs: the authors' code takes every answer without `no` or `not` for yes; here an answer that says neither is wrong, whatever is true.
    """
    true = {answer for answer in map(_plain_yes_no, accepted) if answer is not None}
    if not true:
        return None
    return float(read_yes_no(given) in true)


def _plain_yes_no(answer: str) -> str | None:
    """A true answer that is yes or no and nothing else: "no cars" is no answer to a question of yes or no."""
    text = normalise_answer(answer)
    return text if text in ("yes", "no") else None


_MARKED = re.compile(r"(?:(?<=\s)|^)(?:\(([A-Z])\)|([A-Z])[.):])\s*(?=\S)", re.MULTILINE)
_LETTER = r"\(?[A-Z]\)?(?![\w'])"
_LETTERS = rf"{_LETTER}(?:\s*(?:,\s*(?:or|and)\b|,|/|&|\bor\b|\band\b)\s*{_LETTER})*"
_STATED = re.compile(rf"(?i:\b(?:answer|choice|option)s?)(?:\s*:\s*|\s+(?i:is|are)\s*:?\s*)(?i:(?:option|choice)\s+)?({_LETTERS})")
_ALONE = re.compile(r"\(?([A-Za-z])\)?[.):]?")
_LED = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(\S.*)", re.DOTALL)
_MENTIONED = re.compile(r"(?<![\w'])\(?([A-Z])\)?(?![\w'])")
_DENIES = re.compile(r"(?i)\b(?:not|neither|nor|except|wrong|incorrect|never)\b|n't\b")
_LEAD = re.compile(r"(?i)^(?:the\s+)?(?:correct\s+|right\s+)?answer(?:\s*:\s*|\s+is\s*:?\s*)")


def _options(question: str) -> dict[str, str]:
    """The options that a question lists, normalised, by letter: `A. cat`, `(B) dog` or `C) cow`, from A on, each on a line or one after another."""
    marks = [(next(filter(None, mark.groups())), mark.start(), mark.end()) for mark in _MARKED.finditer(question)]
    listed: list[tuple[str, int, int]] = []
    for mark in marks:
        if mark[0] == "A":
            run = [mark]
        elif listed and ord(mark[0]) == ord(listed[-1][0]) + 1:
            run = [*listed, mark]
        else:
            continue
        listed = run if len(run) > 1 or len(listed) < 2 else listed
    if len(listed) < 2:
        return {}
    ends = [start for _, start, _ in listed[1:]] + [len(question)]
    texts = [question[start:end].split("\n", maxsplit=1)[0] for (_, _, start), end in zip(listed, ends, strict=True)]
    return {letter: normalise_answer(text).rstrip(" ,;") for (letter, _, _), text in zip(listed, texts, strict=True)}


def read_choice(text: str, options: dict[str, str]) -> str | None:
    """The one option that a free answer names.

    In this order: the text is one letter (`b`, `(B)`, `B.`); it is an option's text, also behind "The answer is"; it begins with a marked letter
    (`B. cat`), unless what follows is another option's text; it states letters ("the answer is B", "Option: (B)"); it mentions capital letters as
    words of their own, and denies nothing (`not`, `wrong`). An article `A` is no letter: before another word it has to be marked. Letters that are
    not among the listed options are not read. More than one letter is none.

    Args:
        text: an answer.
        options: normalised text by letter, as the question lists them; empty where it lists none, and any letter can be one.

    Returns:
        The letter; None where the text names none, or several.
    """
    bare = text.strip()
    allowed = set(options) or {chr(code) for code in range(ord("A"), ord("Z") + 1)}

    def one_of(letters: set[str]) -> str | None:
        return next(iter(letters)) if len(letters) == 1 and letters <= allowed else None

    if (alone := _ALONE.fullmatch(bare)) and alone[1].upper() in allowed:
        return alone[1].upper()
    named = {letter for letter, option in options.items() if option and normalise_answer(_LEAD.sub("", bare)) == option}
    if named:
        return one_of(named)
    if led := _LED.fullmatch(bare):
        letter, rest = led[1] or led[2], normalise_answer(led[3])
        others = {other for other, option in options.items() if option == rest and other != letter}
        if others:
            return None
        if options.get(letter) == rest:
            return letter
    else:
        letter = None
    if stated := [set(re.findall("[A-Z]", found[1])) for found in _STATED.finditer(bare) if not _is_article(found[1], bare, found.end())]:
        return one_of(set().union(*stated))
    mentioned = {found[1] for found in _MENTIONED.finditer(bare) if found[1] in allowed and not _is_article(found[0], bare, found.end())}
    if letter in allowed and mentioned <= {letter}:
        return letter
    return None if _DENIES.search(bare) else one_of(mentioned)


def _is_article(found: str, text: str, end: int) -> bool:
    """Whether an unmarked A or I is a word of the sentence: "A cat", "I think", but not "A or B", "A is right"."""
    behind = re.match(r"\s+(\w+)", text[end:])
    if found not in ("A", "I") or behind is None:
        return False
    return behind[1].casefold() not in ({"or", "and", "is"} if found == "A" else {"or", "and"})


def multiple_choice(given: str, accepted: tuple[str, ...], question: str = "") -> float | None:
    """Whether an answer names the right option; `read_choice` has the rules.

    Args:
        given: the model's answer.
        accepted: the true ones: a letter, a marked letter, or an option's text.
        question: lists the options, or does not.

    Returns:
        1 or 0; None when no accepted answer names an option.
    """
    options = _options(question)
    true = {letter for letter in (_true_choice(answer, options) for answer in accepted) if letter is not None}
    if not true:
        return None
    return float(read_choice(given, options) in true)


def _true_choice(answer: str, options: dict[str, str]) -> str | None:
    """The option that a true answer names. Without listed options only a letter is one, since any text may hold a capital letter."""
    if not options and not _ALONE.fullmatch(answer.strip()):
        return None
    return read_choice(answer, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Right answers out of all, with the 95 % Wilson score interval."""

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """Right over all; 0 of 0 is 0."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % Wilson score interval; (0, 1) when there is nothing."""
        if not self.total:
            return 0.0, 1.0
        share, square = self.fraction, Z_95**2
        centre = (share + square / (2 * self.total)) / (1 + square / self.total)
        half = Z_95 * math.sqrt(share * (1 - share) / self.total + square / (4 * self.total**2)) / (1 + square / self.total)
        return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding must not push the share out


def majority_answers(answers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The commonest normalised answer of each kind of question: what a model without eyes can know at best without reading the question.

    Args:
        answers: (kind, answer) of the training questions.

    Returns:
        Answer by kind; of equally common ones the first in alphabetical order.
    """
    counts: dict[str, Counter[str]] = {}
    for kind, answer in answers:
        counts.setdefault(kind, Counter())[normalise_answer(answer)] += 1
    return {kind: min(counter.items(), key=lambda item: (-item[1], item[0]))[0] for kind, counter in sorted(counts.items())}
