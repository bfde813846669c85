"""The kernel of every pass, forward and backward. Steps are counted in the direction of the pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, piece_of, place, valid_steps


@triton.jit
def _times(g, count):
    return tl.where(count == 0, 0.0, g * count)  # a decay of -inf, no time at all, is 0


@triton.jit
def _place(origin, b, T, step, n, down):
    return (b * T if origin is None else origin) + place(step, n, down)


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _linear_kernel(
    q,  # [B, T, H, Dk]
    k,  # [B, T, H, Dk]
    v,  # [B, T, H, Dv]
    g,  # [H] or [B, T, H], float32, or None
    q_more,  # [B, T, H], float32, one more channel of q, or None: 1 if k has one more
    k_more,  # the same of k
    o,  # [B, T, H, Dv], or None: only the states are wanted
    norms,  # [B, T, H], float32: the normaliser, infinite where it is 0, or None: there is none
    memory,  # [B·H·segments, Dk, Dv], [..., Dk], [..., Dv] to start from, or None: zero
    keys,
    values,
    memory_end,  # the same behind the last step, or None: not wanted
    keys_end,
    values_end,
    through,  # [B·H, segments]: the sum of log decays, where the states behind each segment are wanted
    lengths,  # [B] or None
    pieces,  # [P, 4], of documents in one row, which are the segments; their states have a row a document; or None
    T,
    H,
    Dk,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    PER_STEP: tl.constexpr,  # g is
    LATE: tl.constexpr,  # the decay of the step before counts, as on the way back
    DOWN: tl.constexpr,  # from the last step to the first
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(Dv, DV)
    block = tl.program_id(0) % blocks
    item = tl.program_id(0) // blocks
    segment = item % segments
    head = item // segments  # of B·H
    b, h = (head // H).to(tl.int64), head % H
    if pieces is None:
        origin, n = None, valid_steps(lengths, b, T)
    else:
        document, origin, n, start = piece_of(pieces, segment)
        if start >= n:
            return
        if CAUSAL and o is None:
            if start + segment_len >= n:  # nobody goes on from there
                return
    i, dk, dv = tl.arange(0, STEPS), tl.arange(0, DK), block * DV + tl.arange(0, DV)
    in_k, in_v = dk < Dk, dv < Dv

    # The state to start from.
    at = item.to(tl.int64) if CAUSAL else head.to(tl.int64) if pieces is None else document * H + h
    matrix, in_matrix = dk[:, None] * Dv + dv[None, :], in_k[:, None] & in_v[None, :]
    S, z, r = tl.zeros([DK, DV], tl.float32), tl.zeros([DK], tl.float32), tl.zeros([DV], tl.float32)
    if memory is not None:
        S = tl.load(memory + at * Dk * Dv + matrix, mask=in_matrix, other=0.0)
    if keys is not None:
        z = tl.load(keys + at * Dk + dk, mask=in_k, other=0.0)
    if values is not None:
        r = tl.load(values + at * Dv + dv, mask=in_v, other=0.0)
    decayed = tl.zeros([], tl.float32)

    if pieces is None:
        start = segment * segment_len
        end = T
    else:
        end = n
    for first in tl.range(start, min(start + segment_len, end), STEPS, num_stages=STAGES):
        step = first + i
        valid = step < n
        row = _place(origin, b, T, step, n, DOWN) * H + h
        k_t = tl.load(k + row[:, None] * Dk + dk[None, :], mask=valid[:, None] & in_k[None, :], other=0.0)
        v_t = tl.load(v + row[:, None] * Dv + dv[None, :], mask=valid[:, None] & in_v[None, :], other=0.0)
        f = tl.full([STEPS], 1.0, tl.float32)
        if k_more is not None:
            f = tl.load(k_more + row, mask=valid, other=0.0)

        if g is not None:
            if PER_STEP:
                counted = step - 1 if LATE else step
                reads = (counted >= 0) & valid
                g_t = tl.load(g + _place(origin, b, T, counted, n, DOWN) * H + h, mask=reads, other=0.0)
                # A sum of its own for each pair: differences would lose small decays, and make NaN of -inf.
                between = tl.cumsum(tl.where(i[:, None] > i[None, :], g_t[:, None], 0.0), 0)
                since = tl.cumsum(g_t, 0)
                total = tl.sum(g_t, 0)
                until = tl.sum(tl.where((i == STEPS - 1)[:, None], between, 0.0), 0)
            else:
                g_h = tl.load(g + h)
                counted = tl.minimum(step, n - 1)
                begin = tl.maximum(first, 1) if LATE else first
                between = _times(g_h, counted[:, None] - counted[None, :])
                since = _times(g_h, tl.maximum(counted - begin + 1, 0))
                total = _times(g_h, tl.maximum(tl.minimum(first + STEPS, n) - begin, 0))
                until = _times(g_h, tl.maximum(tl.minimum(first + STEPS, n) - 1 - counted, 0))
        if o is not None:
            q_t = tl.load(q + row[:, None] * Dk + dk[None, :], mask=valid[:, None] & in_k[None, :], other=0.0)
            e = tl.full([STEPS], 1.0, tl.float32)
            if q_more is not None:
                e = tl.load(q_more + row, mask=valid, other=0.0)
            out = dot(q_t, S, PRECISION)
            if MORE:
                out += e[:, None] * r[None, :]
            if norms is not None:
                norm = tl.sum(q_t.to(tl.float32) * z[None, :], 1)
            if g is not None:
                out *= tl.exp(since)[:, None]
                if norms is not None:
                    norm *= tl.exp(since)
            if CAUSAL:
                pairs = dot(q_t, tl.trans(k_t), PRECISION)
                if MORE:
                    pairs += e[:, None] * f[None, :]
                if g is not None:
                    pairs *= tl.exp(between)
                pairs = tl.where(i[:, None] >= i[None, :], pairs, 0.0)
                out += dot(pairs, v_t, PRECISION)
                if norms is not None:
                    norm += tl.sum(pairs, 1)
            if norms is not None:
                norm = tl.where(valid & (norm != 0), norm, float("inf"))
                out /= norm[:, None]
                if block == 0:
                    tl.store(norms + row, norm, mask=step < end)
            out = tl.where(valid[:, None], out, 0.0).to(o.dtype.element_ty)
            tl.store(o + row[:, None] * Dv + dv[None, :], out, mask=(step < end)[:, None] & in_v[None, :])
        if CAUSAL or o is None:
            u_t = v_t.to(tl.float32)
            if g is not None:
                u_t *= tl.exp(until)[:, None]
                S, z, r = S * tl.exp(total), z * tl.exp(total), r * tl.exp(total)
                decayed += total
            S += dot(tl.trans(k_t), u_t, PRECISION)
            if norms is not None or keys_end is not None:
                k_f = k_t.to(tl.float32)
                if g is not None:
                    k_f *= tl.exp(until)[:, None]
                z += tl.sum(k_f, 0)
            if MORE:
                r += tl.sum(f[:, None] * u_t, 0)

    if o is None or (segment == segments - 1 if pieces is None else start + segment_len >= n):
        at = item.to(tl.int64) if o is None else head.to(tl.int64) if pieces is None else document * H + h
        if LATE and g is not None and o is not None:  # through the first step of the sequence, the last one here
            last = g + h
            if PER_STEP:
                last = g + _place(origin, b, T, tl.maximum(n - 1, 0), n, DOWN) * H + h
            factor = tl.exp(tl.load(last, mask=n > 0, other=0.0))
            S, r = S * factor, r * factor
        if memory_end is not None:
            tl.store(memory_end + at * Dk * Dv + matrix, S, mask=in_matrix)
        if keys_end is not None:
            if block == 0:
                tl.store(keys_end + at * Dk + dk, z, mask=in_k)
        if values_end is not None:
            tl.store(values_end + at * Dv + dv, r, mask=in_v)
        if o is None and through is not None:
            if block == 0:
                tl.store(through + item, decayed)


@triton.jit(do_not_specialize=["segments"])
def _carry_kernel(initial, added, through, before, last, firsts, size, segments, H, BLOCK: tl.constexpr):
    """The state that each segment starts from, [B·H, segments, size] as what each adds; `initial` is [B·H, size].

    Where documents have the segments from `firsts` [N + 1] on, a program has one of them and a head of H; `initial`,
    and `last`, the state behind each document, are [N·H, size]. `before` and `last` may be None: not wanted.
    """
    blocks = tl.cdiv(size, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    S = tl.zeros([BLOCK], tl.float32)
    if firsts is None:
        begin, end = 0, segments
    else:
        begin = tl.load(firsts + head // H).to(tl.int32)
        end = tl.load(firsts + head // H + 1).to(tl.int32)
    if initial is not None:
        S = tl.load(initial + head * size + at, mask=inside, other=0.0)
    for segment in range(begin, end):
        item = (head if firsts is None else head % H) * segments + segment
        if before is not None:
            tl.store(before + item * size + at, S, mask=inside)
        if through is not None:
            S *= tl.exp(tl.load(through + item))
        S += tl.load(added + item * size + at, mask=inside, other=0.0)
    if last is not None:
        tl.store(last + head * size + at, S, mask=inside)
