"""Softmax attention as a block: what a window leaves of its state."""

import pytest
import torch

from seqzoo import build_block


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_bounds_the_state(window):
    torch.manual_seed(0)
    block = build_block("softmax_attention", 8, causal=True, num_heads=2, window=window).double()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    outputs, state = [], None
    for part in x.split([1, 2, 7, 1, 19], 1):
        y, state = block.extend(part, state)
        outputs.append(y)
        assert state.keys.shape[1] <= window - 1
    torch.testing.assert_close(torch.cat(outputs, 1), block(x))


def test_a_window_sees_a_position_at_least():
    with pytest.raises(ValueError, match="SoftmaxAttention: window=0; valid: 1 or more, or None"):
        build_block("softmax_attention", 8, window=0)
