import math

import pytest
from scipy.stats import binomtest, ttest_ind

from seqzoo.report.intervals import of_difference, over_examples, over_seeds


def test_over_seeds():
    low, high, kind = over_seeds([0.60, 0.62, 0.64])
    half = 4.30265 * 0.02 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.62 - half, 0.62 + half), abs=1e-6)
    assert kind == "t"


def test_an_interval_of_accuracies_stays_within_them():
    assert over_seeds([0.9, 1.0], largest=1.0).high == 1.0
    assert over_seeds([0.0, 0.2]).low == 0.0
    assert over_seeds([0.5, 0.5, 0.5])[:2] == (0.5, 0.5)


def test_over_examples_is_wilsons():
    low, high, kind = over_examples(0.5, 100)
    assert (low, high, kind) == (pytest.approx(0.40383, abs=1e-5), pytest.approx(0.59617, abs=1e-5), "binomial")
    assert over_examples(0.0, 10).low == 0.0
    assert over_examples(1.0, 10).low == pytest.approx(0.72247, abs=1e-5)


def test_difference_of_single_seeds_is_of_two_proportions():
    low, high, kind = of_difference([0.6], [0.5], 400)
    half = 1.959964 * math.sqrt((0.24 + 0.25) / 400)
    assert (low, high, kind) == (pytest.approx(0.1 - half), pytest.approx(0.1 + half), "binomial")


def test_difference_of_seeds_is_welchs():
    # Equal variances and numbers: 2 + 2 degrees of freedom, the pooled t-interval.
    low, high, kind = of_difference([0.70, 0.72, 0.74], [0.60, 0.62, 0.64], 400)
    half = 2.77645 * 0.02 * math.sqrt(2 / 3)
    assert (low, high, kind) == (pytest.approx(0.1 - half, abs=1e-6), pytest.approx(0.1 + half, abs=1e-6), "t")
    assert of_difference([0.7, 0.7], [0.5, 0.5], 400)[:2] == pytest.approx((0.2, 0.2))


def test_difference_to_a_single_seed_is_over_examples():
    assert of_difference([0.7], [0.5, 0.6], 400) == of_difference([0.7], [0.55], 400)


def test_intervals_are_those_of_scipy():
    for k, n in ((0, 7), (7, 7), (3, 7), (611, 5000)):
        found = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert over_examples(k / n, n)[:2] == pytest.approx((found.low, found.high), abs=1e-12)
    for after, before in (([0.7, 0.75], [0.5, 0.52, 0.6]), ([0.7, 0.74], [0.5, 0.52])):
        found = ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
        assert of_difference(after, before, 400)[:2] == pytest.approx((found.low, found.high), abs=1e-12)
