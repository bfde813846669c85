"""gated_attention in Triton against masked quadratic weights."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from torch import Tensor

from seqzoo.kernels import gated_attention
from seqzoo.kernels.gated_attention import fused

NAMES = ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v", "bias")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def make(B, T, S, E, chunk_len, *, causal, bias=True, dtype=torch.float32, size=1.0) -> dict[str, Tensor]:
    """Inputs by name; the bias stays in single precision."""
    u, v = torch.randn(B, T, E), torch.randn(B, T, E)
    keys = [size * torch.randn(B, T, S) for _ in range(4)]
    inputs = dict(zip(NAMES, (y.to(DEVICE, dtype) for y in (u, *keys, v)), strict=False))
    return inputs | ({"bias": torch.randn(chunk_len if causal else 2 * chunk_len - 1).to(DEVICE)} if bias else {})


def run(inputs: dict[str, Tensor], w: Tensor, **options) -> dict[str, Tensor]:
    inputs = {name: y.detach().clone().requires_grad_() for name, y in inputs.items()}
    o = gated_attention(**inputs, **options)
    gradients = torch.autograd.grad(o, list(inputs.values()), w)
    return {"o": o} | dict(zip((f"d{name}" for name in inputs), gradients, strict=True))


def check(inputs: dict[str, Tensor], *, lengths=None, **options) -> None:
    v = inputs["v"]
    w = torch.randn(v.shape).to(v)
    lengths = None if lengths is None else torch.tensor(lengths)
    clean = {name: wide(y).cpu() for name, y in inputs.items()}
    expected = run(clean, wide(w).cpu(), lengths=lengths, **options, backend="reference")
    if lengths is not None:
        lengths = lengths.to(DEVICE)
        padding = (torch.arange(v.shape[1], device=DEVICE) >= lengths[:, None])[..., None]
        inputs = {name: y.masked_fill(padding, float("nan")) if y.dim() > 1 else y for name, y in inputs.items()}
        w = w.masked_fill(padding, float("nan"))
    with poisoned():
        values = run(inputs, w, lengths=lengths, **options, backend="fused")
        again = run(inputs, w, lengths=lengths, **options, backend="fused")
    for name, value in values.items():
        assert torch.equal(value, again[name]), name
        assert value.dtype == inputs.get(name[1:], v).dtype
        assert_close(value.cpu(), expected[name], TOLERANCE[v.dtype], name)
        if lengths is not None and value.dim() > 1:
            assert (value.masked_select(padding) == 0).all(), name


CASES = [  # B, T, S, E, chunk_len, causal, bias, lengths, dtype
    (2, 1, 3, 5, 4, True, True, None, torch.float32),
    (1, 2, 8, 7, 1, False, True, None, torch.float32),
    (2, 15, 5, 3, 1, True, True, [15, 4], torch.float32),
    (2, 16, 24, 16, 5, True, True, [3, 16], torch.float32),
    (2, 16, 8, 24, 300, False, True, None, torch.float32),
    (3, 63, 16, 10, 20, True, False, [63, 0, 40], torch.float32),
    (3, 63, 16, 10, 33, False, True, [63, 0, 40], torch.float32),
    (2, 64, 8, 100, 64, True, True, [64, 33], torch.float32),
    (2, 64, 16, 16, 16, False, False, [64, 33], torch.float16),
    (2, 65, 24, 8, 32, True, True, [65, 64], torch.float16),
    (1, 65, 100, 24, 64, False, True, None, torch.float32),
    (1, 100, 64, 64, 100, True, True, None, torch.float16),
    (2, 100, 8, 64, 37, True, True, None, torch.float32),
    (2, 257, 8, 16, 64, True, True, [257, 130], torch.float32),
    (1, 257, 16, 24, 70, False, True, None, torch.float32),
    (1, 257, 8, 8, 256, False, True, None, torch.float16),
]


@pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "cut"])
@pytest.mark.parametrize(("B", "T", "S", "E", "chunk_len", "causal", "bias", "lengths", "dtype"), CASES)
def test_agrees_with_reference(B, T, S, E, chunk_len, causal, bias, lengths, dtype, pieces, monkeypatch):
    monkeypatch.setattr(fused, "_pieces", lambda programs, most, device: min(pieces, most))
    inputs = make(B, T, S, E, chunk_len, causal=causal, bias=bias, dtype=dtype)
    check(inputs, chunk_len=chunk_len, causal=causal, lengths=lengths)
