"""VQ attention in Triton: codes and window in one pass with a running maximum, without a matrix of weights in memory.

A key outside the window of a block of queries counts through its code, so that these queries see S columns, each the
mean of some values with the logarithm of their number as a bias, and then the keys of their window one by one:

    sums       the values of each block, and their number, added up by code: a product with a matrix of zeros and ones
    outside    of each block, the sum of those two or more before it and, if not causal, behind it; divided: means
    forward    a tile of queries: codes, then window

Backward takes weights from the logarithm of their sum. The gradient of q is made by tiles of queries, those of v and k
in the window by tiles of keys, that of the means by codes; `outside` hands the last one on to each value, the other way
round. Products are made some channels at a time and outputs are cut into channels too, so that heads and values may
have any width. Nothing is added to from two programs: the same bits in every run. Exponentials are powers of two.

Source: Lingle, "Transformer-VQ" (ICLR 2024), section 3; Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous, pad_channels, zero_padding
from ..derivatives import Outline, differentiable, pullback
from ..launching import launch
from ..tiles import absorb, dot, head_rows, load_tile, valid_steps
from .chunked import plain_attention
from .outside import sums_outside
from .state import VQState

LOG2_E = tl.constexpr(math.log2(math.e))
PRECISIONS = {torch.float32: "tf32x3", torch.float16: "fp16", torch.bfloat16: "bf16"}
ADDED = 1024  # numbers that one program adds up over blocks


class Config(NamedTuple):
    """Of `forward`, of `query`, the gradient of q, of `key`, that of k, of `value`, those of v and of the means, and of
    `sums`."""

    queries: int  # in a tile
    keys: int  # or codes
    channels: int  # of a product at a time
    out: int  # channels of its output that a program has
    num_warps: int
    num_stages: int


BLOCKS = Blocks("vq_attention", Path(__file__).with_name("blocks.csv"), Config)


@triton.jit
def _product(
    x, x_row, x_stride, x_read, y, y_row, y_stride, y_read, width,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x yᵀ: [rows of x, rows of y]."""
    sums = tl.zeros([x_row.shape[0], y_row.shape[0]], tl.float32)
    for low in tl.range(0, width, CHANNELS, num_stages=STAGES):
        channel = low + tl.arange(0, CHANNELS)
        x_t = load_tile(x, x_row, x_stride, channel, width, x_read)
        y_t = load_tile(y, y_row, y_stride, channel, width, y_read)
        sums += dot(x_t, tl.trans(y_t), PRECISION)
    return sums


