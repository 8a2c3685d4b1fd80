"""Scores of answers: normalisation, exact match, and how sure a share of right answers is.

Standard library alone. Normalisation, stated once: case folded, blanks at the ends removed, runs of blanks made one, one trailing period removed.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Share", "exact_match", "majority_answers", "normalise_answer"]

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def normalise_answer(text: str) -> str:
    """An answer as it is compared: casefold, strip, collapse blanks, strip one trailing period.

    Args:
        text: an answer, given or expected.

    Returns:
        The normalised text.
    """
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact_match(given: str, expected: str) -> bool:
    """Whether two answers are the same after normalisation. Nothing partial counts.

    Args:
        given: the model's answer.
        expected: the true one.

    Returns:
        True when they are equal.
    """
    return normalise_answer(given) == normalise_answer(expected)


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
