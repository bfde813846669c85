"""RWKV-7: its equations, one step at a time, its token shift, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close
from model_cases import TOKENS, config
from torch import Tensor

from seqzoo import build_block
from seqzoo.blocks.rwkv7 import RWKV7, TokenShift, rwkv7
from seqzoo.kernels.documents import Documents
from seqzoo.models import build_model

D = 8


def memory(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor) -> Tensor:
    """o_t = S_tᵀ r_t with S_t = (diag(w) - (a ∘ κ) κᵀ) S_{t-1} + k vᵀ, all of [B, T, H, D]."""
    S, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(r.shape[1]):
        erased = (a * kappa)[:, t, :, :, None] * kappa[:, t, :, None]
        S = (torch.diag_embed(w[:, t]) - erased) @ S + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((S * r[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1)


def equations(block: RWKV7, x: Tensor) -> Tensor:
    H = block.num_heads
    near = F.pad(x, (0, 0, 1, 0))[:, :-1]
    if not block.causal:
        near = (near + F.pad(x, (0, 0, 0, 1))[:, 1:]) / 2
    x_r, x_w, x_k, x_v, x_a, x_g = ((1 - mu) * x + mu * near for mu in block.mu)
    r, k, v = x_r @ block.r_proj.weight.T, x_k @ block.k_proj.weight.T, x_v @ block.v_proj.weight.T
    (w1, w2), (a1, a2), (g1, g2) = (
        (layers[0].weight.T, layers[2].weight.T) for layers in (block.decay_proj, block.rate_proj, block.gate_proj)
    )
    w = torch.exp(-math.exp(-0.5) * (block.decay_bias.bias + (x_w @ w1).tanh() @ w2).sigmoid())
    a = (block.rate_bias.bias + x_a @ a1 @ a2).sigmoid()
    gate = (x_g @ g1).sigmoid() @ g2
    kappa, k = k * block.k_k, k * (1 + (a - 1) * block.k_a)
    r, w, k, v, kappa, a = (y.unflatten(-1, (H, -1)) for y in (r, w, k, v, kappa, a))
    kappa = kappa / (kappa.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    o = memory(r, w, k, v, kappa, a)
    if not block.causal:
        o = o + memory(*(y.flip(1) for y in (r, w, k, v, kappa, a))).flip(1)
    mean, variance = o.mean(-1, keepdim=True), o.var(-1, keepdim=True, unbiased=False)
    o = ((o - mean) / (variance + 1e-5 * block.head_dim).sqrt()).flatten(2) * block.norm_weight + block.norm_bias
    present = (r * k * block.r_k.unflatten(-1, (H, -1))).sum(-1, keepdim=True) * v
    return ((o + present.flatten(2)) * gate) @ block.out_proj.weight.T


@pytest.mark.parametrize("T", [1, 2, 65])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_heads": 1, "depth": 0.0}, {"num_heads": 2, "depth": 0.9}])
def test_follows_its_equations(options, causal, T):
    torch.manual_seed(0)
    block = build_block("rwkv7", D, causal=causal, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, T, D, dtype=torch.float64)
    named = dict(block.named_parameters())
    value, target = block(x), equations(block, x)
    assert_close(value, target, 1e-11)
    for actual, expected, key in zip(
        torch.autograd.grad(value, [x, *named.values()], w),
        torch.autograd.grad(target, [x, *named.values()], w),
        ["x", *named],
        strict=True,
    ):
        assert_close(actual, expected, 1e-10, key)


@pytest.mark.parametrize("causal", [True, False])
def test_tokens_are_shifted(causal):
    shift, x = TokenShift(causal=causal), torch.arange(1.0, 7).view(1, 6, 1)
    y, after = shift(x, None, None)
    assert after is None
    assert y.flatten().tolist() == ([0, 1, 2, 3, 4, 5] if causal else [1, 2, 3, 4, 5, 2.5])
    y, _ = shift(x, None, None, Documents(torch.tensor([0, 2, 2, 6]), 6))
    assert y.flatten().tolist() == ([0, 1, 0, 3, 4, 5] if causal else [1, 0.5, 2, 4, 5, 2.5])
    assert not list(shift.parameters())
    if causal:
        y, after = shift(x.expand(2, -1, -1), torch.tensor([[[9.0]], [[8.0]]]), torch.tensor([6, 0]))
        assert y[:, 0].flatten().tolist() == [9, 8]
        assert after.flatten().tolist() == [6, 8]


def test_starts_as_published():
    """With head l = 1 of L = 4, written out channel by channel; w₀ with 1 / 4 for 1 / 3."""
    d, H, depth = 64, 2, 0.25
    block = build_block("rwkv7", d, num_heads=H, depth=depth)
    for n in range(d):
        z = (n % 32 - 15.5) / 15.5
        zigzag, linear, x, rest = z * abs(z), n / (d - 1) - 0.5, n / d, 1 - depth
        powers = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
        torch.testing.assert_close(block.mu[:, n], torch.tensor([1 - x ** (p * rest) for p in powers]))
        w0 = -6 + 6 * (n / (d - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
        assert block.decay_bias.bias[n].item() == pytest.approx(w0, abs=1e-5)
        assert block.rate_bias.bias[n].item() == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * linear, abs=1e-6)
        assert block.k_k[n].item() == pytest.approx(0.71 - 0.1 * linear)
    assert (block.k_a == 1.02).all()
    assert (block.r_k == -0.04).all()
    sizes = ((block.r_proj, 0.5), (block.k_proj, 0.05), (block.v_proj, 0.5))
    for layer, size in sizes:
        assert 0.95 * size < layer.weight.abs().max() * math.sqrt(d) <= size
    ranks = [layers[0].weight.shape[0] for layers in (block.decay_proj, block.rate_proj, block.gate_proj)]
    assert ranks == [32, 32, 32]
    assert build_block("rwkv7", 512).gate_proj[2].weight.shape == (512, 128)
    for layers in (block.decay_proj, block.rate_proj, block.gate_proj):
        assert not layers[0].weight.any()
        torch.testing.assert_close(layers[2].weight.T @ layers[2].weight, 0.01 * torch.eye(32))
    assert block.out_proj.weight.any()


def test_what_starts_by_depth_and_in_any_width():
    model = build_model(config(block={"name": "rwkv7"}, num_layers=4), TOKENS, head="classify", causal=False)
    blocks = [layer.branch for layer in model.backbone.layers if isinstance(layer.branch, RWKV7)]
    for depth, block in zip((0, 0.25, 0.5, 0.75), blocks, strict=True):
        expected = build_block("rwkv7", block.d_model, num_heads=block.num_heads, depth=depth)
        assert torch.equal(block.mu, expected.mu)
        assert torch.equal(block.decay_bias.bias, expected.decay_bias.bias)
    for d in (1, 2, 5):
        for depth in (0.0, 0.99):
            block = build_block("rwkv7", d, num_heads=1, depth=depth)
            assert all(parameter.isfinite().all() for parameter in block.parameters())
    with pytest.raises(ValueError, match=r"RWKV7: depth=1\.0; valid: 0 or more, and below 1"):
        RWKV7(8, depth=1.0)
    with pytest.raises(ValueError, match="RWKV7: num_heads=3 does not divide d_model=8"):
        RWKV7(8, num_heads=3)


def test_two_steps_of_the_delta_rule_are_one():
    """From a state, of a batch of lengths, and of documents that may be empty."""
    torch.manual_seed(0)
    r, k, kappa, a = (torch.randn(2, 70, 3, 5, dtype=torch.float64) for _ in range(4))
    kappa, a = F.normalize(kappa, dim=-1), a.sigmoid()
    v, log_w = torch.randn(2, 70, 3, 4, dtype=torch.float64), -0.6 * torch.rand(2, 70, 3, 5, dtype=torch.float64)
    o = rwkv7(r, k, v, kappa, a, log_w)
    expected = memory(r, log_w.exp(), k, v, kappa, a)
    assert_close(o, expected, 1e-12)
    timed = (r, k, v, kappa, a, log_w)
    lengths, first = torch.tensor([33, 0]), torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    head, state = rwkv7(*timed, first, lengths)
    assert_close(head[0, :33], expected[0, :33], 1e-12)
    assert (head[1] == 0).all()
    tail, _ = rwkv7(*(y[:1, 33:] for y in timed), state[:1])
    assert_close(tail, expected[:1, 33:], 1e-12)
    starts = torch.tensor([0, 33, 33, 70])
    row, states = rwkv7(*(y[:1] for y in timed), first.new_zeros(3, 3, 5, 4), None, Documents(starts, 70))
    assert_close(row[:, :33], expected[:1, :33], 1e-12)
    alone, last = rwkv7(*(y[:1, 33:] for y in timed), first[:1])
    assert_close(row[:, 33:], alone, 1e-12)
    assert_close(states, torch.cat([state[:1], first[:1], last]), 1e-12)
