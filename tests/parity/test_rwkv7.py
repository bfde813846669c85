"""RWKV-7 beside the time mixing of rwkv7-hf and the recurrence of fla, in double precision."""

from __future__ import annotations

import math
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

from seqzoo import build_block
from seqzoo.blocks.rwkv7 import rwkv7
from seqzoo.kernels.agreement import relative_error

B, T, D, H = 2, 100, 32, 4
FACTORS = {"decay_proj": "w_lora", "rate_proj": "a_lora", "gate_proj": "g_lora"}


@pytest.fixture
def double(monkeypatch):
    """They cast to single precision inside; here, to double."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def layer(index: int):
    modeling = pytest.importorskip("rwkv7_hf.modeling_rwkv7")
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config

    ranks = dict.fromkeys(("decay_low_rank_dim", "a_low_rank_dim", "gate_low_rank_dim", "v_low_rank_dim"), 32)
    config = RWKV7Config(hidden_size=D, num_hidden_layers=2, num_heads=H, **ranks)
    original = modeling.RWKV7TimeMix(config, index).double()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return original


def run(original, x, v_first=None):
    state = torch.zeros(B, H, D // H, D // H, dtype=torch.float64)
    shift, seen = torch.zeros(B, D, dtype=torch.float64), torch.ones(B, x.shape[1], dtype=torch.bool)
    return original(x, state, shift, v_first, seen)


def by_our_names(original, of):
    """`of` the original's parameters, by the names of the block's."""
    return {
        "mu": torch.cat([of(getattr(original, f"x_{c}")).view(1, D) for c in "rwkvag"]),
        **{f"{c}_proj.weight": of(getattr(original, f"{c}_proj").weight) for c in "rkv"},
        "out_proj.weight": of(original.o_proj.weight),
        **{
            f"{ours}.{n}.weight": of(getattr(original, theirs).lora[n].weight)
            for ours, theirs in FACTORS.items()
            for n in (0, 2)
        },
        "decay_bias.bias": of(original.w_lora.lora[2].bias),
        "rate_bias.bias": of(original.a_lora.lora[2].bias),
        "k_k": of(original.k_k),
        "k_a": of(original.k_a),
        "r_k": of(original.r_k).flatten(),
        "norm_weight": of(original.g_norm.weight),
        "norm_bias": of(original.g_norm.bias),
    }


def same(original):
    block = build_block("rwkv7", D, causal=True, num_heads=H).double()
    block.load_state_dict({name: x.detach() for name, x in by_our_names(original, lambda x: x).items()})
    return block


def test_layer_of_rwkv7_hf(double, record_parity):
    """The first of a model, which like the block has no values of another to add."""
    torch.manual_seed(0)
    original = layer(0)
    block = same(original)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    (expected, memory, *_), y = run(original, x), block(z)
    w = torch.randn_like(y)
    expected.backward(w)
    y.backward(w)
    gradients = by_our_names(original, lambda x: x.grad)
    assert gradients.keys() == dict(block.named_parameters()).keys()
    pairs = {"y": (y, expected), "dx": (z.grad, x.grad), "memory": (block.extend(z, None)[1].memory, memory)}
    pairs |= {name: (parameter.grad, gradients[name]) for name, parameter in block.named_parameters()}
    for name, pair in pairs.items():
        assert_close(*pair, 1e-11, name)
    error = max(relative_error(*pair)[0] for pair in pairs.values())
    record_parity("rwkv7", "RWKV7TimeMix of rwkv7-hf, the first layer", version("rwkv7-hf"), error)


@torch.no_grad()
def test_values_of_the_first_layer_are_left_out(double):
    """Later layers add them: the block is such a layer where they are its own values, and no other."""
    torch.manual_seed(0)
    original = layer(1)
    block, x = same(original), torch.randn(B, T, D, dtype=torch.float64)
    shifted = F.pad(x, (0, 0, 1, 0))[:, :-1]
    own = original.v_proj(x + (shifted - x) * original.x_v)
    assert_close(block(x), run(original, x, own)[0], 1e-11)
    assert relative_error(block(x), run(original, x, torch.randn_like(own))[0])[0] > 0.1


def test_operation_is_the_recurrence_of_fla(double, record_parity):
    recurrence = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence
    torch.manual_seed(0)
    r, k, kappa, a, w = (torch.randn(B, T, H, 5, dtype=torch.float64) for _ in range(5))
    kappa, a, log_w = F.normalize(kappa, dim=-1), a.sigmoid(), -math.exp(-0.5) * w.sigmoid()
    v, first = torch.randn(B, T, H, 7, dtype=torch.float64), torch.randn(B, H, 5, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (r, k, v, kappa, a, log_w, first)]
    given = (r * math.sqrt(5), k, v, -kappa, a * kappa, log_w)
    o, state = recurrence(*(x.transpose(1, 2) for x in given), initial_state=first)
    expected, actual = (o.transpose(1, 2), state), rwkv7(*inputs)
    ways = [torch.randn_like(x) for x in actual]
    pairs = list(zip(actual, expected, strict=True))
    pairs += zip(*(torch.autograd.grad(outputs, inputs, ways) for outputs in (actual, expected)), strict=True)
    for pair in pairs:
        assert_close(*pair, 1e-12)
    error = max(relative_error(*pair)[0] for pair in pairs)
    record_parity("rwkv7", "dplr_recurrence of fla, the operation alone", version("fla-core"), error)
