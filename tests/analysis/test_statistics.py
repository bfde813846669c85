import math

import pytest
import torch

from seqzoo.analysis import (
    distance_profile,
    effective_rank,
    mean_distance,
    normalized_entropy,
    reachable,
    row_entropy,
    shares,
    window_share,
)

T = 8
UNIFORM = torch.full((T, T), 1 / T, dtype=torch.float64)
HERE = torch.eye(T, dtype=torch.float64)
BEFORE = torch.eye(T, dtype=torch.float64).roll(1, 0)  # each takes the value before its own; the first one the last
SIGNED = torch.tensor([[3.0, -1.0], [0.0, -2.0]], dtype=torch.float64)
PADDED = torch.nn.functional.pad(UNIFORM[:4, :4], (0, 4, 0, 4))


def test_shares_are_magnitudes_by_row():
    assert shares(SIGNED).tolist() == [[0.75, 0.25], [0, 1]]


def test_row_entropy():
    torch.testing.assert_close(row_entropy(UNIFORM), torch.full((T,), math.log(T), dtype=torch.float64))
    assert (row_entropy(HERE) == 0).all()
    torch.testing.assert_close(row_entropy(5 * UNIFORM), row_entropy(UNIFORM))
    expected = torch.tensor([-0.75 * math.log(0.75) - 0.25 * math.log(0.25), 0], dtype=torch.float64)
    torch.testing.assert_close(row_entropy(SIGNED), expected)


def test_reachable():
    assert reachable(4, causal=False).tolist() == [4, 4, 4, 4]
    assert reachable(4, causal=True).tolist() == [1, 2, 3, 4]
    lengths = torch.tensor([3, 1])
    assert reachable(4, causal=False, lengths=lengths).tolist() == [[[3, 3, 3, 0]], [[1, 0, 0, 0]]]
    assert reachable(4, causal=True, lengths=lengths).tolist() == [[[1, 2, 3, 0]], [[1, 0, 0, 0]]]


def test_normalized_entropy_is_one_where_all_that_can_be_seen_weighs_the_same():
    causal = torch.ones(2, 3, T, T).tril()  # two sequences, three heads
    lengths = torch.tensor([T, 5])
    weights = causal * (torch.arange(T) < lengths[:, None])[:, None, :, None]
    entropy = normalized_entropy(weights, reachable(T, causal=True, lengths=lengths))
    assert entropy.shape == (2, 3, T)
    assert entropy[..., 0].isnan().all()  # the first position sees one
    assert entropy[1, :, 5:].isnan().all()
    assert torch.allclose(entropy[0, :, 1:], torch.ones(3, T - 1))
    assert torch.allclose(entropy[1, :, 1:5], torch.ones(3, 4))


def test_effective_rank():
    assert effective_rank(HERE).item() == pytest.approx(T)
    assert effective_rank(UNIFORM).item() == pytest.approx(1)
    assert effective_rank(BEFORE).item() == pytest.approx(T)
    two = torch.block_diag(UNIFORM[:4, :4], UNIFORM[:4, :4])
    assert effective_rank(torch.stack([two, PADDED])).tolist() == pytest.approx([2, 1])


def test_distance_profile_of_matrices_written_by_hand():
    profile = distance_profile(torch.stack([HERE, BEFORE]))
    assert profile.shape == (2, 2 * T - 1)
    assert profile[0].nonzero().flatten().tolist() == [T - 1]
    expected = torch.zeros(2 * T - 1, dtype=torch.float64)
    expected[T - 1 + 1] = (T - 1) / T  # one before
    expected[0] = 1 / T  # the first looks at the last, T - 1 later
    torch.testing.assert_close(profile[1], expected)
    lags = torch.arange(1 - T, T)
    torch.testing.assert_close(distance_profile(UNIFORM), (T - lags.abs()).double() / T**2)


def test_distance_profile_leaves_padding_out():
    profile = distance_profile(PADDED)
    assert profile.sum().item() == pytest.approx(1)
    torch.testing.assert_close(profile[4:11], distance_profile(UNIFORM[:4, :4] / 2))


def test_mean_distance():
    assert (mean_distance(HERE) == 0).all()
    assert mean_distance(BEFORE).tolist() == [T - 1] + [1] * (T - 1)
    assert mean_distance(UNIFORM).mean().item() == pytest.approx((T * T - 1) / (3 * T))
    assert mean_distance(PADDED)[4:].isnan().all()


def test_window_share():
    assert (window_share(HERE, 0) == 1).all()
    assert window_share(UNIFORM, 1).tolist() == pytest.approx([2 / T] + [3 / T] * (T - 2) + [2 / T])
    assert window_share(UNIFORM, T).tolist() == pytest.approx([1] * T)
    with pytest.raises(ValueError, match="width=-1; valid: 0 or more"):
        window_share(HERE, -1)


def test_statistics_are_taken_of_any_leading_dimensions():
    weights = torch.rand(2, 3, T, T)
    for statistic in (row_entropy, effective_rank, distance_profile, mean_distance):
        together = statistic(weights)
        assert torch.allclose(together[1, 2], statistic(weights[1, 2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_in_single(dtype):
    torch.manual_seed(0)
    weights = torch.rand(3, T, T).softmax(-1).to(dtype)
    for statistic in (row_entropy, effective_rank, distance_profile, mean_distance):
        value = statistic(weights)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, statistic(weights.float()))
