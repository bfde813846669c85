"""95 % confidence intervals of scores: over seeds and test examples, over the latter alone where there is one seed.

From quantiles alone: `scipy.stats`, which has all of this, takes longer to import than most reports take.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

TAIL = (1 - 0.95) / 2


class Interval(NamedTuple):
    """The 95 % interval of a score, and what it is over."""

    low: float
    high: float
    kind: str  # "t": over seeds and test examples; "binomial": over the latter, nothing said of other seeds


def over_seeds(scores: Sequence[float], *, n: int | None = None) -> Interval:
    """Of the mean of two or more scores: of accuracies measured on `n` test examples, within [0, 1], else at least 0.

    The t-interval over seeds and that over examples, which further seeds do not narrow, their halves in quadrature.
    """
    mean = statistics.fmean(scores)
    half = math.hypot(_half_over_seeds(scores), 0.0 if n is None else _half_over_examples([mean], n))
    return Interval(max(0.0, mean - half), mean + half if n is None else min(1.0, mean + half), "t")


def over_examples(share: float, n: int) -> Interval:
    """Wilson's interval of an accuracy measured on `n` examples: E. B. Wilson 1927, J. Am. Stat. Assoc. 22 (158)."""
    from scipy.special import ndtri

    k, z = round(share * n), float(ndtri(1 - TAIL))
    p, denominator = k / n, 2 * (n + z**2)
    centre = (2 * n * p + z**2) / denominator
    half = z / denominator * math.sqrt(4 * n * p * (1 - p) + z**2)
    return Interval(centre - half if k else 0.0, centre + half if k < n else 1.0, "binomial")


def of_difference(after: Sequence[float], before: Sequence[float], n: int) -> Interval:
    """The interval of mean(after) - mean(before), accuracies measured on `n` test examples.

    Welch's over seeds (B. L. Welch 1947, Biometrika 34 (1-2)) and that of two proportions over examples, their halves
    in quadrature; the latter alone where either has a single seed, which says nothing of other seeds. It is wide,
    because it takes the examples of the two for different ones.
    """
    means = statistics.fmean(after), statistics.fmean(before)
    several = min(len(after), len(before)) > 1
    half = math.hypot(_half_over_seeds(after, before) if several else 0.0, _half_over_examples(means, n))
    return Interval(means[0] - means[1] - half, means[0] - means[1] + half, "t" if several else "binomial")


def _half_over_seeds(*sides: Sequence[float]) -> float:
    """Of the mean of one, or of the difference of two."""
    from scipy.special import stdtrit

    parts = [(statistics.variance(scores) / len(scores), len(scores) - 1) for scores in sides]
    total, spread = sum(part for part, _ in parts), sum(part**2 / freedom for part, freedom in parts)
    return -float(stdtrit(total**2 / spread, TAIL)) * math.sqrt(total) if spread else 0.0


def _half_over_examples(shares: Sequence[float], n: int) -> float:
    """Of a share of `n` examples, or of the difference of two."""
    from scipy.special import ndtri

    return -float(ndtri(TAIL)) * math.sqrt(sum(share * (1 - share) / n for share in shares))
