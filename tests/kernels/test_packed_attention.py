"""attention over documents in one row: each comes out as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from torch import Tensor

from seqzoo.kernels import attention

LENGTHS = [5, 0, 1, 37, 64, 90]
ASKED = [9, 3, 0, 64, 5, 37]  # queries of each document, where there are others


def starts(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def make(T: int, S: int, H: int, G: int, D: int, Dv: int, dtype=torch.float64, seed=0) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, T, H, D), (1, S, G, D), (1, S, G, Dv), (1, T, H, Dv)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(q, k, v, w, **options) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v, **options)
    return [o, *torch.autograd.grad(o, (q, k, v), w)]


def one_by_one(q, k, v, w, asked: list[int], lengths: list[int], *, causal: bool, scale=None, **options):
    """What the definition makes of each document alone."""
    outputs = [torch.zeros_like(x) for x in (w, q, k, v)]
    for n, keys in enumerate(lengths):
        rows = slice(sum(asked[:n]), sum(asked[: n + 1]))
        there = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
        if keys == 0 or asked[n] == 0:
            continue
        given = {"scale": scale[rows] if isinstance(scale, Tensor) else scale, "causal": causal, **options}
        if causal and asked is not lengths:
            given["position"] = torch.tensor([keys - asked[n]])
        values = run(q[:, rows], k[:, there], v[:, there], w[:, rows], **given, backend="reference")
        for output, value, place in zip(outputs, values, (rows, rows, there, there), strict=True):
            output[:, place] = value
    return outputs


def check(tensors, asked, lengths, tolerance, backend, dtype=torch.int64, **options) -> None:
    scale = options.get("scale")
    wide = {**options, "scale": scale.double() if isinstance(scale, Tensor) else scale}
    expected = one_by_one(*(x.double() for x in tensors), asked, lengths, **wide)
    given = {"cu_seqlens": starts(lengths, dtype)}
    if asked is not lengths:
        given["query_cu_seqlens"] = starts(asked, dtype)
    for name, actual, target in zip(
        ("o", "dq", "dk", "dv"), run(*tensors, **given, **options, backend=backend), expected, strict=True
    ):
        assert_close(actual, target, tolerance, name)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3, "per query"])
def test_documents_are_as_if_alone(scaling, causal, backend):
    T = sum(LENGTHS)
    scale = torch.linspace(0.1, 1, T, dtype=torch.float64) if scaling == "per query" else scaling
    check(make(T, T, 4, 2, 8, 16), LENGTHS, LENGTHS, 1e-12, backend, causal=causal, scale=scale)
    single = scale.float() if isinstance(scale, Tensor) else scale
    tensors = make(T, T, 2, 2, 16, 8, torch.float32)
    check(tensors, LENGTHS, LENGTHS, 2e-6, backend, torch.int32, causal=causal, scale=single)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_may_be_others(causal, backend):
    tensors = make(sum(ASKED), sum(LENGTHS), 4, 2, 8, 16)
    check(tensors, ASKED, LENGTHS, 1e-12, backend, causal=causal)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_leaks_from_another_document(causal, backend):
    T = sum(LENGTHS)
    tensors = make(T, T, 2, 1, 8, 8)
    document = slice(sum(LENGTHS[:3]), sum(LENGTHS[:4]))
    dirty = [x.clone() for x in tensors]
    for x in dirty[:3]:
        x[:, document] = math.nan
    options = {"causal": causal, "cu_seqlens": starts(LENGTHS), "backend": backend}
    for actual, expected in zip(run(*dirty, **options), run(*tensors, **options), strict=True):
        actual[:, document] = expected[:, document]
        assert torch.equal(actual, expected)


def test_errors_say_what_is_valid():
    q, k, v, _ = make(6, 8, 2, 1, 4, 4)
    ends = torch.tensor([0, 3, 8])
    with pytest.raises(ValueError, match="6 queries against 8 keys in documents need query_cu_seqlens"):
        attention(q, k, v, cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"attention \(query_cu_seqlens\): cu_seqlens must begin with 0.* T = 6"):
        attention(q, k, v, cu_seqlens=ends, query_cu_seqlens=ends)
    with pytest.raises(ValueError, match="must be of the same documents, got 2 and 1"):
        attention(q, k, v, cu_seqlens=ends, query_cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="query_cu_seqlens are beside cu_seqlens"):
        attention(q, k, v, query_cu_seqlens=ends)
    with pytest.raises(ValueError, match="cu_seqlens and a position or query_lengths; valid: query_cu_seqlens"):
        attention(k, k, v, cu_seqlens=ends, position=torch.tensor([0]))
    with pytest.raises(ValueError, match="got cu_seqlens and lengths"):
        attention(k, k, v, cu_seqlens=ends, lengths=torch.tensor([8]))
