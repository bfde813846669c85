"""attention in Triton against the definition."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from torch import Tensor

from seqzoo.kernels import attention

TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def run(q, k, v, w, **options) -> dict[str, Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v, **options)
    return dict(zip(("o", "dq", "dk", "dv"), (o, *torch.autograd.grad(o, (q, k, v), w)), strict=True))


def check(q, k, v, *, lengths=None, scale=None, position=None, causal=False, window=None, tolerance=None) -> None:
    w = torch.randn(*q.shape[:3], v.shape[-1]).to(q)
    to = {"causal": causal, "window": window, "position": None if position is None else torch.tensor(position)}
    to["lengths"] = None if lengths is None else torch.tensor(lengths)
    to["scale"] = wide(scale) if isinstance(scale, Tensor) else scale
    expected = run(*(wide(x).cpu() for x in (q, k, v, w)), **to, backend="reference")
    if lengths is not None:  # what is past the end is never used
        k, v = (x.masked_fill(past(lengths, x, 0), float("nan")) for x in (k, v))
        q, w = (x.masked_fill(past(lengths, x, position), float("nan")) for x in (q, w))
    to |= {name: x.to(DEVICE) for name, x in to.items() if isinstance(x, Tensor)}
    to["scale"] = scale
    with poisoned():
        values = run(q, k, v, w, **to, backend="fused")
    for name, value in values.items():
        assert_close(value.cpu(), expected[name], tolerance or TOLERANCE[q.dtype], name)


def past(lengths, x: Tensor, position) -> Tensor:
    first = torch.tensor(position or [0] * len(lengths), device=DEVICE)[:, None]
    place = first + torch.arange(x.shape[1], device=DEVICE)
    return (place >= torch.tensor(lengths, device=DEVICE)[:, None])[..., None, None]


def make(B, T, S, H, G, D, Dv, dtype=torch.float32, size=1.0) -> list[Tensor]:
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, Dv)
    q, k, v = (torch.randn(*shape) for shape in shapes)
    return [x.to(DEVICE, dtype) for x in (size * q, size * k, v)]


CASES = [  # B, T, H, G, D, Dv, causal, lengths, dtype
    (2, 1, 2, 1, 3, 5, True, None, torch.float32),
    (1, 2, 3, 3, 8, 7, False, None, torch.float32),
    (2, 15, 1, 1, 16, 3, False, [15, 4], torch.float32),
    (2, 16, 4, 2, 24, 24, True, [3, 16], torch.float32),
    (3, 63, 2, 1, 8, 10, True, [63, 0, 40], torch.float32),
    (2, 64, 2, 2, 16, 16, False, [64, 33], torch.float16),
    (2, 65, 1, 1, 64, 8, True, [65, 64], torch.float32),
    (1, 65, 2, 1, 100, 24, True, None, torch.float16),
    (2, 100, 1, 1, 33, 20, False, [51, 0], torch.float32),
    (1, 100, 4, 1, 8, 16, True, None, torch.float16),
    (2, 257, 1, 1, 10, 6, True, [257, 130], torch.float32),
    (1, 257, 1, 1, 24, 8, False, None, torch.float32),
]


@pytest.mark.parametrize(("B", "T", "H", "G", "D", "Dv", "causal", "lengths", "dtype"), CASES)
def test_agrees_with_reference(B, T, H, G, D, Dv, causal, lengths, dtype):
    check(*make(B, T, T, H, G, D, Dv, dtype), lengths=lengths, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [70, 40, 0]])
def test_queries_behind_a_cache(causal, lengths):
    check(*make(3, 9, 70, 2, 1, 8, 5), position=[61, 33, 5], lengths=lengths, causal=causal)
    check(*make(3, 9, 70, 2, 1, 8, 5), position=[-70, -3, -(2**40)], lengths=lengths, causal=causal)


WINDOWS = [(1, False), (9, True), ((20, 3), False), (70, True), (2**31 - 1, False)]


@pytest.mark.parametrize(("window", "causal"), WINDOWS)
def test_a_window(window, causal):
    check(*make(2, 65, 65, 2, 1, 8, 5), lengths=[65, 40], window=window, causal=causal)
    for position in ([61, 33, 5], [-70, -20, 5]):
        check(*make(3, 9, 70, 2, 1, 8, 5), position=position, lengths=[70, 40, 0], window=window, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_for_each_query(causal):
    scale = torch.rand(2, 65).to(DEVICE)
    check(*make(2, 65, 65, 2, 2, 8, 8), scale=scale, causal=causal)
    check(*make(2, 65, 65, 2, 2, 8, 8), scale=scale[0], causal=causal, lengths=[65, 9])
    check(*make(1, 20, 20, 1, 1, 8, 8), scale=-0.7, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_large_logits(causal):
    # Where one weight is all there is, dq is the difference of two numbers that are nearly equal.
    check(*make(1, 65, 65, 1, 1, 8, 4, size=5.0), causal=causal, tolerance=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_come_in_any_layout(causal):
    q, k, v = make(2, 17, 17, 2, 1, 4, 4)
    for name, gradient in awkward(torch.randn_like(q)).items():
        value = run(q, k, v, gradient, causal=causal, backend="fused")
        expected = run(q, k, v, gradient.contiguous(), causal=causal, backend="fused")
        assert all(torch.equal(value[key], expected[key]) for key in value), name


def test_operator():
    q, k, v = make(2, 9, 9, 2, 1, 4, 3)
    lengths = torch.tensor([9, 4], device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.seqzoo.attention_fused.default, (*leaves, None, 0.5, lengths, None, True))
    plain = [x.detach() for x in leaves]
    o, log_sum = torch.ops.seqzoo.attention_fused(*plain, None, 0.5, lengths, None, True)
    backward = torch.ops.seqzoo.attention_fused_backward.default
    torch.library.opcheck(backward, (o, *plain, None, 0.5, lengths, None, o, log_sum, True))


def test_what_no_kernel_takes_runs_without_one(caplog):
    q, k, v = make(1, 5, 5, 2, 2, 80, 3)
    o = attention(q, k, v, backend="fused")
    assert torch.equal(o, attention(q, k, v, backend="chunked"))
    assert "attention: no kernel takes more than 64 channels in torch.float32; the chunked form runs" in caplog.text
