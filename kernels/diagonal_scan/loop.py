"""The diagonal scan on CPU: one compiled loop forward and one backward, at the speed of memory.

Work is cut into items, a batch entry times a block of channels, which are independent: threads share them out, and
results are the same whatever their number. The threads are Python's own, running compiled code that holds no lock,
so that concurrent callers (autograd's threads among them) and forked processes are safe: Numba's own threading layers
do not all allow both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

MIN_BLOCK = 32  # channels: narrower blocks waste vector width and cache lines
MIN_WORK = 1 << 18  # elements: a thread is woken for as much, about 0.1 ms


def scan(
    x: Tensor, a: Tensor, initial_state: Tensor | None, reverse: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final state [B, D], of x [B, T, D], a [D] or [B, T, D] and initial_state [B, D]."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    state = x.new_zeros(x.shape[0], x.shape[2])
    if initial_state is not None:
        state.copy_(initial_state)
    _in_parallel(
        _scan_items, x.shape, _array(x), _coefficients(a), _steps(x, lengths), reverse, h.numpy(), state.numpy()
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and the initial state, from those of h [B, T, D] and of the final state [B, D]."""
    B, _, D = h.shape
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    da = a.new_zeros(B, 1, D) if a.dim() == 1 or h.shape[1] == 1 else a.new_empty(h.shape)
    d_initial = d_state.clone(memory_format=torch.contiguous_format)
    initial = h.new_zeros(B, D) if initial_state is None else initial_state
    _in_parallel(
        _scan_backward_items,
        h.shape,
        _array(dh),
        _array(h),
        _coefficients(a),
        _array(initial),
        _steps(h, lengths),
        reverse,
        dx.numpy(),
        da.numpy(),
        d_initial.numpy(),
    )
    return dx, da if a.dim() == 3 else da.sum((0, 1)), d_initial


def _array(x: Tensor) -> np.ndarray:
    return x.detach().resolve_conj().resolve_neg().contiguous().numpy()


def _coefficients(a: Tensor) -> np.ndarray:
    return _array(a if a.dim() == 3 else a[None, None])  # [B, T, D] or [1, 1, D]


def _steps(x: Tensor, lengths: Tensor | None) -> np.ndarray:
    B, T, _ = x.shape
    if lengths is None:
        return np.full(B, T)
    if B and (lengths.min() < 0 or lengths.max() > T):
        raise ValueError(f"diagonal_scan: lengths must lie in [0, T] = [0, {T}], got {lengths.tolist()}")
    return _array(lengths)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "diagonal_scan")


def _in_parallel(items: Callable[..., None], shape: torch.Size, *arguments: Any) -> None:
    """Calls items(start, stop, block, *arguments) on parts of the B * (blocks of channels) items there are."""
    B, T, D = shape
    threads = max(1, min(torch.get_num_threads(), B * T * D // MIN_WORK))
    blocks = max(1, min(-(-threads // max(B, 1)), D // MIN_BLOCK))
    block = max(1, -(-D // blocks))
    count = B * -(-D // block)
    parts = list(pairwise(count * i // threads for i in range(threads + 1)))
    # A forked process has none of its parent's threads and needs a pool of its own.
    others = [_pool(os.getpid()).submit(items, *part, block, *arguments) for part in parts[1:]]
    items(*parts[0], block, *arguments)
    for other in others:
        other.result()


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # nowhere to write a cache
        return numba.njit(function, nogil=True)


# An inner loop stores to one row only: with more, the compiler cannot tell that rows never overlap and gives up
# vectors. What is carried from step to step has a row of its own that stays in cache.


@_compile
def _scan_items(start, stop, block, x, a, lengths, reverse, h, state):
    D = x.shape[2]
    blocks = -(-D // block)
    per_sequence, per_step = a.shape[0] > 1, a.shape[1] > 1
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        high = min(low + block, D)
        n = lengths[b]
        s = state[b, low:high]
        for i in range(n):
            t = n - 1 - i if reverse else i
            x_t, h_t = x[b, t, low:high], h[b, t, low:high]
            a_t = a[b if per_sequence else 0, t if per_step else 0, low:high]
            for d in range(s.shape[0]):
                s[d] = a_t[d] * s[d] + x_t[d]
            for d in range(s.shape[0]):
                h_t[d] = s[d]
        h[b, n:, low:high] = 0


@_compile
def _scan_backward_items(start, stop, block, dh, h, a, initial, lengths, reverse, dx, da, d_state):
    D = h.shape[2]
    blocks = -(-D // block)
    per_sequence, per_step = a.shape[0] > 1, a.shape[1] > 1
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        high = min(low + block, D)
        n = lengths[b]
        carry = d_state[b, low:high]  # conj(a_{t+1}) p_{t+1}, at first the gradient of the final state
        for i in range(n):
            t = i if reverse else n - 1 - i
            dh_t, p = dh[b, t, low:high], dx[b, t, low:high]
            a_t = a[b if per_sequence else 0, t if per_step else 0, low:high]
            da_t = da[b, t if per_step else 0, low:high]
            h_before = initial[b, low:high]
            if i < n - 1:
                h_before = h[b, t + 1 if reverse else t - 1, low:high]
            for d in range(p.shape[0]):
                p[d] = carry[d] + dh_t[d]
            if per_step:
                for d in range(p.shape[0]):
                    da_t[d] = p[d] * np.conj(h_before[d])
            else:
                for d in range(p.shape[0]):
                    da_t[d] += p[d] * np.conj(h_before[d])
            for d in range(p.shape[0]):
                carry[d] = p[d] * np.conj(a_t[d])
        dx[b, n:, low:high] = 0
        if per_step:
            da[b, n:, low:high] = 0
