"""95 % confidence intervals of scores: over seeds where there are several, over test examples where there is one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
NORMAL_QUANTILE = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Interval(NamedTuple):
    """The 95 % interval of a score, and what it is over."""

    low: float
    high: float
    kind: str  # "t": over seeds; "binomial": over test examples, nothing said of other seeds


def over_seeds(scores: Sequence[float], *, largest: float = math.inf) -> Interval:
    """The t-interval of the mean of two or more scores, within [0, largest]."""
    half = t_quantile(len(scores) - 1) * math.sqrt(statistics.variance(scores) / len(scores))
    mean = statistics.fmean(scores)
    return Interval(max(0.0, mean - half), min(largest, mean + half), "t")


def over_examples(share: float, n: int) -> Interval:
    """Wilson's interval of an accuracy measured on `n` examples: E. B. Wilson 1927, J. Am. Stat. Assoc. 22 (158)."""
    z2 = NORMAL_QUANTILE**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(max(0.0, centre - half), min(1.0, centre + half), "binomial")


def of_difference(after: Sequence[float], before: Sequence[float], n: int) -> Interval:
    """The interval of mean(after) - mean(before), accuracies measured on `n` test examples.

    Welch's where both have several seeds. Else the normal interval of two proportions, which says nothing of other
    seeds, and is wide because it takes the examples of the two for different ones.
    """
    means = statistics.fmean(after), statistics.fmean(before)
    difference = means[0] - means[1]
    if min(len(after), len(before)) == 1:
        half = NORMAL_QUANTILE * math.sqrt(sum(mean * (1 - mean) / n for mean in means))
        return Interval(difference - half, difference + half, "binomial")
    errors = [statistics.variance(scores) / len(scores) for scores in (after, before)]
    if sum(errors) == 0:
        return Interval(difference, difference, "t")
    # Rounded down: the fractional degrees of freedom of Welch and Satterthwaite, and an interval never too narrow.
    degrees = sum(errors) ** 2 / sum(
        error**2 / (len(scores) - 1) for error, scores in zip(errors, (after, before), strict=True)
    )
    half = t_quantile(max(1, math.floor(degrees + 1e-9))) * math.sqrt(sum(errors))
    return Interval(difference - half, difference + half, "t")


def t_quantile(degrees: int) -> float:
    """The t that |T| stays below with probability 0.95, for Student's T with 1 or more degrees of freedom.

    Found by bisection of the angle atan(t / sqrt(degrees)), in which the probability is a finite sum: Abramowitz and
    Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_probability(angle, degrees) < CONFIDENCE else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _t_probability(angle: float, degrees: int) -> float:
    odd = degrees % 2
    cosine = math.cos(angle)
    term, series = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        series += term
        term *= (power + 1) / (power + 2) * cosine**2
    series *= math.sin(angle)
    return 2 / math.pi * (angle + series) if odd else series
