"""RetNet, Mamba-2 and Mamba-3: their equations, one step or one pair at a time, and where they start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close
from block_cases import VARIANTS
from torch import Tensor

from seqzoo import build_block
from seqzoo.blocks.mamba2 import Mamba2
from seqzoo.blocks.mamba3 import Mamba3
from seqzoo.blocks.retnet import RetNet

B, D = 2, 16


def linear_states(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """o_t = S_tᵀ q_t with S_t = decay_t S_{t-1} + k_t v_tᵀ: [B, T, H, ...], decay [B, T, H]."""
    S, outputs = torch.zeros(*q[:, 0].shape, v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = decay[:, t, :, None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * S).sum(2))
    return torch.stack(outputs, 1)


def both_ways(states, causal: bool, *inputs: Tensor) -> Tensor:
    y = states(*inputs)
    return y if causal else y + states(*(x.flip(1) for x in inputs)).flip(1)


def of_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, G, N], each for as many of the heads: [B, T, H, N]."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def retnet_equations(block: RetNet, x: Tensor) -> Tensor:
    H, Dk, place = block.num_heads, block.key_dim, torch.arange(x.shape[1], dtype=x.dtype)
    q, k, v, gate = block.in_proj(x).split(block.widths, -1)
    q, k, v = (y.unflatten(-1, (H, -1)) for y in (q, k, v))
    angle = place[:, None] * 10_000 ** -torch.linspace(0, 1, Dk // 2, dtype=x.dtype)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn for y in (q, k))
    distance = place[:, None] - place
    weights = torch.einsum("bihd,bjhd->bhij", q, k.conj()).real / math.sqrt(Dk)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype))
    weights = weights * gamma[:, None, None] ** distance.abs()
    if block.causal:
        weights = weights.masked_fill(distance < 0, 0)
    o = torch.einsum("bhij,bjhd->bihd", weights, v)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return block.out_proj(F.silu(gate) * o.flatten(2))


def mamba2_equations(block: Mamba2, x: Tensor) -> Tensor:
    (T, H, G), W = (x.shape[1], block.num_heads, block.num_groups), block.conv.width
    z, (xBC, delta) = block.gate_proj(x), block.in_proj(x).split(block.widths, -1)
    past = W - 1 if block.causal else W // 2
    padded = F.pad(xBC, (0, 0, past, W - 1 - past))
    xBC = F.silu(sum(block.conv.weight[:, j] * padded[:, j : j + T] for j in range(W)) + block.conv.bias)
    v, k, q = xBC.split((z.shape[-1], G * block.state_dim, G * block.state_dim), -1)
    v, k, q = v.unflatten(-1, (H, -1)), *(of_heads(y.unflatten(-1, (G, -1)), H) for y in (k, q))
    dt = F.softplus(delta + block.dynamics.dt_bias)
    decay = torch.exp(-block.dynamics.A_log.exp() * dt)
    y = both_ways(linear_states, block.causal, q, k, v * dt[..., None], decay) + block.skip[:, None] * v
    y = (y.flatten(2) * F.silu(z)).unflatten(-1, (G, -1))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return block.out_proj(y.flatten(2) * block.norm.scale)


def trapezoid_states(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, alpha: Tensor, share: Tensor, theta: Tensor
) -> Tensor:
    """Mamba-3's, from queries and keys that are not rotated, [B, T, H, N], and angles [B, T, N // 4]."""
    R = theta.shape[-1]

    def rotated(x: Tensor, phase: Tensor) -> Tensor:
        first, second = x[..., : 2 * R : 2], x[..., 1 : 2 * R : 2]
        pairs = first * phase.cos() - second * phase.sin(), first * phase.sin() + second * phase.cos()
        return torch.cat([torch.stack(pairs, -1).flatten(-2), x[..., 2 * R :]], -1)

    S = torch.zeros(*q[:, 0].shape, v.shape[-1], dtype=q.dtype)
    phase, before, outputs = 0.0, torch.zeros_like(S), []
    for t in range(q.shape[1]):
        phase = phase + dt[:, t, :, None] * theta[:, t, None]
        added = rotated(k[:, t], phase)[..., None] * v[:, t, :, None]
        a, d, s = (x[:, t, :, None, None] for x in (alpha, dt, share))
        S = a * S + (1 - s) * d * a * before + s * d * added
        outputs.append((rotated(q[:, t], phase)[..., None] * S).sum(2))
        before = added
    return torch.stack(outputs, 1)


