"""Every fused operation, with each of its options, at any size, and the modules that have its functions."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import passes
import torch

from seqzoo import kernels

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(kernels.__path__, "seqzoo.kernels.")
    if not module.ispkg
]


class Size(NamedTuple):
    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype


HALF, SINGLE = torch.float16, torch.float32
RAGGED = Size(2, 37, 2, 20, SINGLE)
Calls = Iterator[Callable[[], Any]]


def attention_calls(size: Size) -> Calls:
    B, T, H, D, dtype = size
    yield partial(passes.attention, B, T, H, H, D, D, dtype, True, padded=True)
    yield partial(passes.attention, B, T, H, 1, D, D, dtype, False, padded=True, placed=True, scaled=True)
    yield partial(passes.attention, B, T, H, H, D, D, dtype, True, padded=True, placed=True, window=20)
    yield partial(passes.attention, 1, B * T, H, 1, D, D, dtype, True, scaled=True, documents=B, others=True)
    yield partial(passes.attention, 1, B * T, H, H, D, D, dtype, False, documents=B, window=20)


def scan_calls(size: Size) -> Calls:
    B, T, H, D, dtype = size
    yield partial(passes.scan, B, T, H * D, torch.complex64, True, False, padded=True, state=True, scaled=True)
    yield partial(passes.scan, B, T, H * D, dtype, False, True, padded=True, scaled=True)
    yield partial(passes.both_scans, B, T, H * D, torch.complex64, padded=True)
    yield partial(passes.scan, 1, B * T, H * D, dtype, False, True, state=True, documents=B)
    yield partial(passes.both_scans, 1, B * T, H * D, torch.complex64, scaled=True, documents=B)


def delta_calls(size: Size) -> Calls:
    B, T, H, D, dtype = size
    call = partial(passes.delta_rule, B, T, H, 1, D, D, dtype, state=True)
    yield partial(call, "none", erase=True, padded=True)
    yield partial(call, "head", packed=True)
    yield partial(call, "channel", padded=True)


def favor_calls(size: Size) -> Calls:
    B, T, H, D, dtype = size
    for causal in (True, False):
        yield partial(passes.favor_attention, B, T, H, D, 100, dtype, causal, state=causal, padded=True)
        yield partial(passes.favor_attention, B, T, H, D, 100, dtype, causal, state=causal, packed=True)


def gated_calls(size: Size) -> Calls:
    B, T, H, E, dtype = size
    for causal in (True, False):
        yield partial(passes.gated_attention, B, T, 40, E * H, 100, dtype, causal, True, state=causal)
    yield partial(passes.gated_attention, B, T, 40, E * H, T, dtype, False, True, state=True)


def linear_calls(size: Size) -> Calls:
    B, T, H, D, dtype = size
    for decay, causal, normalize in (
        ("none", True, True), ("step", True, False), ("head", True, False), ("channel", True, True),
        ("none", False, True),
    ):  # fmt: skip
        yield partial(
            passes.linear_attention, B, T, H, D, D, dtype, decay, causal, normalize, state=causal, padded=True
        )
        yield partial(
            passes.linear_attention, B, T, H, D, D, dtype, decay, causal, normalize, state=causal, packed=True
        )


def vq_calls(size: Size) -> Calls:
    B, T, H, D, dtype = size
    for causal, bias in ((True, "step"), (False, "head")):
        call = partial(passes.vq_attention, D=D, Dv=D, S=70, L=50, dtype=dtype, causal=causal, bias=bias, state=causal)
        yield partial(call, B, T, H, padded=True)
        yield partial(call, 1, T, H, documents=3)


def nearest_calls(size: Size) -> Calls:
    B, T, H, D, dtype = size
    yield partial(passes.nearest_code, B, T, H, D, 70, dtype, padded=True)


CALLS = {
    "attention": attention_calls,
    "delta_rule": delta_calls,
    "diagonal_scan": scan_calls,
    "favor_attention": favor_calls,
    "gated_attention": gated_calls,
    "linear_attention": linear_calls,
    "nearest_code": nearest_calls,
    "vq_attention": vq_calls,
}
