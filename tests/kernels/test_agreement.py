from __future__ import annotations

import math

import pytest
import torch

from seqzoo.kernels.agreement import relative_error


def test_a_row_counts_by_its_own_size_and_a_tiny_one_by_a_hundredth_of_the_whole():
    expected = torch.tensor([[10.0, 10.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    scale = math.sqrt(202 / 6)
    whole, row = relative_error(expected + torch.tensor([[0.0], [0.1], [0.0]]), expected)
    assert whole == pytest.approx(0.1 * math.sqrt(2 / 6) / scale)
    assert row == pytest.approx(0.1)
    _, row = relative_error(expected + torch.tensor([[0.0], [0.0], [0.001]]), expected)
    assert row == pytest.approx(0.001 / (0.01 * scale))


def test_what_should_be_zero_is_measured_absolutely():
    assert relative_error(torch.full((2, 3), 0.125), torch.zeros(2, 3)) == (0.125, 12.5)
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == (0, 0)
    assert relative_error(torch.tensor(1.1), torch.tensor(1.0)) == pytest.approx((0.1, 0.1), abs=1e-6)


def test_what_is_not_finite_is_infinitely_wrong():
    for bad in (math.nan, math.inf):
        there = torch.tensor([1.0, bad])
        for actual, expected in ((there, torch.ones(2)), (torch.ones(2), there), (there, there)):
            assert relative_error(actual, expected) == (math.inf, math.inf)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shape \[2\]; valid: \[3\]"):
        relative_error(torch.ones(2), torch.ones(3))
