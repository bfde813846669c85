"""The gradients of q and the bias, of k, of v and of the means, from weights that are made again.

Arguments that nothing is said of are those of `forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, head_rows, load_tile
from .tiles import LOG2_E, bias_entry, bounds, pair_scores, positions, product, program, window_scores


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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of q and of the bias."""
    chunk, tile, block, b, h, cell = program(tl.cdiv(D, OUT), tl.cdiv(L, QUERIES), tl.cdiv(T, L), H)
    begin, end = bounds(first, last, b, block, T, PACKED)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    channel = chunk * OUT + tl.arange(0, OUT)
    start, query, inside, live = positions(block, tile, L, T, begin, end, QUERIES)
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
        scores = product(q, row, H * D, live, codebook, code, D, known, D, PRECISION, CHANNELS, STAGES)
        log_count = tl.load(log_counts + cell * S + code, mask=known, other=float("-inf"))
        weights = tl.exp2(scores * LOG2_E + log_count[None, :] - log[:, None])
        d_weights = product(do, row, H * Dv, live, means, code, Dv, known, Dv, PRECISION, CHANNELS, STAGES)
        d_scores = weights * (d_weights - delta_t[:, None])
        sums += dot(d_scores, load_tile(codebook, code, D, channel, D, known), PRECISION)

    low_key, high_key = tl.maximum(begin, (block - 1) * L), tl.minimum(end, (block + 2) * L)
    if CAUSAL:
        high_key = tl.minimum(high_key, tl.minimum((block + 1) * L, start + QUERIES))
    for low in range(low_key, high_key, KEYS):
        key = low + column
        known = key < high_key
        scores, seen = window_scores(
            q, keys, bias, bias_stride, b, h, start, row, query, live, low, column, key, known, T, H, D, offsets,
            CAUSAL, PRECISION, CHANNELS, STAGES,
        )  # fmt: skip
        values_t = head_rows(v, b, low, T, h, H, Dv)
        weights = tl.exp2(scores - log[:, None])
        d_weights = product(do, row, H * Dv, live, values_t, column, H * Dv, known, Dv, PRECISION, CHANNELS, STAGES)
        d_scores = weights * (d_weights - delta_t[:, None])
        if d_bias is not None:
            at, has = bias_entry(row[:, None], query[:, None], key[None, :], seen, H * offsets, offsets, CAUSAL)
            tl.store(
                head_rows(d_bias, b, start, T, h, H, offsets) + at, d_scores, mask=tl.where(chunk == 0, has, False)
            )
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
    scores = product(keys, column, H * D, known, q_t, row, H * D, live, D, PRECISION, CHANNELS, STAGES)
    scores, seen = pair_scores(
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of k, from the window. Scores are made with keys as rows: nothing computed is transposed."""
    chunk, tile, block, b, h, _ = program(tl.cdiv(D, OUT), tl.cdiv(L, KEYS), tl.cdiv(T, L), H)
    begin, end = bounds(first, last, b, block, T, PACKED)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    channel = chunk * OUT + tl.arange(0, OUT)
    start, key, inside, known = positions(block, tile, L, T, begin, end, KEYS)
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
        d_weights = product(v, column, H * Dv, known, do_t, row, H * Dv, live, Dv, PRECISION, CHANNELS, STAGES)
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of v."""
    chunk, tile, block, b, h, cell = program(tl.cdiv(Dv, OUT), tl.cdiv(L, KEYS), tl.cdiv(T, L), H)
    begin, end = bounds(first, last, b, block, T, PACKED)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    channel = chunk * OUT + tl.arange(0, OUT)
    in_channels = (channel < Dv)[None, :]
    start, key, inside, known = positions(block, tile, L, T, begin, end, KEYS)
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of the means that each block of queries sees."""
    chunk, tile, block, b, h, cell = program(tl.cdiv(Dv, OUT), tl.cdiv(S, KEYS), tl.cdiv(T, L), H)
    begin, end = bounds(first, last, b, block, T, PACKED)
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
        scores = product(codebook, code, D, known, q_t, row, H * D, live, D, PRECISION, CHANNELS, STAGES)
        log = tl.load(head_rows(log_sum, b, low, T, h, H, 1) + row * H, mask=live, other=float("inf"))
        weights = tl.exp2(scores * LOG2_E + log_count[:, None] - log[None, :])
        do_t = load_tile(head_rows(do, b, low, T, h, H, Dv), row, H * Dv, channel, Dv, live)
        sums += dot(weights, do_t, PRECISION)
    tl.store(
        d_means + cell * S * Dv + code[:, None] * Dv + channel[None, :],
        sums,
        mask=known[:, None] & (channel < Dv)[None, :],
    )
