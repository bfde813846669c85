"""attention within a window: keys that are too far away count as if there were none."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from attention_cases import LENGTHS, check, make, run

from seqzoo.kernels import attention
from seqzoo.kernels.attention import blockwise

WINDOWS = [(1, False), (1, True), (9, False), (9, True), (200, True), ((3, 11), False), ((0, 4), False), ((7, 2), True)]


@pytest.mark.parametrize(("window", "causal"), WINDOWS)
def test_reference_sees_so_many_keys(window, causal):
    q, k, v, _ = make(20, 20, 1, 1, 4, 4)
    left, right = window if isinstance(window, tuple) else (window - 1, window - 1)
    right = 0 if causal else right
    y = attention(q, k, v, window=window, causal=causal, backend="reference")
    for i in range(20):
        there = slice(max(0, i - left), i + right + 1)
        weights = (k[0, there, 0] @ q[0, i, 0] / 2).softmax(0)
        torch.testing.assert_close(y[0, i, 0], weights @ v[0, there, 0])


@pytest.mark.parametrize(("window", "causal"), WINDOWS)
@pytest.mark.parametrize("given", ["nothing", "lengths", "position", "scale"])
def test_agrees_with_the_reference(given, window, causal, monkeypatch):
    monkeypatch.setattr(blockwise, "FEWEST", 4)
    generator = torch.Generator().manual_seed(0)
    T, S = (9, 70) if given == "position" else (70, 70)
    shapes = (3, T, 4, 8), (3, S, 2, 8), (3, S, 2, 16), (3, T, 4, 16)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    options = {"window": window, "causal": causal}
    if given != "nothing":
        options["lengths"] = torch.tensor([70, 0, 33])
    if given == "position":
        options["position"] = torch.tensor([61, 0, 30])
    if given == "scale":
        options["scale"] = torch.linspace(0.1, 1, 70, dtype=torch.float64)
    expected = run(*tensors, **options, backend="reference")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        cast = [x.to(dtype) for x in tensors]
        own = {name: x.to(dtype) if name == "scale" else x for name, x in options.items()}
        for name, actual, target in zip(("o", "dq", "dk", "dv"), run(*cast, **own), expected, strict=True):
            assert_close(actual, target, tolerance if name == "o" else 4 * tolerance, name)


@pytest.mark.parametrize(("window", "causal"), WINDOWS)
def test_of_documents(window, causal):
    T = sum(LENGTHS)
    check(make(T, T, 4, 2, 8, 16), LENGTHS, LENGTHS, 1e-12, "chunked", causal=causal, window=window)


def test_a_window_of_everything_is_none():
    tensors = make(30, 30, 2, 2, 8, 8)
    for causal in (False, True):
        everything = run(*tensors, causal=causal)
        for actual, expected in zip(run(*tensors, causal=causal, window=30), everything, strict=True):
            assert_close(actual, expected, 1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_has_no_effect(causal):
    q, k, v, w = (x.repeat(2, 1, 1, 1) for x in make(20, 20, 2, 2, 8, 8))
    lengths = torch.tensor([13, 20])
    clean = run(q, k, v, w, causal=causal, lengths=lengths, window=4)
    dirty = [x.index_fill(1, torch.arange(13, 20), math.nan) for x in (q, k, v, w)]
    dirty = [torch.stack([x[0], y[1]]) for x, y in zip(dirty, (q, k, v, w), strict=True)]
    for actual, expected in zip(run(*dirty, causal=causal, lengths=lengths, window=4), clean, strict=True):
        assert torch.equal(actual, expected)


def test_derivatives():
    q, k, v, _ = (x.requires_grad_() for x in make(9, 9, 2, 1, 3, 2))
    ends = torch.tensor([0, 3, 3, 9])
    for options in ({"window": 3, "causal": True}, {"cu_seqlens": ends}, {"cu_seqlens": ends, "window": (1, 2)}):

        def f(q, k, v, options=options):
            return attention(q, k, v, **options)

        assert torch.autograd.gradcheck(f, (q, k, v), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (q, k, v))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 5, "causal": True},
        {"cu_seqlens": [0, 5, 5, 24], "window": 3},
        {"cu_seqlens": [0, 5, 5, 24], "query_cu_seqlens": [0, 3, 8, 24], "causal": True},
        {"cu_seqlens": [0, 5, 5, 24], "query_cu_seqlens": [0, 3, 8, 24]},
        {"cu_seqlens": [0, 5, 5, 24], "causal": True},
    ],
)
def test_compiles_whole(options):
    q, k, v, w = make(24, 24, 2, 1, 4, 4)
    options = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in options.items()}
    expected = run(q, k, v, w, **options, backend="reference")
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    y = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v, **options)
    for actual, target in zip((y, *torch.autograd.grad(y, (q, k, v), w)), expected, strict=True):
        assert_close(actual, target, 1e-13)


def test_operator():
    q, k, v, w = make(24, 24, 2, 1, 4, 6)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, 5, 5, 24])
    for arguments in ((torch.tensor([20]), None, None, None, 3, 0), (None, None, ends, ends, -1, 0)):
        torch.library.opcheck(torch.ops.seqzoo.attention_blockwise.default, (*leaves, *arguments))
        torch.library.opcheck(torch.ops.seqzoo.attention_blockwise_backward.default, (w, q, k, v, *arguments))


def test_errors_say_what_is_valid():
    q, k, v, _ = make(6, 8, 2, 1, 4, 4)
    for window in (0, -1, True, 2.0, (1,), (1, -1), [1, 2]):
        with pytest.raises(ValueError, match=r"window=.*; valid: an integer of 1 or more, or how many keys"):
            attention(k, k, v, window=window)
    with pytest.raises(ValueError, match="a window is over the queries' own sequence"):
        attention(q, k, v, window=3)
