"""Compiled loops on a CPU: over sequences that lie one behind the other in [steps, ...], and shared out among threads.

The threads are Python's own, running compiled code that holds no lock, so that concurrent callers (autograd's threads
among them) and forked processes are safe: Numba's own threading layers do not all allow both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .common import check_lengths

CACHE_LINE = 64  # bytes


class Sequences(NamedTuple):
    starts: np.ndarray  # int64 [R + 1], the first step of each, and where all end
    lengths: np.ndarray  # int64 [R]; behind them is padding, up to the next one

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))


def sequences(what: str, x: Tensor, lengths: Tensor | None, starts: Tensor | None) -> Sequences:
    """Those of x [B, T, ...], or documents in it, with B = 1.

    Raises:
        ValueError: `what` has lengths outside [0, T].
    """
    if starts is not None:
        return Sequences(array(starts), np.diff(array(starts)))
    B, T = x.shape[:2]
    checked = check_lengths(what, lengths, B, T)
    return Sequences(np.arange(B + 1) * T, np.full(B, T) if checked is None else array(checked))


def array(x: Tensor) -> np.ndarray:
    """As compiled code reads it."""
    return x.detach().resolve_conj().resolve_neg().contiguous().numpy()


def rows(x: Tensor) -> np.ndarray:
    """[B, T, D] -> [B T, D]."""
    return array(x).reshape(-1, x.shape[-1])


def shared_out(items: Callable[..., None], of: Sequences, each: int, threads: int, *arguments: Any) -> None:
    """Calls items(start, stop, *arguments) on as many parts of the items as there are threads, one in each.

    There are `each` items of every sequence, one sequence's behind the other's, and they are cut where time is: parts
    take about as long.
    """
    R, cuts = len(of.lengths), []
    if threads > 1:
        time = np.append(0, of.lengths.cumsum())
        places = np.interp(np.arange(R * each), np.arange(R + 1) * each, time)
        cuts = np.searchsorted(places, [time[-1] * i / threads for i in range(1, threads)]).tolist()
    parts = list(pairwise([0, *cuts, R * each]))
    # A forked process has none of its parent's threads and needs a pool of its own.
    others = [_pool(os.getpid()).submit(items, *part, *arguments) for part in parts[1:]]
    items(*parts[0], *arguments)
    for other in others:
        other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "seqzoo")


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a function that Python calls. Kept in a cache on disk, where there is a place for one."""
    options = {"nogil": True, "no_cfunc_wrapper": True, **options}

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:
            return numba.njit(function, **options)

    return compile


def part(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a function that compiled ones alone call: each that does takes it in, and compiles it once more."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **options}
    return numba.njit(**options)


@part()
def put(values, row):
    """As row[:] = values, without the error of lengths that differ: Numba takes seconds to compile its message."""
    for d in range(len(values)):
        row[d] = values[d]


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


prefetch: Any = intrinsic(_declare_prefetch)
