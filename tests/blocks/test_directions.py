"""Both directions of a causal operation, in one call."""

import pytest
import torch

from seqzoo.blocks.directions import Directions
from seqzoo.kernels.documents import Documents

B, T = 3, 11


def running_sum(x, ways):
    """A causal operation that tells a step from those before it."""
    if ways.documents is None:
        return x.cumsum(1)
    return torch.cat([row.cumsum(1) for (row,) in ways.documents.split(x)], 1)


def expected(x):
    """Of one sequence [n, D]."""
    return x.cumsum(0) + x.flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize("lengths", [None, [11, 1, 6], [0, 5, 11]])
def test_turns_within_lengths(lengths):
    x = torch.randn(B, T, 2, dtype=torch.float64, requires_grad=True)
    given = None if lengths is None else torch.tensor(lengths)
    ways = Directions(x, given, None, both=True)
    doubled = ways.doubled(x)
    assert doubled.shape == (2 * B, T, 2)
    y = ways.summed(running_sum(doubled, ways))
    for b, n in enumerate([T] * B if lengths is None else lengths):
        torch.testing.assert_close(y[b, :n], expected(x[b, :n]))
    if lengths is not None:
        assert ways.lengths.tolist() == lengths * 2
    assert torch.autograd.gradcheck(lambda x: ways.summed(running_sum(ways.doubled(x), ways)), x)
    assert torch.autograd.gradgradcheck(lambda x: ways.summed(ways.doubled(x) ** 2), x)


def test_turns_within_documents():
    starts = torch.tensor([0, 4, 4, 5, T])
    x = torch.randn(1, T, 2, dtype=torch.float64, requires_grad=True)
    ways = Directions(x, None, Documents(starts, T), both=True)
    assert ways.doubled(x).shape == (1, 2 * T, 2)
    assert ways.documents.starts.tolist() == [0, 4, 4, 5, 11, 15, 15, 16, 22]
    y = ways.summed(running_sum(ways.doubled(x), ways))
    for start, end in starts.unfold(0, 2, 1).tolist():
        torch.testing.assert_close(y[0, start:end], expected(x[0, start:end]))
    assert torch.autograd.gradcheck(lambda x: ways.summed(running_sum(ways.doubled(x), ways)), x)
    _, tangent = torch.func.jvp(lambda x: ways.summed(ways.doubled(x) ** 2), (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, 4 * x.detach())


def test_one_direction_changes_nothing():
    x, lengths = torch.randn(B, T, 2), torch.tensor([1, 2, 3])
    ways = Directions(x, lengths, None, both=False)
    assert ways.doubled(x) is x
    assert ways.summed(x) is x
    assert ways.lengths is lengths
