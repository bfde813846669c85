"""attention by flash-attn, for which a module with its signatures stands in: they are those of its version 2.8."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from agreement import assert_close
from attention_cases import ASKED, LENGTHS, make, run, starts

from seqzoo.kernels import attention


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k >= cu_seqlens_k.diff().max()
    others = {} if cu_seqlens_q.equal(cu_seqlens_k) else {"query_cu_seqlens": cu_seqlens_q}
    window = None if window_size == (-1, -1) else window_size
    options = {"causal": causal, "scale": softmax_scale, "window": window, "cu_seqlens": cu_seqlens_k, **others}
    return attention(*(x[None].double() for x in (q, k, v)), **options, backend="reference")[0].to(q.dtype)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    window = None if window_size == (-1, -1) else window_size
    options = {"causal": causal, "scale": softmax_scale, "window": window}
    return attention(*(x.double() for x in (q, k, v)), **options, backend="reference").to(q.dtype)


@pytest.fixture
def _stand_in(monkeypatch):
    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(**functions))


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", ["nothing", "window", "scale", "documents", "others"])
def test_takes_what_attention_takes(given, causal):
    asked = ASKED if given == "others" else LENGTHS
    tensors = make(sum(asked), sum(LENGTHS), 4, 2, 16, 8, torch.bfloat16)
    options = {"causal": causal}
    if given in ("documents", "others"):
        options["cu_seqlens"] = starts(LENGTHS)
    if given == "others":
        options["query_cu_seqlens"] = starts(asked)
    if given == "window":
        options["window"] = (9, 4)
    if given == "scale":
        options["scale"] = torch.linspace(0.1, 1, sum(asked))
    expected = run(*(x.double() for x in tensors), **options, backend="reference")
    for actual, target in zip(run(*tensors, **options, backend="flash"), expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_close(actual, target, 1e-2)


@pytest.mark.usefixtures("_stand_in")
def test_across_sequences():
    q, k, v, w = make(12, 9, 4, 2, 16, 16, torch.float16)
    for options in ({}, {"query_lengths": torch.tensor([7])}):
        expected = run(*(x.double() for x in (q, k, v, w)), **options, backend="reference")
        dirty = q.index_fill(1, torch.arange(7, 12), torch.nan) if options else q
        for actual, target in zip(run(dirty, k, v, w, **options, backend="flash"), expected, strict=True):
            assert_close(actual, target, 2e-3)


@pytest.mark.usefixtures("_stand_in")
def test_refuses_what_it_does_not_know():
    q, k, v, _ = make(8, 8, 2, 2, 4, 4, torch.float16)
    with pytest.raises(ValueError, match="knows neither lengths nor a position; valid: cu_seqlens"):
        attention(q, k, v, lengths=torch.tensor([5]), backend="flash")
    with pytest.raises(ValueError, match=r"float16 and bfloat16, all three alike, got torch\.float16, torch\.float32"):
        attention(q, k.float(), v, backend="flash")


def test_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    q, k, v, _ = make(8, 8, 2, 2, 4, 4, torch.float16)
    with pytest.raises(ValueError, match=r'backend="flash" needs flash-attn .*pip install "seqzoo\[flash\]"'):
        attention(q, k, v, backend="flash")
