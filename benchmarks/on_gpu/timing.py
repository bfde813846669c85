"""How long the GPU takes for calls: launched one by one, and as a graph, where Python takes no part.

On a CPU there is nothing to measure; what comes back was counted on a wall clock, once, so that the rest can be tried.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAM = DEVICE == "cpu"
BUDGET_MS = 40.0  # of device time for one figure
LEAST, MOST = 3, 200  # samples
WARMUP = 2


def cache_bytes() -> int:
    """Of the last cache before memory."""
    return 0 if SHAM else getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)


class Time(NamedTuple):
    """Milliseconds of one call."""

    median: float
    low: float  # the first decile
    high: float  # the last

    @classmethod
    def of(cls, samples: Sequence[float]) -> Time:
        ordered = sorted(samples)
        tenth = len(ordered) // 10
        return cls(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def eager(calls: Sequence[Callable[[], Any]]) -> Time:
    """Launched one by one, in turn: what Python and the launches take counts, where it is more than the GPU's own."""
    if SHAM:
        return _sham(calls)
    for call in (*calls, *calls)[:WARMUP]:
        call()
    return Time.of(_between_events(lambda i: calls[i % len(calls)](), 1))


def graphed(calls: Sequence[Callable[[], Any]]) -> Time:
    """Replays of a graph that holds every call once.

    Raises:
        RuntimeError: what the calls do cannot be captured. PyTorch's state is that of a capture then, for good.
    """
    if SHAM:
        return _sham(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first calls choose algorithms and take memory, which no graph may hold
        for call in (*calls, *calls)[:WARMUP]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # what autograd still holds of the first calls is of the same stream
        for call in calls:
            call()
    graph.replay()
    return Time.of(_between_events(lambda i: graph.replay(), len(calls)))


def said(error: RuntimeError) -> str:
    """Of a capture that failed: what ends it fails too, but for the first reason."""
    first = error.__context__ or error
    return (str(first).splitlines() or [type(first).__name__])[0][:150]


def _between_events(run: Callable[[int], Any], calls: int) -> list[float]:
    """Milliseconds of a call in each of as many samples as the budget allows."""
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(MOST)]

    def sample(indices: range) -> list[float]:
        for i in indices:
            pairs[i][0].record()
            run(i)
            pairs[i][1].record()
        torch.cuda.synchronize()
        return [pairs[i][0].elapsed_time(pairs[i][1]) for i in indices]

    first = sample(range(LEAST))
    many = min(MOST, max(LEAST, int(BUDGET_MS / max(statistics.median(first), 1e-3))))
    return [ms / calls for ms in sample(range(many))]


def _sham(calls: Sequence[Callable[[], Any]]) -> Time:
    start = time.perf_counter()
    calls[0]()
    return Time.of([1e3 * (time.perf_counter() - start)])
