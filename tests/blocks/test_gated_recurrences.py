"""minGRU, RG-LRU and Mamba: their equations, one step at a time, in both directions; where they start."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

from seqzoo import build_block
from seqzoo.kernels.real_gated_scan.plain import decay

B, T, D = 2, 11, 8


def steps(a, x, reverse=False):
    """h_t = a_t ∘ h_{t-1} + x_t, or from the last step to the first."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for a_t, x_t in zip(*((z.flip(1) if reverse else z).unbind(1) for z in (a, x)), strict=True):
        h = a_t * h + x_t
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs, 1)


def both(block, a, x, x_reverse=None):
    h = steps(a, x)
    return h if block.causal else h + steps(a, x if x_reverse is None else x_reverse, reverse=True)


def convolved(conv, x):
    past, W = conv.past, conv.width
    seen = F.pad(x, (0, 0, past, W - 1 - past))
    return sum(conv.weight[:, j] * seen[:, j : j + x.shape[1]] for j in range(W)) + conv.bias


def positive(x):
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def min_gru(block, x):
    z = block.gate_proj(x).sigmoid()
    return both(block, 1 - z, z * positive(block.in_proj(x)))


def min_lstm(block, x):
    i, f = block.gate_proj(x).sigmoid().chunk(2, -1)
    return block.out_proj(both(block, f / (f + i), i / (f + i) * positive(block.in_proj(x))))


def rg_lru(block, x):
    u = convolved(block.conv, block.in_proj(x))
    gates = (block.recurrence_gate, block.input_gate)
    r, i = ((u @ torch.block_diag(*gate.weight) + gate.bias).sigmoid() for gate in gates)
    a = (-8 * r * F.softplus(block.dynamics.Lambda)).exp()
    root = (1 - a**2).sqrt()
    first, last = (torch.where(torch.arange(x.shape[1])[:, None] == at, 1, root) for at in (0, x.shape[1] - 1))
    h = both(block, a, first * i * u, last * i * u)
    return block.out_proj(h * F.gelu(block.gate_proj(x), approximate="tanh"))


def mamba(block, x):
    u, z = block.in_proj(x).chunk(2, -1)
    u = F.silu(convolved(block.conv, u))
    N = block.state_dim
    low, write, read = block.x_proj(u).split((block.x_proj.out_features - 2 * N, N, N), -1)
    dt = F.softplus(block.dt_proj(low) + block.dynamics.dt_bias)
    a = (-dt[..., None] * block.dynamics.A_log.exp()).exp()
    h = both(block, a, (dt * u)[..., None] * write[:, :, None])
    return block.out_proj(((h * read[:, :, None]).sum(-1) + block.skip * u) * F.silu(z))


CASES = {
    "min_gru": (min_gru, {"gate_bias": -1.0}),
    "min_lstm": (min_lstm, {"cell": "lstm", "gate_bias": -1.0, "expand": 1.5}),
    "rg_lru": (rg_lru, {"num_heads": 2}),
    "mamba": (mamba, {"state_dim": 5, "dt_max": 1.0}),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_follows_its_equations(case, causal):
    equations, options = CASES[case]
    block = build_block("min_gru" if case == "min_lstm" else case, D, causal=causal, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    named = dict(block.named_parameters())
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    value, target = block(x), equations(block, x)
    assert_close(value, target, 1e-12, "y")
    gradients = [torch.autograd.grad(y, [x, *named.values()], w) for y in (value, target)]
    for actual, expected, label in zip(*gradients, ["x", *named], strict=True):
        assert_close(actual, expected, 1e-11, label)
    starts = torch.tensor([0, 4, 4, 5, T])
    row = block(x[:1], cu_seqlens=starts)
    alone = torch.cat([equations(block, x[:1, a:b]) for a, b in pairwise(starts.tolist()) if a < b], 1)
    assert_close(row, alone, 1e-12, "documents")


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_bias_sets_for_how_long_a_minimal_unit_remembers(cell):
    block = build_block("min_gru", D, causal=True, cell=cell, gate_bias=-4.0).double()
    state = block.initial_state(1)
    state.hidden.fill_(1.5)
    _, state = block.extend(torch.zeros(1, 38, D, dtype=torch.float64), state)
    kept = state.hidden - 0.5  # g(0) = ½ is where it ends
    assert_close(kept, torch.full_like(kept, (1 - 1 / (1 + math.exp(4))) ** 38), 1e-12)
    assert kept.mean().item() == pytest.approx(0.5, abs=0.01)
    assert build_block("min_gru", D, cell=cell).gate_proj.bias is None


def test_a_minimal_lstm_stands_shut_gates():
    block = build_block("min_gru", D, causal=True, cell="lstm", gate_bias=0.0)
    with torch.no_grad():
        block.gate_proj.bias.fill_(-300.0)  # σ of which is 0
    x = torch.randn(1, 5, D, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        block.gate_proj.bias[:D] = -310.0
    assert block(x).isfinite().all()


def test_the_slope_of_the_root_is_cut():
    below = torch.tensor([0.0, 1e-9, 2.4e-7, 2.6e-7, 0.5, 1 - 1e-9], dtype=torch.float64)  # 1 - a²
    slope = torch.cat([torch.full((3,), 1000.0, dtype=torch.float64), 0.5 / below[3:].sqrt()])
    log_a = torch.log1p(-below) / 2
    root = (-torch.expm1(2 * log_a)).sqrt()
    expected = -2 * (2 * log_a).exp() * slope  # by log a
    leaf = log_a.clone().requires_grad_()
    a, value = decay(leaf)
    assert_close(a, log_a.exp(), 1e-15)
    assert_close(value, root, 1e-15)
    assert_close(torch.autograd.grad(value.sum(), leaf)[0], expected, 1e-9)
    (a, value), (d_a, d_root) = torch.func.jvp(decay, (log_a,), (torch.ones_like(log_a),))
    assert_close(value, root, 1e-12)
    assert_close(d_a, a, 1e-12)
    assert_close(d_root, expected, 1e-9)


def test_gates_that_stay_open_keep_gradients_finite():
    block = build_block("rg_lru", D, causal=True)
    with torch.no_grad():
        block.dynamics.Lambda.fill_(-100.0)
    x = torch.randn(1, 50, D, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all()
    assert block.dynamics.Lambda.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("min_gru", {"cell": "rnn"}, "MinGRU: cell='rnn'; valid: gru, lstm"),
        ("min_gru", {"expand": 0.1}, r"MinGRU: expand=0.1 \(width 0\)"),
        ("rg_lru", {"num_heads": 3}, "RGLRU: num_heads=3 does not divide state_dim=8"),
        ("rg_lru", {"r_min": 0.9, "r_max": 0.5}, "RGLRU: r_min=0.9, r_max=0.5; valid: 0 < r_min < r_max < 1"),
        ("s5", {"num_blocks": 3}, "S5: state_dim=8 is not num_blocks=3 times an even number; valid: multiples of 6"),
        ("s5", {"discretization": "euler"}, "S5: discretization='euler'; valid: zoh, bilinear"),
        ("mamba", {"dt_min": 0.1, "dt_max": 0.01}, "Mamba: dt_min=0.1, dt_max=0.01; valid: 0 < dt_min < dt_max"),
        ("mamba", {"expand": 0.1}, r"Mamba: expand=0.1 \(width 0\)"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_block(name, D, **options)
