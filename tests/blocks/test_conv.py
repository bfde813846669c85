"""Convolutions of short kernels: the sum that defines them, and which kernels there are."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close

from seqzoo import build_block
from seqzoo.blocks.depthwise import Depthwise

B, D = 2, 3


@pytest.mark.parametrize("T", [1, 4, 150])
@pytest.mark.parametrize(("width", "causal"), [(1, True), (4, True), (61, True), (5, False), (61, False)])
def test_follows_its_equation(width, causal, T):
    torch.manual_seed(0)
    conv = Depthwise(D, width, causal=causal).double()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    past = width - 1 if causal else (width - 1) // 2
    expected = torch.stack(
        [sum(conv.weight[:, past + s - t] * x[:, s] for s in range(T) if 0 <= past + s - t < width) for t in range(T)],
        1,
    )
    y, _ = conv(x, None, None)
    assert_close(y, expected, 1e-12, "y")
    w = torch.randn_like(y)
    for gradient, target, label in zip(
        torch.autograd.grad(y, [x, conv.weight], w),
        torch.autograd.grad(expected, [x, conv.weight], w),
        "xw",
        strict=True,
    ):
        assert_close(gradient, target, 1e-12, label)


def test_a_kernel_of_even_width_has_no_middle():
    with pytest.raises(ValueError, match="width=4 has no middle; valid: an odd number, or causal=True"):
        build_block("conv", D, width=4)
    assert build_block("conv", D, width=4, causal=True).initial_state(B).inputs.shape == (B, 3, D)
