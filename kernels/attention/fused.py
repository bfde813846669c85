"""Softmax attention in Triton, without a matrix of weights in memory.

A program has a block of queries of one head and goes through the keys block by block with a running maximum (Milakov
and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, "FlashAttention-2"). Backward makes weights
again from the logarithm of their sum: one kernel for q, by blocks of queries, one for k and v, by blocks of keys, which
goes through all query heads that share them. Nothing is added to from two programs: the same bits in every run.

Blocks of keys that every query of the block sees are taken without a mask. Exponentials are powers of two.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous, pad_channels
from ..derivatives import differentiable, pullback
from ..launching import launch
from ..tiles import absorb, dot, head_rows, load_tile, valid_steps
from .chunked import attention_chunked

LOG2_E = tl.constexpr(math.log2(math.e))
PRECISIONS = {torch.float32: "tf32x3", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Config(NamedTuple):
    """Of `forward`, of `query`, the gradient of q, and of `key`, those of k and v."""

    queries: int  # in a block
    keys: int
    num_warps: int
    num_stages: int


BLOCKS = Blocks("attention", Path(__file__).with_name("blocks.csv"), Config)


@triton.jit
def _sequence(lengths, position, b, S):
    """How many keys of a sequence are valid, and where its first query stands."""
    n, before = S, 0
    if lengths is not None:
        n = valid_steps(lengths, b, S)
    if position is not None:
        before = tl.minimum(tl.load(position + b), S).to(tl.int32)
    return n, before


@triton.jit
def _scale(scales, scale, b, T, query, live):
    """Of the queries' scores, by row."""
    if scales is None:
        return tl.zeros(query.shape, tl.float32) + scale
    else:
        return tl.load(scales + b * T + query, mask=live, other=0.0)


