"""The diagonal scan on CPU: one compiled loop forward and one backward, at the speed of memory.

Sequences, the rows of a batch or documents in one, lie one behind the other in [steps, channels]. Work is cut into
items, a sequence times a block of channels, which are independent: threads share them out, and results are the same
whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loops import CACHE_LINE, Sequences, array, compiled, prefetch, put, rows, sequences, shared_out

MIN_BLOCK = 32  # channels: narrower blocks waste vector width and cache lines
MIN_WORK = 1 << 18  # elements: a thread is woken for as much, about 0.1 ms
LONG_ROW = 1024  # bytes: the hardware foresees shorter ones better


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `doubling.scan`.

    Raises:
        ValueError: lengths outside [0, T], or a factor of 0.
    """
    if factor is not None and (factor == 0).any():
        raise ValueError(
            f"diagonal_scan: factor is 0 in {int((factor == 0).sum())} of {len(factor)} channels; valid: any other "
            "number, as its gradient is made from what it multiplied"
        )
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    of = sequences("diagonal_scan", x, lengths, starts)
    state = x.new_zeros(len(of.lengths), x.shape[2])
    if initial_state is not None:
        state.copy_(initial_state)
    in_parallel(
        _scan_items,
        *(x.shape[2], of),
        rows(x),
        rows(a if a.dim() == 3 else a[None, None]),  # [B T, D] or [1, D]
        None if factor is None else array(factor),
        *of,
        reverse,
        h.flatten(0, 1).numpy(),
        state.numpy(),
    )
    return h, state


