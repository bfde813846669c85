"""LRU and S4D against their equations, one step at a time."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from torch import Tensor

from seqzoo import build_block
from seqzoo.blocks.lru import LRU
from seqzoo.blocks.s4d import CHUNK, S4D

B, D = 2, 6


def states(x: Tensor, a: Tensor) -> Tensor:
    """h_t = a h_{t-1} + x_t along the second dimension."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for x_t in x.unbind(1):
        h = a * h + x_t
        outputs.append(h)
    return torch.stack(outputs, 1)


def lru_equations(block: LRU, x: Tensor) -> Tensor:
    lam = torch.exp(torch.complex(-block.dynamics.nu_log.exp(), block.dynamics.theta_log.exp()))
    u = torch.view_as_complex(block.in_proj(x).unflatten(-1, (-1, 2))) * block.dynamics.gamma_log.exp()
    y = block.out_proj(torch.view_as_real(states(u, lam)).flatten(2))
    if not block.causal:
        y = y + block.out_proj_reverse(torch.view_as_real(states(u.flip(1), lam).flip(1)).flatten(2))
    return block.gate(y + block.skip * x)


def s4d_equations(block: S4D, x: Tensor) -> Tensor:
    A = torch.complex(-block.dynamics.log_neg_real.exp(), block.dynamics.imag)  # [D, P]
    decay = (A * block.dynamics.log_dt.exp()[:, None]).exp()
    C = torch.view_as_complex(block.C) * (decay - 1) / A
    h = states(x[..., None].to(A.dtype), decay)  # [B, T, D, P]
    y = 2 * (C[0] * h).sum(-1).real
    if not block.causal:
        later = states(x.flip(1)[..., None].to(A.dtype), decay).flip(1)[:, 1:]  # from the next step on
        y = y + 2 * torch.cat([(C[1] * later).sum(-1).real, torch.zeros_like(y[:, :1])], 1)
    return block.gate(y + block.skip * x)


@pytest.mark.parametrize("T", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "equations"), [("lru", lru_equations), ("s4d", s4d_equations)])
def test_follows_its_equations(name, equations, causal, T):
    torch.manual_seed(0)
    block = build_block(name, D, causal=causal).double()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(B, T, D, dtype=torch.float64)
    named = dict(block.named_parameters())
    value, target = block(x), equations(block, x)
    assert_close(value, target, 1e-12, "y")
    for gradient, expected, label in zip(
        torch.autograd.grad(value, [x, *named.values()], w),
        torch.autograd.grad(target, [x, *named.values()], w),
        ["x", *named],
        strict=True,
    ):
        assert_close(gradient, expected, 1e-11, label)
