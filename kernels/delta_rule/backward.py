"""The kernels of the backward pass, behind the first one of the forward pass.

One goes through a sequence from its last chunk to its first, with the gradient of the state in registers, and leaves
that of each chunk's end. The others take all chunks at once: what each has written and the gradients of its pairs, then
those of what is given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, load_tile
from .tiles import between, chunk_of, decays, of_steps, rows_of, sequence_of, square


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    q,  # [B, T, G, Dk]; with a decay per channel, this, k and erase with what `_pairs_kernel` made of them
    k,  # [B, T, G, Dk]
    beta,  # [B, T, H], float32
    erase,  # [B, T, H, Dk], or None: beta k
    through,  # [B, T, H], float32, or None
    after,
    total,  # [slots, H] or [slots, H, Dk], float32, or None
    pairs,  # [slots, H, STEPS, STEPS]
    inverse,
    do,  # [B, T, H, Dv]
    d_last,  # [R·H, Dk, Dv] of R sequences, float32, or None: zero
    dw,  # [B, T, H, Dv], float32, of what each step would write by itself
    d_states,  # [slots, H, Dk, Dv], those behind each chunk
    d_initial,  # [R·H, Dk, Dv], float32, or None: not wanted
    lengths,  # [B] or None
    starts,  # [R + 1], of documents in one row, or None
    before,  # [R + 1], the slots ahead of each document, or None
    T,
    H,
    G,
    Dk,
    Dv,
    PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STEPS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(Dv, DV)
    item = tl.program_id(0) // blocks
    sequence, h = item // H, item % H
    i, d, e = tl.arange(0, STEPS), tl.arange(0, DK), tl.program_id(0) % blocks * DV + tl.arange(0, DV)
    if PER_CHANNEL:
        c, C = d, Dk
    else:
        c, C = tl.arange(0, 1), 1
    head = h // (H // G)
    matrix, in_matrix = d[:, None] * Dv + e[None, :], (d < Dk)[:, None] & (e < Dv)[None, :]
    turned = i[None, :] * STEPS + i[:, None]
    D = tl.zeros([DK, DV], tl.float32)
    if d_last is not None:
        D = tl.load(d_last + item.to(tl.int64) * Dk * Dv + matrix, mask=in_matrix, other=0.0)
    origin, first_slot, n, end = sequence_of(starts, before, lengths, sequence, T, STEPS)
    chunks = tl.cdiv(end, STEPS)
    for turn in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - turn
        ahead, slot = chunk * STEPS, first_slot + chunk
        left = n - ahead
        valid = i < left
        kept = d_states + (slot.to(tl.int64) * H + h) * Dk * Dv
        tl.store(kept + matrix, D.to(d_states.dtype.element_ty), mask=in_matrix)
        k_t = load_tile(rows_of(k, origin, ahead, head, G, Dk), i, G * Dk, d, Dk, valid)
        du = dot(k_t, D, PRECISION)
        if after is not None:
            du *= of_steps(rows_of(after, origin, ahead, h, H, 1), i, H, left)[:, None]
        do_t = load_tile(rows_of(do, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        du += dot(tl.load(square(pairs, slot, h, H, STEPS) + turned), do_t, PRECISION)
        dw_t = dot(tl.load(square(inverse, slot, h, H, STEPS) + turned), du, EXACT)
        inside = (i < end - ahead)[:, None] & (e < Dv)[None, :]
        tl.store(rows_of(dw, origin, ahead, h, H, Dv) + i[:, None] * (H * Dv) + e[None, :], dw_t, mask=inside)
        if total is not None:
            D *= tl.load(total + (slot.to(tl.int64) * H + h) * C + c, mask=c < C, other=0.0)[:, None]
        if erase is None:
            r_t = k_t
            dw_t *= of_steps(rows_of(beta, origin, ahead, h, H, 1), i, H, left)[:, None]
        else:
            r_t = load_tile(rows_of(erase, origin, ahead, h, H, Dk), i, H * Dk, d, Dk, valid)
        do_f = do_t
        if through is not None:
            through_t = of_steps(rows_of(through, origin, ahead, h, H, 1), i, H, left)[:, None]
            do_f, dw_t = do_t * through_t, dw_t * through_t
        q_t = load_tile(rows_of(q, origin, ahead, head, G, Dk), i, G * Dk, d, Dk, valid)
        D += dot(tl.trans(q_t), do_f, PRECISION) - dot(tl.trans(r_t), dw_t, PRECISION)
    if d_initial is not None:
        tl.store(d_initial + item.to(tl.int64) * Dk * Dv + matrix, D, mask=in_matrix)


@triton.jit(do_not_specialize=["T"])
def _inner_kernel(
    k,  # [B, T, G, Dk]
    v,  # [B, T, H, Dv]
    beta,  # [B, T, H], float32
    erase,  # [B, T, H, Dk], or None: beta k; with a decay per channel, as `_pairs_kernel` made it
    g,  # [B, T, H], float32, or None
    through,
    inverse,  # [slots, H, STEPS, STEPS]
    states,  # [slots, H, Dk, Dv]
    do,  # [B, T, H, Dv]
    dw,  # [B, T, H, Dv], float32
    u,  # [B, T, H, Dv], what each step writes; this and all behind it to be filled
    d_reading,  # [slots, H, STEPS, STEPS], of the pairs of queries below the diagonal, times what decays a head
    d_erasing,  # the same of what erases
    lengths,  # [B] or None
    pieces,  # [slots, 4], of documents in one row, or None
    T,
    H,
    G,
    Dk,
    Dv,
    PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STEPS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    origin, ahead, left, _ = chunk_of(pieces, lengths, slot, T, STEPS)
    if pieces is not None:
        if left <= 0:
            return
    i, d = tl.arange(0, STEPS), tl.arange(0, DK)
    valid = i < left
    beta_t = of_steps(rows_of(beta, origin, ahead, h, H, 1), i, H, left)[None, :]
    if erase is None:
        r_t = load_tile(rows_of(k, origin, ahead, h // (H // G), G, Dk), i, G * Dk, d, Dk, valid)
    else:
        r_t = load_tile(rows_of(erase, origin, ahead, h, H, Dk), i, H * Dk, d, Dk, valid)
    # What a step writes is made as a column: no product is turned around to be multiplied.
    T_t = tl.load(square(inverse, slot, h, H, STEPS) + i[None, :] * STEPS + i[:, None])
    of_queries, of_erasers = tl.zeros([STEPS, STEPS], tl.float32), tl.zeros([STEPS, STEPS], tl.float32)
    kept = states + (slot.to(tl.int64) * H + h) * Dk * Dv
    for start in tl.range(0, Dv, DV, num_stages=STAGES):
        e = start + tl.arange(0, DV)
        in_v = e < Dv
        S_t = tl.load(kept + d[None, :] * Dv + e[:, None], mask=(d < Dk)[None, :] & in_v[:, None], other=0.0)
        at, inside = i[None, :] * (H * Dv) + e[:, None], valid[None, :] & in_v[:, None]
        v_t = tl.load(rows_of(v, origin, ahead, h, H, Dv) + at, mask=inside, other=0.0)
        found = dot(S_t, tl.trans(r_t), PRECISION)  # [DV, STEPS]
        if through is not None:
            found *= of_steps(rows_of(through, origin, ahead, h, H, 1), i, H, left)[None, :]
        if erase is None:
            found *= beta_t
        u_t = dot(v_t.to(tl.float32) * beta_t - found, T_t, EXACT)
        tl.store(rows_of(u, origin, ahead, h, H, Dv) + at, u_t.to(u.dtype.element_ty), mask=inside)
        do_t = load_tile(rows_of(do, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        dw_t = load_tile(rows_of(dw, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        of_queries += dot(do_t, u_t, PRECISION)
        of_erasers -= dot(dw_t, u_t, PRECISION)
    if g is not None:
        weights = between(rows_of(g, origin, ahead, h, H, 1), i, H, left)
        of_queries, of_erasers = of_queries * weights, of_erasers * weights
    below, at = i[:, None] > i[None, :], i[:, None] * STEPS + i[None, :]
    of_queries, of_erasers = tl.where(below, of_queries, 0.0), tl.where(below, of_erasers, 0.0)
    tl.store(square(d_reading, slot, h, H, STEPS) + at, of_queries.to(d_reading.dtype.element_ty))
    tl.store(square(d_erasing, slot, h, H, STEPS) + at, of_erasers.to(d_erasing.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def _outer_kernel(
    q,  # [B, T, G, Dk]
    k,  # [B, T, G, Dk]
    v,  # [B, T, H, Dv]
    beta,  # [B, T, H], float32
    erase,  # [B, T, H, Dk], or None: beta k
    g,  # [B, T, H] or [B, T, H, Dk], float32, or None
    states,  # [slots, H, Dk, Dv]
    d_states,
    do,  # [B, T, H, Dv]
    dw,  # [B, T, H, Dv], float32
    u,  # [B, T, H, Dv]
    d_reading,  # [slots, H, STEPS, STEPS]
    d_erasing,
    dq,  # [B, T, H, Dk], of each head for itself; this and all behind it to be filled
    dk,  # [B, T, H, Dk]
    dv,  # [B, T, H, Dv]
    d_beta,  # [B, T, H, blocks], float32, what each block of channels adds
    dr,  # [B, T, H, Dk], or None: r is beta k
    dg,  # [B, T, H, blocks] or [B, T, H, Dk], float32, or None
    lengths,  # [B] or None
    pieces,  # [slots, 4], of documents in one row, or None
    T,
    H,
    G,
    Dk,
    Dv,
    PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STEPS: tl.constexpr,
    DK: tl.constexpr,  # channels of k in a program
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(Dk, DK)
    block, item = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    slot, h = item // H, item % H
    origin, ahead, left, there = chunk_of(pieces, lengths, slot, T, STEPS)
    if pieces is not None:
        if left <= 0:
            return
    i, d = tl.arange(0, STEPS), block * DK + tl.arange(0, DK)
    if PER_CHANNEL:
        c, C = d, Dk
    else:
        c, C = tl.arange(0, 1), 1
    valid, in_k = i < left, d < Dk
    head = h // (H // G)
    q_c, k_c = rows_of(q, origin, ahead, head, G, Dk), rows_of(k, origin, ahead, head, G, Dk)
    k_t = load_tile(k_c, i, G * Dk, d, Dk, valid)
    g_c = g
    if g is not None:
        g_c = rows_of(g, origin, ahead, h, H, C)
        through, after, total = decays(g_c, i, H * C, c, C, left, STEPS)
    of_queries, of_erasers = square(d_reading, slot, h, H, STEPS), square(d_erasing, slot, h, H, STEPS)
    at, turned = i[:, None] * STEPS + i[None, :], i[None, :] * STEPS + i[:, None]
    to_k, made_k = i[:, None] * (H * Dk) + d[None, :], (i < there)[:, None] & in_k[None, :]
    kept = (slot.to(tl.int64) * H + h) * Dk * Dv

    # What queries read.
    found, own = tl.zeros([STEPS, DK], tl.float32), tl.zeros([STEPS], tl.float32)
    for start in tl.range(0, Dv, DV, num_stages=STAGES):
        e = start + tl.arange(0, DV)
        do_t = load_tile(rows_of(do, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        u_t = load_tile(rows_of(u, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        S_t = tl.load(states + kept + d[None, :] * Dv + e[:, None], mask=in_k[None, :] & (e < Dv)[:, None], other=0.0)
        found += dot(do_t, S_t, PRECISION)
        own += tl.sum(do_t.to(tl.float32) * u_t.to(tl.float32), 1)
    if g is not None:
        found *= through
    if PER_CHANNEL:
        found += _of_earlier(of_queries, k_c, g_c, i, d, G * Dk, H * Dk, Dk, left, STEPS, DK)
    else:
        found += dot(tl.load(of_queries + at), k_t, PRECISION)
    q_t = load_tile(q_c, i, G * Dk, d, Dk, valid)
    change = found * q_t.to(tl.float32)
    if not PER_CHANNEL:
        change = tl.sum(change, 1)[:, None]
    found += own[:, None] * k_t.to(tl.float32)
    tl.store(rows_of(dq, origin, ahead, h, H, Dk) + to_k, found.to(dq.dtype.element_ty), mask=made_k)

    # What is erased.
    found, written = tl.zeros([STEPS, DK], tl.float32), tl.zeros([STEPS], tl.float32)
    beta_t = of_steps(rows_of(beta, origin, ahead, h, H, 1), i, H, left)[:, None]
    for start in tl.range(0, Dv, DV, num_stages=STAGES):
        e = start + tl.arange(0, DV)
        dw_t = load_tile(rows_of(dw, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        S_t = tl.load(states + kept + d[None, :] * Dv + e[:, None], mask=in_k[None, :] & (e < Dv)[:, None], other=0.0)
        found -= dot(dw_t, S_t, PRECISION)
        if block == 0:
            v_t = load_tile(rows_of(v, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
            written += tl.sum(v_t.to(tl.float32) * dw_t, 1)
            dv_t, made_v = (dw_t * beta_t).to(dv.dtype.element_ty), (i < there)[:, None] & (e < Dv)[None, :]
            tl.store(rows_of(dv, origin, ahead, h, H, Dv) + i[:, None] * (H * Dv) + e[None, :], dv_t, mask=made_v)
    if g is not None:
        found *= through
    if PER_CHANNEL:
        found += _of_earlier(of_erasers, k_c, g_c, i, d, G * Dk, H * Dk, Dk, left, STEPS, DK)
    else:
        found += dot(tl.load(of_erasers + at), k_t, PRECISION)
    if erase is None:
        r_t = k_t.to(tl.float32) * beta_t
        written += tl.sum(found * k_t.to(tl.float32), 1)
    else:
        r_t = load_tile(rows_of(erase, origin, ahead, h, H, Dk), i, H * Dk, d, Dk, valid)
        tl.store(rows_of(dr, origin, ahead, h, H, Dk) + to_k, found.to(dr.dtype.element_ty), mask=made_k)
    tl.store(
        rows_of(d_beta, origin, ahead, h * blocks + block, H * blocks, 1) + i * H * blocks, written, mask=i < there
    )
    if PER_CHANNEL:
        change += found * r_t.to(tl.float32)
    else:
        change += tl.sum(found * r_t.to(tl.float32), 1)[:, None]

    # What is written.
    more = own[:, None] * q_t.to(tl.float32)
    if erase is None:
        more += beta_t * found
    if PER_CHANNEL:
        r_c, r_stride = k_c, G * Dk
        if erase is not None:
            r_c, r_stride = rows_of(erase, origin, ahead, h, H, Dk), H * Dk
        beta_c = rows_of(beta, origin, ahead, h, H, 1)
        off = tl.zeros([STEPS, DK], tl.float32)
        for turn in range(tl.minimum(left, STEPS)):
            t = tl.minimum(left, STEPS) - 1 - turn
            q_s = tl.load(q_c + t * (G * Dk) + d, mask=in_k, other=0.0).to(tl.float32)
            r_s = tl.load(r_c + t * r_stride + d, mask=in_k, other=0.0).to(tl.float32)
            if erase is None:
                r_s *= tl.load(beta_c + t * H)
            off += tl.load(of_queries + t * STEPS + i).to(tl.float32)[:, None] * q_s[None, :]
            off += tl.load(of_erasers + t * STEPS + i).to(tl.float32)[:, None] * r_s[None, :]
            a_s = tl.exp(tl.load(g_c + t * (H * Dk) + d, mask=in_k, other=0.0))
            off = tl.where((i < t)[:, None], off * a_s[None, :], off)
    else:
        off = dot(tl.load(of_queries + turned), q_t, PRECISION)
        off += dot(tl.load(of_erasers + turned), r_t, EXACT if erase is None else PRECISION)
    more += off
    change -= off * k_t.to(tl.float32) if PER_CHANNEL else tl.sum(off * k_t.to(tl.float32), 1)[:, None]
    found, lasting = tl.zeros([STEPS, DK], tl.float32), tl.zeros([DK], tl.float32)
    for start in tl.range(0, Dv, DV, num_stages=STAGES):
        e = start + tl.arange(0, DV)
        u_t = load_tile(rows_of(u, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        of_state, inside = kept + d[None, :] * Dv + e[:, None], in_k[None, :] & (e < Dv)[:, None]
        D_t = tl.load(d_states + of_state, mask=inside, other=0.0)
        found += dot(u_t, D_t, PRECISION)
        if g is not None:
            S_t = tl.load(states + of_state, mask=inside, other=0.0)
            lasting += tl.sum(S_t.to(tl.float32) * D_t.to(tl.float32), 0)
    if g is not None:
        found *= after
    dk_t = (found + more).to(dk.dtype.element_ty)
    tl.store(rows_of(dk, origin, ahead, h, H, Dk) + to_k, dk_t, mask=made_k)

    # Each decay is in what later steps have of earlier ones and of the state before, and in what the state keeps.
    if g is not None:
        to_g, in_g = i[:, None] * (H * C) + c[None, :], (c < C)[None, :]
        lasting *= total
        until = i[:, None] <= i[None, :]
        kept_at_end = found * k_t.to(tl.float32)
        if PER_CHANNEL:
            dg_t = dot(tl.where(until, 1.0, 0.0), change, EXACT) + dot(tl.where(until, 0.0, 1.0), kept_at_end, EXACT)
            dg_t += lasting[None, :]
        else:
            ends = tl.where(until, tl.trans(change), tl.sum(kept_at_end, 1)[None, :])
            dg_t = (tl.sum(ends, 1) + tl.sum(lasting, 0))[:, None]
        if PER_CHANNEL:
            to = rows_of(dg, origin, ahead, h, H, C) + to_g
        else:
            to = rows_of(dg, origin, ahead, h * blocks + block, H * blocks, 1) + i[:, None] * H * blocks + c[None, :]
        lasting_at_all = tl.exp(tl.load(g_c + to_g, mask=valid[:, None] & in_g, other=0.0)) != 0
        dg_t = tl.where(lasting_at_all & valid[:, None], dg_t, 0.0)
        tl.store(to, dg_t, mask=(i < there)[:, None] & in_g)


@triton.jit
def _of_earlier(weights, k_c, g_c, i, d, k_stride, g_stride, Dk, left, STEPS: tl.constexpr, DK: tl.constexpr):
    """[STEPS, DK], the sum of earlier keys by weights [STEPS, STEPS], each decayed on the way, channel by channel."""
    sums = tl.zeros([STEPS, DK], tl.float32)
    inside = d < Dk
    for t in range(tl.minimum(left, STEPS)):
        k_s = tl.load(k_c + t * k_stride + d, mask=inside, other=0.0).to(tl.float32)
        a_s = tl.exp(tl.load(g_c + t * g_stride + d, mask=inside, other=0.0))
        sums = tl.where((i >= t)[:, None], sums * a_s[None, :], sums)
        sums += tl.load(weights + i * STEPS + t).to(tl.float32)[:, None] * k_s[None, :]
    return sums
