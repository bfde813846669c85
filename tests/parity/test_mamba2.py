"""Mamba-2 beside the layer of transformers, and beside listing 1 of its paper."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from torch import Tensor

from seqzoo import build_block
from seqzoo.kernels import linear_attention
from seqzoo.kernels.agreement import relative_error

B, T, D = 2, 150, 16


@pytest.fixture
def in_double(monkeypatch):
    """The original casts to single precision inside; with this, to double."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)


def layers(num_groups: int, **options):
    """The original's layer and the block, with the same random weights, in double precision."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=D, num_heads=4, head_dim=8, state_size=6, n_groups=num_groups, chunk_size=64, num_hidden_layers=1
    )
    original = Mamba2Mixer(config, layer_idx=0).double()
    block = build_block("mamba2", D, causal=True, num_heads=4, state_dim=6, num_groups=num_groups, **options).double()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return original, block, transformers.__version__


def copied(original, gradients: bool = False) -> dict[str, Tensor]:
    """Weights of the original, or their gradients, by the names of the block."""
    names = {
        "in_proj.weight": original.in_proj.weight,
        "conv.weight": original.conv1d.weight,
        "conv.bias": original.conv1d.bias,
        "dynamics.dt_bias": original.dt_bias,
        "dynamics.A_log": original.A_log,
        "skip": original.D,
        "norm.scale": original.norm.weight,
        "out_proj.weight": original.out_proj.weight,
    }
    values = {name: x.grad if gradients else x.detach() for name, x in names.items()}
    gate, rest = values["in_proj.weight"].tensor_split((4 * 8,))
    return values | {"gate_proj.weight": gate, "in_proj.weight": rest, "conv.weight": values["conv.weight"][:, 0]}


@pytest.mark.parametrize("num_groups", [1, 2])
def test_layer_of_transformers(num_groups, in_double, record_parity):
    torch.manual_seed(0)
    original, block, version = layers(num_groups)
    block.load_state_dict(copied(original))
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(leaf) for layer, leaf in zip((block, original), inputs, strict=True)]
    for y in outputs:
        (y * w).sum().backward()
    pairs = {"y": outputs, "dx": [leaf.grad for leaf in inputs]}
    theirs = copied(original, gradients=True)
    pairs |= {name: [parameter.grad, theirs[name]] for name, parameter in block.named_parameters()}
    for name, (actual, expected) in pairs.items():
        assert_close(actual, expected, 1e-12, name)
    error = max(relative_error(*pair)[0] for pair in pairs.values())
    record_parity("mamba2", "Mamba2Mixer of transformers, PyTorch path", version, error)


def test_starts_with_other_rates_than_transformers():
    """There they are 1, 2, ..., H; the authors draw them, and so does the block."""
    original, block, _ = layers(1)
    original.init_mamba2_weights()
    assert_close(original.A_log.exp(), torch.arange(1, 5, dtype=torch.float64), 1e-6)
    assert not torch.equal(block.dynamics.A_log, original.A_log)


def listing_1(X: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """The paper's algorithm in four steps, over pairs of chunks: X [b, T, h, p], A [b, T, h], B and C [b, T, h, n]."""

    def lower(g: Tensor) -> Tensor:
        """exp of the sum of g over (s, t], 0 above the diagonal."""
        sums = g.new_full((*g.shape, g.shape[-1]), -torch.inf)
        for t in range(g.shape[-1]):
            for s in range(t + 1):
                sums[..., t, s] = g[..., s + 1 : t + 1].sum(-1)
        return sums.exp()

    X, A, B, C = (x.unflatten(1, (-1, chunk)).transpose(2, 3) for x in (X, A, B, C))  # [b, c, h, l, ...]
    inside = (C @ B.mT * lower(A)) @ X
    to_end = torch.stack([A[..., s + 1 :].sum(-1) for s in range(chunk)], -1).exp()
    states = (B * to_end[..., None]).mT @ X  # [b, c, h, n, p]
    over_chunks = torch.cat([torch.zeros_like(A[:, :1]), A], 1).sum(-1).movedim(1, -1)  # [b, h, 1 + c]
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    reached = torch.einsum("bhzc,bchnp->bzhnp", lower(over_chunks), states)[:, :-1]
    between = (C * A.cumsum(-1).exp()[..., None]) @ reached
    return (inside + between).transpose(2, 3).flatten(1, 2)


def test_listing_1(record_parity):
    torch.manual_seed(0)
    H, P, N, chunk = 3, 5, 4, 8
    steps = 10 * chunk
    X, B_, C = (torch.randn(B, steps, H, n, dtype=torch.float64, requires_grad=True) for n in (P, N, N))
    A = (-torch.rand(B, steps, H, dtype=torch.float64)).requires_grad_()
    inputs, w = (X, A, B_, C), torch.randn(B, steps, H, P, dtype=torch.float64)
    outputs = linear_attention(C, B_, X, log_decay=A, causal=True), listing_1(*inputs, chunk)
    actual, expected = ([y, *torch.autograd.grad(y, inputs, w)] for y in outputs)
    for a, e, name in zip(actual, expected, ("y", "dX", "dA", "dB", "dC"), strict=True):
        assert_close(a, e, 1e-12, name)
    error = max(relative_error(a, e)[0] for a, e in zip(actual, expected, strict=True))
    record_parity("mamba2", "listing 1 of arXiv 2405.21060, written from the paper", "", error)