@triton.jit
def _program(chunks, tiles, blocks, H):
    """Which channels, tile of a block, block, sequence and head a program has, and where its block lies in [B·H, N]."""
    index = tl.program_id(0)
    chunk, tile, block = index % chunks, index // chunks % tiles, index // (chunks * tiles) % blocks
    head = index // (chunks * tiles * blocks)
    b, cell = (head // H).to(tl.int64), head.to(tl.int64) * blocks + block
    return chunk, tile, block, b, head % H, cell


@triton.jit
def _bounds(first, last, b, T):
    """The first valid position of a sequence, and the one behind its last."""
    begin, end = 0, T
    if first is not None:
        begin = valid_steps(first, b, T)
    if last is not None:
        end = valid_steps(last, b, T)
    return begin, end


@triton.jit
def _positions(block, tile, L, T, begin, end, SIZE: tl.constexpr):
    """Of a tile of a block: where it starts, its positions, which of them are the tile's, and which of these valid."""
    index = tile * SIZE + tl.arange(0, SIZE)
    position = block * L + index
    inside = (index < L) & (position < T)
    return block * L + tile * SIZE, position, inside, inside & (position >= begin) & (position < end)


@triton.jit
def _entry(row, query, key, seen, stride, offsets, CAUSAL: tl.constexpr):
    """Where the bias of a pair lies, and whether it has one. `row` counts from the first query of the tile."""
    reach = offsets - 1 if CAUSAL else offsets // 2
    entry = key - query + reach
    return row * stride + entry, seen & (entry >= 0) & (entry < offsets)


@triton.jit
def _of_pairs(scores, bias, bias_stride, b, h, start, row, query, live, key, known, T, offsets, CAUSAL: tl.constexpr):
    """The scores with their biases, and which pairs there are. Queries, from `start` on, and keys have an axis each."""
    seen = live & known
    if CAUSAL:
        seen = seen & (key <= query)
    if bias is not None:
        at, has = _entry(row, query, key, seen, bias_stride, offsets, CAUSAL)
        bias += h * offsets + (b * T + start) * bias_stride  # those of a head, where all queries have the same
        scores += tl.load(bias + at, mask=has, other=0.0).to(tl.float32)
    return scores, seen


@triton.jit
def _window_scores(
    q, keys, bias, bias_stride, b, h, start, row, query, live, low, column, key, known, T, H, D, offsets,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits, to base 2, of the queries at `start` and the keys at `low` in their window, and which pairs there are."""
    keys_t = head_rows(keys, b, low, T, h, H, D)
    scores = _product(q, row, H * D, live, keys_t, column, H * D, known, D, PRECISION, CHANNELS, STAGES)
    scores, seen = _of_pairs(
        scores, bias, bias_stride, b, h, start, row[:, None], query[:, None], live[:, None], key[None, :],
        known[None, :], T, offsets, CAUSAL,
    )  # fmt: skip
    return tl.where(seen, scores * LOG2_E, float("-inf")), seen


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q,  # [B, T, H, D]
    keys,  # [B, T, H, D], the code of each
    v,  # [B, T, H, Dv]
    codebook,  # [H, S, D]
    means,  # [B·H, N, S, Dv], of values outside the window
    log_counts,  # [B·H, N, S], float32: log2 of their number
    bias,  # [B, T, H, offsets], or [H, offsets] and a stride of 0, or None
    bias_stride,  # from query to query
    log_sum,  # [B, T, H], float32: log2 of the sum of weights, inf where there is none
    first,  # [B] or None
    last,  # [B] or None
    o,  # [B, T, H, Dv]
    T,
    H,
    S,
    D,
    Dv,
    L,
    offsets,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunk, tile, block, b, h, cell = _program(tl.cdiv(Dv, OUT), tl.cdiv(L, QUERIES), tl.cdiv(T, L), H)
    begin, end = _bounds(first, last, b, T)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    value_channel = chunk * OUT + tl.arange(0, OUT)
    start, query, inside, live = _positions(block, tile, L, T, begin, end, QUERIES)
    q = head_rows(q, b, start, T, h, H, D)
    codebook += h * S * D
    means += cell * S * Dv
    sums = tl.zeros([QUERIES, OUT], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)

    for low in range(0, tl.where(start < end, S, 0), KEYS):
        code = low + column
        known = code < S
        scores = _product(q, row, H * D, live, codebook, code, D, known, D, PRECISION, CHANNELS, STAGES)
        scores = scores * LOG2_E + tl.load(log_counts + cell * S + code, mask=known, other=float("-inf"))[None, :]
        v_t = load_tile(means, code, Dv, value_channel, Dv, known)
        sums, m, total = absorb(scores, v_t, sums, m, total, PRECISION)

    low_key, high_key = tl.maximum(begin, (block - 1) * L), tl.minimum(end, (block + 2) * L)
    if CAUSAL:
        high_key = tl.minimum(high_key, tl.minimum((block + 1) * L, start + QUERIES))
    for low in range(low_key, high_key, KEYS):
        key = low + column
        known = key < high_key
        scores, _ = _window_scores(
            q, keys, bias, bias_stride, b, h, start, row, query, live, low, column, key, known, T, H, D, offsets,
            CAUSAL, PRECISION, CHANNELS, STAGES,
        )  # fmt: skip
        values_t = head_rows(v, b, low, T, h, H, Dv)
        v_t = load_tile(values_t, column, H * Dv, value_channel, Dv, known)
        sums, m, total = absorb(scores, v_t, sums, m, total, PRECISION)

    any_seen = live & (total > 0)
    out = tl.where(any_seen[:, None], sums / tl.where(any_seen, total, 1.0)[:, None], 0.0)
    out_at = row[:, None] * (H * Dv) + value_channel[None, :]
    tl.store(
        head_rows(o, b, start, T, h, H, Dv) + out_at,
        out.to(o.dtype.element_ty),
        mask=inside[:, None] & (value_channel < Dv)[None, :],
    )
    if chunk == 0:
        log = tl.where(any_seen, m + tl.log2(tl.where(any_seen, total, 1.0)), float("inf"))
        tl.store(head_rows(log_sum, b, start, T, h, H, 1) + row * H, log, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _query_kernel(
    q,
    keys,
    v,
    codebook,
    means,
    log_counts,
    bias,
    bias_stride,
    log_sum,
    first,
    last,
    do,  # [B, T, H, Dv]
    delta,  # [B, T, H], float32: o·do
    dq,
    d_bias,  # [B, T, H, offsets], zeros, or None
    T,
    H,
    S,
    D,
    Dv,
    L,
    offsets,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of q and of the bias."""
    chunk, tile, block, b, h, cell = _program(tl.cdiv(D, OUT), tl.cdiv(L, QUERIES), tl.cdiv(T, L), H)
    begin, end = _bounds(first, last, b, T)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    channel = chunk * OUT + tl.arange(0, OUT)
    start, query, inside, live = _positions(block, tile, L, T, begin, end, QUERIES)
    q = head_rows(q, b, start, T, h, H, D)
    do = head_rows(do, b, start, T, h, H, Dv)
    codebook += h * S * D
    means += cell * S * Dv
    log = tl.load(head_rows(log_sum, b, start, T, h, H, 1) + row * H, mask=live, other=float("inf"))
    delta_t = tl.load(head_rows(delta, b, start, T, h, H, 1) + row * H, mask=live, other=0.0)
    sums = tl.zeros([QUERIES, OUT], tl.float32)

    for low in range(0, tl.where(start < end, S, 0), KEYS):
        code = low + column
        known = code < S
        scores = _product(q, row, H * D, live, codebook, code, D, known, D, PRECISION, CHANNELS, STAGES)
        log_count = tl.load(log_counts + cell * S + code, mask=known, other=float("-inf"))
        weights = tl.exp2(scores * LOG2_E + log_count[None, :] - log[:, None])
        d_weights = _product(do, row, H * Dv, live, means, code, Dv, known, Dv, PRECISION, CHANNELS, STAGES)
        d_scores = weights * (d_weights - delta_t[:, None])
        sums += dot(d_scores, load_tile(codebook, code, D, channel, D, known), PRECISION)

    low_key, high_key = tl.maximum(begin, (block - 1) * L), tl.minimum(end, (block + 2) * L)
    if CAUSAL:
        high_key = tl.minimum(high_key, tl.minimum((block + 1) * L, start + QUERIES))
    for low in range(low_key, high_key, KEYS):
        key = low + column
        known = key < high_key
        scores, seen = _window_scores(
            q, keys, bias, bias_stride, b, h, start, row, query, live, low, column, key, known, T, H, D, offsets,
            CAUSAL, PRECISION, CHANNELS, STAGES,
        )  # fmt: skip
        values_t = head_rows(v, b, low, T, h, H, Dv)
        weights = tl.exp2(scores - log[:, None])
        d_weights = _product(do, row, H * Dv, live, values_t, column, H * Dv, known, Dv, PRECISION, CHANNELS, STAGES)
        d_scores = weights * (d_weights - delta_t[:, None])
        if d_bias is not None:
            at, has = _entry(row[:, None], query[:, None], key[None, :], seen, H * offsets, offsets, CAUSAL)
            tl.store(head_rows(d_bias, b, start, T, h, H, offsets) + at, d_scores, mask=has & (chunk == 0))
        keys_t = load_tile(head_rows(keys, b, low, T, h, H, D), column, H * D, channel, D, known)
        sums += dot(d_scores, keys_t, PRECISION)

    tl.store(
        head_rows(dq, b, start, T, h, H, D) + row[:, None] * (H * D) + channel[None, :],
        sums.to(dq.dtype.element_ty),
        mask=inside[:, None] & (channel < D)[None, :],
    )


@triton.jit
def _weights_of_keys(
    q, keys, log_sum, bias, bias_stride, b, h, low, row, query, live, column, key, known, T, H, D, offsets,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What some queries, from position `low` on, give to keys in their window: [keys, queries]."""
    q_t = head_rows(q, b, low, T, h, H, D)
    scores = _product(keys, column, H * D, known, q_t, row, H * D, live, D, PRECISION, CHANNELS, STAGES)
    scores, seen = _of_pairs(
        scores, bias, bias_stride, b, h, low, row[None, :], query[None, :], live[None, :], key[:, None],
        known[:, None], T, offsets, CAUSAL,
    )  # fmt: skip
    log = tl.load(head_rows(log_sum, b, low, T, h, H, 1) + row * H, mask=live, other=float("inf"))
    return tl.where(seen, tl.exp2(scores * LOG2_E - log[None, :]), 0.0)


@triton.jit(do_not_specialize=["T"])
def _key_kernel(
    q,
    keys,
    v,
    bias,
    bias_stride,
    log_sum,
    first,
    last,
    do,
    delta,
    dk,
    T,
    H,
    D,
    Dv,
    L,
    offsets,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of k, from the window. Scores are made with keys as rows: nothing computed is transposed."""
    chunk, tile, block, b, h, _ = _program(tl.cdiv(D, OUT), tl.cdiv(L, KEYS), tl.cdiv(T, L), H)
    begin, end = _bounds(first, last, b, T)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    channel = chunk * OUT + tl.arange(0, OUT)
    start, key, inside, known = _positions(block, tile, L, T, begin, end, KEYS)
    keys = head_rows(keys, b, start, T, h, H, D)
    v = head_rows(v, b, start, T, h, H, Dv)
    sums = tl.zeros([KEYS, OUT], tl.float32)

    low_query = start if CAUSAL else (block - 1) * L
    low_query, high_query = tl.maximum(low_query, begin), tl.minimum(end, (block + 2) * L)
    for low in range(low_query, high_query, QUERIES):
        query = low + row
        live = query < high_query
        weights = _weights_of_keys(
            q, keys, log_sum, bias, bias_stride, b, h, low, row, query, live, column, key, known, T, H, D, offsets,
            CAUSAL, PRECISION, CHANNELS, STAGES,
        )  # fmt: skip
        do_t = head_rows(do, b, low, T, h, H, Dv)
        d_weights = _product(v, column, H * Dv, known, do_t, row, H * Dv, live, Dv, PRECISION, CHANNELS, STAGES)
        delta_t = tl.load(head_rows(delta, b, low, T, h, H, 1) + row * H, mask=live, other=0.0)
        q_t = load_tile(head_rows(q, b, low, T, h, H, D), row, H * D, channel, D, live)
        sums += dot(weights * (d_weights - delta_t[None, :]), q_t, PRECISION)
    tl.store(
        head_rows(dk, b, start, T, h, H, D) + column[:, None] * (H * D) + channel[None, :],
        sums.to(dk.dtype.element_ty),
        mask=inside[:, None] & (channel < D)[None, :],
    )


@triton.jit(do_not_specialize=["T"])
def _value_kernel(
    q,
    keys,
    codes,  # [B, T, H], int64
    outside,  # [B·H, N, S, Dv], float32: what queries outside the window give to the values of each code
    bias,
    bias_stride,
    log_sum,
    first,
    last,
    do,
    dv,
    T,
    H,
    S,
    D,
    Dv,
    L,
    offsets,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of v."""
    chunk, tile, block, b, h, cell = _program(tl.cdiv(Dv, OUT), tl.cdiv(L, KEYS), tl.cdiv(T, L), H)
    begin, end = _bounds(first, last, b, T)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    channel = chunk * OUT + tl.arange(0, OUT)
    in_channels = (channel < Dv)[None, :]
    start, key, inside, known = _positions(block, tile, L, T, begin, end, KEYS)
    keys = head_rows(keys, b, start, T, h, H, D)
    code = tl.load(head_rows(codes, b, start, T, h, H, 1) + column * H, mask=known, other=0).to(tl.int32)
    of_code = outside + cell * S * Dv + code[:, None] * Dv + channel[None, :]
    sums = tl.load(of_code, mask=known[:, None] & in_channels, other=0.0)

    low_query = start if CAUSAL else (block - 1) * L
    low_query, high_query = tl.maximum(low_query, begin), tl.minimum(end, (block + 2) * L)
    for low in range(low_query, high_query, QUERIES):
        query = low + row
        live = query < high_query
        weights = _weights_of_keys(
            q, keys, log_sum, bias, bias_stride, b, h, low, row, query, live, column, key, known, T, H, D, offsets,
            CAUSAL, PRECISION, CHANNELS, STAGES,
        )  # fmt: skip
        do_t = load_tile(head_rows(do, b, low, T, h, H, Dv), row, H * Dv, channel, Dv, live)
        sums += dot(weights, do_t, PRECISION)
    tl.store(
        head_rows(dv, b, start, T, h, H, Dv) + column[:, None] * (H * Dv) + channel[None, :],
        sums.to(dv.dtype.element_ty),
        mask=inside[:, None] & in_channels,
    )


@triton.jit(do_not_specialize=["T"])
def _means_kernel(
    q,
    codebook,
    log_counts,
    log_sum,
    first,
    last,
    do,
    d_means,  # [B·H, N, S, Dv], float32
    T,
    H,
    S,
    D,
    Dv,
    L,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of the means that each block of queries sees."""
    chunk, tile, block, b, h, cell = _program(tl.cdiv(Dv, OUT), tl.cdiv(S, KEYS), tl.cdiv(T, L), H)
    begin, end = _bounds(first, last, b, T)
    row, code = tl.arange(0, QUERIES), tile * KEYS + tl.arange(0, KEYS)
    channel = chunk * OUT + tl.arange(0, OUT)
    known = code < S
    codebook += h * S * D
    log_count = tl.load(log_counts + cell * S + code, mask=known, other=float("-inf"))
    sums = tl.zeros([KEYS, OUT], tl.float32)
    high_query = tl.minimum(end, (block + 1) * L)
    for low in range(tl.maximum(begin, block * L), high_query, QUERIES):
        live = low + row < high_query
        q_t = head_rows(q, b, low, T, h, H, D)
        scores = _product(codebook, code, D, known, q_t, row, H * D, live, D, PRECISION, CHANNELS, STAGES)
        log = tl.load(head_rows(log_sum, b, low, T, h, H, 1) + row * H, mask=live, other=float("inf"))
        weights = tl.exp2(scores * LOG2_E + log_count[:, None] - log[None, :])
        do_t = load_tile(head_rows(do, b, low, T, h, H, Dv), row, H * Dv, channel, Dv, live)
        sums += dot(weights, do_t, PRECISION)
    tl.store(
        d_means + cell * S * Dv + code[:, None] * Dv + channel[None, :],
        sums,
        mask=known[:, None] & (channel < Dv)[None, :],
    )


@triton.jit(do_not_specialize=["T"])
def _sums_kernel(
    v,
    codes,
    sums,  # [B·H, N, S, Dv], float32
    counts,  # [B·H, N, S], int32
    first,
    last,
    T,
    H,
    S,
    Dv,
    L,
    PRECISION: tl.constexpr,
    CODES: tl.constexpr,
    KEYS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The values of each block, and their number, added up by code."""
    chunk, tile, block, b, h, cell = _program(tl.cdiv(Dv, OUT), tl.cdiv(S, CODES), tl.cdiv(T, L), H)
    begin, end = _bounds(first, last, b, T)
    column, code = tl.arange(0, KEYS), tile * CODES + tl.arange(0, CODES)
    channel = chunk * OUT + tl.arange(0, OUT)
    added, number = tl.zeros([CODES, OUT], tl.float32), tl.zeros([CODES], tl.int32)
    high_key = tl.minimum(end, (block + 1) * L)
    for low in tl.range(tl.maximum(begin, block * L), high_key, KEYS, num_stages=STAGES):
        known = low + column < high_key
        found = tl.load(head_rows(codes, b, low, T, h, H, 1) + column * H, mask=known, other=-1).to(tl.int32)
        member = code[:, None] == found[None, :]
        v_t = load_tile(head_rows(v, b, low, T, h, H, Dv), column, H * Dv, channel, Dv, known)
        added += dot(tl.where(member, 1.0, 0.0), v_t, PRECISION)
        number += tl.sum(member.to(tl.int32), 1)
    known = code < S
    tl.store(
        sums + cell * S * Dv + code[:, None] * Dv + channel[None, :],
        added,
        mask=known[:, None] & (channel < Dv)[None, :],
    )
    if chunk == 0:
        tl.store(counts + cell * S + code, number, mask=known)


@triton.jit(do_not_specialize=["N"])
def _outside_kernel(
    x,  # [B·H, N, S, Dv], float32, of each block
    share,  # [B·H, N, S], float32
    start,  # [B·H, S, Dv], float32, of before the first block, or None
    behind,  # [B·H, N, S, Dv], float32, to write to if both ways are gone, or None
    out,  # [B·H, N, S, Dv]
    whole,  # [B·H, S, Dv], float32: the sum of all blocks, or None
    N,
    S,
    Dv,
    BEFORE: tl.constexpr,
    BEHIND: tl.constexpr,
    GIVEN: tl.constexpr,  # `share` multiplies what is added up, not the sums
    BLOCK: tl.constexpr,
):
    """Of each block, the sum of `x` over those two or more before it, or behind it, or both."""
    size = S * Dv
    programs = tl.cdiv(size, BLOCK)
    head = (tl.program_id(0) // programs).to(tl.int64)
    at = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    cell, code = head * N, at // Dv
    if BEHIND:
        sums = tl.zeros([BLOCK], tl.float32)
        for step in range(N):
            block = N - 1 - step
            there = inside & (block + 2 < N)
            added = tl.load(x + (cell + block + 2) * size + at, mask=there, other=0.0)
            if GIVEN:
                added *= tl.load(share + (cell + block + 2) * S + code, mask=there, other=0.0)
            sums += added
            if BEFORE:
                tl.store(behind + (cell + block) * size + at, sums, mask=inside)
            else:
                tl.store(out + (cell + block) * size + at, sums.to(out.dtype.element_ty), mask=inside)
        if whole is not None:
            for block in range(2):
                there = inside & (block < N)
                added = tl.load(x + (cell + block) * size + at, mask=there, other=0.0)
                sums += added * tl.load(share + (cell + block) * S + code, mask=there, other=0.0)
            tl.store(whole + head * size + at, sums, mask=inside)
    if BEFORE:
        if BEHIND:
            tl.debug_barrier()  # `behind` is read by other threads than those that wrote it
        sums = tl.zeros([BLOCK], tl.float32)
        if start is not None:
            sums = tl.load(start + head * size + at, mask=inside, other=0.0)
        for block in range(N):
            there = inside & (block >= 2)
            added = tl.load(x + (cell + block - 2) * size + at, mask=there, other=0.0)
            if GIVEN:
                added *= tl.load(share + (cell + block - 2) * S + code, mask=there, other=0.0)
            sums += added
            both = sums
            if BEHIND:
                both = sums + tl.load(behind + (cell + block) * size + at, mask=inside, other=0.0)
            if not GIVEN:
                both *= tl.load(share + (cell + block) * S + code, mask=inside, other=0.0)
            tl.store(out + (cell + block) * size + at, both.to(out.dtype.element_ty), mask=inside)


def vq_attention_fused(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    codebook: Tensor,  # [H, S, D]
    codes: Tensor,  # [B, T, H]
    *,
    block_len: int,
    bias: Tensor | None,
    causal: bool,
    initial_state: VQState | None,
    output_final_state: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, VQState | None]:
    (B, T, H, _), S, Dv, L = q.shape, codebook.shape[1], v.shape[-1], block_len
    dtype, state, past = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype), None, initial_state
    if output_final_state:
        values = zero_padding(v, lengths).float()
        state = past or VQState.empty(B, H, S, Dv, L, device=q.device, dtype=values.dtype)
        state = state.advance(codes, values, lengths)
    sums = counts = first = None
    before = 0
    if past is None:
        L = min(L, T)
    else:  # what it remembers one by one becomes the block in front
        before, first = L, L - past.position.clamp(max=L)
        lengths = torch.full_like(first, L + T) if lengths is None else L + lengths
        q, k = (F.pad(x, (0, 0, 0, 0, L, 0)) for x in (q, k))
        v, codes = torch.cat([past.values.to(dtype), v.to(dtype)], 1), torch.cat([past.codes, codes], 1)
        sums, counts = past.sums.float(), past.counts
        if bias is not None and bias.dim() == 4:
            bias = F.pad(bias, (0, 0, 0, 0, L, 0))
    q, k, v, codebook = (pad_channels(x.to(dtype)) for x in (q, k, v, codebook))
    sums = None if sums is None else pad_channels(sums)
    y = _attention(q, Outline.apply(k), v, codebook, codes, bias, sums, counts, first, lengths, L, causal)[0]
    return y[:, before:, :, :Dv].to(v.dtype), state


@torch.library.custom_op("seqzoo::vq_attention_fused", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,  # only to take a gradient
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,  # [H, offsets] or [B, T, H, offsets]
    past_sums: Tensor | None,  # [B, H, S, Dv], float32
    past_counts: Tensor | None,  # [B, H, S]
    first: Tensor | None,  # [B], the first valid position
    last: Tensor | None,  # [B], the one behind the last
    block_len: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o; log2 of the sums of weights [B, T, H]; and of keys outside each window, by code, means and numbers."""
    (B, T, H, D), S, Dv, L = q.shape, codebook.shape[1], v.shape[-1], block_len
    N = triton.cdiv(T, L)
    q, v, codes, codebook, bias, past_sums, first, last = contiguous(
        q, v, codes, codebook, bias, past_sums, first, last
    )

    sums = q.new_empty(B * H, N, S, Dv, dtype=torch.float32)
    counts = torch.empty(B * H, N, S, dtype=torch.int32, device=q.device)
    config = _config("sums", q, v)
    out = _width(config.out, Dv)
    launch(
        _sums_kernel,
        B * H * N * triton.cdiv(S, config.queries) * triton.cdiv(Dv, out),
        *(v, codes, sums, counts, first, last, T, H, S, Dv, L),
        PRECISION=PRECISIONS[q.dtype],
        CODES=config.queries,
        KEYS=config.keys,
        OUT=out,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    counts = sums_outside(counts.unflatten(0, (B, H)), causal)
    if past_counts is not None:
        counts += past_counts[:, :, None]
    means = v.new_empty(B, H, N, S, Dv)
    _outside(sums, _share(counts), past_sums, means, None, before=True, behind=not causal)

    o, log_sum = v.new_empty(v.shape), q.new_empty(B, T, H, dtype=torch.float32)
    arguments = (*_arguments(q, v, codebook, codes, bias, means, counts), log_sum, first, last)
    config = _config("forward", q, v)
    out = _width(config.out, Dv)
    launch(
        _forward_kernel,
        B * H * N * triton.cdiv(L, config.queries) * triton.cdiv(Dv, out),
        *(*arguments, o, T, H, S, D, Dv, L, _offsets(bias)),
        **_meta(q, config, out),
        CAUSAL=causal,
    )
    return o, log_sum, means, counts


@_attention.register_fake
def _(q, k, v, codebook, codes, bias, past_sums, past_counts, first, last, block_len, causal):
    (B, T, H, _), S, Dv = q.shape, codebook.shape[1], v.shape[-1]
    N = -(-T // block_len)
    return (
        v.new_empty(v.shape),
        q.new_empty(B, T, H, dtype=torch.float32),
        v.new_empty(B, H, N, S, Dv),
        codes.new_empty(B, H, N, S, dtype=torch.int64),
    )


@torch.library.custom_op("seqzoo::vq_attention_fused_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,  # an outline, for a gradient of the gradient
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    past_sums: Tensor | None,  # as k
    first: Tensor | None,
    last: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    means: Tensor,
    counts: Tensor,
    block_len: int,
    causal: bool,
    bias_needs_gradient: bool,
    past_needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the bias and the past sums, the last two empty where none is to be had."""
    (B, T, H, D), S, Dv, L, N = q.shape, codebook.shape[1], v.shape[-1], block_len, counts.shape[2]
    delta = (do.float() * o).sum(-1)
    do, q, v, codes, codebook, bias, first, last = contiguous(do, q, v, codes, codebook, bias, first, last)
    q, keys, v, codebook, means, log_counts, bias, bias_stride = _arguments(q, v, codebook, codes, bias, means, counts)
    cells, offsets = B * H * N, _offsets(bias)

    dq, dk, dv = (x.new_empty(x.shape) for x in (q, q, v))
    d_bias = q.new_zeros(B, T, H, offsets, dtype=torch.float32) if bias_needs_gradient else None
    config = _config("query", q, v)
    out = _width(config.out, D)
    launch(
        _query_kernel,
        cells * triton.cdiv(L, config.queries) * triton.cdiv(D, out),
        *(q, keys, v, codebook, means, log_counts, bias, bias_stride, log_sum, first, last, do, delta, dq, d_bias),
        *(T, H, S, D, Dv, L, offsets),
        **_meta(q, config, out),
        CAUSAL=causal,
    )
    config = _config("key", q, v)
    out = _width(config.out, D)
    launch(
        _key_kernel,
        cells * triton.cdiv(L, config.keys) * triton.cdiv(D, out),
        *(q, keys, v, bias, bias_stride, log_sum, first, last, do, delta, dk, T, H, D, Dv, L, offsets),
        **_meta(q, config, out),
        CAUSAL=causal,
    )
    d_means, outside = (q.new_empty(B, H, N, S, Dv, dtype=torch.float32) for _ in range(2))
    config = _config("value", q, v)
    out = _width(config.out, Dv)
    launch(
        _means_kernel,
        cells * triton.cdiv(S, config.keys) * triton.cdiv(Dv, out),
        *(q, codebook, log_counts, log_sum, first, last, do, d_means, T, H, S, D, Dv, L),
        **_meta(q, config, out),
    )
    d_past = q.new_empty((B, H, S, Dv) if past_needs_gradient else (0,), dtype=torch.float32)
    whole = d_past if past_needs_gradient else None
    _outside(d_means, _share(counts), None, outside, whole, before=not causal, behind=True, given=True)
    launch(
        _value_kernel,
        cells * triton.cdiv(L, config.keys) * triton.cdiv(Dv, out),
        *(q, keys, codes, outside, bias, bias_stride, log_sum, first, last, do, dv, T, H, S, D, Dv, L, offsets),
        **_meta(q, config, out),
        CAUSAL=causal,
    )
    if d_bias is None:
        d_bias = q.new_empty(0, dtype=torch.float32)
    elif bias.dim() == 2:
        d_bias = d_bias.sum((0, 1))
    return dq, dk, dv, d_bias, d_past


@_attention_backward.register_fake
def _(
    do, q, k, v, codebook, codes, bias, past_sums, first, last, o, log_sum, means, counts, block_len, causal, biased,
    resumed,
):  # fmt: skip
    (B, _, H, _), S, Dv = q.shape, codebook.shape[1], v.shape[-1]
    d_bias, d_past = bias.shape if biased else (0,), (B, H, S, Dv) if resumed else (0,)
    inputs = (x.new_empty(x.shape) for x in (q, q, v))
    return *inputs, *(q.new_empty(shape, dtype=torch.float32) for shape in (d_bias, d_past))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, codebook, codes, bias, past_sums, _, first, last, ctx.block_len, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, codebook, codes, bias, past_sums, first, last, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, do: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    saved, (biased, resumed) = ctx.saved_tensors, ctx.needs_input_grad[5:7]
    dq, dk, dv, d_bias, d_past = _written(do, *saved, ctx.block_len, ctx.causal, biased, resumed)
    bias = saved[5]
    return dq, dk, dv, None, None, d_bias.to(bias.dtype) if biased else None, d_past if resumed else None, *(None,) * 5


def _plain(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    past_sums: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    means: Tensor,
    counts: Tensor,
    block_len: int,
    causal: bool,
    bias_needs_gradient: bool,
    past_needs_gradient: bool,
) -> tuple[Tensor | None, ...]:
    """As `_attention_backward`, for PyTorch to differentiate."""
    (B, T, H, _), L = q.shape, block_len
    position = torch.arange(T, device=q.device)
    valid = torch.ones(B, T, dtype=torch.bool, device=q.device)
    valid = valid if first is None else valid & (position >= first[:, None])
    valid = valid if last is None else valid & (position < last[:, None])

    def split(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, N, L, D]
        return F.pad(x, (0, 0, 0, 0, 0, -T % L)).transpose(1, 2).unflatten(2, (-1, L))

    def form(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, past_sums: Tensor | None) -> tuple[Tensor]:
        q_b, k_b, v_b = (split(torch.where(valid[..., None, None], x, 0).float()) for x in (q, k, v))
        biases = None if bias is None else split(bias.float().expand(B, T, H, -1))
        codes_b, valid_b = split(codes[..., None])[..., 0], split(valid[..., None, None])[..., 0]
        y = plain_attention(q_b, k_b, v_b, biases, past_sums, codebook.float(), codes_b, valid_b, counts, causal)
        y = y.flatten(2, 3)[:, :, :T].transpose(1, 2)
        return (torch.where(valid[..., None, None], y, 0).to(v.dtype),)

    return pullback(form, (q, k, v, bias, past_sums), (do,))


_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_attention_backward, _plain)


def _outside(
    x: Tensor,
    share: Tensor,
    start: Tensor | None,
    out: Tensor,
    whole: Tensor | None,
    *,
    before: bool,
    behind: bool,
    given: bool = False,
) -> None:
    B, H, N, S, Dv = out.shape
    scratch = torch.empty_like(x) if before and behind else None
    launch(
        _outside_kernel,
        B * H * triton.cdiv(S * Dv, ADDED),
        *(x, share, start, scratch, out, whole, N, S, Dv),
        BEFORE=before,
        BEHIND=behind,
        GIVEN=given,
        BLOCK=ADDED,
    )


def _share(counts: Tensor) -> Tensor:
    return counts.clamp(min=1).float().reciprocal()


def _arguments(
    q: Tensor, v: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, means: Tensor, counts: Tensor
) -> tuple[Any, ...]:
    """What kernels that make weights begin with."""
    heads = torch.arange(len(codebook), device=q.device)
    bias_stride = 0 if bias is None or bias.dim() == 2 else bias[0, 0].numel()
    return q, codebook[heads, codes], v, codebook, means, counts.float().log2(), bias, bias_stride


def _offsets(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.shape[-1]


def _config(kernel: str, q: Tensor, v: Tensor) -> Config:
    return BLOCKS.of(kernel, q.device, q.dtype, max(q.shape[-1], v.shape[-1]))


def _width(most: int, channels: int) -> int:
    return max(16, min(most, triton.next_power_of_2(channels)))


def _meta(q: Tensor, config: Config, out: int) -> dict[str, Any]:
    return {
        "PRECISION": PRECISIONS[q.dtype],
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "CHANNELS": _width(config.channels, q.shape[-1]),
        "OUT": out,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
