"""Linear attention with a decay per channel, or one of a head, on a CPU: the recurrence itself, compiled.

A step reads, decays and writes every number of the state once, which is no more work than chunks are, and needs no sums
of decays: each is a factor of at most 1, so that nothing overflows and one of 0 forgets exactly. An item is a head of a
sequence; items are independent, threads share them out, and results are the same whatever their number.

With a = exp(g), D_t the gradient of S_t, and what is left of both at the next step that is taken,

    E_t = a_t S_{t-1}    S_t = E_t + k_t v_tᵀ    F_t = a_{t+1} D_{t+1}    D_t = F_t + q_t do_tᵀ

    o_t = E_tᵀ q_t + (q_t·k_t) v_t        dv_t = F_tᵀ k_t + (q_t·k_t) do_t
    dq_t = E_t do_t + (v_t·do_t) k_t      dk_t = F_t v_t + (v_t·do_t) q_t

    dg_t = sum_{i ≥ t} (q_i ∘ E_i do_i - k_i ∘ F_i v_i)

up to the end of a segment, and the gradient of the next one's first decay, the rows of S ∘ F summed there. Differences
leave out what a step has of itself: they are as small as the decays, and so is their rounding.

In both directions there is the same once more with E and F the other way, in time and in what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loops import CACHE_LINE, Sequences, array, compiled, part, prefetch, sequences, shared_out

STEPS = 4  # at a time that the state is passed over
WIDTH = 80  # columns of the state at a time: 64 and a normaliser's, at most
SEGMENT = 64  # steps, a multiple of STEPS
MIN_WORK = 1 << 18  # numbers of states: a thread is woken for as many, about 0.1 ms


def forward(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    g: Tensor,  # [B, T, H, Dk or 1]
    first: Tensor | None,  # [R, H, Dk, Dv], of R sequences
    lengths: Tensor | None,  # [B]
    starts: Tensor | None,  # [R + 1], of documents
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The outputs [B, T, H, Dv] and the last states [R, H, Dk, Dv]."""
    of = sequences("linear_attention", q, lengths, starts)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = _states(first, q, v, g, of)
    given = _rows(q, k, v, g.exp())
    _in_parallel(_forward_items, state, of, causal, _width(v.shape[3]), *given, *of, *_rows(o), state.numpy())
    return o, state.to(v.dtype)


