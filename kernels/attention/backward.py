"""The gradients of q, k and v, from weights that are made again.

Arguments that nothing is said of are those of `forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, head_rows, load_tile
from .tiles import LOG2_E, keys_and_queries, query_scale, seen_keys, sequence, visible


@triton.jit
def _query_gradient(
    dq, q_t, do_t, log, delta, k, v, scale, here, b, g, first, last, n, left, right, S, G, D, Dv, channel,
    value_channel, MASKED: tl.constexpr, CAUSAL: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        k_t = load_tile(head_rows(k, b, start, S, g, G, D), tl.arange(0, KEYS), G * D, channel, D, key < n)
        v_t = load_tile(head_rows(v, b, start, S, g, G, Dv), tl.arange(0, KEYS), G * Dv, value_channel, Dv, key < n)
        weights = tl.exp2(dot(q_t, tl.trans(k_t), PRECISION) * (scale * LOG2_E)[:, None] - log[:, None])
        if MASKED:
            weights = tl.where(visible(key, here, n, left, right, CAUSAL), weights, 0.0)
        d_scores = weights * (dot(do_t, tl.trans(v_t), PRECISION) - delta[:, None])
        dq += dot(d_scores, k_t, PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "S", "pieces", "documents", "left", "right"])
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
    starts,
    query_starts,
    document,
    number,
    pieces,
    documents,
    left,
    right,
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
    if document is None:
        blocks = tl.cdiv(T, QUERIES)
        block = blocks - 1 - tl.program_id(0) % blocks
        head = tl.program_id(0) // blocks
        b, h = (head // H).to(tl.int64), head % H
        g = h // (H // G)
        n, before = sequence(lengths, position, b, S)
    else:
        which = tl.load(document + tl.program_id(0) % pieces)
        if which >= documents:
            return
        block, h = tl.load(number + tl.program_id(0) % pieces).to(tl.int32), tl.program_id(0) // pieces
        held, S, asked, T, before = keys_and_queries(starts, query_starts, which)
        q, do, dq = q + asked * H * D, do + asked * H * Dv, dq + asked * H * D
        log_sum, delta = log_sum + asked * H, delta + asked * H
        k, v = k + held * G * D, v + held * G * Dv
        if scales is not None:
            scales += asked
        b, g, n = asked * 0, h // (H // G), S
    query = block * QUERIES + tl.arange(0, QUERIES)
    here = before + query
    live = (query < T) & (here < n)
    channel, value_channel = tl.arange(0, DK), tl.arange(0, DV)
    index = tl.arange(0, QUERIES)
    q_t = load_tile(head_rows(q, b, block * QUERIES, T, h, H, D), index, H * D, channel, D, live)
    do_t = load_tile(head_rows(do, b, block * QUERIES, T, h, H, Dv), index, H * Dv, value_channel, Dv, live)
    log = tl.load(head_rows(log_sum, b, block * QUERIES, T, h, H, 1) + index * H, mask=live, other=float("inf"))
    delta_t = tl.load(head_rows(delta, b, block * QUERIES, T, h, H, 1) + index * H, mask=live, other=0.0)
    factor = query_scale(scales, scale, b, T, query, live)

    free, end = seen_keys(before + block * QUERIES, n, left, right, CAUSAL, QUERIES, KEYS)
    sums = tl.zeros([QUERIES, DK], tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED or left is None:
            sums = _query_gradient(
                sums, q_t, do_t, log, delta_t, k, v, factor, here, b, g, free if MASKED else 0,
                end if MASKED else free, n, left, right, S, G, D, Dv, channel, value_channel,
                MASKED, CAUSAL, KEYS, STAGES, PRECISION,
            )  # fmt: skip
    sums *= factor[:, None]
    tl.store(
        head_rows(dq, b, block * QUERIES, T, h, H, D) + index[:, None] * (H * D) + channel[None, :],
        sums.to(dq.dtype.element_ty),
        mask=(query < T)[:, None] & (channel < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "S", "pieces", "documents", "left", "right"])
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
    starts,
    query_starts,
    document,
    number,
    pieces,
    documents,
    left,
    right,
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
    """The gradients of k and v, a block of keys a program, of which `document` and `number` are here.

    Scores are made with keys as rows: nothing is transposed.
    """
    if document is None:
        blocks = tl.cdiv(S, KEYS)
        block = tl.program_id(0) % blocks
        head = tl.program_id(0) // blocks
        b, g = (head // G).to(tl.int64), head % G
        n, before = sequence(lengths, position, b, S)
    else:
        which = tl.load(document + tl.program_id(0) % pieces)
        if which >= documents:
            return
        block, g = tl.load(number + tl.program_id(0) % pieces).to(tl.int32), tl.program_id(0) // pieces
        held, S, asked, T, before = keys_and_queries(starts, query_starts, which)
        q, do = q + asked * H * D, do + asked * H * Dv
        log_sum, delta = log_sum + asked * H, delta + asked * H
        k, dk, v, dv = k + held * G * D, dk + held * G * D, v + held * G * Dv, dv + held * G * Dv
        if scales is not None:
            scales += asked
        b, n = asked * 0, S
    key = block * KEYS + tl.arange(0, KEYS)
    channel, value_channel = tl.arange(0, DK), tl.arange(0, DV)
    row, index = tl.arange(0, KEYS), tl.arange(0, QUERIES)
    k_t = load_tile(head_rows(k, b, block * KEYS, S, g, G, D), row, G * D, channel, D, key < n)
    v_t = load_tile(head_rows(v, b, block * KEYS, S, g, G, Dv), row, G * Dv, value_channel, Dv, key < n)
    dk_t, dv_t = tl.zeros([KEYS, DK], tl.float32), tl.zeros([KEYS, DV], tl.float32)

    start, stop = 0, T
    if document is None:
        stop = tl.maximum(tl.minimum(T, n - before), 0)
    if CAUSAL:
        start = tl.maximum(block * KEYS - before, 0) // QUERIES * QUERIES
    if left is not None:
        start = tl.maximum(block * KEYS - right - before, 0) // QUERIES * QUERIES
        stop = tl.minimum(stop, block * KEYS + KEYS + left - before)
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
            factor = query_scale(scales, scale, b, T, query, live)
            weights = tl.exp2(dot(k_t, tl.trans(q_t), PRECISION) * (factor * LOG2_E)[None, :] - log[None, :])
            seen = (key < n)[:, None]
            if CAUSAL:
                seen = seen & (key[:, None] <= before + query[None, :])
            if left is not None:
                distance = key[:, None] - (before + query[None, :])
                seen = seen & (distance >= -left) & (distance <= right)
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
