"""Queries and keys of one vector: what is written by hand against autograd, and against the formula."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from torch.autograd import gradcheck, gradgradcheck

from seqzoo.blocks.offset_scale import _plain, offset_scale
from seqzoo.blocks.rotary import rotate, turns
from seqzoo.kernels import common


def inputs(S, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((2, 7, S), (3, S), (3, S))]


@pytest.mark.parametrize("S", [1, 5, 6])
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
@pytest.mark.parametrize("cached", [1, 1 << 18])
def test_by_hand_is_as_by_autograd(S, kind, cached, monkeypatch):
    monkeypatch.setattr(common, "CACHED", cached)
    z, gamma, beta = inputs(S)
    position = {"none": None, "shared": torch.arange(7), "each": torch.arange(7) + torch.tensor([[0], [5]])}[kind]
    rows = offset_scale(z, gamma, beta, position)
    for row, scale, offset in zip(rows, gamma, beta, strict=True):
        expected = z * scale + offset
        if position is not None:
            expected = rotate(expected[:, :, None], position)[:, :, 0]
        assert_close(row, expected, 1e-14)
    weights = [torch.randn_like(row) for row in rows]
    plain = _plain(z, gamma, beta, None if position is None else turns(position, S, torch.float64))
    expected = torch.autograd.grad(plain, (z, gamma, beta), weights)
    for a, e in zip(torch.autograd.grad(rows, (z, gamma, beta), weights), expected, strict=True):
        assert_close(a, e, 1e-13)


def test_derivatives():
    call = lambda *x: offset_scale(*x, torch.arange(7))  # noqa: E731
    assert gradcheck(call, inputs(4), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(call, inputs(4), fast_mode=True)


def test_half_precision_is_rounded_once():
    z, gamma, beta = inputs(4, torch.bfloat16)
    wide = offset_scale(*(x.double() for x in (z, gamma, beta)), torch.arange(7))
    for row, expected in zip(offset_scale(z, gamma, beta, torch.arange(7)), wide, strict=True):
        assert row.dtype == torch.bfloat16
        assert_close(row, expected, 2**-8)
