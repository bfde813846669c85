"""Loops that Numba compiles for a CPU, and the threads that share their work out.

The threads are Python's own, running compiled code that holds no lock, so that concurrent callers (autograd's threads
among them) and forked processes are safe: Numba's own threading layers do not all allow both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
from torch import Tensor

from .common import check_lengths


class Sequences(NamedTuple):
    """Rows of a batch, or documents in one, that lie one behind the other in [steps, channels]."""

    starts: np.ndarray  # int64 [R + 1], the first step of each, and where all end
    lengths: np.ndarray  # int64 [R]; behind them is padding, up to the next one


def sequences(what: str, x: Tensor, lengths: Tensor | None, starts: Tensor | None) -> Sequences:
    """Those of x [B, T, ...].

    Raises:
        ValueError: lengths outside [0, T].
    """
    B, T = x.shape[:2]
    if starts is not None:
        return Sequences(array(starts), np.diff(array(starts)))
    checked = check_lengths(what, lengths, B, T)
    return Sequences(np.arange(B + 1) * T, np.full(B, T) if checked is None else array(checked))


def array(x: Tensor) -> np.ndarray:
    """As compiled code reads it."""
    return x.detach().resolve_conj().resolve_neg().contiguous().numpy()


def rows(x: Tensor) -> np.ndarray:
    """[B, T, D] -> [B T, D]."""
    return array(x).reshape(-1, x.shape[-1])


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function`, compiled at its first call, or read where an earlier process has left it."""
    try:
        return numba.njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # nowhere to write a cache
        return numba.njit(function, nogil=True, **options)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "seqzoo")


def in_threads(items: Callable[..., None], ends: Sequence[int], *arguments: Any) -> None:
    """Calls items(start, stop, *arguments) on the parts 0 to ends[0], ends[0] to ends[1] and so on, a thread each."""
    first, *parts = pairwise([0, *ends])
    # A forked process has none of its parent's threads and needs a pool of its own.
    others = [_pool(os.getpid()).submit(items, *part, *arguments) for part in parts]
    items(*first, *arguments)
    for other in others:
        other.result()