@triton.jit
def _absorb(
    q_t, sums, m, total, k, v, scale, here, b, g, first, last, n, S, G, D, Dv, channel, value_channel,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys from `first` to `last` change of the weighted sum of values, the maximum and the sum of weights."""
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        k_t = load_tile(head_rows(k, b, start, S, g, G, D), tl.arange(0, KEYS), G * D, channel, D, key < n)
        v_t = load_tile(head_rows(v, b, start, S, g, G, Dv), tl.arange(0, KEYS), G * Dv, value_channel, Dv, key < n)
        scores = dot(q_t, tl.trans(k_t), PRECISION) * scale[:, None]
        if MASKED:
            seen = (key < n)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= here[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        sums, m, total = absorb(scores, v_t, sums, m, total, PRECISION)
    return sums, m, total


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(
    q,  # [B, T, H, D]
    k,  # [B, S, G, D]
    v,  # [B, S, G, Dv]
    scales,  # [B, T], float32, or None: the same for all
    scale,
    o,  # [B, T, H, Dv]
    log_sum,  # [B, T, H], float32: log2 of the sum of weights, inf where there is none
    lengths,  # [B] or None
    position,  # [B] or None
    T,
    S,
    H,
    G,
    D,
    Dv,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(T, QUERIES)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest first
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), head % H
    g = h // (H // G)
    n, before = _sequence(lengths, position, b, S)
    query = block * QUERIES + tl.arange(0, QUERIES)
    here = before + query
    live = (query < T) & (here < n)
    channel, value_channel = tl.arange(0, DK), tl.arange(0, DV)
    index = tl.arange(0, QUERIES)
    q_t = load_tile(head_rows(q, b, block * QUERIES, T, h, H, D), index, H * D, channel, D, live)
    factor = _scale(scales, scale, b, T, query, live) * LOG2_E

    first = before + block * QUERIES  # where the first query of the block stands
    end, free = n, n
    if CAUSAL:
        end, free = tl.minimum(n, first + QUERIES), tl.minimum(n, first + 1)
    if first >= n:
        end, free = 0, 0
    free = free // KEYS * KEYS
    sums = tl.zeros([QUERIES, DV], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums, m, total = _absorb(
        q_t, sums, m, total, k, v, factor, here, b, g, 0, free, n, S, G, D, Dv, channel, value_channel,
        False, CAUSAL, KEYS, STAGES, PRECISION,
    )  # fmt: skip
    sums, m, total = _absorb(
        q_t, sums, m, total, k, v, factor, here, b, g, free, end, n, S, G, D, Dv, channel, value_channel,
        True, CAUSAL, KEYS, STAGES, PRECISION,
    )  # fmt: skip
    any_seen = live & (total > 0)
    out = tl.where(any_seen[:, None], sums / tl.where(any_seen, total, 1.0)[:, None], 0.0)
    inside = query < T
    tl.store(
        head_rows(o, b, block * QUERIES, T, h, H, Dv) + index[:, None] * (H * Dv) + value_channel[None, :],
        out.to(o.dtype.element_ty),
        mask=inside[:, None] & (value_channel < Dv)[None, :],
    )
    log = tl.where(any_seen, m + tl.log2(tl.where(any_seen, total, 1.0)), float("inf"))
    tl.store(head_rows(log_sum, b, block * QUERIES, T, h, H, 1) + index * H, log, mask=inside)


@triton.jit
def _query_gradient(
    dq, q_t, do_t, log, delta, k, v, scale, here, b, g, first, last, n, S, G, D, Dv, channel, value_channel,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        k_t = load_tile(head_rows(k, b, start, S, g, G, D), tl.arange(0, KEYS), G * D, channel, D, key < n)
        v_t = load_tile(head_rows(v, b, start, S, g, G, Dv), tl.arange(0, KEYS), G * Dv, value_channel, Dv, key < n)
        weights = tl.exp2(dot(q_t, tl.trans(k_t), PRECISION) * (scale * LOG2_E)[:, None] - log[:, None])
        if MASKED:
            seen = (key < n)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= here[:, None])
            weights = tl.where(seen, weights, 0.0)
        d_scores = weights * (dot(do_t, tl.trans(v_t), PRECISION) - delta[:, None])
        dq += dot(d_scores, k_t, PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "S"])
def _query_kernel(
    q,
    k,
    v,
    scales,
    scale,
    do,  # [B, T, H, Dv]
    log_sum,
    delta,  # [B, T, H], float32: o·do
    dq,
    lengths,
    position,
    T,
    S,
    H,
    G,
    D,
    Dv,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of q, a block of queries a program."""
    blocks = tl.cdiv(T, QUERIES)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), head % H
    g = h // (H // G)
    n, before = _sequence(lengths, position, b, S)
    query = block * QUERIES + tl.arange(0, QUERIES)
    here = before + query
    live = (query < T) & (here < n)
    channel, value_channel = tl.arange(0, DK), tl.arange(0, DV)
    index = tl.arange(0, QUERIES)
    q_t = load_tile(head_rows(q, b, block * QUERIES, T, h, H, D), index, H * D, channel, D, live)
    do_t = load_tile(head_rows(do, b, block * QUERIES, T, h, H, Dv), index, H * Dv, value_channel, Dv, live)
    log = tl.load(head_rows(log_sum, b, block * QUERIES, T, h, H, 1) + index * H, mask=live, other=float("inf"))
    delta_t = tl.load(head_rows(delta, b, block * QUERIES, T, h, H, 1) + index * H, mask=live, other=0.0)
    factor = _scale(scales, scale, b, T, query, live)

    first = before + block * QUERIES
    end, free = n, n
    if CAUSAL:
        end, free = tl.minimum(n, first + QUERIES), tl.minimum(n, first + 1)
    if first >= n:
        end, free = 0, 0
    free = free // KEYS * KEYS
    sums = tl.zeros([QUERIES, DK], tl.float32)
    sums = _query_gradient(
        sums, q_t, do_t, log, delta_t, k, v, factor, here, b, g, 0, free, n, S, G, D, Dv, channel, value_channel,
        False, CAUSAL, KEYS, STAGES, PRECISION,
    )  # fmt: skip
    sums = _query_gradient(
        sums, q_t, do_t, log, delta_t, k, v, factor, here, b, g, free, end, n, S, G, D, Dv, channel, value_channel,
        True, CAUSAL, KEYS, STAGES, PRECISION,
    )  # fmt: skip
    sums *= factor[:, None]
    tl.store(
        head_rows(dq, b, block * QUERIES, T, h, H, D) + index[:, None] * (H * D) + channel[None, :],
        sums.to(dq.dtype.element_ty),
        mask=(query < T)[:, None] & (channel < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "S"])
