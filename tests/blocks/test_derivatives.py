"""Blocks in forward mode and to the second derivative: PyTorch's ways of making them agree with each other."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from torch.func import grad, hessian, jvp, vmap

from seqzoo import BLOCKS, build_block
from seqzoo.blocks.forward_mode import GLU, LayerNorm

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
    slope = jvp(loss, (leaf,), (way,))[1]
    assert_close(torch.autograd.grad(slope, leaf)[0], curvature, 1e-10, "reverse over forward")
    assert_close(grad(lambda x: (grad(loss)(x) * way).sum())(x), curvature, 1e-10, "of functions")
    gradient = (grad(loss)(leaf) * way).sum()
    assert_close(torch.autograd.grad(gradient, leaf)[0], curvature, 1e-10, "of a function's gradient")
    if name == "vq_attention":
        return  # keys are straight-through: small steps do not see what their gradient says
    step = 1e-6 * way
    difference = (grad_of(loss, x + step) - grad_of(loss, x - step)) / 2e-6
    assert_close(curvature, difference, 1e-6, "small steps")


def grad_of(loss, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_each_sequence_and_its_length(name, causal):
    torch.manual_seed(0)
    block = build_block(name, 16, causal=causal, **OPTIONS.get(name, {})).double().eval()
    x, lengths = torch.randn(3, 9, 16, dtype=torch.float64), torch.tensor([9, 5, 0])

    def loss(x, length):
        return block(x[None], lengths=length[None]).square().sum()

    found = vmap(grad(loss))(x, lengths)
    assert_close(found, grad_of(lambda x: block(x, lengths=lengths).square().sum(), x), 1e-10)


def test_transforms_leave_nothing_behind():
    block, x = build_block("softmax_attention", 16, num_heads=1), torch.randn(1, 3, 16)
    hessian(lambda x: block(x).sum())(x)
    assert_close(grad(lambda x: block(x).sum())(x), grad_of(lambda x: block(x).sum(), x), 1e-5)


@pytest.mark.parametrize("layer", [LayerNorm(8), GLU()], ids=["layer norm", "glu"])
def test_layers_written_out_are_those_of_pytorch(layer):
    torch.manual_seed(0)
    layer, x, way = layer.double(), torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    y, slope = jvp(layer, (x,), (way,))
    assert_close(y, layer(x), 1e-14)
    assert_close(slope, (layer(x + 1e-6 * way) - layer(x - 1e-6 * way)) / 2e-6, 1e-8)
