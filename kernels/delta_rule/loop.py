"""The delta rule on a CPU: the recurrence itself, compiled.

Forward, a step passes once over the state, in the core's first cache: it adds what it writes, and its output and what
the next step finds are sums over rows. The way back passes over the gradient of the state, then over the state again.
This is less work than products and triangular systems of chunks. An item is a group of heads of a sequence; items are
independent, threads share them out, and results are the same whatever their number. With a = exp(g), E = a S_{t-1} what
a step finds, u what it writes, and F the gradient that later steps leave of S_t,

    u_t = beta v - Eᵀ r          S_t = E + k uᵀ                    o_t = S_tᵀ q
    dw_t = Fᵀ k + (q·k) do       F_{t-1} = a (F + q doᵀ - r dwᵀ)
    dq_t = E do + (u·do) k       dk_t = F u + (u·do) q             dr_t = -E dw
    dg_t = dg_{t+1} + q ∘ E do + r ∘ dr - k ∘ F u

from the rows of S ∘ F at the end of every C steps on. These differences leave out what a step has of itself: they are
as small as the decays, and so is their rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loops import CACHE_LINE, Sequences, array, compiled, part, prefetch, sequences, shared_out
from .chunks import Chunks

# Columns of a state at a time, as tuples: their length is part of a type, so that the compiler knows and unrolls it.
WIDTHS = {width: (0,) * width for width in (16, 32, 64, 96, 128)}
AHEAD = 4  # steps, that rows are asked for before they are needed: they lie too far apart to be foreseen
MIN_WORK = 1 << 19  # numbers of states that steps pass over, for which a thread is woken


def forward(
    q: Tensor,  # [B, T, G, Dk]
    k: Tensor,  # [B, T, G, Dk]
    v: Tensor,  # [B, T, H, Dv]
    beta: Tensor,  # [B, T, H]
    log_decay: Tensor | None,  # [B, T, H] or [B, T, H, Dk]
    erase: Tensor | None,  # [B, T, H, Dk]
    first: Tensor,  # [R, H, Dk, Dv], of R sequences
    lengths: Tensor | None,  # [B]
    starts: Tensor | None,  # int64 [R + 1], of documents
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `chunks.outputs`."""
    (B, T), G, chunks = v.shape[:2], q.shape[2], Chunks.of(v.shape[1], starts)
    of = sequences("delta_rule", v, lengths, starts)
    o, u, states = (first.new_empty(shape) for shape in (v.shape, v.shape, (chunks.room * B, *first.shape[1:])))
    last = first.clone(memory_format=torch.contiguous_format)
    o = o if lengths is None else o.zero_()
    made = (_row(o), _row(u), array(states), array(last))
    given = (_lanes(first), *_rows(first.dtype, q, k, v, beta, log_decay, erase))
    _in_parallel(_forward_items, first, G, of, *given, *of, _slots(of, T, chunks.C, starts), chunks.C, *made)
    return o.to(v.dtype), last, states, u


def backward(
    do: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    first: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    last: Tensor,
    states: Tensor,
    u: Tensor,
) -> tuple[Tensor, ...]:
    """As `chunks.gradients`."""
    T, G, C, dtype = v.shape[1], q.shape[2], Chunks.of(v.shape[1], starts).C, last.dtype
    of, given = sequences("delta_rule", v, lengths, starts), (q, k, v, beta, log_decay, erase)
    found = [d_last.new_zeros(0) if x is None else x.new_zeros(x.shape, dtype=dtype) for x in given]
    dq, dk, dv, d_beta = (_row(y) for y in found[:4])
    dg = np.zeros_like(d_beta) if log_decay is None else _row(found[4])
    dr = np.empty((0, 0, 0), d_beta.dtype) if erase is None else _row(found[5])
    d_first = d_last.clone(memory_format=torch.contiguous_format)
    rows, kept = (_lanes(last), *_rows(dtype, *given)), (array(states), _row(u), _row(do.to(dtype)), array(last))
    made = (dq, dk, dv, d_beta, dg, dr, array(d_first))
    _in_parallel(_backward_items, last, G, of, *rows, *of, _slots(of, T, C, starts), C, of.longest, *kept, *made)
    return *(y if x is None else y.to(x.dtype) for x, y in zip(given, found, strict=True)), d_first


