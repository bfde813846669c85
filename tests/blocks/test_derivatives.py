"""Blocks in forward mode and to the second derivative: PyTorch's ways of making them agree with each other."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from torch.func import grad, jvp

from seqzoo import BLOCKS, build_block

OPTIONS = {"vq_attention": {"block_len": 4, "codebook_size": 8}, "gau": {"chunk_len": 4, "key_dim": 8}}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_forward_and_reverse_agree_to_the_second_derivative(name, causal):
    torch.manual_seed(0)
    block = build_block(name, 16, causal=causal, **OPTIONS.get(name, {})).double().eval()
    x, way, weight = (torch.randn(2, 9, 16, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([9, 5])

    def loss(x):
        return (weight * block(x, lengths=lengths).square()).sum()

    slope = jvp(loss, (x,), (way,))[1]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert_close(slope, (gradient * way).sum(), 1e-10, "forward mode")
    (curvature,) = torch.autograd.grad((gradient * way).sum(), leaf)
    assert_close(jvp(grad(loss), (x,), (way,))[1], curvature, 1e-10, "forward over reverse")
    if name == "vq_attention":
        return  # keys are straight-through: small steps do not see what their gradient says
    step = 1e-6 * way
    difference = (grad_of(loss, x + step) - grad_of(loss, x - step)) / 2e-6
    assert_close(curvature, difference, 1e-6, "small steps")


def grad_of(loss, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]