def backward(
    do: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    first: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g and the first states."""
    of = sequences("linear_attention", q, lengths, starts)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g)]
    state, d_first = _states(first, q, v, g, of), _states(d_state, q, v, g, of)
    given, made = _rows(q, k, v, g.exp(), do), _rows(*gradients)
    of_head = np.zeros(made[3].shape[:2] if g.shape[3] == 1 else (0, 0))  # what many channels sum up to is small
    sizes = _width(v.shape[3]), -(-of.longest // SEGMENT)
    _in_parallel(
        _backward_items, state, of, causal, *sizes, *given, *of, state.numpy(), *made, of_head, d_first.numpy()
    )
    dq, dk, dv, dg = gradients
    return dq, dk, dv, dg, d_first.to(v.dtype)


def _states(first: Tensor | None, q: Tensor, v: Tensor, g: Tensor, of: Sequences) -> Tensor:
    """A copy, or zeros. One decay of a head leaves less of each step's rounding to the next where it is in double
    precision, as that of chunks is less."""
    dtype = v.dtype if g.shape[3] > 1 else torch.float64
    if first is not None:
        return first.clone(memory_format=torch.contiguous_format).to(dtype)
    return q.new_zeros(len(of.lengths), *q.shape[2:], v.shape[3], dtype=dtype)


def _rows(*tensors: Tensor) -> list[np.ndarray]:
    """[B, T, H, D] -> [B T, H, D] each."""
    return [array(x).reshape(-1, *x.shape[2:]) for x in tensors]


def _width(columns: int) -> int:
    """Of equal parts of so many columns."""
    parts = max(1, -(-columns // WIDTH))
    return max(1, -(-columns // parts))


def _in_parallel(items: Callable[..., None], state: Tensor, of: Sequences, *arguments: Any) -> None:
    """Calls items(start, stop, *arguments) on parts of the R * H items there are."""
    R, H, Dk, Dv = state.shape
    threads = max(1, min(torch.get_num_threads(), R * H, int(of.starts[-1]) * H * Dk * Dv // MIN_WORK))
    shared_out(items, of, H, threads, *arguments)


@compiled()
def _forward_items(start, stop, causal, width, q, k, v, a, starts, lengths, o, state):
    _, H, Dk, Dv = state.shape
    S, none, of_none = np.zeros((Dk, WIDTH), state.dtype), np.empty((0, 0, 0), q.dtype), np.empty((0, 0))
    taken = (k, v, q, none, none, o, none)
    for item in range(start, stop):
        r, h = item // H, item % H
        begin, end = starts[r], starts[r] + lengths[r]
        o[end : starts[r + 1], h] = 0
        for t in range(begin, end):
            own = _dot(q[t, h], k[t, h])
            for c in range(Dv):
                o[t, h, c] = own * v[t, h, c]
        for low in range(0, Dv, width):
            high = min(low + width, Dv)
            _load(S, state[r, h], low, high)
            _sweep(S, begin, end, end, a, taken, h, low, high, none, of_none)
            for d in range(Dk):
                for c in range(low, high):
                    state[r, h, d, c] = S[d, c - low]
            if not causal:
                S[:] = 0
                _sweep(S, end - 1, begin - 1, end, a, taken, h, low, high, none, of_none)


@compiled()
def _backward_items(
    start, stop, causal, width, segments, q, k, v, a, do, starts, lengths, state, dq, dk, dv, dg, of_head, d_state
):
    _, H, Dk, Dv = state.shape
    S, none = np.zeros((Dk, WIDTH), state.dtype), np.empty((0, 0, 0), q.dtype)
    kept = np.empty((segments + 1, Dk, WIDTH), state.dtype)  # the state ahead of each segment, and the last one
    each = a.shape[2] > 1
    # The gradient of each segment's first decay, and of one behind them all.
    known = np.empty((segments + 1, a.shape[2]))
    for item in range(start, stop):
        r, h = item // H, item % H
        begin, end = starts[r], starts[r] + lengths[r]
        n = -(-(end - begin) // SEGMENT)
        known[:] = 0
        _start_gradients(begin, end, starts[r + 1], h, q, k, v, do, dq, dk, dv, dg)
        for low in range(0, Dv, width):
            high = min(low + width, Dv)
            there, back = (k, v, none, do, q, none, dq), (q, do, k, v, k, dv, dk)
            for way in range(1 if causal else 2):
                if way == 0:
                    _load(S, state[r, h], low, high)
                else:
                    S[:] = 0
                for i in range(n):
                    here, beyond = begin + i * SEGMENT, min(begin + (i + 1) * SEGMENT, end)
                    _load(kept[i], S, 0, WIDTH)
                    _sweep(S, here, beyond, end, a, there, h, low, high, dg, of_head)
                _load(kept[n], S, 0, WIDTH)
                if way == 0:
                    _load(S, d_state[r, h], low, high)
                else:
                    S[:] = 0
                for d in range(Dk):
                    known[n, d * each] += _exact_dot(kept[n, d], S[d])
                for i in range(n - 1, -1, -1):
                    here, beyond = begin + i * SEGMENT, min(begin + (i + 1) * SEGMENT, end)
                    _sweep(S, beyond - 1, here - 1, end, a, back, h, low, high, dg, of_head)
                    for d in range(Dk):
                        known[i, d * each] += a[here, h, d * each] * _exact_dot(kept[i, d], S[d])
                if way == 0:
                    for d in range(Dk):
                        for c in range(low, high):
                            d_state[r, h, d, c] = S[d, c - low] * (a[begin, h, d * each] if begin < end else 1)
                there, back = back, there
        for i in range(n):
            here, beyond = begin + i * SEGMENT, min(begin + (i + 1) * SEGMENT, end)
            _sum_to_the_end(here, beyond, h, known[i], known[i + 1].copy(), a, dg, of_head)


@part()
def _load(S, state, low, high):
    S[:] = 0
    for d in range(len(S)):
        for c in range(low, high):
            S[d, c - low] = state[d, c]


@part(fastmath={"contract", "reassoc"})
def _dot(x, y):
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@part(fastmath={"contract", "reassoc"})
def _exact_dot(x, y):
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@part()
def _start_gradients(begin, end, beyond, h, q, k, v, do, dq, dk, dv, dg):
    """What steps have of themselves, and zeros behind the last one."""
    for t in range(begin, end):
        of_values, of_keys = _dot(v[t, h], do[t, h]), _dot(q[t, h], k[t, h])
        for d in range(k.shape[2]):
            dq[t, h, d] = of_values * k[t, h, d]
            dk[t, h, d] = of_values * q[t, h, d]
        for d in range(v.shape[2]):
            dv[t, h, d] = of_keys * do[t, h, d]
    dg[begin:end, h] = 0
    for x in (dq, dk, dv, dg):
        x[end:beyond, h] = 0


@part()
def _sum_to_the_end(begin, end, h, first, total, a, dg, of_head):
    """Of a segment's steps, of which dg has what each adds to the `total` behind, up to the `first`, which is known.

    What is forgotten has no gradient, and nothing later has one for what is before.
    """
    for t in range(end - 1, begin, -1):
        for d in range(dg.shape[2]):
            change = np.float64(dg[t, h, d]) if dg.shape[2] > 1 else of_head[t, h]
            total[d] = total[d] + change if a[t, h, d] != 0 else 0.0
            dg[t, h, d] = total[d]
    for d in range(dg.shape[2]):
        dg[begin, h, d] = first[d]


# What the few steps have that the state is passed over for lies in local arrays with rows of a constant length, so that
# the compiler knows what overlaps and makes vectors of columns: for that the pass has to be in the function that makes
# them before it is compiled (`inline="always"`). Steps behind the last one decay and add nothing.


@part(inline="always")
def _pass(S, A, X, Y, U, W, O, R, eighths):
    """Over the state, in few steps: O += Eᵀ u, where there is U, and R += E w, where there is W."""
    for d in range(len(S)):
        a0, a1, a2, a3 = A[0, d], A[1, d], A[2, d], A[3, d]
        x0, x1, x2, x3 = X[0, d], X[1, d], X[2, d], X[3, d]
        if U is not None:
            u0, u1, u2, u3 = U[0, d], U[1, d], U[2, d], U[3, d]
        if W is not None:
            r0, r1, r2, r3 = R[0, d], R[1, d], R[2, d], R[3, d]
        for c in range(8 * eighths):
            e = a0 * S[d, c]
            s = e + x0 * Y[0, c]
            if W is not None:
                r0 += e * W[0, c]
            if U is not None:
                O[0, c] += u0 * e
            e = a1 * s
            s = e + x1 * Y[1, c]
            if W is not None:
                r1 += e * W[1, c]
            if U is not None:
                O[1, c] += u1 * e
            e = a2 * s
            s = e + x2 * Y[2, c]
            if W is not None:
                r2 += e * W[2, c]
            if U is not None:
                O[2, c] += u2 * e
            e = a3 * s
            s = e + x3 * Y[3, c]
            if W is not None:
                r3 += e * W[3, c]
            if U is not None:
                O[3, c] += u3 * e
            S[d, c] = s
        if W is not None:
            R[0, d], R[1, d], R[2, d], R[3, d] = r0, r1, r2, r3


@part(fastmath={"contract", "reassoc"})
def _sweep(S, first, beyond, end, a, taken, h, low, high, change, of_head):
    """Takes columns `low` to `high` of a head's state, S [Dk, WIDTH], through steps up or down, `first` to `beyond`.

    Of `taken`, (x, y, u, w, partner, columns, rows), what a step leaves of S is E, then S is E + x yᵀ, and the step has

        columns += Eᵀ u        rows += E w        change += partner ∘ E w, or -= on the way down

    None of what has an empty u or w; where a head has one decay, the sum of the last is added to `of_head`. The
    sequence ends before `end`.
    """
    x, y, u, w, partner, columns, rows = taken
    to_columns, to_rows = len(u) > 0, len(w) > 0
    Dk, n, back, width = S.shape[0], abs(beyond - first), beyond < first, high - low
    eighths = (width + 7) >> 3
    each = a.shape[2] > 1
    A, X = np.empty((STEPS, Dk), S.dtype), np.empty((STEPS, Dk), S.dtype)
    U, R = np.zeros((STEPS, Dk), S.dtype), np.empty((STEPS, Dk), S.dtype)
    Y, W = np.zeros((STEPS, WIDTH), S.dtype), np.zeros((STEPS, WIDTH), S.dtype)
    O = np.empty((STEPS, WIDTH), S.dtype)
    for i in range(0, n, STEPS):
        for j in range(STEPS):
            t = first - i - j if back else first + i + j
            if i + j >= n:
                A[j], X[j], Y[j] = 1, 0, 0
                continue
            decay = t + 1 if back else t
            for d in range(Dk):
                X[j, d] = x[t, h, d]
                A[j, d] = a[decay, h, d * each] if decay < end else 1
            for c in range(high - low):
                Y[j, c] = y[t, h, low + c]
            if to_columns:
                for d in range(Dk):
                    U[j, d] = u[t, h, d]
            if to_rows:
                for c in range(high - low):
                    W[j, c] = w[t, h, low + c]
            soon = t - STEPS if back else t + STEPS
            for byte in range(0, Dk * S.itemsize, CACHE_LINE):
                prefetch(x[soon, h], byte)
                if each:
                    prefetch(a[soon, h], byte)
                if to_columns:
                    prefetch(u[soon, h], byte)
                if to_rows:
                    prefetch(rows[soon, h], byte)
                    if each:
                        prefetch(change[soon, h], byte)
                    prefetch(partner[soon, h], byte)
            for byte in range(low * S.itemsize, high * S.itemsize, CACHE_LINE):
                prefetch(y[soon, h], byte)
                if to_columns:
                    prefetch(columns[soon, h], byte)
                if to_rows:
                    prefetch(w[soon, h], byte)
        R[:] = 0
        O[:] = 0
        if not to_rows:
            _pass(S, A, X, Y, U, None, O, None, eighths)
        elif not to_columns:
            _pass(S, A, X, Y, None, W, None, R, eighths)
        else:
            _pass(S, A, X, Y, U, W, O, R, eighths)
        for j in range(min(STEPS, n - i)):
            t = first - i - j if back else first + i + j
            if to_columns:
                for c in range(high - low):
                    columns[t, h, low + c] += O[j, c]
            if to_rows:
                sign = S.dtype.type(-1 if back else 1)
                for d in range(Dk):
                    rows[t, h, d] += R[j, d]
                if each:
                    for d in range(Dk):
                        change[t, h, d] += sign * partner[t, h, d] * R[j, d]
                else:
                    of_head[t, h] += sign * _exact_dot(partner[t, h], R[j])
