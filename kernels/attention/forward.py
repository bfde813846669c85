"""The weighted sums of values, a block of queries a program.

Blocks of keys that every query of the block sees are taken without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import absorb, dot, head_rows, load_tile
from .tiles import LOG2_E, keys_and_queries, query_scale, seen_keys, sequence, visible


@triton.jit
def _absorb(
    q_t, sums, m, total, k, v, scale, here, b, g, first, last, n, left, right, S, G, D, Dv, channel, value_channel,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys from `first` to `last` change of the weighted sum of values, the maximum and the sum of weights."""
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        k_t = load_tile(head_rows(k, b, start, S, g, G, D), tl.arange(0, KEYS), G * D, channel, D, key < n)
        v_t = load_tile(head_rows(v, b, start, S, g, G, Dv), tl.arange(0, KEYS), G * Dv, value_channel, Dv, key < n)
        scores = dot(q_t, tl.trans(k_t), PRECISION) * scale[:, None]
        if MASKED:
            scores = tl.where(visible(key, here, n, left, right, CAUSAL), scores, float("-inf"))
        sums, m, total = absorb(scores, v_t, sums, m, total, PRECISION)
    return sums, m, total


@triton.jit(do_not_specialize=["T", "S", "pieces", "documents", "left", "right"])
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
    starts,  # [documents + 1], or None: keys lie in a batch of B sequences
    query_starts,  # as `starts`, or None: queries are of the same steps
    document,  # [pieces], of each block of queries; `documents` where there is none
    number,  # [pieces], of the block in its document
    pieces,
    documents,
    left,  # how many keys ahead of its own place a query sees, or None: all
    right,  # how many behind it
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
    if document is None:
        blocks = tl.cdiv(T, QUERIES)
        block = blocks - 1 - tl.program_id(0) % blocks  # the longest first
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
        q, o, log_sum = q + asked * H * D, o + asked * H * Dv, log_sum + asked * H
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
    factor = query_scale(scales, scale, b, T, query, live) * LOG2_E

    free, end = seen_keys(before + block * QUERIES, n, left, right, CAUSAL, QUERIES, KEYS)
    sums = tl.zeros([QUERIES, DV], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED or left is None:
            sums, m, total = _absorb(
                q_t, sums, m, total, k, v, factor, here, b, g, free if MASKED else 0, end if MASKED else free, n, left,
                right, S, G, D, Dv, channel, value_channel, MASKED, CAUSAL, KEYS, STAGES, PRECISION,
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
