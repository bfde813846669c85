"""Times of one alternative at one shape."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from seqzoo.kernels import backends
from seqzoo.kernels.common import dtype_name

from . import timing
from .case import Maker
from .shapes import FEW_WARPS, Shape, every

MOST_SETS = 4  # of inputs, in turn


@cache
def known(rehearse: bool) -> dict[tuple[str, str, str], Shape]:
    """By operation, label and dtype."""
    return {(shape.operation, shape.label, dtype_name(shape.dtype)): shape for shape in every(rehearse)}


def plan(rehearse: bool) -> list[dict[str, Any]]:
    """The arguments of `bench` for all rows, in order, with what they count for."""
    rows = []
    for (operation, label, dtype), shape in known(rehearse).items():
        names = shape.names(Maker(shape.dtype, torch.device(timing.DEVICE)))
        at = {"operation": operation, "shape": label, "dtype": dtype, "width": shape.width, "lra": shape.lra}
        rows += [{**at, "name": name} for name in names]
    return rows


def warm(**where: Any) -> dict[str, Any]:
    """Compiles everything that `bench` of the same arguments runs."""
    with calls_of(**where) as (forward, both, _, _):
        with torch.no_grad():
            forward[0]()
        if both:
            both[0]()
    return {}


def bench(**where: Any) -> dict[str, Any]:
    """Milliseconds of forward, and of forward and backward, launched one by one and as a graph.

    What cannot be captured has no time as a graph and says why, in `no_graph`; nothing may be captured in its process
    any more. With `sham` there was nothing to measure.
    """
    row: dict[str, Any] = {"sham": True} if timing.SHAM else {}
    with calls_of(**where) as (forward, both, shape, sets):
        row["sets"] = sets
        parts = [(part, calls) for part, calls in (("forward", forward), ("both", both)) if calls]

        def measure(way: str, how: Callable[[Calls], timing.Time]) -> None:
            for part, calls in parts:
                with torch.set_grad_enabled(part == "both"):
                    found = how(calls)
                row[f"{part}{way}_ms"] = found.median
                row[f"{part}{way}_spread"] = [found.low, found.high]

        measure("_eager", timing.eager)
        try:
            measure("", timing.graphed)
        except RuntimeError as error:
            row["no_graph"] = timing.said(error)
        best = row.get("forward_ms", row["forward_eager_ms"])
        row |= {"tflops": shape.flops / best / 1e9, "gbs": shape.bytes / best / 1e6}
    return row


Calls = list[Callable[[], Any]]


@contextmanager
def calls_of(
    operation: str, shape: str, dtype: str, width: int, lra: bool, name: str, rehearse: bool
) -> Iterator[tuple[Calls, Calls, Shape, int]]:
    """Calls of forward, and of forward and backward (none where there is no backward), one for each set of inputs.

    There are enough sets that none is found in the cache of the one before.
    """
    chosen = known(rehearse)[operation, shape, dtype]
    maker = Maker(chosen.dtype, torch.device(timing.DEVICE))
    call = chosen.alternative(name, maker)
    torch.manual_seed(0)
    sets = max(1, min(MOST_SETS, math.ceil(2 * timing.cache_bytes() / chosen.bytes)))
    inputs = [[x.requires_grad_(chosen.differentiable) for x in chosen.make(maker)] for _ in range(sets)]
    with warnings.catch_warnings(), mock.patch.object(backends, "FEW_WARPS", name == FEW_WARPS):
        warnings.simplefilter("ignore")
        with torch.no_grad():
            w = torch.empty_like(call(*inputs[0]))
        if chosen.differentiable:
            w = torch.randn_like(w)

        def both(x: list[Tensor]) -> Any:
            return torch.autograd.grad(call(*x), x, w)

        forward = [lambda x=x: call(*x) for x in inputs]
        backward = [lambda x=x: both(x) for x in inputs] if chosen.differentiable else []
        yield forward, backward, chosen, sets
