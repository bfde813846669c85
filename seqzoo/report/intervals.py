"""95 % confidence intervals of scores: over seeds where there are several, over test examples where there is one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """The 95 % interval of a score, and what it is over."""

    low: float
    high: float
    kind: str  # "t": over seeds; "binomial": over test examples, nothing said of other seeds


def over_seeds(scores: Sequence[float], *, largest: float = math.inf) -> Interval:
    """The t-interval of the mean of two or more scores, within [0, largest]."""
    from scipy.stats import t  # slow to import

    mean, error = statistics.fmean(scores), math.sqrt(statistics.variance(scores) / len(scores))
    half = error * float(t.isf((1 - CONFIDENCE) / 2, len(scores) - 1))
    return Interval(max(0.0, mean - half), min(largest, mean + half), "t")


def over_examples(share: float, n: int) -> Interval:
    """Wilson's interval of an accuracy measured on `n` examples: E. B. Wilson 1927, J. Am. Stat. Assoc. 22 (158)."""
    from scipy.stats import binomtest

    found = binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high), "binomial")


def of_difference(after: Sequence[float], before: Sequence[float], n: int) -> Interval:
    """The interval of mean(after) - mean(before), accuracies measured on `n` test examples.

    Welch's where both have several seeds. Else the normal interval of two proportions, which says nothing of other
    seeds, and is wide because it takes the examples of the two for different ones.
    """
    from scipy.stats import norm, ttest_ind

    means = statistics.fmean(after), statistics.fmean(before)
    difference = means[0] - means[1]
    if min(len(after), len(before)) == 1:
        half = float(norm.isf((1 - CONFIDENCE) / 2)) * math.sqrt(sum(mean * (1 - mean) / n for mean in means))
        return Interval(difference - half, difference + half, "binomial")
    if statistics.variance(after) == statistics.variance(before) == 0:
        return Interval(difference, difference, "t")
    found = ttest_ind(after, before, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(float(found.low), float(found.high), "t")
