"""RetNet beside the authors' layer. `pip install --no-deps torchscale` installs it; it asks for more than it needs."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from agreement import assert_close
from torch import nn

from seqzoo import build_block
from seqzoo.kernels.agreement import relative_error

B, T, D, H = 2, 90, 32, 4


def of_positions(T: int, Dk: int):
    """What the authors' model hands to its layers: sines, cosines, and decays with rows divided by the root of their
    sum. Their module of it needs packages that the layer does not."""
    place = torch.arange(T, dtype=torch.float64)
    angle = place[:, None] * (1 / 10_000 ** torch.linspace(0, 1, Dk // 2, dtype=torch.float64)).repeat_interleave(2)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    decays = (gamma[:, None, None] ** (place[:, None] - place).clamp(min=0)).tril()
    return (angle.sin(), angle.cos()), decays / decays.sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("eps", "tolerance"), [(1e-18, 1e-12), (1e-6, 2e-6)])
def test_layer_of_torchscale(eps, tolerance, record_parity, monkeypatch):
    """Rows that the authors divide before the norm come out the same but for the eps in it."""
    retention = pytest.importorskip("torchscale.component.multiscale_retention")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    arguments = SimpleNamespace(multiway=False, layernorm_eps=eps)
    original = retention.MultiScaleRetention(arguments, D, 2 * D, H).double()
    block = build_block("retnet", D, causal=True, num_heads=H).double()
    block.norm.eps = eps
    theirs = [original.q_proj, original.k_proj, original.v_proj, original.g_proj]
    with torch.no_grad():
        for layer in (*theirs, original.out_proj):
            nn.init.normal_(layer.weight, std=0.3)
        block.in_proj.weight.copy_(torch.cat([layer.weight for layer in theirs]))
        block.out_proj.weight.copy_(original.out_proj.weight)
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = block(inputs[0]), original(inputs[1], of_positions(T, D // H))
    for y in outputs:
        (y * w).sum().backward()
    pairs = {
        "y": outputs,
        "out_proj": (block.out_proj.weight.grad, original.out_proj.weight.grad),
        "in_proj": (block.in_proj.weight.grad, torch.cat([layer.weight.grad for layer in theirs])),
        "dx": tuple(leaf.grad for leaf in inputs),
    }
    for name, (actual, expected) in pairs.items():
        assert_close(actual, expected, tolerance, name)
    error = max(relative_error(*pair)[0] for pair in pairs.values())
    record_parity("retnet", f"MultiScaleRetention of torchscale, eps {eps:g}", version("torchscale"), error)