def mamba3_equations(block: Mamba3, x: Tensor) -> Tensor:
    H, G = block.num_heads, block.num_groups
    z, v, k, q, delta, a, share, omega = block.in_proj(x).split(block.widths, -1)
    k, q = (
        of_heads(y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight, H) + bias
        for y, norm, bias in (
            (k.unflatten(-1, (G, -1)), block.k_norm, block.k_bias),
            (q.unflatten(-1, (G, -1)), block.q_norm, block.q_bias),
        )
    )
    v, dt = v.unflatten(-1, (H, -1)), F.softplus(delta + block.dynamics.dt_bias)
    rate = torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0)))
    alpha = torch.exp(-dt * rate.clamp(min=1e-4))
    gates = dt, alpha, share.sigmoid(), math.pi * omega.tanh()
    y = both_ways(trapezoid_states, block.causal, q, k, v, *gates) + block.skip[:, None] * v
    return block.out_proj(y.flatten(2) * F.silu(z))


EQUATIONS = {"retnet": retnet_equations, "mamba2": mamba2_equations, "mamba3": mamba3_equations}


def wider(block):
    """With every parameter moved, so that none stays at 0 or 1, and larger gates."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "weight" not in name or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        block.in_proj.weight *= 2
    return block


@pytest.mark.parametrize("T", [1, 2, 63, 130])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "options"), [(name, o) for name in EQUATIONS for o in VARIANTS[name]])
def test_follows_its_equations(name, options, causal, T):
    torch.manual_seed(0)
    block = wider(build_block(name, D, causal=causal, **options).double())
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(B, T, D, dtype=torch.float64)
    named = dict(block.named_parameters())
    value, target = block(x), EQUATIONS[name](block, x)
    assert_close(value, target, 1e-12, "y")
    for gradient, expected, label in zip(
        torch.autograd.grad(value, [x, *named.values()], w),
        torch.autograd.grad(target, [x, *named.values()], w),
        ["x", *named],
        strict=True,
    ):
        assert_close(gradient, expected, 1e-11, label)


@pytest.mark.parametrize(("dt_min", "dt_max"), [(1e-3, 1e-1), (1e-4, 1e-3)])
@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
def test_steps_start_in_their_range(name, dt_min, dt_max):
    torch.manual_seed(0)
    block = build_block(name, 512, num_heads=512, state_dim=4, dt_min=dt_min, dt_max=dt_max)
    dt = F.softplus(block.dynamics.dt_bias.double())
    assert dt_min * 0.999 <= dt.min() < dt_min * 1.1
    assert dt_max * 0.9 < dt.max() <= dt_max * 1.001
    spread = math.log(dt_max / dt_min) / math.sqrt(12 * len(dt))
    assert abs(dt.log().mean() - math.log(dt_min * dt_max) / 2) < 4 * spread
    if name == "mamba2":
        A = block.dynamics.A_log.exp()
        assert 1 <= A.min() < 1.5
        assert 15.5 < A.max() <= 16.001


def test_retnet_starts_as_published():
    block = build_block("retnet", 64)
    weights = *block.in_proj.weight.split(block.widths), block.out_proj.weight
    for weight, gain in zip(weights, [2**-2.5] * 4 + [0.5], strict=True):
        bound = gain * math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < weight.abs().max() <= bound


def test_mamba3_phases_stay_small():
    """As a state holds them, however long a sequence is."""
    block = build_block("mamba3", D, causal=True, num_heads=4, state_dim=8, dt_min=1.0, dt_max=2.0)
    state = None
    with torch.no_grad():
        block.in_proj.weight[-2:] += 1  # angles that add up
        for _ in range(3):
            _, state = block.extend(1 + torch.rand(1, 2000, D), state)
    assert (state.phase >= 0).all()
    assert (state.phase <= 2 * math.pi).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba2", {"num_heads": 5}, r"Mamba2: num_heads=5 does not divide expand · d_model = 32; valid: \[1, 2, 4, 8"),
        ("mamba2", {"num_groups": 3}, "Mamba2: num_groups=3 does not divide num_heads=8"),
        ("mamba2", {"expand": 0.01}, "expand · d_model = 0; valid: expand · d_model of 1 or more"),
        ("mamba2", {"dt_min": 0.2}, r"Mamba2: dt_min=0.2, dt_max=0.1; valid: 0 < dt_min < dt_max"),
        ("mamba3", {"num_heads": 5}, "Mamba3: num_heads=5 does not divide expand · d_model = 32"),
        ("mamba3", {"state_dim": 3}, "Mamba3: state_dim=3; valid: 4 or more"),
        ("retnet", {"num_heads": 3}, "RetNet: num_heads=3 does not divide d_model=16"),
    ],
)
def test_options_that_do_not_fit_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_block(name, D, **options)
