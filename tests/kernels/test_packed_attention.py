"""attention over documents in one row: each comes out as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from attention_cases import ASKED, LENGTHS, check, make, one_by_one, run, starts
from fused_cases import poisoned
from torch import Tensor

from seqzoo.kernels import attention
from seqzoo.kernels.attention.packed import attention_masked
from seqzoo.kernels.documents import Documents


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


@pytest.mark.parametrize(
    ("causal", "window", "scaling", "others"),
    [
        (False, None, None, False),
        (True, None, "per query", False),
        (False, None, 0.3, True),
        (True, None, None, True),
        (True, 9, None, False),
        (False, (20, 3), "per query", False),
    ],
)
def test_in_triton(causal, window, scaling, others):
    asked = ASKED if others else LENGTHS
    scale = torch.linspace(0.1, 1, sum(asked)) if scaling == "per query" else scaling
    options = {"causal": causal, "window": window, "scale": scale}
    with poisoned():
        check(make(sum(asked), sum(LENGTHS), 4, 2, 8, 5, torch.float32), asked, LENGTHS, 5e-6, "fused", **options)


@pytest.mark.parametrize(
    ("causal", "window", "others"),
    [
        (False, None, False),
        (True, None, False),
        (True, (8, 0), False),
        (False, (3, 20), False),
        (False, None, True),
        (True, None, True),
    ],
)
def test_masked_where_ends_are_not_looked_at(causal, window, others):
    asked = ASKED if others else LENGTHS
    q, k, v, w = make(sum(asked), sum(LENGTHS), 4, 2, 8, 16)
    expected = one_by_one(q, k, v, w, asked, LENGTHS, causal=causal, window=window, scale=1.0)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    ends = [Documents(starts(lengths), sum(lengths)) for lengths in (LENGTHS, asked)]
    o = attention_masked(q, k, v, causal, window, ends[0], ends[1] if others else None)
    for actual, target in zip((o, *torch.autograd.grad(o, (q, k, v), w)), expected, strict=True):
        assert_close(actual, target, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_in_a_graph_too(causal):
    """Where ends of documents cannot be looked at on a CPU."""
    tensors = make(sum(LENGTHS), sum(LENGTHS), 4, 2, 8, 16)
    expected = one_by_one(*tensors, LENGTHS, LENGTHS, causal=causal)[0]
    graph = torch.compile(attention, fullgraph=True, backend="eager")
    assert_close(graph(*tensors[:3], causal=causal, cu_seqlens=starts(LENGTHS)), expected, 1e-12)
