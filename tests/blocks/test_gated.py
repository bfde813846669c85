"""GLA and HGRN2: their equations, one step at a time, and what sets how long they remember."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close
from model_cases import TOKENS, config
from torch import Tensor

from seqzoo import build_block
from seqzoo.blocks.gated_norm import NormThenGate
from seqzoo.blocks.gla import GLA
from seqzoo.blocks.hgrn2 import HGRN2
from seqzoo.kernels import common
from seqzoo.models import build_model

D = 8


def memory(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """o_t = S_tᵀ q_t with S_t = diag(decay_t) S_{t-1} + k_t v_tᵀ, all of [B, T, H, ...]."""
    S, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(q.shape[1]):
        S = decay[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1)


def of_heads(causal: bool, H: int, *inputs: Tensor) -> Tensor:
    inputs = tuple(y.unflatten(-1, (H, -1)) for y in inputs)
    o = memory(*inputs)
    return o if causal else o + memory(*(y.flip(1) for y in inputs)).flip(1)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def gla_equations(block: GLA, x: Tensor) -> Tensor:
    W = block.in_proj.weight
    q, k, v, r = (x @ part.T for part in W.split((D // 2, D // 2, D, D)))
    low, high = (layer.weight for layer in block.gate_proj)
    decay = (x @ low.T @ high.T + block.gate_bias.bias).sigmoid() ** (1 / block.gate_temperature)
    o = of_heads(block.causal, block.num_heads, q / math.sqrt(block.key_dim), k, v, decay)
    return (rms(o) * block.norm.weight).flatten(2) * F.silu(r) @ block.out_proj.weight.T


def hgrn2_equations(block: HGRN2, x: Tensor) -> Tensor:
    q, f, v = (x @ part.T for part in block.in_proj.weight.chunk(3))
    f = (f if block.gate_bias is None else f + block.gate_bias.bias).sigmoid()
    f = block.lower_bound + (1 - block.lower_bound) * f
    o = of_heads(block.causal, block.num_heads, F.silu(q), 1 - f, v, f)
    return rms(o.flatten(2)) * block.norm.weight @ block.out_proj.weight.T


@pytest.mark.parametrize("T", [1, 2, 65])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "equations", "options"),
    [
        ("gla", gla_equations, {}),
        ("gla", gla_equations, {"num_heads": 2, "gate_rank": 3, "gate_temperature": 2.0, "gate_bias": -1.0}),
        ("hgrn2", hgrn2_equations, {}),
        ("hgrn2", hgrn2_equations, {"num_heads": 2, "lower_bound": 0.4, "gate_bias": 1.0}),
    ],
)
def test_follows_its_equations(name, equations, options, causal, T):
    torch.manual_seed(0)
    block = build_block(name, D, causal=causal, **options).double()
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


@pytest.mark.parametrize("causal", [True, False])
def test_hgrn2_with_gates_shut_at_either_end_is_finite(causal):
    """σ of 0 or of 1, to the last bit: nothing is above 1, and no gradient is lost in 0 / 0."""
    for lower_bound in (0.0, 1e-12, 0.3, 0.999):
        block = build_block("hgrn2", D, causal=causal, lower_bound=lower_bound)
        for size in (20.0, 300.0, 1e4):
            x = (size * torch.randn(2, 30, D, generator=torch.Generator().manual_seed(0))).requires_grad_()
            y = block(x)
            gradients = torch.autograd.grad(y.sum(), [x, *block.parameters()])
            assert y.isfinite().all()
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_hgrn2_remembers_at_least_what_its_bound_says():
    block = build_block("hgrn2", D, lower_bound=0.25)
    decay = block._log_decay(torch.tensor([-1e4, -2.0, 0.0, 2.0, 1e4])).exp()
    torch.testing.assert_close(decay, 0.25 + 0.75 * torch.tensor([-1e4, -2.0, 0.0, 2.0, 1e4]).sigmoid())
    with pytest.raises(ValueError, match=r"HGRN2: lower_bound=1.0; valid: 0 or more, and below 1"):
        HGRN2(D, lower_bound=1.0)
    with pytest.raises(ValueError, match=r"lower_bound=1\.0: valid: 0 or more and below 1"):
        build_block("hgrn2", D, lower_bound=1.0)


def test_a_model_gives_bounds_by_depth():
    def bounds(**changes):
        model = build_model(config(**changes), TOKENS, head="classify", causal=False)
        blocks = [layer.branch for layer in model.backbone.layers if isinstance(layer.branch, HGRN2)]
        return [block.lower_bound for block in blocks]

    assert bounds(block={"name": "hgrn2"}, num_layers=4, mlp_ratio=1) == [0, 0.25, 0.5, 0.75]
    assert bounds(block={"name": "hgrn2"}, num_layers=2, blocks_per_layer=2) == [0, 0, 0.5, 0.5]
    assert bounds(block={"name": "hgrn2", "lower_bound": 0.9}, num_layers=2) == [0.9, 0.9]
    assert bounds(layers=["lru", "hgrn2", {"name": "hgrn2", "lower_bound": 0.1}, "hgrn2"]) == [0.25, 0.1, 0.75]
    assert build_block("hgrn2", D).lower_bound == 0


def test_gate_biases_start_where_they_are_told():
    for name in ("gla", "hgrn2"):
        bias = build_block(name, D, gate_bias=-3.0).gate_bias
        assert (bias.bias == -3).all()
        assert bias.to(torch.bfloat16).bias.dtype == torch.float32
    assert build_block("hgrn2", D).gate_bias is None
    half_life = math.log(2) / -math.log(1 / (1 + math.exp(-4))) * 16
    assert round(half_life) == 611, "as GLA says"
    assert round(half_life / 16) == 38, "as HGRN2 says"


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"GLA: num_heads=8 of d_model=8; valid: divisors of half the width"):
        build_block("gla", 8, num_heads=8)
    with pytest.raises(ValueError, match=r"gate_temperature=0\.0: valid: above 0"):
        build_block("gla", 8, gate_temperature=0.0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_a_norm_ahead_of_a_gate_in_parts(gate, affine, monkeypatch):
    monkeypatch.setattr(common, "CACHED", 1)
    layer = NormThenGate(6, gate, eps=1e-3, affine=affine).double()
    y, z = (torch.randn(2, 5, *shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (18,)))
    if affine:
        torch.nn.init.normal_(layer.weight)
    expected = F.rms_norm(y, (6,), layer.weight, 1e-3).flatten(2) * {"silu": F.silu, "sigmoid": torch.sigmoid}[gate](z)
    assert_close(layer(y, z), expected, 1e-14)
    leaves, w = [y, z, *layer.parameters()], torch.randn_like(z)
    for value, target in zip(*(torch.autograd.grad(x, leaves, w) for x in (layer(y, z), expected)), strict=True):
        assert_close(value, target, 1e-13)
    assert torch.autograd.gradgradcheck(lambda y, z: layer(y, z), (y, z), fast_mode=True)
