"""The kernel of every pass with a decay per channel of the state. Steps are counted in the direction of the pass.

The decay between two steps of a chunk is a vector, which is never made for all pairs at once. A loop goes through the
steps of the chunk:

* Where keys have the decays, queries go back from where they stand: at each step they meet its key, channel by channel,
  and then take its decay upon them. Behind the loop they are what the chunk's first state is read with.
* Where values have them, outputs go forward to where they stand, from what the chunk's first state gives: at each step
  they take its decay upon them, and then its value by the weight of the pair.

On the same way, keys or values go forward to the end of the chunk, where the state takes them up. All that multiplies
is a product of decays, no quotient and no difference of sums: small decays stay beside large ones, and what is
forgotten is exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, piece_of, valid_steps
from .recurrence import _place


@triton.jit
def _of_step(x, row, channel, width, there):
    """[channels] of a row of x, 0 if it is not there."""
    return tl.load(x + row * width + channel, mask=tl.where(there, channel < width, False), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _channel_kernel(
    q,  # [B, T, H, Dk]
    k,  # [B, T, H, Dk]
    v,  # [B, T, H, Dv]
    g,  # [B, T, H, Dk or Dv], float32
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
    through,  # [B·H, segments, Dk or Dv]: the sum of log decays, where the states behind each segment are wanted
    lengths,  # [B] or None
    pieces,  # [P, 4], of documents in one row, which are the segments; their states have a row a document; or None
    T,
    H,
    Dk,
    Dv,
    segment_len,
    segments,
    OF_VALUES: tl.constexpr,  # g is of the channels of v, and there is no normaliser; otherwise of k, which has no more
    LATE: tl.constexpr,  # the decay of the step before counts, as on the way back
    DOWN: tl.constexpr,  # from the last step to the first
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    blocks = tl.cdiv(Dv, DV)
    block = tl.program_id(0) % blocks
    item = tl.program_id(0) // blocks
    segment = item % segments
    head = item // segments  # of B·H
    b, h = (head // H).to(tl.int64), head % H
    if pieces is None:
        origin, n = None, valid_steps(lengths, b, T)
        start, end = segment * segment_len, T
    else:
        document, origin, n, start = piece_of(pieces, segment)
        end = n
        if start >= n:
            return
        if o is None:
            if start + segment_len >= n:  # nobody goes on from there
                return
    i, dk, dv = tl.arange(0, STEPS), tl.arange(0, DK), block * DV + tl.arange(0, DV)
    in_k, in_v = dk < Dk, dv < Dv
    if OF_VALUES:
        c, C = dv, Dv
    else:
        c, C = dk, Dk

    # The state to start from.
    at = item.to(tl.int64)
    matrix, in_matrix = dk[:, None] * Dv + dv[None, :], in_k[:, None] & in_v[None, :]
    S, z, r = tl.zeros([DK, DV], tl.float32), tl.zeros([DK], tl.float32), tl.zeros([DV], tl.float32)
    if memory is not None:
        S = tl.load(memory + at * Dk * Dv + matrix, mask=in_matrix, other=0.0)
    if keys is not None:
        z = tl.load(keys + at * Dk + dk, mask=in_k, other=0.0)
    if values is not None:
        r = tl.load(values + at * Dv + dv, mask=in_v, other=0.0)
    decayed = tl.zeros([DV if OF_VALUES else DK], tl.float32)

    for first in range(start, tl.minimum(start + segment_len, end), STEPS):
        step = first + i
        valid = step < n
        row = _place(origin, b, T, step, n, DOWN) * H + h
        k_t = tl.load(k + row[:, None] * Dk + dk[None, :], mask=valid[:, None] & in_k[None, :], other=0.0)
        v_t = tl.load(v + row[:, None] * Dv + dv[None, :], mask=valid[:, None] & in_v[None, :], other=0.0)
        counted = step - 1 if LATE else step
        reads = ((counted >= 0) & valid)[:, None] & (c < C)[None, :]
        g_t = tl.load(
            g + (_place(origin, b, T, counted, n, DOWN) * H + h)[:, None] * C + c[None, :], mask=reads, other=0.0
        )
        total = tl.sum(g_t, 0)
        if o is not None:
            q_t = tl.load(q + row[:, None] * Dk + dk[None, :], mask=valid[:, None] & in_k[None, :], other=0.0)
        if OF_VALUES:
            e, f = tl.full([STEPS], 1.0, tl.float32), tl.full([STEPS], 1.0, tl.float32)
            if q_more is not None:
                e = tl.load(q_more + row, mask=valid, other=0.0)
            if k_more is not None:
                f = tl.load(k_more + row, mask=valid, other=0.0)
            if o is not None:
                pairs = dot(q_t, tl.trans(k_t), PRECISION)
                out = dot(q_t, S, PRECISION)
                if MORE:
                    pairs += e[:, None] * f[None, :]
                    out += e[:, None] * r[None, :]
            added = v_t.to(tl.float32)
        else:
            if o is not None:
                read = q_t.to(tl.float32)
                pairs = tl.zeros([STEPS, STEPS], tl.float32)
            added = k_t.to(tl.float32)

        for turn in range(STEPS):
            t = turn if OF_VALUES else STEPS - 1 - turn
            here = first + t
            at_t = _place(origin, b, T, here, n, DOWN) * H + h
            if LATE:
                at_g = _place(origin, b, T, here - 1, n, DOWN) * H + h
                a_t = tl.exp(_of_step(g, at_g, c, C, (here >= 1) & (here < n)))
            else:
                a_t = tl.exp(_of_step(g, at_t, c, C, here < n))
            later = (i >= t)[:, None]
            added = tl.where(later, added, added * a_t[None, :])
            if o is not None:
                if OF_VALUES:
                    weight = tl.sum(tl.where((i == t)[None, :], pairs, 0.0), 1)
                    u = _of_step(v, at_t, c, C, here < n)
                    out = tl.where(later, out * a_t[None, :] + weight[:, None] * u[None, :], out)
                else:
                    met = tl.sum(read * _of_step(k, at_t, c, C, here < n)[None, :], 1)
                    pairs = tl.where(later & (i == t)[None, :], met[:, None], pairs)
                    read = tl.where(later, read * a_t[None, :], read)

        if o is not None:
            if not OF_VALUES:
                if norms is not None:
                    norm = tl.sum(read * z[None, :], 1) + tl.sum(pairs, 1)
                    norm = tl.where(valid & (norm != 0), norm, float("inf"))
                    if block == 0:
                        tl.store(norms + row, norm, mask=step < end)
                out = dot(read, S, PRECISION) + dot(pairs, v_t, PRECISION)
                if norms is not None:
                    out /= norm[:, None]
            out = tl.where(valid[:, None], out, 0.0).to(o.dtype.element_ty)
            tl.store(o + row[:, None] * Dv + dv[None, :], out, mask=(step < end)[:, None] & in_v[None, :])
        if OF_VALUES:
            if MORE:
                r = r * tl.exp(total) + tl.sum(f[:, None] * added, 0)
            S = S * tl.exp(total)[None, :] + dot(tl.trans(k_t), added, PRECISION)
        else:
            if norms is not None or keys_end is not None:
                z = z * tl.exp(total) + tl.sum(added, 0)
            S = S * tl.exp(total)[:, None] + dot(tl.trans(added), v_t, PRECISION)
        decayed += total

    if o is None or (segment == segments - 1 if pieces is None else start + segment_len >= n):
        at = item.to(tl.int64) if o is None else head.to(tl.int64) if pieces is None else document * H + h
        if LATE and o is not None:  # through the first step of the sequence, the last one here
            last = _place(origin, b, T, tl.maximum(n - 1, 0), n, DOWN) * H + h
            factor = tl.exp(_of_step(g, last, c, C, n > 0))
            if OF_VALUES:
                S, r = S * factor[None, :], r * factor
            else:
                S, z = S * factor[:, None], z * factor
        if memory_end is not None:
            tl.store(memory_end + at * Dk * Dv + matrix, S, mask=in_matrix)
        if keys_end is not None:
            if block == 0:
                tl.store(keys_end + at * Dk + dk, z, mask=in_k)
        if values_end is not None:
            tl.store(values_end + at * Dv + dv, r, mask=in_v)
        if through is not None:
            tl.store(through + item.to(tl.int64) * C + c, decayed, mask=(c < C) & (OF_VALUES | (block == 0)))
