"""The kernels of the forward pass.

The first one makes what all states of a chunk have in common, of all chunks at once. The second goes through a sequence
chunk by chunk, a program a head and a block of value channels, with the state in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, load_tile
from .tiles import between, chunk_of, decays, inverse_of, of_steps, rows_of, sequence_of, square


@triton.jit
def _rows(q, k, beta, erase, origin, ahead, i, d, h, H, G, Dk, left, PER_CHANNEL: tl.constexpr):
    """Those of some steps, q, k and r: r without beta where it is beta k, but for a decay per channel."""
    head, valid = h // (H // G), i < left
    q_t = load_tile(rows_of(q, origin, ahead, head, G, Dk), i, G * Dk, d, Dk, valid)
    k_t = load_tile(rows_of(k, origin, ahead, head, G, Dk), i, G * Dk, d, Dk, valid)
    r_t = k_t
    if erase is not None:
        r_t = load_tile(rows_of(erase, origin, ahead, h, H, Dk), i, H * Dk, d, Dk, valid)
    if PER_CHANNEL:
        q_t, k_t, r_t = q_t.to(tl.float32), k_t.to(tl.float32), r_t.to(tl.float32)
        if erase is None:
            r_t *= of_steps(rows_of(beta, origin, ahead, h, H, 1), i, H, left)[:, None]
    return q_t, k_t, r_t


@triton.jit
def _half(
    q, k, beta, erase, g, pairs, inverse, origin, ahead, i, h, H, G, Dk, left,
    PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, DK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What N steps have of each other, in its place; and the inverse [N, N] of their own triangular system."""
    A, M = tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32)
    if PER_CHANNEL:
        d = tl.arange(0, DK)
        q_t, _, r_t = _rows(q, k, beta, erase, origin, ahead, i, d, h, H, G, Dk, left, PER_CHANNEL)
        # Queries go back from where they stand: at each step they meet its key, and then take its decay upon them.
        k_c, g_c = rows_of(k, origin, ahead, h // (H // G), G, Dk), rows_of(g, origin, ahead, h, H, Dk)
        for turn in range(tl.minimum(left, N)):
            t = tl.minimum(left, N) - 1 - turn
            k_s = tl.load(k_c + t * (G * Dk) + d, mask=d < Dk, other=0.0).to(tl.float32)
            a_s = tl.exp(tl.load(g_c + t * (H * Dk) + d, mask=d < Dk, other=0.0))
            here, later = (i == t)[None, :], (i >= t)[:, None]
            A = tl.where(here, tl.sum(q_t * k_s[None, :], 1)[:, None], A)
            M = tl.where(here, tl.sum(r_t * k_s[None, :], 1)[:, None], M)
            q_t, r_t = tl.where(later, q_t * a_s[None, :], q_t), tl.where(later, r_t * a_s[None, :], r_t)
    else:
        for start in range(0, Dk, CHANNELS):
            d = start + tl.arange(0, CHANNELS)
            q_t, k_t, r_t = _rows(q, k, beta, erase, origin, ahead, i, d, h, H, G, Dk, left, PER_CHANNEL)
            A += dot(q_t, tl.trans(k_t), PRECISION)
            M += dot(r_t, tl.trans(k_t), PRECISION)
        if g is not None:
            weights = between(rows_of(g, origin, ahead, h, H, 1), i, H, left)
            A, M = A * weights, M * weights
        if erase is None:
            M *= of_steps(rows_of(beta, origin, ahead, h, H, 1), i, H, left)[:, None]
    T = inverse_of(tl.where(i[:, None] > i[None, :], M, 0.0), i, N)
    at = i[:, None] * (2 * N) + i[None, :]
    tl.store(pairs + at, tl.where(i[:, None] >= i[None, :], A, 0.0).to(pairs.dtype.element_ty))
    tl.store(inverse + at, T)
    return T


@triton.jit(do_not_specialize=["T"])
def _pairs_kernel(
    q,  # [B, T, G, Dk]
    k,  # [B, T, G, Dk]
    beta,  # [B, T, H], float32
    erase,  # [B, T, H, Dk], or None: beta k
    g,  # [B, T, H] or [B, T, H, Dk], float32, or None
    pairs,  # [slots, H, STEPS, STEPS], of queries and keys; this and all behind it to be filled
    inverse,  # [slots, H, STEPS, STEPS], float32, of I + the pairs of what erases and keys
    through,  # [B, T, H], float32, what is left at each step of what was before its chunk; or, with a decay per
    after,  # channel, [B, T, H, Dk], queries with that, and keys with what is left of each behind the chunk
    erasers,  # [B, T, H, Dk], with a decay per channel, what erases likewise
    total,  # [slots, H] or [slots, H, Dk], float32, what is left behind the chunk of what was before it
    lengths,  # [B] or None
    pieces,  # [slots, 4], of documents in one row, or None
    T,
    H,
    G,
    Dk,
    PER_CHANNEL: tl.constexpr,  # g is
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STEPS: tl.constexpr,
    DK: tl.constexpr,
    CHANNELS: tl.constexpr,  # of k in a product
):
    """Half a chunk after the other, and then what the second has of the first."""
    N: tl.constexpr = STEPS // 2
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    origin, ahead, left, there = chunk_of(pieces, lengths, slot, T, STEPS)
    if pieces is not None:
        if left <= 0:
            return
    i = tl.arange(0, N)
    pairs, inverse = square(pairs, slot, h, H, STEPS), square(inverse, slot, h, H, STEPS)
    T1 = _half(
        q, k, beta, erase, g, pairs, inverse, origin, ahead, i, h, H, G, Dk, left,
        PER_CHANNEL, PRECISION, N, DK, CHANNELS,
    )  # fmt: skip
    corner = N * STEPS + N
    T2 = _half(
        q, k, beta, erase, g, pairs + corner, inverse + corner, origin, ahead + N, i, h, H, G, Dk, left - N,
        PER_CHANNEL, PRECISION, N, DK, CHANNELS,
    )  # fmt: skip

    if g is not None:
        total += (slot.to(tl.int64) * H + h) * (Dk if PER_CHANNEL else 1)
    A, M = tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32)
    for start in range(0, Dk, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        q1, k1, r1 = _rows(q, k, beta, erase, origin, ahead, i, d, h, H, G, Dk, left, PER_CHANNEL)
        q2, k2, r2 = _rows(q, k, beta, erase, origin, ahead + N, i, d, h, H, G, Dk, left - N, PER_CHANNEL)
        if PER_CHANNEL:
            g_c = rows_of(g, origin, ahead, h, H, Dk)
            through1, after1, total1 = decays(g_c, i, H * Dk, d, Dk, left, N)
            through2, after2, total2 = decays(g_c + N * H * Dk, i, H * Dk, d, Dk, left - N, N)
            tl.store(total + d, total1 * total2, mask=d < Dk)
            _fill(through, q1 * through1, origin, ahead, h, H, i, d, Dk, there)
            _fill(erasers, r1 * through1, origin, ahead, h, H, i, d, Dk, there)
            _fill(after, k2 * after2, origin, ahead + N, h, H, i, d, Dk, there - N)
            q2, r2, k1 = q2 * through2, r2 * through2, k1 * after1
            _fill(through, q2 * total1[None, :], origin, ahead + N, h, H, i, d, Dk, there - N)
            _fill(erasers, r2 * total1[None, :], origin, ahead + N, h, H, i, d, Dk, there - N)
            _fill(after, k1 * total2[None, :], origin, ahead, h, H, i, d, Dk, there)
        A += dot(q2, tl.trans(k1), PRECISION)
        M += dot(r2, tl.trans(k1), EXACT if PER_CHANNEL else PRECISION)
    if g is not None:
        if not PER_CHANNEL:
            g_c, c = rows_of(g, origin, ahead, h, H, 1), tl.arange(0, 1)
            through1, after1, total1 = decays(g_c, i, H, c, 1, left, N)
            through2, after2, total2 = decays(g_c + N * H, i, H, c, 1, left - N, N)
            tl.store(total + c, total1 * total2)
            _fill(through, through1, origin, ahead, h, H, i, c, 1, there)
            _fill(through, through2 * total1[None, :], origin, ahead + N, h, H, i, c, 1, there - N)
            _fill(after, after1 * total2[None, :], origin, ahead, h, H, i, c, 1, there)
            _fill(after, after2, origin, ahead + N, h, H, i, c, 1, there - N)
            A, M = A * through2 * tl.trans(after1), M * through2 * tl.trans(after1)
    if erase is None:
        if not PER_CHANNEL:
            M *= of_steps(rows_of(beta, origin, ahead + N, h, H, 1), i, H, left - N)[:, None]
    at, nothing = i[:, None] * STEPS + i[None, :], tl.zeros([N, N], tl.float32)
    tl.store(pairs + N * STEPS + at, A.to(pairs.dtype.element_ty))
    tl.store(pairs + N + at, nothing.to(pairs.dtype.element_ty))
    tl.store(inverse + N * STEPS + at, -dot(T2, dot(M, T1, EXACT), EXACT))
    tl.store(inverse + N + at, nothing)


@triton.jit
def _fill(x, value, origin, ahead, h, H, i, c, width, there):
    to = rows_of(x, origin, ahead, h, H, width) + i[:, None] * (H * width) + c[None, :]
    tl.store(to, value.to(x.dtype.element_ty), mask=(i < there)[:, None] & (c < width)[None, :])


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q,  # [B, T, G, Dk]; with a decay per channel, this, k and erase with what `_pairs_kernel` made of them
    k,  # [B, T, G, Dk]
    v,  # [B, T, H, Dv]
    beta,  # [B, T, H], float32
    erase,  # [B, T, H, Dk], or None: beta k
    through,  # [B, T, H], float32, or None
    after,
    total,  # [slots, H] or [slots, H, Dk], float32, or None
    pairs,  # [slots, H, STEPS, STEPS]
    inverse,
    initial,  # [R·H, Dk, Dv] of R sequences, float32, or None: zero
    o,  # [B, T, H, Dv]
    states,  # [slots, H, Dk, Dv], those before each chunk, or None: not wanted
    last,  # [R·H, Dk, Dv], float32, or None: not wanted
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
    at = i[:, None] * STEPS + i[None, :]
    S = tl.zeros([DK, DV], tl.float32)
    if initial is not None:
        S = tl.load(initial + item.to(tl.int64) * Dk * Dv + matrix, mask=in_matrix, other=0.0)
    origin, first_slot, n, end = sequence_of(starts, before, lengths, sequence, T, STEPS)
    for chunk in tl.range(0, tl.cdiv(end, STEPS), num_stages=STAGES):
        ahead, slot = chunk * STEPS, first_slot + chunk
        left = n - ahead
        valid = i < left
        if states is not None:
            kept = states + (slot.to(tl.int64) * H + h) * Dk * Dv
            tl.store(kept + matrix, S.to(states.dtype.element_ty), mask=in_matrix)
        v_t = load_tile(rows_of(v, origin, ahead, h, H, Dv), i, H * Dv, e, Dv, valid)
        beta_t = of_steps(rows_of(beta, origin, ahead, h, H, 1), i, H, left)[:, None]
        k_t = load_tile(rows_of(k, origin, ahead, head, G, Dk), i, G * Dk, d, Dk, valid)
        if erase is None:
            found = dot(k_t, S, PRECISION) * beta_t
        else:
            r_t = load_tile(rows_of(erase, origin, ahead, h, H, Dk), i, H * Dk, d, Dk, valid)
            found = dot(r_t, S, PRECISION)
        q_t = load_tile(rows_of(q, origin, ahead, head, G, Dk), i, G * Dk, d, Dk, valid)
        out = dot(q_t, S, PRECISION)
        if through is not None:
            through_t = of_steps(rows_of(through, origin, ahead, h, H, 1), i, H, left)[:, None]
            found, out = found * through_t, out * through_t
        u = dot(tl.load(square(inverse, slot, h, H, STEPS) + at), v_t.to(tl.float32) * beta_t - found, EXACT)
        out += dot(tl.load(square(pairs, slot, h, H, STEPS) + at), u, PRECISION)
        out = tl.where(valid[:, None], out, 0.0).to(o.dtype.element_ty)
        inside = (i < end - ahead)[:, None] & (e < Dv)[None, :]
        tl.store(rows_of(o, origin, ahead, h, H, Dv) + i[:, None] * (H * Dv) + e[None, :], out, mask=inside)
        if total is not None:
            S *= tl.load(total + (slot.to(tl.int64) * H + h) * C + c, mask=c < C, other=0.0)[:, None]
        if after is not None:
            u *= of_steps(rows_of(after, origin, ahead, h, H, 1), i, H, left)[:, None]
        S += dot(tl.trans(k_t), u, PRECISION)
    if last is not None:
        tl.store(last + item.to(tl.int64) * Dk * Dv + matrix, S, mask=in_matrix)
