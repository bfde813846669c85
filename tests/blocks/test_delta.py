"""DeltaNet, Gated DeltaNet and KDA: their equations, one step at a time, and how they start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close
from torch import Tensor

from seqzoo import build_block
from seqzoo.blocks.decays import Decay
from seqzoo.blocks.delta import DeltaBlock, unit
from seqzoo.kernels import common

D = 8


def memory(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """o_t = S_tᵀ q_t with S_t = (1 - β k kᵀ) diag(decay) S_{t-1} + β k vᵀ, of [B, T, H, D] and β [B, T, H, 1]."""
    S, outputs, one = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), [], torch.eye(k.shape[-1]).to(k)
    for t in range(q.shape[1]):
        key, share = k[:, t, :, :, None], beta[:, t, :, :, None]
        S = (one - share * key * key.mT) @ (decay[:, t, :, :, None] * S) + share * key * v[:, t, :, None]
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1)


def convolved(block: DeltaBlock, x: Tensor) -> Tensor:
    W, past = block.conv.width, block.conv.past
    padded = F.pad(x, (0, 0, past, W - 1 - past))
    return F.silu(sum(padded[:, j : j + x.shape[1]] * block.conv.weight[:, j] for j in range(W)))


def parts(block: DeltaBlock, x: Tensor, *more: int) -> tuple[Tensor, ...]:
    """q, k, v and β, and of the projection what is left, so many numbers each."""
    H, Dk, Dv = block.num_heads, block.key_dim, block.value_dim
    G = block.qkv_widths[0] // Dk
    qkv, beta, *rest = (x @ block.in_proj.weight.T).split((2 * G * Dk + H * Dv, H, *more), -1)
    q, k, v = convolved(block, qkv).split((G * Dk, G * Dk, H * Dv), -1)
    q, k = (y.unflatten(-1, (G, Dk)) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    q, k = (y.repeat_interleave(H // G, 2) for y in (q / math.sqrt(Dk), k))
    beta = beta.sigmoid()[..., None] * (2 if block.negative_eigenvalues else 1)
    return q, k, v.unflatten(-1, (H, Dv)), beta, *rest


def out(block: DeltaBlock, *inputs: Tensor, gate: Tensor | float = 1.0) -> Tensor:
    o = memory(*inputs)
    if not block.causal:
        o = o + memory(*(y.flip(1) for y in inputs)).flip(1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
    return (o.flatten(2) * gate) @ block.out_proj.weight.T


def delta_net(block, x):
    q, k, v, beta = parts(block, x)
    return out(block, q, k, v, beta, torch.ones_like(k))


def gated_delta_net(block, x):
    H, Dv = block.num_heads, block.value_dim
    q, k, v, beta, a, r = parts(block, x, H, H * Dv)
    decay = torch.exp(-block.decay.A_log.exp() * F.softplus(a + block.decay.dt_bias))[..., None]
    return out(block, q, k, v, beta, decay, gate=F.silu(r))


def kda(block, x):
    H, Dk = block.num_heads, block.key_dim
    q, k, v, beta, low, r = parts(block, x, Dk, Dk)
    step = F.softplus(low @ block.decay_proj.weight.T + block.decay.dt_bias).unflatten(-1, (H, Dk))
    decay = torch.exp(-block.decay.A_log.exp()[:, None] * step)
    return out(block, q, k, v, beta, decay, gate=(r @ block.gate_proj.weight.T).sigmoid())


@pytest.mark.parametrize("T", [1, 2, 65])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("equations", "options"),
    [
        (delta_net, {}),
        (delta_net, {"num_heads": 2, "conv_width": 2, "negative_eigenvalues": True}),
        (gated_delta_net, {"num_heads": 2, "expand_k": 1.0, "expand": 2.0}),
        (gated_delta_net, {"num_heads": 4, "num_key_heads": 2, "conv_width": 3, "negative_eigenvalues": True}),
        (kda, {"num_heads": 2}),
        (kda, {"num_heads": 1, "conv_width": 1, "negative_eigenvalues": True, "dt_max": 1.0}),
    ],
)
def test_follows_its_equations(equations, options, causal, T):
    torch.manual_seed(0)
    block = build_block(equations.__name__, D, causal=causal, **options).double()
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, T, D, dtype=torch.float64)
    named = dict(block.named_parameters())
    value, target = block(x), equations(block, x)
    assert_close(value, target, 1e-12)
    for actual, expected, key in zip(
        torch.autograd.grad(value, [x, *named.values()], w),
        torch.autograd.grad(target, [x, *named.values()], w),
        ["x", *named],
        strict=True,
    ):
        assert_close(actual, expected, 1e-11, key)


def half_lives(block: DeltaBlock) -> Tensor:
    """Steps in which a memory is halved where projections give 0, of each decay."""
    return math.log(2) / -block.decay(torch.zeros_like(block.decay.dt_bias))[1].flatten()


@pytest.mark.parametrize(("name", "low", "high", "median"), [("gated_delta_net", 0.01, 16, 12), ("kda", 1, 16, 10)])
def test_memories_start_as_published(name, low, high, median):
    torch.manual_seed(0)
    block = build_block(name, 2048, num_heads=1024, **({"expand_k": 1.0} if name == "gated_delta_net" else {}))
    A, step = block.decay.A_log.exp(), F.softplus(block.decay.dt_bias)
    assert A.min() >= low
    assert A.max() <= high
    assert abs(A.mean() - (low + high) / 2) < 0.5
    assert step.min() >= 0.999e-3
    assert step.max() <= 0.1001
    assert abs(half_lives(block).median() / median - 1) < 0.3
    longer = build_block(name, 2048, num_heads=1024, dt_min=1e-4, dt_max=1e-3)
    assert half_lives(longer).median() > 20 * half_lives(block).median()


@pytest.mark.parametrize("name", ["gated_delta_net", "kda"])
def test_decays_stay_in_single_precision(name):
    decay = build_block(name, 16).to(torch.bfloat16).decay
    assert {parameter.dtype for parameter in decay.parameters()} == {torch.float32}
    made = decay(torch.zeros(1, 2, len(decay.dt_bias), dtype=torch.bfloat16))
    assert {x.dtype for x in made} == {torch.float32}


def test_decays_of_a_head_share_a_rate():
    decay = Decay(torch.tensor([1.0, 2.0]), torch.zeros(6))
    _, log_decay = decay(torch.zeros(1, 1, 6))
    torch.testing.assert_close(log_decay[0, 0], -math.log(2) * torch.tensor([[1.0] * 3, [2.0] * 3]))


def test_lengths_are_one_and_zeros_have_gradients():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [300.0, 400.0]], requires_grad=True)
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]))
    unit(x).sum().backward()
    torch.testing.assert_close(x.grad[1], torch.full((2,), 1e3))
    assert unit(x.detach().to(torch.bfloat16)).dtype == torch.bfloat16


def test_lengths_are_made_in_parts(monkeypatch):
    monkeypatch.setattr(common, "CACHED", 1)
    x, w = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(2))
    expected = x.requires_grad_() / (x.square().sum(-1, keepdim=True) + 0.1).sqrt()
    assert_close(unit(x, eps=0.1), expected, 1e-14)
    for value, target in zip(*(torch.autograd.grad(y, x, w) for y in (unit(x, eps=0.1), expected)), strict=True):
        assert_close(value, target, 1e-13)
    assert torch.autograd.gradgradcheck(unit, (x,), fast_mode=True)


def test_few_key_heads_serve_many_of_values():
    block = build_block("gated_delta_net", 16, num_heads=4, num_key_heads=1, expand_k=1.0, expand=2.0)
    assert block.qkv_widths == (4, 4, 32)
    assert block.in_proj.weight.shape == (4 + 4 + 32 + 4 + 4 + 32, 16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("delta_net", {"num_heads": 3}, "DeltaNet: num_heads=3 does not divide d_model=16"),
        ("kda", {"num_heads": 3}, "KDA: num_heads=3 does not divide d_model=16"),
        ("gated_delta_net", {"num_heads": 4, "num_key_heads": 3}, "num_key_heads=3 does not divide num_heads=4"),
        ("gated_delta_net", {"num_heads": 16}, "heads of 0 and 1 channels; valid: 1 or more"),
        ("gated_delta_net", {"dt_min": 0.2}, r"GatedDeltaNet: dt_min=0\.2, dt_max=0\.1; valid"),
        ("kda", {"dt_min": 0.0}, r"KDA: dt_min=0\.0"),
    ],
)
def test_wrong_sizes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_block(name, 16, **options)
