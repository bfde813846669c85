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

    The t-interval over seeds and Wilson's over examples, which further seeds do not narrow: what they are from the
    mean in quadrature, below and above.
    """
    mean, seeds = statistics.fmean(scores), _half_over_seeds(scores)
    if n is None:
        return Interval(max(0.0, mean - seeds), mean + seeds, "t")
    low, high, _ = over_examples(mean, n)
    return Interval(
        max(0.0, mean - math.hypot(seeds, mean - low)), min(1.0, mean + math.hypot(seeds, high - mean)), "t"
    )


def over_examples(share: float, n: int) -> Interval:
    """Wilson's interval of an accuracy measured on `n` examples: E. B. Wilson 1927, J. Am. Stat. Assoc. 22 (158)."""
    from scipy.special import ndtri

    z = float(ndtri(1 - TAIL))
    denominator = 2 * (n + z**2)
    centre = (2 * n * share + z**2) / denominator
    half = z / denominator * math.sqrt(4 * n * share * (1 - share) + z**2)
    return Interval(centre - half if share > 0 else 0.0, centre + half if share < 1 else 1.0, "binomial")


def of_difference(after: Sequence[float], before: Sequence[float], n: int) -> Interval:
    """The interval of mean(after) - mean(before), accuracies measured on `n` test examples, within [-1, 1].

    Welch's over seeds (B. L. Welch 1947, Biometrika 34 (1-2)) and Newcombe's over examples, from Wilson's of each
    (R. G. Newcombe 1998, Stat. Med. 17 (8), method 10), in quadrature; the latter alone where either has a single
    seed, which says nothing of other seeds. It is wide, because it takes the examples of the two for different ones.
    """
    means = statistics.fmean(after), statistics.fmean(before)
    several = min(len(after), len(before)) > 1
    seeds = _half_over_seeds(after, before) if several else 0.0
    (low, high, _), (low_before, high_before, _) = (over_examples(mean, n) for mean in means)
    difference = means[0] - means[1]
    below = math.hypot(seeds, means[0] - low, high_before - means[1])
    above = math.hypot(seeds, high - means[0], means[1] - low_before)
    return Interval(max(-1.0, difference - below), min(1.0, difference + above), "t" if several else "binomial")


def _half_over_seeds(*sides: Sequence[float]) -> float:
    """Of the mean of one, or of the difference of two."""
    from scipy.special import stdtrit

    parts = [(statistics.variance(scores) / len(scores), len(scores) - 1) for scores in sides]
    total, spread = sum(part for part, _ in parts), sum(part**2 / freedom for part, freedom in parts)
    return -float(stdtrit(total**2 / spread, TAIL)) * math.sqrt(total) if spread else 0.0
