"""How sure a mean, a ratio or a difference of answers is, when questions about one image stand or fall together.

Input: numerators and denominators, one per question, and which image each question is about. Output: a 95 % interval of sum(numerators) /
sum(denominators). Images are drawn anew, not questions: the images of an evaluation are a sample, and the questions of one image share its
difficulty, so intervals over questions alone would be too narrow. A ratio covers all that is needed: a mean of scores (denominators of one),
precision, recall and F1 (2 TP over 2 TP + FP + FN), and a paired difference (numerators from -1 to 1).

Invariant: the same input gives the same interval, on every machine; the value itself lies within it.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from model.metrics import Z_95

__all__ = ["ratio_interval"]

NUM_RESAMPLES = 2000
_SEED = 0
_CELLS_AT_ONCE = 4_000_000
"""Draws that are in memory together."""


def _t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t, by its expansion around the normal one (within 2 % from four degrees of freedom on)."""
    z = Z_95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _tail(num_clusters: int) -> float:
    """Share of the resamples that lies beyond either end.

    Source: Hesterberg, "What teachers should know about the bootstrap" (arXiv 1411.5279) section 3.3: a percentile interval is too narrow by
        sqrt((n - 1) / n) and takes the normal quantile where Student's t is due; asking for ends further out puts both right.
    """
    return NormalDist().cdf(-math.sqrt(num_clusters / (num_clusters - 1)) * _t_quantile(num_clusters - 1))


def ratio_interval(
    numerators: Sequence[float] | NDArray[np.float64],
    denominators: Sequence[float] | NDArray[np.float64],
    clusters: Sequence[str],
    *,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> tuple[float, float]:
    """The 95 % interval of a ratio of sums, by drawing clusters with replacement.

    Where the clusters do not differ at all, drawing them again says nothing, and an interval without width would claim to be certain. Then either end
    allows for a share of clusters at that extreme, of which none was seen in as many (the upper end of the Wilson interval of 0 of n).

    Args:
        numerators: one per question.
        denominators: one per question, none negative.
        clusters: what each question belongs to, such as its image.
        lowest: that the ratio can be.
        highest: that the ratio can be.

    Returns:
        Lower and upper end; the whole range where the denominators sum to nothing.

    Source: percentile bootstrap over clusters, with the ends of `_tail`.
    """
    names, places = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    tops = np.bincount(places, weights=np.asarray(numerators, dtype=np.float64), minlength=len(names))
    bottoms = np.bincount(places, weights=np.asarray(denominators, dtype=np.float64), minlength=len(names))
    told = bottoms > 0
    tops, bottoms = tops[told], bottoms[told]  # a cluster without a denominator changes no ratio
    number = len(tops)
    if not number:
        return lowest, highest
    value = float(tops.sum() / bottoms.sum())
    if number == 1 or np.ptp(tops / bottoms) < 1e-12:
        unseen = Z_95**2 / (number + Z_95**2)
        return value - unseen * (value - lowest), value + unseen * (highest - value)
    generator = np.random.default_rng(_SEED)
    at_once = max(1, _CELLS_AT_ONCE // number)
    ratios: list[NDArray[np.float64]] = []
    for start in range(0, NUM_RESAMPLES, at_once):
        drawn = generator.integers(0, number, size=(min(at_once, NUM_RESAMPLES - start), number))
        ratios.append(tops[drawn].sum(axis=1) / bottoms[drawn].sum(axis=1))
    tail = _tail(number)
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return max(lowest, min(value, float(low))), min(highest, max(value, float(high)))
