"""95 % confidence intervals of scores: over seeds where there are several, over test examples where there is one.

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
    kind: str  # "t": over seeds; "binomial": over test examples, nothing said of other seeds


def over_seeds(scores: Sequence[float], *, largest: float = math.inf) -> Interval:
    """The t-interval of the mean of two or more scores, within [0, largest]."""
    from scipy.special import stdtrit

    mean, error = statistics.fmean(scores), math.sqrt(statistics.variance(scores) / len(scores))
    half = error * -float(stdtrit(len(scores) - 1, TAIL))
    return Interval(max(0.0, mean - half), min(largest, mean + half), "t")


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

    Welch's where both have several seeds. Else the normal interval of two proportions, which says nothing of other
    seeds, and is wide because it takes the examples of the two for different ones.
    """
    from scipy.special import ndtri, stdtrit

    means = statistics.fmean(after), statistics.fmean(before)
    difference = means[0] - means[1]
    if min(len(after), len(before)) == 1:
        half = -float(ndtri(TAIL)) * math.sqrt(sum(mean * (1 - mean) / n for mean in means))
        return Interval(difference - half, difference + half, "binomial")
    parts = [statistics.variance(scores) / len(scores) for scores in (after, before)]
    if not any(parts):
        return Interval(difference, difference, "t")
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(scores) - 1) for part, scores in zip(parts, (after, before), strict=True)
    )
    half = -float(stdtrit(freedom, TAIL)) * math.sqrt(sum(parts))
    return Interval(difference - half, difference + half, "t")
