"""The selective scan on CPU: one compiled loop forward and one backward.

Work is cut into items, a sequence times `WIDTH` channels, whose states stay in a core's cache. Items are independent,
threads share them out, and results are the same whatever their number: what is summed over channels is summed item by
item first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..exponentials import exp
from ..loops import Sequences, array, compiled, put, rows, sequences, shared_out
from . import pieces
from .pieces import PIECE

WIDTH = 64  # channels of an item
MIN_WORK = 1 << 17  # states times steps: a thread is woken for as much, about 0.1 ms


def scan(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `pieces.scan`.

    Raises:
        ValueError: lengths outside [0, T].
    """
    T, ends = v.shape[1], sequences("selective_scan", v, lengths, starts)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    kept = pieces.marks(v, A, keep)
    state = v.new_zeros(len(ends.lengths), *A.shape)
    if initial_state is not None:
        state.copy_(initial_state)
    _in_parallel(
        _scan_items,
        *(v.shape[2], A.shape[0], ends),
        *(rows(v), rows(dt), array(A), rows(write), rows(read)),
        *ends,
        *(T, PIECE, reverse),  # compiled code would not notice another PIECE
        *(y.flatten(0, 1).numpy(), state.numpy(), kept.numpy()),
    )
    return y, state, kept


def scan_backward(
    dy: Tensor,
    d_state: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `pieces.scan_backward`."""
    (B, T, D), N, ends = v.shape, A.shape[0], sequences("selective_scan", v, lengths, starts)
    R, blocks = len(ends.lengths), -(-D // WIDTH)
    dv, d_dt = (torch.empty_like(v, memory_format=torch.contiguous_format) for _ in range(2))
    dA = v.new_zeros(R, N, D)
    d_write, d_read = (v.new_zeros(blocks, B * T, N) for _ in range(2))
    d_initial = d_state.clone(memory_format=torch.contiguous_format)
    initial = v.new_zeros(R, N, D) if initial_state is None else initial_state
    _in_parallel(
        _backward_items,
        *(D, N, ends),
        *(rows(dy), rows(v), rows(dt), array(A), rows(write), rows(read), array(initial), array(kept)),
        *ends,
        *(T, PIECE, reverse),
        *(dv.flatten(0, 1).numpy(), d_dt.flatten(0, 1).numpy(), dA.numpy()),
        *(d_write.numpy(), d_read.numpy(), d_initial.numpy()),
    )
    of_write, of_read = (x.sum(0).view(B, T, N) for x in (d_write, d_read))
    return dv, d_dt, dA.sum(0), of_write, of_read, d_initial


def _in_parallel(items: Callable[..., None], D: int, N: int, ends: Sequences, *arguments: Any) -> None:
    """Calls items(start, stop, *arguments) on parts of the R * (blocks of channels) items there are."""
    blocks = -(-D // WIDTH)
    threads = max(1, min(torch.get_num_threads(), int(ends.lengths.sum()) * blocks * N * WIDTH // MIN_WORK))
    shared_out(items, ends, blocks, threads, *arguments)


# Sums over channels become vectors only where their order is free.


@compiled(fastmath={"contract", "reassoc"})
def _scan_items(start, stop, v, dt, A, write, read, starts, lengths, T, piece, reverse, y, state, marks):
    N, D = A.shape
    blocks = -(-D // WIDTH)
    keep = marks.shape[1] > 0
    edge = piece - 1 if reverse else 0
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * WIDTH
        high = min(low + WIDTH, D)
        begin, end, n = starts[b], starts[b + 1], lengths[b]
        row = begin // T
        s, rate = state[b, :, low:high].copy(), A[:, low:high].copy()
        out = np.empty_like(s[0])
        t, step = (begin + n - 1, -1) if reverse else (begin, 1)
        for _ in range(n):
            place = t - row * T
            if keep and place % piece == edge:
                for j in range(N):
                    put(s[j], marks[row, place // piece, j, low:high])
            v_t, dt_t = v[t, low:high], dt[t, low:high]
            out[:] = 0
            for j in range(N):
                w, r = write[t, j], read[t, j]
                for d in range(high - low):
                    s[j, d] = exp(dt_t[d] * rate[j, d]) * s[j, d] + w * v_t[d]
                    out[d] += r * s[j, d]
            put(out, y[t, low:high])
            t += step
        for j in range(N):
            put(s[j], state[b, j, low:high])
        y[begin + n : end, low:high] = 0


@compiled(fastmath={"contract", "reassoc"})
def _backward_items(
    start, stop, dy, v, dt, A, write, read, initial, marks, starts, lengths, T, piece, reverse,
    dv, d_dt, dA, d_write, d_read, d_state,
):  # fmt: skip
    N, D = A.shape
    blocks = -(-D // WIDTH)
    for item in range(start, stop):
        b, block = item // blocks, item % blocks
        low, high = block * WIDTH, min(block * WIDTH + WIDTH, D)
        width = high - low
        begin, end, n = starts[b], starts[b + 1], lengths[b]
        row = begin // T
        rate, p = A[:, low:high].copy(), d_state[b, :, low:high].copy()
        of_rate, of_v, of_dt = np.zeros_like(p), np.empty_like(p[0]), np.empty_like(p[0])
        zero = np.zeros(1, p.dtype)[0]
        h, a = np.empty((piece + 1, N, width), p.dtype), np.empty((piece, N, width), p.dtype)
        left, step = n, -1 if reverse else 1
        while left > 0:
            # The steps of one piece, the last ones taken that are left: how many, and the first of them.
            t = begin + left - 1 if not reverse else begin + n - left
            inside = (t - row * T) % piece
            count = min(left, (piece - inside if reverse else inside + 1))
            t -= (count - 1) * step
            known = initial[b] if count == left else marks[row, (t - row * T) // piece]
            for j in range(N):
                put(known[j, low:high], h[0, j])
            for k in range(count):
                v_t, dt_t = v[t + k * step, low:high], dt[t + k * step, low:high]
                for j in range(N):
                    w = write[t + k * step, j]
                    for d in range(width):
                        a[k, j, d] = exp(dt_t[d] * rate[j, d])
                        h[k + 1, j, d] = a[k, j, d] * h[k, j, d] + w * v_t[d]
            for k in range(count - 1, -1, -1):
                u = t + k * step
                v_t, dt_t, dy_t = v[u, low:high], dt[u, low:high], dy[u, low:high]
                of_v[:] = 0
                of_dt[:] = 0
                for j in range(N):
                    w, r = write[u, j], read[u, j]
                    of_w = of_r = zero
                    for d in range(width):
                        of_r += dy_t[d] * h[k + 1, j, d]
                        p_d = p[j, d] + r * dy_t[d]
                        of_w += p_d * v_t[d]
                        of_v[d] += p_d * w
                        p_d = p_d * a[k, j, d]
                        p[j, d] = p_d
                        exponent = p_d * h[k, j, d]
                        of_dt[d] += exponent * rate[j, d]
                        of_rate[j, d] += exponent * dt_t[d]
                    d_write[block, u, j] = of_w
                    d_read[block, u, j] = of_r
                put(of_v, dv[u, low:high])
                put(of_dt, d_dt[u, low:high])
            left -= count
        for j in range(N):
            put(of_rate[j], dA[b, j, low:high])
            put(p[j], d_state[b, j, low:high])
        dv[begin + n : end, low:high] = 0
        d_dt[begin + n : end, low:high] = 0
