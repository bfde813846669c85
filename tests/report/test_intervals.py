import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_ind

from seqzoo.report.intervals import of_difference, over_examples, over_seeds


def test_over_seeds():
    low, high, kind = over_seeds([0.60, 0.62, 0.64])
    half = 4.30265 * 0.02 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.62 - half, 0.62 + half), abs=1e-6)
    assert kind == "t"


def test_an_interval_of_accuracies_stays_within_them():
    assert over_seeds([0.9, 1.0], n=10).high == 1.0
    assert over_seeds([0.0, 0.2], n=10).low == over_seeds([0.0, 0.2]).low == 0.0
    assert over_seeds([0.5, 0.5, 0.5])[:2] == (0.5, 0.5)


def test_seeds_that_agree_leave_what_examples_leave_to_chance():
    assert over_seeds([0.5, 0.5, 0.5], n=400)[:2] == pytest.approx(over_examples(0.5, 400)[:2])
    assert over_seeds([1.0, 1.0], n=400)[:2] == over_examples(1.0, 400)[:2]
    together = of_difference([0.7, 0.7], [0.5, 0.5], 400)
    assert together[:2] == of_difference([0.7], [0.5], 400)[:2]
    assert together.kind == "t"


def test_an_interval_holds_what_is_so_nineteen_times_of_twenty():
    """For further seeds and other examples, where all runs of a side know the same examples, and those of the other
    side others: the intervals over seeds alone hold it 15 times of 20."""
    rng, held, times = np.random.default_rng(0), 0, 1000
    for _ in range(times):
        sides = []
        for expected in (0.55, 0.5):
            known = rng.random(500) < (expected - 0.1) / 0.8
            right = rng.random((3, 500)) < np.where(known, 0.9, 0.1) + 0.005 * rng.standard_normal((3, 1))
            sides.append(right.mean(1).tolist())
        low, high, _ = of_difference(*sides, 500)
        held += low <= 0.05 <= high
    assert held / times > 0.95


def test_over_examples_is_wilsons():
    low, high, kind = over_examples(0.5, 100)
    assert (low, high, kind) == (pytest.approx(0.40383, abs=1e-5), pytest.approx(0.59617, abs=1e-5), "binomial")
    assert over_examples(0.0, 10).low == 0.0
    assert over_examples(1.0, 10).low == pytest.approx(0.72247, abs=1e-5)


def test_difference_of_single_seeds_is_newcombes():
    # Newcombe 1998, table II, example (c): 9 of 10 and 3 of 10 by method 10.
    low, high, kind = of_difference([0.9], [0.3], 10)
    assert (low, high, kind) == (pytest.approx(0.1705, abs=1e-4), pytest.approx(0.8090, abs=1e-4), "binomial")
    low, high, _ = of_difference([0.6], [0.5], 40_000)
    half = 1.959964 * math.sqrt((0.24 + 0.25) / 40_000)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-4)


def test_a_difference_at_the_end_of_the_scale():
    """Where accuracies are whole, and examples few, what chance does is not nothing (Fisher's exact p: 0.12, 0.21)."""
    for after, before, n in (([1.0], [0.98], 200), ([1.0, 1.0], [0.7, 0.7], 10)):
        low, high, _ = of_difference(after, before, n)
        assert low < 0 < high
    assert of_difference([0.9, 0.1], [0.8, 0.9], 50)[:2] == (-1.0, 1.0)


def test_difference_of_seeds_is_welchs_and_examples():
    # With equal variances and numbers 2 + 2 degrees of freedom, the pooled t-interval; many examples add nothing.
    low, high, kind = of_difference([0.70, 0.72, 0.74], [0.60, 0.62, 0.64], 10**12)
    half = 2.77645 * 0.02 * math.sqrt(2 / 3)
    assert (low, high, kind) == (pytest.approx(0.1 - half, abs=1e-6), pytest.approx(0.1 + half, abs=1e-6), "t")
    low, high, _ = of_difference([0.70, 0.72, 0.74], [0.60, 0.62, 0.64], 400)
    by_examples = of_difference([0.72], [0.62], 400)
    assert (0.1 - low, high - 0.1) == pytest.approx(
        (math.hypot(half, 0.1 - by_examples.low), math.hypot(half, by_examples.high - 0.1)), abs=1e-6
    )


def test_difference_to_a_single_seed_is_over_examples():
    assert of_difference([0.7], [0.5, 0.6], 400) == of_difference([0.7], [0.55], 400)


def test_intervals_are_those_of_scipy():
    for k, n in ((0, 7), (7, 7), (3, 7), (611, 5000)):
        found = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert over_examples(k / n, n)[:2] == pytest.approx((found.low, found.high), abs=1e-12)
    for after, before in (([0.7, 0.75], [0.5, 0.52, 0.6]), ([0.7, 0.74], [0.5, 0.52])):
        found = ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
        assert of_difference(after, before, 10**15)[:2] == pytest.approx((found.low, found.high), abs=1e-12)
