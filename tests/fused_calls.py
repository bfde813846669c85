"""Both passes of every fused operation, with each of its options, on tensors of any size: they have no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.attention import fused as attention
from seqzoo.kernels.diagonal_scan import fused as diagonal_scan
from seqzoo.kernels.favor_attention import fused as favor_attention
from seqzoo.kernels.gated_attention import fused as gated_attention
from seqzoo.kernels.linear_attention import fused as linear_attention
from seqzoo.kernels.vq_attention import fused as vq_attention
from seqzoo.kernels.vq_attention import nearest

MODULES = (attention, diagonal_scan, favor_attention, gated_attention, linear_attention, vq_attention, nearest)


class Size(NamedTuple):
    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype


HALF, SINGLE = torch.float16, torch.float32
RAGGED = Size(2, 37, 2, 20, SINGLE)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def counts(B: int) -> Tensor:
    return meta(B, dtype=torch.int64)


def attention_calls(size: Size) -> Iterator[Callable[[], Any]]:
    B, T, H, D, dtype = size

    def both(G: int, causal: bool, position: Tensor | None, scales: Tensor | None) -> None:
        q, k, v = meta(B, T, H, D, dtype=dtype), meta(B, T, G, D, dtype=dtype), meta(B, T, G, D, dtype=dtype)
        arguments = (scales, 1.0, counts(B), position)
        o, log_sum = attention._attention._init_fn(q, k, v, *arguments, causal)
        attention._attention_backward._init_fn(o, q, k, v, *arguments, o, log_sum, causal)

    yield lambda: both(H, True, None, None)
    yield lambda: both(1, False, counts(B), meta(B, T))


def scan_calls(size: Size) -> Iterator[Callable[[], Any]]:
    B, T, H, D, dtype = size
    D *= H

    def one(dtype: torch.dtype, constant: bool, reverse: bool, state: Tensor | None) -> None:
        x, a = meta(B, T, D, dtype=dtype), meta(*((D,) if constant else (B, T, D)), dtype=dtype)
        arguments = (a, state, reverse, counts(B), meta(D))
        h, final = diagonal_scan.scan(x, *arguments)
        diagonal_scan.scan_backward(h, final, h, *arguments)

    def both(dtype: torch.dtype) -> None:
        x, a, lengths = meta(B, T, D, dtype=dtype), meta(D, dtype=dtype), counts(B)
        h = diagonal_scan._both_scans._init_fn(x, a, lengths, None)
        diagonal_scan._both_scans_backward._init_fn(h, h, a, lengths, None)

    yield lambda: one(torch.complex64, True, False, meta(B, D, dtype=torch.complex64))
    yield lambda: one(dtype, False, True, None)
    yield lambda: both(torch.complex64)


def favor_calls(size: Size) -> Iterator[Callable[[], Any]]:
    B, T, H, D, dtype = size
    M = 100

    def both(causal: bool) -> None:
        q, k, v, projection = *(meta(B, T, H, D, dtype=dtype) for _ in range(3)), meta(H, M, D, dtype=dtype)
        state = (meta(B, H, M, D), meta(B, H, M), meta(B, H, M)) if causal else (None,) * 3
        arguments = (q, k, v, projection, *state, counts(B))
        o, log_sum, *last = favor_attention._favor_attention._init_fn(*arguments, causal)
        backward = favor_attention._favor_attention_backward._init_fn
        backward(o, *last[:2], *arguments, o, log_sum, *last, causal)

    yield lambda: both(True)
    yield lambda: both(False)


def gated_calls(size: Size) -> Iterator[Callable[[], Any]]:
    B, T, H, E, dtype = size
    E, S, C = E * H, 40, 100

    def both(causal: bool) -> None:
        u, v = (meta(B, T, E, dtype=dtype) for _ in range(2))
        keys = [meta(B, T, S, dtype=dtype) for _ in range(4)]
        bias = meta(C if causal else 2 * C - 1)
        initial, earlier = (meta(B, S, E), counts(B)) if causal else (None, None)
        inputs = (u, *keys, v, bias, initial, earlier, counts(B))
        o, memory = gated_attention._gated_attention._init_fn(*inputs, C, causal, 0.5)
        gated_attention._gated_attention_backward._init_fn(o, *inputs, memory, C, causal, 0.5, True, causal)

    yield lambda: both(True)
    yield lambda: both(False)


def linear_calls(size: Size) -> Iterator[Callable[[], Any]]:
    B, T, H, D, dtype = size

    def both(decay: Tensor | None, causal: bool, normalize: bool) -> None:
        q, k, v = (meta(B, T, H, D, dtype=dtype) for _ in range(3))
        state = meta(B, H, D, D + normalize) if causal else None
        inputs, options = (q, k, v, decay, state, counts(B)), (causal, normalize, causal)
        o, last, inverse = linear_attention._linear_attention._init_fn(*inputs, *options)
        backward = linear_attention._linear_attention_backward._init_fn
        backward(o, last, *inputs, o, last, inverse, *options, decay is not None)

    yield lambda: both(None, True, True)
    yield lambda: both(meta(B, T, H), True, False)
    yield lambda: both(meta(H), True, False)
    yield lambda: both(None, False, True)


def vq_calls(size: Size) -> Iterator[Callable[[], Any]]:
    B, T, H, D, dtype = size
    S, L = 70, 50

    def both(causal: bool, bias: Tensor) -> None:
        q, k, v = (meta(B, T, H, D, dtype=dtype) for _ in range(3))
        codebook, codes = meta(H, S, D, dtype=dtype), meta(B, T, H, dtype=torch.int64)
        past = (meta(B, H, S, D), meta(B, H, S, dtype=torch.int64)) if causal else (None, None)
        ends = (counts(B), counts(B))
        outputs = vq_attention._attention._init_fn(q, k, v, codebook, codes, bias, *past, *ends, L, causal)
        vq_attention._attention_backward._init_fn(
            outputs[0], q, k, v, codebook, codes, bias, past[0], *ends, *outputs, L, causal, True, causal
        )

    yield lambda: both(True, meta(B, T, H, L + 1))
    yield lambda: both(False, meta(H, 2 * L + 1))


def nearest_calls(size: Size) -> Iterator[Callable[[], Any]]:
    B, T, H, D, dtype = size
    k, codebook, valid = meta(B, T, H, D, dtype=dtype), meta(H, 70, D, dtype=dtype), meta(B, T, dtype=torch.bool)
    yield lambda: nearest.nearest_code_fused._init_fn(k, codebook, valid)


CALLS = {
    "attention": attention_calls,
    "diagonal_scan": scan_calls,
    "favor_attention": favor_calls,
    "gated_attention": gated_calls,
    "linear_attention": linear_calls,
    "nearest_code": nearest_calls,
    "vq_attention": vq_calls,
}
