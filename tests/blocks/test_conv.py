"""Convolutions of short kernels: the sum that defines them, and which kernels there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

from seqzoo import build_block
from seqzoo.blocks.depthwise import CHANNELS, Depthwise
from seqzoo.kernels import common
from seqzoo.kernels.documents import Documents

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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_silu_is_of_what_comes_out_and_parts_are_one(bias, causal, monkeypatch):
    monkeypatch.setattr(common, "CACHED", 1)  # a part is as small as it can be
    width, D = 5, 2 * CHANNELS + 3
    conv = Depthwise(D, width, causal=causal, bias=bias, silu=True).double()
    plain = Depthwise(D, width, causal=causal, bias=bias).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(B, 9, D, dtype=torch.float64, requires_grad=True)
    y, expected = conv(x, None, None)[0], F.silu(plain(x, None, None)[0])
    assert_close(y, expected, 1e-14)
    w = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, *conv.parameters()], w)
    for gradient, target in zip(gradients, torch.autograd.grad(expected, [x, *plain.parameters()], w), strict=True):
        assert_close(gradient, target, 1e-13)
    if causal:
        before = x[:, :4].detach()
        assert_close(conv(x, before, None)[0], F.silu(plain(x, before, None)[0]), 1e-14)


def test_a_kernel_of_even_width_has_no_middle():
    with pytest.raises(ValueError, match="width=4 has no middle; valid: an odd number, or causal=True"):
        build_block("conv", D, width=4)
    assert build_block("conv", D, width=4, causal=True).initial_state(B).inputs.shape == (B, 3, D)


@pytest.mark.parametrize(("width", "causal"), [(1, True), (4, True), (61, True), (5, False), (61, False)])
def test_documents_are_as_if_alone(width, causal):
    lengths = [5, 0, 1, 37, 64, 0, 90]
    documents = Documents(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))
    conv = Depthwise(D, width, causal=causal).double()
    x = torch.randn(1, sum(lengths), D, dtype=torch.float64, requires_grad=True)
    before = torch.randn(len(lengths), width - 1, D, dtype=torch.float64, requires_grad=True) if causal else None
    leaves = [x, conv.weight] if before is None else [x, conv.weight, before]

    def one_by_one():
        outputs, ends = [], []
        for n, its in enumerate(x.split(lengths, 1)):
            ahead = None if before is None else before[n : n + 1]
            y, after = conv(its, ahead, None) if its.shape[1] else (its, ahead)
            outputs.append(y)
            ends.append(after)
        return torch.cat(outputs, 1), torch.cat(ends) if causal else None

    results = []
    for y, after in (conv(x, before, None, documents), one_by_one()):
        outputs = [y] if after is None else [y, after]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(output.shape, generator=generator, dtype=output.dtype) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-12)
