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
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ..common import check_lengths

MIN_BLOCK = 32  # channels: narrower blocks waste vector width and cache lines
MIN_WORK = 1 << 18  # elements: a thread is woken for as much, about 0.1 ms
CACHE_LINE = 64  # bytes
LONG_ROW = 1024  # bytes: the hardware foresees shorter ones better


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
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
    state = x.new_zeros(x.shape[0], x.shape[2])
    if initial_state is not None:
        state.copy_(initial_state)
    _in_parallel(
        _scan_items,
        x.shape,
        _array(x),
        _array(a if a.dim() == 3 else a[None, None]),  # [B, T, D] or [1, 1, D]
        None if factor is None else _array(factor),
        _steps(x, lengths),
        reverse,
        h.numpy(),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `doubling.scan_backward`."""
    B, _, D = h.shape
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    constant = a.dim() == 1
    da = a.new_zeros(B, D) if constant else a.new_empty(h.shape)
    d_factor = h.new_empty(0, dtype=h.dtype.to_real()) if factor is None else factor.new_zeros(B, D)
    d_initial = d_state.clone(memory_format=torch.contiguous_format)
    initial = h.new_zeros(B, D) if initial_state is None else initial_state
    _in_parallel(
        _constant_backward_items if constant else _varying_backward_items,
        h.shape,
        _array(dh),
        _array(h),
        _array(a),
        None if factor is None else _array(factor),
        _array(initial),
        _steps(h, lengths),
        reverse,
        dx.numpy(),
        da.numpy(),
        d_factor.numpy(),
        d_initial.numpy(),
    )
    if factor is not None:
        d_factor = d_factor.sum(0) / factor
    return dx, da.sum(0) if constant else da, d_initial, d_factor


def _array(x: Tensor) -> np.ndarray:
    return x.detach().resolve_conj().resolve_neg().contiguous().numpy()


def _steps(x: Tensor, lengths: Tensor | None) -> np.ndarray:
    B, T, _ = x.shape
    checked = check_lengths("diagonal_scan", lengths, B, T)
    return np.full(B, T) if checked is None else _array(checked)


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


def _declare_prefetch(context, array, byte):
    """Asks for the cache line of a byte of `array`, counted from its start. Any address will do: none is read."""

    def generate(target, builder, signature, arguments):
        pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        data = builder.bitcast(target.make_array(array)(target, builder, arguments[0]).data, pointer)
        read, all_caches, of_data = int32(0), int32(3), int32(1)
        builder.call(function, [builder.gep(data, [arguments[1]]), read, all_caches, of_data])
        return target.get_dummy_value()

    return types.void(array, types.intp), generate


_prefetch: Any = intrinsic(_declare_prefetch)


# What is carried from step to step lies in a local array, which the compiler knows to overlap with nothing, so that
# loops over channels become vectors. Long rows are asked for one step ahead, `ahead` bytes of each: the hardware
# foresees memory that is read upwards, not a row below the last one.


@_compile
def _scan_items(start, stop, block, x, a, factor, lengths, reverse, h, state):
    D = x.shape[2]
    blocks = -(-D // block)
    per_sequence, per_step = a.shape[0] > 1, a.shape[1] > 1
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        n = lengths[b]
        s = state[b, channels].copy()
        ahead = s.nbytes if s.nbytes >= LONG_ROW else 0
        t, step = (n - 1, -1) if reverse else (0, 1)
        for _ in range(n):
            for byte in range(0, ahead, CACHE_LINE):
                _prefetch(x[b, t + step, channels], byte)
                _prefetch(h[b, t + step, channels], byte)
            x_t, h_t = x[b, t, channels], h[b, t, channels]
            a_t = a[b if per_sequence else 0, t if per_step else 0, channels]
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
        state[b, channels] = s
        h[b, n:, channels] = 0


@_compile
def _constant_backward_items(
    start, stop, block, dh, h, a, factor, initial, lengths, reverse, dx, da, d_factor, d_state
):
    D = h.shape[2]
    blocks = -(-D // block)
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        n = lengths[b]
        dx[b, n:, channels] = 0
        if n == 0:
            continue
        t, step = (0, 1) if reverse else (n - 1, -1)
        p = dh[b, t, channels] + d_state[b, channels]
        if factor is None:
            dx[b, t, channels] = p
        else:
            f = factor[channels]
            dx[b, t, channels] = f * p
            df_sum = p * np.conj(h[b, t, channels])
        ahead = p.nbytes if p.nbytes >= LONG_ROW else 0
        a_conj, da_sum = np.conj(a[channels]), np.zeros_like(p)
        for _ in range(1, n):
            t += step
            for byte in range(0, ahead, CACHE_LINE):
                _prefetch(h[b, t + step, channels], byte)
                _prefetch(dh[b, t + step, channels], byte)
                _prefetch(dx[b, t + step, channels], byte)
            h_t, dh_t, dx_t = h[b, t, channels], dh[b, t, channels], dx[b, t, channels]
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
        da[b, channels] = da_sum + p * np.conj(initial[b, channels])
        d_state[b, channels] = p * a_conj
        if factor is not None:
            d_factor[b, channels] = (df_sum - d_state[b, channels] * np.conj(initial[b, channels])).real


@_compile
def _varying_backward_items(start, stop, block, dh, h, a, factor, initial, lengths, reverse, dx, da, d_factor, d_state):
    D = h.shape[2]
    blocks = -(-D // block)
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        n = lengths[b]
        dx[b, n:, channels] = 0
        da[b, n:, channels] = 0
        if n == 0:
            continue
        t, step = (0, 1) if reverse else (n - 1, -1)
        p = dh[b, t, channels] + d_state[b, channels]
        if factor is None:
            dx[b, t, channels] = p
        else:
            f = factor[channels]
            dx[b, t, channels] = f * p
            df_sum = p * np.conj(h[b, t, channels])
        ahead = p.nbytes if p.nbytes >= LONG_ROW else 0
        for _ in range(1, n):
            a_after, da_after = a[b, t, channels], da[b, t, channels]
            t += step
            for byte in range(0, ahead, CACHE_LINE):
                _prefetch(h[b, t + step, channels], byte)
                _prefetch(dh[b, t + step, channels], byte)
                _prefetch(dx[b, t + step, channels], byte)
                _prefetch(a[b, t, channels], byte)
                _prefetch(da[b, t, channels], byte)
            h_t, dh_t, dx_t = h[b, t, channels], dh[b, t, channels], dx[b, t, channels]
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
        da[b, t, channels] = p * np.conj(initial[b, channels])
        d_state[b, channels] = p * np.conj(a[b, t, channels])
        if factor is not None:
            d_factor[b, channels] = (df_sum - d_state[b, channels] * np.conj(initial[b, channels])).real
