"""linear_attention with one decay of a head in the compiled loop of a CPU, against the recurrence that defines it."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from torch import Tensor

from seqzoo.kernels import linear_attention
from seqzoo.kernels.linear_attention import chunked

NAMES = ("o", "dq", "dk", "dv", "dg", "state", "dstate")
CASES = [  # B, T, H, Dk, Dv, causal, decay, normalize, options
    (2, 1, 2, 3, 5, True, "step", False, {}),
    (2, 70, 2, 7, 9, True, "head", False, {"lengths": torch.tensor([3, 70])}),
    (2, 131, 2, 5, 6, False, "step", True, {"lengths": torch.tensor([131, 64])}),
    (1, 130, 1, 4, 100, True, "step", True, {}),  # more columns than are taken at a time
    (1, 90, 3, 6, 4, True, "step", False, {"cu_seqlens": torch.tensor([0, 65, 65, 66, 90])}),
    (1, 90, 3, 6, 4, False, "head", False, {"cu_seqlens": torch.tensor([0, 65, 65, 66, 90])}),
]


def make(B: int, T: int, H: int, Dk: int, Dv: int, decay: str, rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    g = -rand(H) / 8 if decay == "head" else -rand(B, T, H) / 4
    return [rand(B, T, H, Dk), rand(B, T, H, Dk), rand(B, T, H, Dv) - 0.5, g, rand(rows, H, Dk, Dv)]


def run(tensors: list[Tensor], normalize: bool, **options) -> list[Tensor]:
    q, k, v, g, *states = leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if not states:
        outputs: tuple[Tensor, ...] = (linear_attention(q, k, v, log_decay=g, normalize=normalize, **options),)
    else:
        options |= {"initial_state": states[0], "output_final_state": True}
        outputs = linear_attention(q, k, v, log_decay=g, normalize=normalize, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [outputs[0], *gradients[:4], *outputs[1:], *gradients[4:]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "T", "H", "Dk", "Dv", "causal", "decay", "normalize", "options"), CASES)
def test_agrees_with_reference(B, T, H, Dk, Dv, causal, decay, normalize, options, dtype):
    rows = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else B
    tensors = [x.to(dtype) for x in make(B, T, H, Dk, Dv + normalize, decay, rows)]
    tensors[2] = tensors[2][..., :Dv]
    tensors = tensors if causal else tensors[:4]
    assert chunked._by_step(*tensors[1:3])
    expected = run([x.double() for x in tensors], normalize, causal=causal, backend="reference", **options)
    for name, value, target in zip(NAMES, run(tensors, normalize, causal=causal, **options), expected, strict=False):
        assert value.dtype == dtype
        assert_close(value, target, 1e-12 if dtype == torch.float64 else 3e-6, name)


def test_agrees_with_chunks(monkeypatch):
    """Which compiled graphs and other devices take; and -inf forgets."""
    tensors = make(2, 150, 2, 5, 6, "step", 2)
    tensors[3][:, 67] = -torch.inf
    value = run(tensors, False, causal=True)
    monkeypatch.setattr(chunked, "SMALL", 0)
    for name, x, y in zip(NAMES, value, run(tensors, False, causal=True), strict=True):
        assert_close(x, y, 1e-12, name)
    assert (value[4][:, 67] == 0).all()


def test_has_a_second_derivative():
    leaves = [x.requires_grad_() for x in make(1, 7, 2, 3, 4, "step", 1)]
    torch.autograd.gradgradcheck(
        lambda q, k, v, g, s: linear_attention(q, k, v, log_decay=g, causal=True, initial_state=s),
        leaves,
        fast_mode=True,
    )
