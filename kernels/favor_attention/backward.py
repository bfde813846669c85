"""The gradients of the states, of q, k and v, from weights that are made again.

Arguments that nothing is said of are those of `forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, head_rows, load_tile, valid_steps
from .tiles import finite, half_square, in_document, key_scores, left_out, pick


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _feature_kernel(
    q,
    do,  # [B, T, H, Dv]
    projection,
    top,
    log_sum,
    delta,  # [B, T, H], float32: o·do
    d_sums,  # [B, H, segments, M, Dv], float32
    d_norm,  # [B, H, segments, M], float32
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
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of the state that the queries of a segment see, a block of features a program."""
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
    state = (item if CAUSAL or pieces is not None else head).to(tl.int64) * M + first
    R = tl.load(top + state + row, mask=inside, other=float("-inf"))
    dS, dz = tl.zeros([ROWS, DV], tl.float32), tl.zeros([ROWS], tl.float32)
    start = segment * segment_len
    for past in tl.range(start, min(start + segment_len, n), COLUMNS, num_stages=STAGES):
        live = past + column < n
        q_t = load_tile(head_rows(q, b, past, rows, h, H, D), column, H * D, channel, D, live)
        do_t = load_tile(head_rows(do, b, past, rows, h, H, Dv), column, H * Dv, value_channel, Dv, live)
        log = tl.load(head_rows(log_sum, b, past, rows, h, H, 1) + column * H, mask=live, other=float("inf"))
        delta_t = tl.load(head_rows(delta, b, past, rows, h, H, 1) + column * H, mask=live, other=0.0)
        weights = tl.exp(dot(w_t, tl.trans(q_t), PRECISION) + R[:, None] - log[None, :])
        dz -= tl.sum(weights * delta_t[None, :], 1)
        dS += dot(weights, do_t, PRECISION)
    at = item.to(tl.int64) * M + first
    in_values = inside[:, None] & (value_channel < Dv)[None, :]
    tl.store(d_sums + at * Dv + row[:, None] * Dv + value_channel[None, :], dS, mask=in_values)
    tl.store(d_norm + at + row, dz, mask=inside)


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _query_kernel(
    q,
    k,
    v,
    do,
    projection,
    sums,
    norm,
    top,
    log_sum,
    delta,
    dq,
    steep,
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
    """The gradient of q, a block of queries a program."""
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
    do_t = load_tile(head_rows(do, b, first, rows, h, H, Dv), row, H * Dv, value_channel, Dv, live)
    log = tl.load(head_rows(log_sum, b, first, rows, h, H, 1) + row * H, mask=live, other=float("inf"))
    delta_t = tl.load(head_rows(delta, b, first, rows, h, H, 1) + row * H, mask=live, other=0.0)
    dq_t = tl.zeros([ROWS, DK], tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        S_t = load_tile(sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        z = tl.load(norm + state + start + column, mask=inside, other=0.0)
        R = tl.load(top + state + start + column, mask=inside, other=float("-inf"))
        weights = tl.exp(dot(q_t, tl.trans(w_t), PRECISION) + R[None, :] - log[:, None])
        da = weights * (dot(do_t, tl.trans(S_t), PRECISION) - delta_t[:, None] * z[None, :])
        dq_t += dot(da, w_t, PRECISION)

    if CAUSAL:
        for past in tl.range(first // segment_len * segment_len, min(first + ROWS, n), PARTNERS, num_stages=1):
            seen = past + partner < n
            k_t = load_tile(head_rows(k, b, past, rows, h, H, D), partner, H * D, channel, D, seen)
            v_t = load_tile(head_rows(v, b, past, rows, h, H, Dv), partner, H * Dv, value_channel, Dv, seen)
            half = half_square(k_t)
            d_pairs = dot(do_t, tl.trans(v_t), PRECISION) - delta_t[:, None]
            d_pairs = tl.where(query[:, None] >= past + partner[None, :], d_pairs, 0.0)
            for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
                inside = start + column < M
                w_t = load_tile(directions + start * D, column, D, channel, D, inside)
                a = dot(q_t, tl.trans(w_t), PRECISION)
                bs = key_scores(k_t, half, w_t, seen, inside, PRECISION)
                da = tl.zeros([ROWS, COLUMNS], tl.float32)
                if CAREFUL:
                    for j in range(PARTNERS):
                        x = tl.where((query >= past + j)[:, None], a + pick(bs, j, 0)[None, :], float("-inf"))
                        da += tl.exp(x - log[:, None]) * pick(d_pairs, j, 1)[:, None]
                else:
                    r = tl.max(bs, 0)
                    x = tl.where((query >= past)[:, None], a + r[None, :], float("-inf"))
                    da = tl.exp(x - log[:, None]) * dot(d_pairs, tl.exp(bs - finite(r)[None, :]), PRECISION)
                dq_t += dot(da, w_t, PRECISION)

    tl.store(
        head_rows(dq, b, first, rows, h, H, D) + row[:, None] * (H * D) + channel[None, :],
        dq_t.to(dq.dtype.element_ty),
        mask=(query < limit)[:, None] & (channel < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _key_kernel(
    q,
    k,
    v,
    do,
    projection,
    top,  # [B, H, segments, M], float32: the maxima behind each segment
    d_sums,  # [B, H, segments, M, Dv], float32: the gradient of the state behind each segment
    d_norm,  # [B, H, segments, M], float32
    log_sum,
    delta,
    dk,
    steep,
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
    """The gradient of k, a block of keys a program. Pairs are made with keys as rows: nothing is transposed."""
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
    key, partner = first + row, tl.arange(0, PARTNERS)
    seen = key < n
    directions = projection + h * M * D
    k_t = load_tile(head_rows(k, b, first, rows, h, H, D), row, H * D, channel, D, seen)
    v_t = load_tile(head_rows(v, b, first, rows, h, H, Dv), row, H * Dv, value_channel, Dv, seen)
    half = half_square(k_t)
    dk_t, db_sum = tl.zeros([ROWS, DK], tl.float32), tl.zeros([ROWS], tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        dS_t = load_tile(d_sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        dz = tl.load(d_norm + state + start + column, mask=inside, other=0.0)
        R = tl.load(top + state + start + column, mask=inside, other=0.0)
        bs = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
        weights = tl.exp(tl.where(seen[:, None] & inside[None, :], bs - finite(R)[None, :], float("-inf")))
        db = weights * (dot(v_t, tl.trans(dS_t), PRECISION) + dz[None, :])
        dk_t += dot(db, w_t, PRECISION)
        db_sum += tl.sum(db, 1)

    if CAUSAL:
        end = min(first // segment_len * segment_len + segment_len, n)
        for ahead in tl.range(first, end, PARTNERS, num_stages=1):
            live = ahead + partner < end
            q_t = load_tile(head_rows(q, b, ahead, rows, h, H, D), partner, H * D, channel, D, live)
            do_t = load_tile(head_rows(do, b, ahead, rows, h, H, Dv), partner, H * Dv, value_channel, Dv, live)
            log = tl.load(head_rows(log_sum, b, ahead, rows, h, H, 1) + partner * H, mask=live, other=float("inf"))
            delta_t = tl.load(head_rows(delta, b, ahead, rows, h, H, 1) + partner * H, mask=live, other=0.0)
            visible = key[:, None] <= ahead + partner[None, :]
            d_pairs = tl.where(visible, dot(v_t, tl.trans(do_t), PRECISION) - delta_t[None, :], 0.0)
            for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
                inside = start + column < M
                w_t = load_tile(directions + start * D, column, D, channel, D, inside)
                bs = key_scores(k_t, half, w_t, seen, inside, PRECISION)
                a = dot(q_t, tl.trans(w_t), PRECISION) - log[:, None]
                db = tl.zeros([ROWS, COLUMNS], tl.float32)
                if CAREFUL:
                    for i in range(PARTNERS):
                        x = tl.where((key <= ahead + i)[:, None], bs + pick(a, i, 0)[None, :], float("-inf"))
                        db += tl.exp(x) * pick(d_pairs, i, 1)[:, None]
                else:
                    r = tl.max(bs, 0)
                    weights = tl.exp(bs - finite(r)[None, :])
                    db = weights * dot(d_pairs, tl.exp(a + r[None, :]), PRECISION)
                dk_t += dot(db, w_t, PRECISION)
                db_sum += tl.sum(db, 1)

    dk_t -= k_t.to(tl.float32) * db_sum[:, None]
    tl.store(
        head_rows(dk, b, first, rows, h, H, D) + row[:, None] * (H * D) + channel[None, :],
        dk_t.to(dk.dtype.element_ty),
        mask=(key < limit)[:, None] & (channel < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _value_kernel(
    q,
    k,
    do,
    projection,
    top,  # [B, H, segments, M], float32: the maxima behind each segment
    d_sums,  # [B, H, segments, M, Dv], float32: the gradient of the state behind each segment
    log_sum,
    dv,
    steep,
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
    """The gradient of v, a block of keys a program."""
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
    key, partner = first + row, tl.arange(0, PARTNERS)
    seen = key < n
    directions = projection + h * M * D
    k_t = load_tile(head_rows(k, b, first, rows, h, H, D), row, H * D, channel, D, seen)
    half = half_square(k_t)
    dv_t = tl.zeros([ROWS, DV], tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        dS_t = load_tile(d_sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        R = tl.load(top + state + start + column, mask=inside, other=0.0)
        bs = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
        weights = tl.exp(tl.where(seen[:, None] & inside[None, :], bs - finite(R)[None, :], float("-inf")))
        dv_t += dot(weights, dS_t, PRECISION)

    if CAUSAL:
        end = min(first // segment_len * segment_len + segment_len, n)
        for ahead in tl.range(first, end, PARTNERS, num_stages=1):
            live = ahead + partner < end
            q_t = load_tile(head_rows(q, b, ahead, rows, h, H, D), partner, H * D, channel, D, live)
            do_t = load_tile(head_rows(do, b, ahead, rows, h, H, Dv), partner, H * Dv, value_channel, Dv, live)
            log = tl.load(head_rows(log_sum, b, ahead, rows, h, H, 1) + partner * H, mask=live, other=float("inf"))
            pairs = tl.zeros([ROWS, PARTNERS], tl.float32)
            for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
                inside = start + column < M
                w_t = load_tile(directions + start * D, column, D, channel, D, inside)
                bs = key_scores(k_t, half, w_t, seen, inside, PRECISION)
                a_t = dot(w_t, tl.trans(q_t), PRECISION) - log[None, :]
                if CAREFUL:
                    for i in range(PARTNERS):
                        x = tl.where((key <= ahead + i)[:, None], bs + pick(a_t, i, 1)[None, :], float("-inf"))
                        pairs += tl.where((partner == i)[None, :], tl.sum(tl.exp(x), 1)[:, None], 0.0)
                else:
                    r = tl.max(bs, 0)
                    pairs += dot(tl.exp(bs - finite(r)[None, :]), tl.exp(a_t + r[:, None]), PRECISION)
            pairs = tl.where(key[:, None] <= ahead + partner[None, :], pairs, 0.0)
            dv_t += dot(pairs, do_t, PRECISION)

    tl.store(
        head_rows(dv, b, first, rows, h, H, Dv) + row[:, None] * (H * Dv) + value_channel[None, :],
        dv_t.to(dv.dtype.element_ty),
        mask=(key < limit)[:, None] & (value_channel < Dv)[None, :],
    )
