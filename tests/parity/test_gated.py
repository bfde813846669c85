"""GLA and HGRN2 beside the recurrence of fla, with the equations around it of its layers, which need a GPU."""

from __future__ import annotations

import math
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

from seqzoo import build_block
from seqzoo.kernels import linear_attention
from seqzoo.kernels.agreement import relative_error

B, T, D, H = 2, 100, 32, 4


@pytest.fixture
def naive_recurrent_gla(monkeypatch):
    """It casts to single precision inside; here, to double."""
    recurrence = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    return recurrence


def heads(x):
    return x.unflatten(-1, (H, -1))


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def gla(block, x, recurrence):
    """The layer of fla, without its options."""
    q, k, v, r = (x @ W.T for W in block.in_proj.weight.split((D // 2, D // 2, D, D)))
    low, high = (layer.weight for layer in block.gate_proj)
    gk = F.logsigmoid(x @ low.T @ high.T + block.gate_bias.bias) / 16
    o, _ = recurrence(*(heads(y) for y in (q, k, v, gk)))
    return (rms(o, block.norm.weight).flatten(2) * F.silu(r)) @ block.out_proj.weight.T


def hgrn2(block, x, recurrence):
    """The layer of fla. It divides queries by the root of a head's width, too, which the norm undoes but for eps."""
    q, f, v = (x @ W.T for W in block.in_proj.weight.chunk(3))
    f = block.lower_bound + (1 - block.lower_bound) * f.sigmoid()
    o, _ = recurrence(*(heads(y) for y in (F.silu(q) * math.sqrt(D / H), 1 - f, v, f.log())))
    return rms(o.flatten(2), block.norm.weight) @ block.out_proj.weight.T


@pytest.mark.parametrize(
    ("name", "layer", "options"),
    [("gla", gla, {}), ("hgrn2", hgrn2, {}), ("hgrn2", hgrn2, {"lower_bound": 0.5})],
)
def test_around_the_recurrence_of_fla(name, layer, options, naive_recurrent_gla, record_parity):
    torch.manual_seed(0)
    block = build_block(name, D, causal=True, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    y, expected = block(x), layer(block, x, naive_recurrent_gla)
    w, wrt = torch.randn_like(y), [x, *block.parameters()]
    pairs = [(y, expected)]
    pairs += zip(*(torch.autograd.grad(z, wrt, w, retain_graph=True) for z in (y, expected)), strict=True)
    for actual, target in pairs:
        assert_close(actual, target, 1e-12)
    error = max(relative_error(*pair)[0] for pair in pairs)
    record_parity(name, "naive_recurrent_gla of fla in its layer's equations", version("fla-core"), error)


def test_operation_is_the_recurrence_of_fla(naive_recurrent_gla, record_parity):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, dtype=torch.float64) for D in (5, 5, 7))
    g = F.logsigmoid(torch.randn(B, T, H, 5, dtype=torch.float64))
    first = torch.randn(B, H, 5, 7, dtype=torch.float64)
    expected, state = naive_recurrent_gla(q, k, v, g, initial_state=first, output_final_state=True)
    o, last = linear_attention(
        q / math.sqrt(5), k, v, log_decay=g, causal=True, initial_state=first, output_final_state=True
    )
    assert_close(o, expected, 1e-13)
    assert_close(last, state, 1e-13)
    error = relative_error(o, expected)[0]
    record_parity("gla", "naive_recurrent_gla of fla, the operation alone", version("fla-core"), error)
