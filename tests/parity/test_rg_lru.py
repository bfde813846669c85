"""RG-LRU beside the recurrent block of transformers' RecurrentGemma."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from agreement import assert_close
from torch import Tensor

from seqzoo import build_block
from seqzoo.kernels.agreement import relative_error

B, T, D, H = 2, 70, 24, 3


def of_transformers() -> tuple[Any, str]:
    transformers = pytest.importorskip("transformers")
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = transformers.RecurrentGemmaConfig(hidden_size=D, lru_width=D, num_attention_heads=H, num_hidden_layers=1)
    original = RecurrentGemmaRecurrentBlock(config, layer_idx=0).double()
    original.rg_lru._rnn_scan = partial(original.rg_lru._rnn_scan, acc_dtype=torch.float64)
    return original, transformers.__version__


def copied(original: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Weights of the original, or their gradients, by the names of the block."""
    names = {
        "in_proj.weight": original.linear_x.weight,
        "in_proj.bias": original.linear_x.bias,
        "gate_proj.weight": original.linear_y.weight,
        "gate_proj.bias": original.linear_y.bias,
        "out_proj.weight": original.linear_out.weight,
        "out_proj.bias": original.linear_out.bias,
        "conv.weight": original.conv_1d.weight,
        "conv.bias": original.conv_1d.bias,
        "dynamics.Lambda": original.rg_lru.recurrent_param,
        "recurrence_gate.weight": original.rg_lru.recurrent_gate_weight,
        "recurrence_gate.bias": original.rg_lru.recurrent_gate_bias,
        "input_gate.weight": original.rg_lru.input_gate_weight,
        "input_gate.bias": original.rg_lru.input_gate_bias,
    }
    values = {name: x.grad if gradients else x.detach() for name, x in names.items()}
    for name in values:
        if name.endswith("gate.bias"):
            values[name] = values[name].flatten()
    return values | {"conv.weight": values["conv.weight"][:, 0]}


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_layer_of_transformers(spread, record_parity):
    original, version = of_transformers()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        original.rg_lru.recurrent_param.copy_(spread * torch.randn(D))
    block = build_block("rg_lru", D, causal=True, num_heads=H).double()
    block.load_state_dict(copied(original))
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [
        block(inputs[0]),
        original(inputs[1], torch.arange(T).expand(B, T), attention_mask=None, use_cache=False)[0],
    ]
    for y in outputs:
        (y * w).sum().backward()
    theirs = copied(original, gradients=True)
    pairs = {"y": outputs, "dx": [leaf.grad for leaf in inputs]}
    pairs |= {name: [parameter.grad, theirs[name]] for name, parameter in block.named_parameters()}
    for what, (actual, expected) in pairs.items():
        assert_close(actual, expected, 1e-12, what)
    error = max(relative_error(*pair)[0] for pair in pairs.values())
    record_parity("rg_lru", "RecurrentGemmaRecurrentBlock of transformers", version, error)


def test_starts_with_rates_of_the_paper_and_not_of_the_code():
    """There a^(1/8) lies between 0.9 and 0.999, here a does, where the gate is 1."""
    ours = build_block("rg_lru", 1000).dynamics
    a = (-ours(torch.float32)).exp()
    assert (a >= 0.9 - 1e-6).all()
    assert (a <= 0.999 + 1e-6).all()
    assert_close(a.mean(), torch.tensor((0.9 + 0.999) / 2), 0.01)
    u = torch.empty(1000).uniform_(0.9**2, 0.999**2)
    coded = (u.log() * -0.5).expm1().log()  # what the code writes into this parameter
    with torch.no_grad():
        ours.Lambda.copy_(coded)
    assert_close((-ours(torch.float32)).exp(), u**4, 1e-5)
