"""MiniMax's lightning attention is linear attention with a constant decay a head: the layer of transformers, by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

from seqzoo.kernels import linear_attention
from seqzoo.kernels.agreement import relative_error

B, T, D, H, LAYERS = 2, 150, 32, 4, 6


@pytest.mark.parametrize("layer", [0, 3])
def test_layer_of_transformers(layer, record_parity, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    monkeypatch.setattr(torch, "float32", torch.float64)  # to which its norm casts
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        hidden_size=D, num_attention_heads=H, head_dim=D // H, num_hidden_layers=LAYERS, block_size=64
    )
    original = MiniMaxLightningAttention(config, layer).double()
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1).double() / H) * (1 - layer / (LAYERS - 1 + 1e-5) + 1e-5)
    assert_close(original.slope_rate.flatten(), slopes, 1e-6)
    original.slope_rate = slopes[:, None, None]  # and what follows from them, in double precision
    decays = original.decay_factors(original.slope_rate)
    original.query_decay, original.key_decay, original.diagonal_decay = decays
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))

    def by_linear_attention(x):
        q, k, v = F.silu(original.qkv_proj(x)).unflatten(-1, (H, -1)).chunk(3, -1)
        o = linear_attention(q, k, v, log_decay=-slopes, causal=True)
        return original.out_proj(original.output_gate(x).sigmoid() * original.norm(o.flatten(2)))

    results = []
    for layer_of_x in (by_linear_attention, lambda x: original(x, None, None)[0]):
        leaf = x.clone().requires_grad_()
        y = layer_of_x(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *original.parameters()], w)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-12)
    error = max(relative_error(*pair)[0] for pair in zip(*results, strict=True))
    record_parity("linear_attention", "MiniMaxLightningAttention of transformers", transformers.__version__, error)