def scan_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `doubling.scan_backward`."""
    D, of = h.shape[2], sequences("diagonal_scan", h, lengths, starts)
    R = len(of.lengths)
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    constant = a.dim() == 1
    da = a.new_zeros(R, D) if constant else a.new_empty(h.shape)
    d_factor = h.new_empty(0, dtype=h.dtype.to_real()) if factor is None else factor.new_zeros(R, D)
    d_initial = d_state.clone(memory_format=torch.contiguous_format)
    initial = h.new_zeros(R, D) if initial_state is None else initial_state
    in_parallel(
        _constant_backward_items if constant else _varying_backward_items,
        *(D, of),
        rows(dh),
        rows(h),
        array(a) if constant else rows(a),
        None if factor is None else array(factor),
        array(initial),
        *of,
        reverse,
        dx.flatten(0, 1).numpy(),
        (da if constant else da.flatten(0, 1)).numpy(),
        d_factor.numpy(),
        d_initial.numpy(),
    )
    if factor is not None:
        d_factor = d_factor.sum(0) / factor
    return dx, da.sum(0) if constant else da, d_initial, d_factor


def in_parallel(items: Callable[..., None], D: int, of: Sequences, *arguments: Any) -> None:
    """Calls items(start, stop, block, *arguments) on parts of the R * (blocks of channels) items there are."""
    starts = of.starts
    steps = int(starts[-1])
    threads = max(1, min(torch.get_num_threads(), steps * D // MIN_WORK))
    block = max(1, D)
    if threads > 1:
        longest = int(np.diff(starts).max())
        block = -(-D // max(1, min(-(-threads * longest // steps), D // MIN_BLOCK)))
    shared_out(items, of, -(-D // block), threads, block, *arguments)


# What is carried from step to step lies in a local array, which the compiler knows to overlap with nothing, so that
# loops over channels become vectors. Long rows are asked for one step ahead, `ahead` bytes of each: the hardware
# foresees memory that is read upwards, not a row below the last one.


@compiled()
def _scan_items(start, stop, block, x, a, factor, starts, lengths, reverse, h, state):
    D = x.shape[1]
    blocks = -(-D // block)
    per_step = a.shape[0] > 1
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        begin, end, n = starts[b], starts[b + 1], lengths[b]
        s = state[b, channels].copy()
        ahead = s.nbytes if s.nbytes >= LONG_ROW else 0
        t, step = (begin + n - 1, -1) if reverse else (begin, 1)
        for _ in range(n):
            for byte in range(0, ahead, CACHE_LINE):
                prefetch(x[t + step, channels], byte)
                prefetch(h[t + step, channels], byte)
            x_t, h_t = x[t, channels], h[t, channels]
            a_t = a[t if per_step else 0, channels]
            if factor is None:
                for d in range(s.shape[0]):
                    s[d] = a_t[d] * s[d] + x_t[d]
                    h_t[d] = s[d]
            else:
                f = factor[channels]
                for d in range(s.shape[0]):
                    s[d] = a_t[d] * s[d] + f[d] * x_t[d]
                    h_t[d] = s[d]
            t += step
        put(s, state[b, channels])
        h[begin + n : end, channels] = 0


@compiled()
def _constant_backward_items(
    start, stop, block, dh, h, a, factor, initial, starts, lengths, reverse, dx, da, d_factor, d_state
):
    D = h.shape[1]
    blocks = -(-D // block)
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        begin, end, n = starts[b], starts[b + 1], lengths[b]
        dx[begin + n : end, channels] = 0
        if n == 0:
            continue
        t, step = (begin, 1) if reverse else (begin + n - 1, -1)
        p = dh[t, channels] + d_state[b, channels]
        if factor is None:
            put(p, dx[t, channels])
        else:
            f = factor[channels]
            put(f * p, dx[t, channels])
            df_sum = p * np.conj(h[t, channels])
        ahead = p.nbytes if p.nbytes >= LONG_ROW else 0
        a_conj, da_sum = np.conj(a[channels]), np.zeros_like(p)
        for _ in range(1, n):
            t += step
            for byte in range(0, ahead, CACHE_LINE):
                prefetch(h[t + step, channels], byte)
                prefetch(dh[t + step, channels], byte)
                prefetch(dx[t + step, channels], byte)
            h_t, dh_t, dx_t = h[t, channels], dh[t, channels], dx[t, channels]
            if factor is None:
                for d in range(p.shape[0]):
                    da_sum[d] += p[d] * np.conj(h_t[d])
                for d in range(p.shape[0]):
                    p[d] = p[d] * a_conj[d] + dh_t[d]
                    dx_t[d] = p[d]
            else:
                for d in range(p.shape[0]):
                    da_sum[d] += p[d] * np.conj(h_t[d])
                    df_sum[d] += dh_t[d] * np.conj(h_t[d])
                for d in range(p.shape[0]):
                    p[d] = p[d] * a_conj[d] + dh_t[d]
                    dx_t[d] = f[d] * p[d]
        put(da_sum + p * np.conj(initial[b, channels]), da[b, channels])
        put(p * a_conj, d_state[b, channels])
        if factor is not None:
            put((df_sum - d_state[b, channels] * np.conj(initial[b, channels])).real, d_factor[b, channels])


@compiled()
def _varying_backward_items(
    start, stop, block, dh, h, a, factor, initial, starts, lengths, reverse, dx, da, d_factor, d_state
):
    D = h.shape[1]
    blocks = -(-D // block)
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        begin, end, n = starts[b], starts[b + 1], lengths[b]
        dx[begin + n : end, channels] = 0
        da[begin + n : end, channels] = 0
        if n == 0:
            continue
        t, step = (begin, 1) if reverse else (begin + n - 1, -1)
        p = dh[t, channels] + d_state[b, channels]
        if factor is None:
            put(p, dx[t, channels])
        else:
            f = factor[channels]
            put(f * p, dx[t, channels])
            df_sum = p * np.conj(h[t, channels])
        ahead = p.nbytes if p.nbytes >= LONG_ROW else 0
        for _ in range(1, n):
            a_after, da_after = a[t, channels], da[t, channels]
            t += step
            for byte in range(0, ahead, CACHE_LINE):
                prefetch(h[t + step, channels], byte)
                prefetch(dh[t + step, channels], byte)
                prefetch(dx[t + step, channels], byte)
                prefetch(a[t, channels], byte)
                prefetch(da[t, channels], byte)
            h_t, dh_t, dx_t = h[t, channels], dh[t, channels], dx[t, channels]
            if factor is None:
                for d in range(p.shape[0]):
                    da_after[d] = p[d] * np.conj(h_t[d])
                for d in range(p.shape[0]):
                    p[d] = p[d] * np.conj(a_after[d]) + dh_t[d]
                    dx_t[d] = p[d]
            else:
                for d in range(p.shape[0]):
                    da_after[d] = p[d] * np.conj(h_t[d])
                    df_sum[d] += dh_t[d] * np.conj(h_t[d])
                for d in range(p.shape[0]):
                    p[d] = p[d] * np.conj(a_after[d]) + dh_t[d]
                    dx_t[d] = f[d] * p[d]
        put(p * np.conj(initial[b, channels]), da[t, channels])
        put(p * np.conj(a[t, channels]), d_state[b, channels])
        if factor is not None:
            put((df_sum - d_state[b, channels] * np.conj(initial[b, channels])).real, d_factor[b, channels])
