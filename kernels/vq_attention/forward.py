"""Values summed by code, the means outside of each window, and outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import absorb, dot, head_rows, load_tile
from .tiles import LOG2_E, bounds, positions, product, program, window_scores


@triton.jit(do_not_specialize=["T"])
def _sums_kernel(
    v,  # [B, T, H, Dv]
    codes,  # [B, T, H], int64
    sums,  # [B·H, N, S, Dv], float32
    counts,  # [B·H, N, S], int32
    first,  # [B], the first valid position, or None; PACKED, [N], that of each block's document
    last,  # [B], the one behind the last, or None; PACKED, [N]
    T,
    H,
    S,
    Dv,
    L,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    CODES: tl.constexpr,
    KEYS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The values of each block, and their number, added up by code."""
    chunk, tile, block, b, h, cell = program(tl.cdiv(Dv, OUT), tl.cdiv(S, CODES), tl.cdiv(T, L), H)
    begin, end = bounds(first, last, b, block, T, PACKED)
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
    start,  # [B·H, S, Dv], float32, of before the first block, or None; with `starts`, of before each document
    behind,  # [B·H, N, S, Dv], float32, to write to if both ways are gone, or None
    out,  # [B·H, N, S, Dv]
    whole,  # [B·H, S, Dv], float32: the sum of all blocks, or None; with `starts`, of each document
    starts,  # [documents + 1], int64, their first blocks in a row, B = 1, or None
    H,  # None without `starts`
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
    if starts is not None:
        document = head // H
        begin = tl.load(starts + document)
        cell = head % H * N + begin
        N = (tl.load(starts + document + 1) - begin).to(tl.int32)
    if BEHIND:
        sums = tl.zeros([BLOCK], tl.float32)
        for step in range(N):
            block = N - 1 - step
            there = tl.where(block + 2 < N, inside, False)
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
                there = tl.where(block < N, inside, False)
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
            there = tl.where(block >= 2, inside, False)
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
    first,
    last,
    o,  # [B, T, H, Dv]
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
    chunk, tile, block, b, h, cell = program(tl.cdiv(Dv, OUT), tl.cdiv(L, QUERIES), tl.cdiv(T, L), H)
    begin, end = bounds(first, last, b, block, T, PACKED)
    row, column = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    value_channel = chunk * OUT + tl.arange(0, OUT)
    start, query, inside, live = positions(block, tile, L, T, begin, end, QUERIES)
    q = head_rows(q, b, start, T, h, H, D)
    codebook += h * S * D
    means += cell * S * Dv
    sums = tl.zeros([QUERIES, OUT], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)

    for low in range(0, tl.where(start < end, S, 0), KEYS):
        code = low + column
        known = code < S
        scores = product(q, row, H * D, live, codebook, code, D, known, D, PRECISION, CHANNELS, STAGES)
        scores = scores * LOG2_E + tl.load(log_counts + cell * S + code, mask=known, other=float("-inf"))[None, :]
        v_t = load_tile(means, code, Dv, value_channel, Dv, known)
        sums, m, total = absorb(scores, v_t, sums, m, total, PRECISION)

    low_key, high_key = tl.maximum(begin, (block - 1) * L), tl.minimum(end, (block + 2) * L)
    if CAUSAL:
        high_key = tl.minimum(high_key, tl.minimum((block + 1) * L, start + QUERIES))
    for low in range(low_key, high_key, KEYS):
        key = low + column
        known = key < high_key
        scores, _ = window_scores(
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