def _lanes(state: Tensor) -> tuple[int, ...]:
    """As few columns as take the state in as few parts as there can be."""
    Dv = state.shape[3]
    parts = -(-Dv // max(WIDTHS))
    return next(lanes for width, lanes in WIDTHS.items() if width * parts >= Dv)


def _slots(of: Sequences, T: int, C: int, starts: Tensor | None) -> np.ndarray:
    """The slot of each sequence's first state."""
    count = np.arange(len(of.lengths))
    return count * -(-T // C) if starts is None else of.starts[:-1] // C + count


def _rows(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, erase: Tensor | None
) -> list[np.ndarray]:
    """Those of each step; decays in place of their logarithms, 1 where there are none, and nothing of no r."""
    decay = torch.ones_like(beta) if log_decay is None else log_decay.to(dtype).exp()
    erase = beta.new_empty(0, 0, 0) if erase is None else erase
    return [_row(x.to(dtype)) for x in (q, k, v, beta, decay, erase)]


def _row(x: Tensor) -> np.ndarray:
    """[B, T, H, D] or [B, T, H] -> [B T, H, D or 1]."""
    return array((x if x.dim() == 4 else x[..., None]).flatten(0, 1))


def _in_parallel(items: Callable[..., None], state: Tensor, G: int, of: Sequences, *arguments: Any) -> None:
    """Calls items(start, stop, *arguments) on parts of the R * G items there are."""
    R, H, Dk, Dv = state.shape
    if not R:
        return
    threads = max(1, min(torch.get_num_threads(), R * G, int(of.starts[-1]) * H * Dk * Dv // MIN_WORK))
    shared_out(items, of, G, threads, *arguments)


@compiled()
def _forward_items(start, stop, lanes, q, k, v, beta, a, erase, starts, lengths, slots, C, o, u, states, last):
    H, Dv = v.shape[1:]
    G = q.shape[1]
    for item in range(start, stop):
        r, g = item // G, item % G
        begin, end = starts[r], starts[r] + lengths[r]
        for h in range(g * (H // G), (g + 1) * (H // G)):
            for low in range(0, Dv if end > begin else 0, len(lanes)):
                _write(lanes, begin, end, g, h, low, q, k, v, beta, a, erase, slots[r], C, o, u, states, last[r, h])


@compiled()
def _backward_items(
    start, stop, lanes, q, k, v, beta, a, erase, starts, lengths, slots, C, longest, states, u, do, last, dq, dk,
    dv, d_beta, dg, dr, d_state,
):  # fmt: skip
    H, Dv = v.shape[1:]
    G, Dk = q.shape[1:]
    dw, own_dr = np.empty((longest, len(lanes)), do.dtype), np.empty((longest, Dk), do.dtype)
    behind = np.empty((-(-longest // C), Dk))
    for item in range(start, stop):
        r, g = item // G, item % G
        begin, end = starts[r], starts[r] + lengths[r]
        if begin == end:
            continue
        for h in range(g * (H // G), (g + 1) * (H // G)):
            own_dr[:] = 0
            behind[:] = 0
            for low in range(0, Dv, len(lanes)):
                _back(
                    lanes, begin, end, g, h, low, q, k, v, beta, a, erase, slots[r], C, states, last[r, h], u, do,
                    dk, dv, d_beta, dg, d_state[r, h], dw, behind
                )  # fmt: skip
                _forth(
                    lanes, begin, end, g, h, low, q, k, beta, a, erase, states[slots[r], h], u, do, dw, dq, dg, dr,
                    own_dr
                )  # fmt: skip
            if not len(erase):
                for t in range(begin, end):
                    for d in range(Dk):
                        dk[t, g, d] += beta[t, h, 0] * own_dr[t - begin, d]
                        d_beta[t, h, 0] += k[t, g, d] * own_dr[t - begin, d]
            _sum_to_the_end(begin, end, h, behind, C, a, dg)


@part()
def _sum_to_the_end(begin, end, h, behind, C, a, dg):
    """Of what each step adds, which dg has, from the ends of segments on; nothing goes past what is forgotten."""
    total = np.zeros(dg.shape[2])
    for t in range(end - 1, begin - 1, -1):
        if t == end - 1 or (t + 1 - begin) % C == 0:
            total[:] = 0
            for d in range(behind.shape[1]):
                total[d % len(total)] += behind[(t - begin) // C, d]
        for d in range(len(total)):
            total[d] = 0.0 if a[t, h, d] == 0 else total[d] + dg[t, h, d]
            dg[t, h, d] = total[d]


# Four rows at a time, those behind the last and columns behind the last are 0. All that a pass reads and writes lies in
# arrays of its own, which the compiler knows not to overlap.


@part()
def _take(x, t, h, Dk, into):
    """A row, or one number in place of all of it."""
    for d in range(Dk):
        into[d] = x[t, h, d] if x.shape[2] > 1 else x[t, h, 0]


@part()
def _ask(x, t, h, low, high):
    for byte in range(low * x.itemsize, high * x.itemsize, CACHE_LINE):
        prefetch(x[t, h], byte)


@part(fastmath={"contract", "reassoc"})
def _write(lanes, begin, end, g, h, low, q, k, v, beta, a, erase, slot, C, o, u, states, state):
    Dk, high = q.shape[2], min(low + len(lanes), v.shape[2])
    rows, n, each = Dk + -Dk % 4, high - low, a.shape[2] > 1
    S, A, K = np.zeros((rows, len(lanes)), q.dtype), np.zeros(rows, q.dtype), np.zeros(rows, q.dtype)
    Q, B = np.zeros(rows, q.dtype), np.zeros(rows, q.dtype)
    U, O, R = np.zeros(len(lanes), q.dtype), np.empty(len(lanes), q.dtype), np.zeros(len(lanes), q.dtype)
    for d in range(Dk):
        for c in range(n):
            S[d, c] = state[d, low + c]
        x = a[begin, h, d * each] * (erase[begin, h, d] if len(erase) else beta[begin, h, 0] * k[begin, g, d])
        for c in range(len(lanes)):
            R[c] += x * S[d, c]
    for t in range(begin, end):
        if (t - begin) % C == 0:
            kept = states[slot + (t - begin) // C, h]
            for d in range(Dk):
                for c in range(n):
                    kept[d, low + c] = S[d, c]
        after = min(t + 1, end - 1)
        _ask(q, t + AHEAD, g, 0, Dk)
        _ask(k, t + AHEAD, g, 0, Dk)
        _ask(v, t + AHEAD, h, low, high)
        _ask(u, t + AHEAD, h, low, high)
        _ask(o, t + AHEAD, h, low, high)
        if each:
            _ask(a, t + AHEAD, h, 0, Dk)
        if len(erase):
            _ask(erase, t + AHEAD, h, 0, Dk)
        _take(a, t, h, Dk, A)
        _take(k, t, g, Dk, K)
        _take(q, t, g, Dk, Q)
        for d in range(Dk):
            x = erase[after, h, d] if len(erase) else beta[after, h, 0] * k[after, g, d]
            B[d] = x * a[after, h, d * each]
        for c in range(n):
            U[c] = beta[t, h, 0] * v[t, h, low + c] - R[c]
        O[:] = 0
        R[:] = 0
        for d in range(0, rows, 4):
            a0, a1, a2, a3 = A[d], A[d + 1], A[d + 2], A[d + 3]
            k0, k1, k2, k3 = K[d], K[d + 1], K[d + 2], K[d + 3]
            q0, q1, q2, q3 = Q[d], Q[d + 1], Q[d + 2], Q[d + 3]
            r0, r1, r2, r3 = B[d], B[d + 1], B[d + 2], B[d + 3]
            for c in range(len(lanes)):
                s0 = a0 * S[d, c] + k0 * U[c]
                s1 = a1 * S[d + 1, c] + k1 * U[c]
                s2 = a2 * S[d + 2, c] + k2 * U[c]
                s3 = a3 * S[d + 3, c] + k3 * U[c]
                S[d, c], S[d + 1, c], S[d + 2, c], S[d + 3, c] = s0, s1, s2, s3
                O[c] += q0 * s0 + q1 * s1 + q2 * s2 + q3 * s3
                R[c] += r0 * s0 + r1 * s1 + r2 * s2 + r3 * s3
        for c in range(n):
            u[t, h, low + c] = U[c]
            o[t, h, low + c] = O[c]
    for d in range(Dk):
        for c in range(n):
            state[d, low + c] = S[d, c]


@part(fastmath={"contract", "reassoc"})
def _back(
    lanes, begin, end, g, h, low, q, k, v, beta, a, erase, slot, C, states, last, u, do, dk, dv, d_beta, dg,
    d_state, dw, behind,
):  # fmt: skip
    Dk, high = q.shape[2], min(low + len(lanes), v.shape[2])
    rows, n, each, zero = Dk + -Dk % 4, high - low, a.shape[2] > 1, q.dtype.type(0)
    D, A, K = np.zeros((rows, len(lanes)), q.dtype), np.zeros(rows, q.dtype), np.zeros(rows, q.dtype)
    Q, B, F = np.zeros(rows, q.dtype), np.zeros(rows, q.dtype), np.zeros(rows, q.dtype)
    U, O = np.zeros(len(lanes), q.dtype), np.zeros(len(lanes), q.dtype)
    W, R = np.zeros(len(lanes), q.dtype), np.zeros(len(lanes), q.dtype)
    for c in range(n):
        U[c] = u[end - 1, h, low + c]
    for d in range(Dk):
        for c in range(n):
            D[d, c] = d_state[d, low + c]
        for c in range(len(lanes)):
            R[c] += k[end - 1, g, d] * D[d, c]
            F[d] += D[d, c] * U[c]
    for t in range(end - 1, begin - 1, -1):
        if t == end - 1 or (t + 1 - begin) % C == 0:
            i = (t - begin) // C
            found = last if t == end - 1 else states[slot + i + 1, h]
            for d in range(Dk):
                for c in range(n):
                    behind[i, d] += found[d, low + c] * D[d, c]
        b, qk, uo, vw = beta[t, h, 0], zero, zero, zero
        for d in range(Dk):
            qk += q[t, g, d] * k[t, g, d]
        for c in range(n):
            O[c] = do[t, h, low + c]
            W[c] = R[c] + qk * O[c]
            dv[t, h, low + c] = b * W[c]
            uo += U[c] * O[c]
            vw += v[t, h, low + c] * W[c]
        d_beta[t, h, 0] += vw
        for c in range(len(lanes)):
            dw[t - begin, c] = W[c]
        ahead = max(t - 1, begin)
        _ask(q, t - AHEAD, g, 0, Dk)
        _ask(k, t - AHEAD, g, 0, Dk)
        _ask(dk, t - AHEAD, g, 0, Dk)
        _ask(v, t - AHEAD, h, low, high)
        _ask(u, t - AHEAD, h, low, high)
        _ask(do, t - AHEAD, h, low, high)
        _ask(dv, t - AHEAD, h, low, high)
        if each:
            _ask(a, t - AHEAD, h, 0, Dk)
            _ask(dg, t - AHEAD, h, 0, Dk)
        if len(erase):
            _ask(erase, t - AHEAD, h, 0, Dk)
        change = zero
        for d in range(Dk):
            dk[t, g, d] += F[d] + uo * q[t, g, d]
            B[d] = erase[t, h, d] if len(erase) else b * k[t, g, d]
            if each:
                dg[t, h, d] -= k[t, g, d] * F[d]
            else:
                change -= k[t, g, d] * F[d]
        if not each:
            dg[t, h, 0] += change
        _take(a, t, h, Dk, A)
        _take(q, t, g, Dk, Q)
        _take(k, ahead, g, Dk, K)
        for c in range(n):
            U[c] = u[ahead, h, low + c]
        R[:] = 0
        for d in range(0, rows, 4):
            a0, a1, a2, a3 = A[d], A[d + 1], A[d + 2], A[d + 3]
            k0, k1, k2, k3 = K[d], K[d + 1], K[d + 2], K[d + 3]
            q0, q1, q2, q3 = Q[d], Q[d + 1], Q[d + 2], Q[d + 3]
            r0, r1, r2, r3 = B[d], B[d + 1], B[d + 2], B[d + 3]
            f0, f1, f2, f3 = zero, zero, zero, zero
            for c in range(len(lanes)):
                s0 = a0 * (D[d, c] + q0 * O[c] - r0 * W[c])
                s1 = a1 * (D[d + 1, c] + q1 * O[c] - r1 * W[c])
                s2 = a2 * (D[d + 2, c] + q2 * O[c] - r2 * W[c])
                s3 = a3 * (D[d + 3, c] + q3 * O[c] - r3 * W[c])
                D[d, c], D[d + 1, c], D[d + 2, c], D[d + 3, c] = s0, s1, s2, s3
                R[c] += k0 * s0 + k1 * s1 + k2 * s2 + k3 * s3
                f0 += s0 * U[c]
                f1 += s1 * U[c]
                f2 += s2 * U[c]
                f3 += s3 * U[c]
            F[d], F[d + 1], F[d + 2], F[d + 3] = f0, f1, f2, f3
    for d in range(Dk):
        for c in range(n):
            d_state[d, low + c] = D[d, c]


@part(fastmath={"contract", "reassoc"})
def _forth(lanes, begin, end, g, h, low, q, k, beta, a, erase, first, u, do, dw, dq, dg, dr, own_dr):
    Dk, high = q.shape[2], min(low + len(lanes), u.shape[2])
    rows, n, each, zero = Dk + -Dk % 4, high - low, a.shape[2] > 1, q.dtype.type(0)
    S, A, K = np.zeros((rows, len(lanes)), q.dtype), np.zeros(rows, q.dtype), np.zeros(rows, q.dtype)
    E, F = np.empty(rows, q.dtype), np.empty(rows, q.dtype)
    U, O, W = np.zeros(len(lanes), q.dtype), np.zeros(len(lanes), q.dtype), np.zeros(len(lanes), q.dtype)
    for d in range(Dk):
        for c in range(n):
            S[d, c] = first[d, low + c]
    for t in range(begin, end):
        _take(a, t, h, Dk, A)
        _take(k, t, g, Dk, K)
        _ask(q, t + AHEAD, g, 0, Dk)
        _ask(k, t + AHEAD, g, 0, Dk)
        _ask(dq, t + AHEAD, g, 0, Dk)
        _ask(u, t + AHEAD, h, low, high)
        _ask(do, t + AHEAD, h, low, high)
        if each:
            _ask(a, t + AHEAD, h, 0, Dk)
            _ask(dg, t + AHEAD, h, 0, Dk)
        if len(erase):
            _ask(erase, t + AHEAD, h, 0, Dk)
            _ask(dr, t + AHEAD, h, 0, Dk)
        uo = zero
        for c in range(n):
            U[c], O[c], W[c] = u[t, h, low + c], do[t, h, low + c], dw[t - begin, c]
            uo += U[c] * O[c]
        for d in range(0, rows, 4):
            a0, a1, a2, a3 = A[d], A[d + 1], A[d + 2], A[d + 3]
            k0, k1, k2, k3 = K[d], K[d + 1], K[d + 2], K[d + 3]
            e0, e1, e2, e3 = zero, zero, zero, zero
            f0, f1, f2, f3 = zero, zero, zero, zero
            for c in range(len(lanes)):
                s0, s1, s2, s3 = a0 * S[d, c], a1 * S[d + 1, c], a2 * S[d + 2, c], a3 * S[d + 3, c]
                e0 += s0 * O[c]
                e1 += s1 * O[c]
                e2 += s2 * O[c]
                e3 += s3 * O[c]
                f0 += s0 * W[c]
                f1 += s1 * W[c]
                f2 += s2 * W[c]
                f3 += s3 * W[c]
                S[d, c] = s0 + k0 * U[c]
                S[d + 1, c] = s1 + k1 * U[c]
                S[d + 2, c] = s2 + k2 * U[c]
                S[d + 3, c] = s3 + k3 * U[c]
            E[d], E[d + 1], E[d + 2], E[d + 3] = e0, e1, e2, e3
            F[d], F[d + 1], F[d + 2], F[d + 3] = f0, f1, f2, f3
        change = zero
        for d in range(Dk):
            dq[t, g, d] += E[d] + uo * k[t, g, d]
            r = erase[t, h, d] if len(erase) else beta[t, h, 0] * k[t, g, d]
            if len(erase):
                dr[t, h, d] -= F[d]
            else:
                own_dr[t - begin, d] -= F[d]
            if each:
                dg[t, h, d] += q[t, g, d] * E[d] - r * F[d]
            else:
                change += q[t, g, d] * E[d] - r * F[d]
        if not each:
            dg[t, h, 0] += change