def _key_kernel(
    q,
    k,
    v,
    scales,
    scale,
    do,
    log_sum,
    delta,
    dk,
    dv,
    lengths,
    position,
    T,
    S,
    H,
    G,
    D,
    Dv,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of k and v, a block of keys a program. Scores are made with keys as rows: nothing is transposed."""
    blocks = tl.cdiv(S, KEYS)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b, g = (head // G).to(tl.int64), head % G
    n, before = _sequence(lengths, position, b, S)
    key = block * KEYS + tl.arange(0, KEYS)
    channel, value_channel = tl.arange(0, DK), tl.arange(0, DV)
    row, index = tl.arange(0, KEYS), tl.arange(0, QUERIES)
    k_t = load_tile(head_rows(k, b, block * KEYS, S, g, G, D), row, G * D, channel, D, key < n)
    v_t = load_tile(head_rows(v, b, block * KEYS, S, g, G, Dv), row, G * Dv, value_channel, Dv, key < n)
    dk_t, dv_t = tl.zeros([KEYS, DK], tl.float32), tl.zeros([KEYS, DV], tl.float32)

    start, stop = 0, tl.maximum(tl.minimum(T, n - before), 0)
    if CAUSAL:
        start = tl.maximum(block * KEYS - before, 0) // QUERIES * QUERIES
    if block * KEYS >= n:
        stop = 0
    for h in range(g * (H // G), (g + 1) * (H // G)):
        for first in tl.range(start, stop, QUERIES, num_stages=STAGES):
            query = first + index
            live = query < stop
            q_t = load_tile(head_rows(q, b, first, T, h, H, D), index, H * D, channel, D, live)
            do_t = load_tile(head_rows(do, b, first, T, h, H, Dv), index, H * Dv, value_channel, Dv, live)
            log = tl.load(head_rows(log_sum, b, first, T, h, H, 1) + index * H, mask=live, other=float("inf"))
            delta_t = tl.load(head_rows(delta, b, first, T, h, H, 1) + index * H, mask=live, other=0.0)
            factor = _scale(scales, scale, b, T, query, live)
            weights = tl.exp2(dot(k_t, tl.trans(q_t), PRECISION) * (factor * LOG2_E)[None, :] - log[None, :])
            seen = (key < n)[:, None]
            if CAUSAL:
                seen = seen & (key[:, None] <= before + query[None, :])
            weights = tl.where(seen, weights, 0.0)
            dv_t += dot(weights, do_t, PRECISION)
            d_scores = weights * (dot(v_t, tl.trans(do_t), PRECISION) - delta_t[None, :]) * factor[None, :]
            dk_t += dot(d_scores, q_t, PRECISION)

    inside = (key < S)[:, None]
    tl.store(
        head_rows(dk, b, block * KEYS, S, g, G, D) + row[:, None] * (G * D) + channel[None, :],
        dk_t.to(dk.dtype.element_ty),
        mask=inside & (channel < D)[None, :],
    )
    tl.store(
        head_rows(dv, b, block * KEYS, S, g, G, Dv) + row[:, None] * (G * Dv) + value_channel[None, :],
        dv_t.to(dv.dtype.element_ty),
        mask=inside & (value_channel < Dv)[None, :],
    )


def attention_fused(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, Dv]
    *,
    causal: bool,
    lengths: Tensor | None,
    scale: float | Tensor,
    position: Tensor | None,
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    scales = scale.reshape(q.shape[:2]).float() if isinstance(scale, Tensor) else None
    number = 1.0 if isinstance(scale, Tensor) else float(scale)
    aligned = (pad_channels(x.to(dtype)) for x in (q, k, v))
    o, _ = _attention(*aligned, scales, number, lengths, position, causal)
    return o[..., : v.shape[-1]].to(v.dtype)


@torch.library.custom_op("seqzoo::attention_fused", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    position: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """o, and the logarithm of the sums of weights [B, T, H], to base 2."""
    (B, T, H, _), Dv = q.shape, v.shape[-1]
    o = q.new_empty(B, T, H, Dv)
    log_sum = q.new_empty(B, T, H, dtype=torch.float32)
    q, k, v, scales, lengths, position = contiguous(q, k, v, scales, lengths, position)
    config = _config("forward", q, v)
    launch(
        _forward_kernel,
        B * H * triton.cdiv(T, config.queries),
        *(q, k, v, scales, scale, o, log_sum, lengths, position, *_sizes(q, k, v)),
        **_meta(q, v, config, causal),
    )
    return o, log_sum


@torch.library.custom_op("seqzoo::attention_fused_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    position: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    delta = (do.float() * o).sum(-1)
    q, k, v, scales, lengths, position, do = contiguous(q, k, v, scales, lengths, position, do)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    arguments, ends = (q, k, v, scales, scale, do, log_sum, delta), (lengths, position, *_sizes(q, k, v))
    config = _config("query", q, v)
    programs = B * H * triton.cdiv(T, config.queries)
    launch(_query_kernel, programs, *arguments, dq, *ends, **_meta(q, v, config, causal))
    config = _config("key", q, v)
    programs = B * G * triton.cdiv(S, config.keys)
    launch(_key_kernel, programs, *arguments, dk, dv, *ends, **_meta(q, v, config, causal))
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, scales, scale, lengths, position, causal):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, T, H, dtype=torch.float32)


@_attention_backward.register_fake
def _(do, q, k, v, scales, scale, lengths, position, o, log_sum, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scales, ctx.scale, lengths, position, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, scales, lengths, position, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, scales, lengths, position, o, log_sum = ctx.saved_tensors
    gradients = _written(do, q, k, v, scales, ctx.scale, lengths, position, o, log_sum, ctx.causal)
    return *gradients, *(None,) * 5


def _plain(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    position: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    causal: bool,
) -> tuple[Tensor | None, ...]:
    """As `_attention_backward`, for PyTorch to differentiate."""
    by_query = scale if scales is None else scales[..., None, None]

    def form(*qkv: Tensor) -> tuple[Tensor]:
        return (attention_chunked(*qkv, causal=causal, lengths=lengths, scale=by_query, position=position),)

    return pullback(form, (q, k, v), (do,))


_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_attention_backward, _plain)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    (_, T, H, D), (S, G, Dv) = q.shape, v.shape[1:]
    return T, S, H, G, D, Dv


def _channels(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _config(kernel: str, q: Tensor, v: Tensor) -> Config:
    return BLOCKS.of(kernel, q.device, q.dtype, max(_channels(q), _channels(v)))


def _meta(q: Tensor, v: Tensor, config: Config, causal: bool) -> dict[str, Any]:
    return {
        "CAUSAL": causal,
        "PRECISION": PRECISIONS[q.dtype],
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "DK": _channels(q),
        "DV": _channels(v),
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
