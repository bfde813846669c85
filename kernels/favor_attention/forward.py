"""The states that keys make, and what queries read of them and of the keys of their segment."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, head_rows, load_tile, valid_steps
from .tiles import finite, half_square, in_document, left_out, pick


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _sums_kernel(
    k,  # [B, T, H, D]
    v,  # [B, T, H, Dv]
    projection,  # [H, M, D]
    sums,  # [B, H, segments, M, Dv], float32
    norm,  # [B, H, segments, M], float32
    top,  # the same: the maxima
    steep,  # [B, H, blocks of features, groups of steps], bool, where b rises too far; or None
    lengths,  # [B] or None
    pieces,  # [P, 4], of documents in one row: the segments, of which T is so many times `segment_len`; or None
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    RISE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state that the keys of a segment make, a block of features a program."""
    blocks = tl.cdiv(M, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    item = tl.program_id(0) // blocks
    segment, head = item % segments, item // segments
    b, h = (head // H).to(tl.int64), head % H
    if pieces is None:
        n, rows = valid_steps(lengths, b, T), T
    else:
        b, n = in_document(pieces, segment * segment_len, segment_len)
        rows = 1
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    inside = first + row < M
    w_t = load_tile(projection + (h * M + first) * D, row, D, channel, D, inside)
    S, z = tl.zeros([ROWS, DV], tl.float32), tl.zeros([ROWS], tl.float32)
    R = tl.full([ROWS], float("-inf"), tl.float32)
    since, rises = R, 0  # b of the group's first key, and whether it rose too far
    start = segment * segment_len
    for past in tl.range(start, min(start + segment_len, n), COLUMNS, num_stages=STAGES):
        seen = past + column < n
        k_t = load_tile(head_rows(k, b, past, rows, h, H, D), column, H * D, channel, D, seen)
        v_t = load_tile(head_rows(v, b, past, rows, h, H, Dv), column, H * Dv, value_channel, Dv, seen)
        scores = dot(w_t, tl.trans(k_t), PRECISION) - half_square(k_t)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.max(scores, 1)
        if CAUSAL:
            begins = past % GROUP == 0
            since = tl.where(begins, pick(scores, 0, 1), since)
            rises = tl.where(begins, 0, rises) | tl.max((peak > since + RISE).to(tl.int32), 0)
            at = (head.to(tl.int64) * blocks + first // ROWS) * tl.cdiv(T, GROUP) + past // GROUP
            tl.store(steep + at, rises != 0)
        highest = tl.maximum(R, peak)
        level = finite(highest)
        weights = tl.exp(scores - level[:, None])
        fading = tl.exp(R - level)
        z = z * fading + tl.sum(weights, 1)
        S = S * fading[:, None] + dot(weights, v_t, PRECISION)
        R = highest
    at = item.to(tl.int64) * M + first
    in_values = inside[:, None] & (value_channel < Dv)[None, :]
    tl.store(sums + at * Dv + row[:, None] * Dv + value_channel[None, :], S, mask=in_values)
    tl.store(norm + at + row, z, mask=inside)
    tl.store(top + at + row, R, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def _carry_kernel(
    first,  # [B·H, M, width], or None: zero
    added,  # [B·H, segments, M, width]
    gains,  # [B·H, segments, M], what is added times this, or None
    fades,  # [B·H, segments, M], what was there times this
    carried,  # [B·H, segments, M, width]: what each segment starts from, or None: not wanted
    last,  # [B·H, M, width]
    firsts,  # [N + 1], where the segments of documents begin: a program has one, and `first` and `last` are [N·H, ...]
    M,
    width,
    segments,
    H,
    DOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A state carried through the segments, with `DOWN` from the last to the first."""
    size = M * width
    blocks = tl.cdiv(size, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    feature, inside = at // width, at < size
    S = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        S = tl.load(first + head * size + at, mask=inside, other=0.0)
    if firsts is None:
        begin, end = 0, segments
    else:
        begin = tl.load(firsts + head // H).to(tl.int32)
        end = tl.load(firsts + head // H + 1).to(tl.int32)
    for count in range(begin, end):
        item = (head if firsts is None else head % H) * segments + (
            (segments if firsts is None else begin + end) - 1 - count if DOWN else count
        )
        if carried is not None:
            tl.store(carried + item * size + at, S, mask=inside)
        x = tl.load(added + item * size + at, mask=inside, other=0.0)
        if gains is not None:
            x *= tl.load(gains + item * M + feature, mask=inside, other=0.0)
        S = S * tl.load(fades + item * M + feature, mask=inside, other=0.0) + x
    tl.store(last + head * size + at, S, mask=inside)


@triton.jit
def _pairs(
    q_t, query, k_t, first, n, projection, M, D, channel, CAREFUL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTNERS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights of keys for queries, [ROWS, PARTNERS], times exp(-level), and the level [ROWS]."""
    index, column = tl.arange(0, PARTNERS), tl.arange(0, COLUMNS)
    half = half_square(k_t)
    pairs = tl.zeros([ROWS, PARTNERS], tl.float32)
    level = tl.full([ROWS], float("-inf"), tl.float32)
    for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
        inside = start + column < M
        w_t = load_tile(projection + start * D, column, D, channel, D, inside)
        b = dot(w_t, tl.trans(k_t), PRECISION) - half[None, :]
        b = tl.where(inside[:, None] & (first + index < n)[None, :], b, float("-inf"))
        a = dot(q_t, tl.trans(w_t), PRECISION)
        if CAREFUL:
            for j in range(PARTNERS):
                x = tl.where((query >= first + j)[:, None], a + pick(b, j, 1)[None, :], float("-inf"))
                highest = tl.maximum(level, tl.max(x, 1))
                base = finite(highest)
                weights = tl.sum(tl.exp(x - base[:, None]), 1)
                pairs = pairs * tl.exp(level - base)[:, None] + tl.where((index == j)[None, :], weights[:, None], 0.0)
                level = highest
        else:
            r = tl.max(b, 1)
            x = tl.where((query >= first)[:, None], a + r[None, :], float("-inf"))
            highest = tl.maximum(level, tl.max(x, 1))
            base = finite(highest)
            pairs *= tl.exp(level - base)[:, None]
            pairs += dot(tl.exp(x - base[:, None]), tl.exp(b - finite(r)[:, None]), PRECISION)
            level = highest
    return pairs, level


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _output_kernel(
    q,  # [B, T, H, D]
    k,
    v,
    projection,
    sums,  # [B, H, segments, M, Dv], float32: the state that each segment sees
    norm,  # [B, H, segments, M], float32
    top,  # the same
    o,  # [B, T, H, Dv]
    log_sum,  # [B, T, H], float32: the logarithm of the sum of weights, inf where there is none
    steep,  # [B, H, groups of steps], bool, causal, or None
    lengths,
    pieces,
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    CAREFUL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTNERS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(T, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks
    if CAUSAL:
        if left_out(steep, head, first, T, CAREFUL, GROUP):
            return
    b, h = (head // H).to(tl.int64), head % H
    if pieces is None:
        n, rows, limit = valid_steps(lengths, b, T), T, T
    else:
        b, n = in_document(pieces, first, segment_len)
        rows, limit = 1, n
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    query, partner = first + row, tl.arange(0, PARTNERS)
    live = query < n
    directions = projection + h * M * D
    q_t = load_tile(head_rows(q, b, first, rows, h, H, D), row, H * D, channel, D, live)
    out, total = tl.zeros([ROWS, DV], tl.float32), tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        S_t = load_tile(sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        z = tl.load(norm + state + start + column, mask=inside, other=0.0)
        R = tl.load(top + state + start + column, mask=inside, other=float("-inf"))
        scores = dot(q_t, tl.trans(w_t), PRECISION) + R[None, :]
        highest = tl.maximum(m, tl.max(scores, 1))
        level = finite(highest)
        weights = tl.exp(scores - level[:, None])
        fading = tl.exp(m - level)
        total = total * fading + tl.sum(weights * z[None, :], 1)
        out = out * fading[:, None] + dot(weights, S_t, PRECISION)
        m = highest

    if CAUSAL:
        for past in tl.range(first // segment_len * segment_len, min(first + ROWS, n), PARTNERS, num_stages=1):
            k_t = load_tile(head_rows(k, b, past, rows, h, H, D), partner, H * D, channel, D, past + partner < n)
            v_t = load_tile(
                head_rows(v, b, past, rows, h, H, Dv), partner, H * Dv, value_channel, Dv, past + partner < n
            )
            pairs, height = _pairs(
                q_t, query, k_t, past, n, directions, M, D, channel,
                CAREFUL, ROWS, COLUMNS, PARTNERS, STAGES, PRECISION,
            )  # fmt: skip
            pairs = tl.where(query[:, None] >= past + partner[None, :], pairs, 0.0)
            highest = tl.maximum(m, height)
            level = finite(highest)
            pairs *= tl.exp(height - level)[:, None]
            fading = tl.exp(m - level)
            total = total * fading + tl.sum(pairs, 1)
            out = out * fading[:, None] + dot(pairs, v_t, PRECISION)
            m = highest

    any_seen = live & (total > 0)
    out = tl.where(any_seen[:, None], out / tl.where(any_seen, total, 1.0)[:, None], 0.0)
    tl.store(
        head_rows(o, b, first, rows, h, H, Dv) + row[:, None] * (H * Dv) + value_channel[None, :],
        out.to(o.dtype.element_ty),
        mask=(query < limit)[:, None] & (value_channel < Dv)[None, :],
    )
    log = tl.where(any_seen, m + tl.log(tl.where(any_seen, total, 1.0)), float("inf"))
    tl.store(head_rows(log_sum, b, first, rows, h, H, 1) + row * H, log, mask=query < limit)
