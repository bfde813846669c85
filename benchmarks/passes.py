"""Both passes of every fused operation on tensors without data, and what they launch, caught in place of being made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from seqzoo.kernels import backends
from seqzoo.kernels.attention import fused as softmax
from seqzoo.kernels.delta_rule import operator as delta
from seqzoo.kernels.diagonal_scan import fused as diagonal
from seqzoo.kernels.favor_attention import fused as favor
from seqzoo.kernels.gated_attention import fused as gated
from seqzoo.kernels.linear_attention import operator as linear
from seqzoo.kernels.vq_attention import fused as vq
from seqzoo.kernels.vq_attention import nearest

L = TypeVar("L")


@contextmanager
def caught(kernels: type, note: Callable[[Any, int, dict[str, Any]], L], multiprocessors: int) -> Iterator[list[L]]:
    """What `note` makes of each launch inside, of a kernel, so many programs, and arguments by name; none is made.

    Args:
        kernels: of which class they are: compiled or interpreted.
        note: what to put on the list.
        multiprocessors: of the GPU that launches are for.
    """
    found: list[L] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        found.append(note(self, grid[0], {**dict(zip(self.arg_names, arguments, strict=False)), **keywords}))

    with (
        mock.patch.object(kernels, "run", run),
        mock.patch.object(backends, "multiprocessors", return_value=multiprocessors),
    ):
        yield found


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def integers(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


def starts(documents: int) -> Tensor | None:
    """Where so many documents begin, None where there are none."""
    return integers(documents + 1) if documents else None


def in_one_row(B: int, T: int) -> tuple[Tensor, int, int]:
    """Where B documents of T steps begin, and the batch and the steps that they are together."""
    return integers(B + 1), 1, B * T


def attention(
    B: int, T: int, H: int, G: int, D: int, Dv: int, dtype: torch.dtype, causal: bool,
    padded: bool = False, placed: bool = False, scaled: bool = False, documents: int = 0, others: bool = False,
    window: int = 0,
) -> None:  # fmt: skip
    q, k, v = meta(B, T, H, D, dtype=dtype), meta(B, T, G, D, dtype=dtype), meta(B, T, G, Dv, dtype=dtype)
    lengths, position = (integers(B) if given else None for given in (padded, placed))
    arguments = (meta(B, T) if scaled else None, 1.0, lengths, position)
    reach = (window - 1, 0 if causal else window - 1) if window else (-1, -1)
    options = (causal and not window, starts(documents), starts(documents) if others else None, *reach)
    o, log_sum = softmax._attention._init_fn(q, k, v, *arguments, *options)
    softmax._attention_backward._init_fn(o, q, k, v, *arguments, o, log_sum, *options)


def scan(
    B: int, T: int, D: int, dtype: torch.dtype, constant: bool, reverse: bool,
    padded: bool = False, state: bool = False, scaled: bool = False, documents: int = 0,
) -> None:  # fmt: skip
    x, a = meta(B, T, D, dtype=dtype), meta(*((D,) if constant else (B, T, D)), dtype=dtype)
    initial = meta(documents or B, D, dtype=torch.complex64 if dtype.is_complex else torch.float32) if state else None
    arguments = (a, initial, reverse, integers(B) if padded else None, meta(D) if scaled else None, starts(documents))
    h, final = diagonal.scan(x, *arguments)
    diagonal.scan_backward(h, final, h, *arguments)


def both_scans(
    B: int, T: int, D: int, dtype: torch.dtype, padded: bool = False, scaled: bool = False, documents: int = 0
) -> None:
    x = meta(B, T, D, dtype=dtype)
    ends = (integers(B) if padded else None, meta(D) if scaled else None, starts(documents))
    arguments = (meta(D, dtype=dtype), *ends)
    h = diagonal._both_scans._init_fn(x, *arguments)
    diagonal._both_scans_backward._init_fn(h, h, *arguments)


def linear_attention(
    B: int, T: int, H: int, D: int, Dv: int, dtype: torch.dtype, decay: str, causal: bool, normalize: bool,
    state: bool = False, padded: bool = False, packed: bool = False,
) -> None:  # fmt: skip
    """`decay` is "none", "head", "step" or "channel"."""
    initial, lengths = meta(B, H, D, Dv + normalize) if state else None, integers(B) if padded else None
    starts, B, T = in_one_row(B, T) if packed else (None, B, T)
    q, k, v = (meta(B, T, H, width, dtype=dtype) for width in (D, D, Dv))
    g = {"none": None, "head": meta(H), "step": meta(B, T, H), "channel": meta(B, T, H, D)}[decay]
    inputs = (q, k, v, g, initial, lengths, starts)
    options = (causal, normalize, state)
    o, last, norms = linear._linear_attention._init_fn(*inputs, *options)
    backward = linear._linear_attention_backward._init_fn
    backward(o, last if state else None, *inputs, o, last, norms, *options, g is not None)


def delta_rule(
    B: int, T: int, H: int, G: int, D: int, Dv: int, dtype: torch.dtype, decay: str,
    erase: bool = False, state: bool = False, padded: bool = False, packed: bool = False,
) -> None:  # fmt: skip
    """`decay` is "none", "head" or "channel"."""
    initial, lengths = meta(B, H, D, Dv) if state else None, integers(B) if padded else None
    starts, B, T = in_one_row(B, T) if packed else (None, B, T)
    q, k, v = (meta(B, T, heads, width, dtype=dtype) for heads, width in ((G, D), (G, D), (H, Dv)))
    g = {"none": None, "head": meta(B, T, H), "channel": meta(B, T, H, D)}[decay]
    r = meta(B, T, H, D, dtype=dtype) if erase else None
    inputs = (q, k, v, meta(B, T, H), g, r, initial, lengths, starts)
    o, last, states = delta._delta_rule._init_fn(*inputs, state, True)
    delta._delta_rule_backward._init_fn(o, last if state else None, *inputs, states, state)


def favor_attention(
    B: int, T: int, H: int, D: int, M: int, dtype: torch.dtype, causal: bool,
    state: bool = False, padded: bool = False, packed: bool = False,
) -> None:  # fmt: skip
    initial = (meta(B, H, M, D), meta(B, H, M), meta(B, H, M)) if state else (None,) * 3
    lengths = integers(B) if padded else None
    starts, B, T = in_one_row(B, T) if packed else (None, B, T)
    q, k, v, projection = *(meta(B, T, H, D, dtype=dtype) for _ in range(3)), meta(H, M, D, dtype=dtype)
    arguments = (q, k, v, projection, *initial, lengths, starts)
    o, log_sum, *last = favor._favor_attention._init_fn(*arguments, causal)
    favor._favor_attention_backward._init_fn(o, *last[:2], *arguments, o, log_sum, *last, causal)


def gated_attention(
    B: int, T: int, S: int, E: int, C: int, dtype: torch.dtype, causal: bool, options: bool, state: bool = False
) -> None:
    """`options` are a bias and lengths. With a `state` and not causal, sequences are chunks, as of documents."""
    u, v = (meta(B, T, E, dtype=dtype) for _ in range(2))
    keys = [meta(B, T, S, dtype=dtype) for _ in range(4)]
    bias, lengths = (meta(C if causal else 2 * C - 1), integers(B)) if options else (None, None)
    initial, earlier = meta(B, S, E) if state else None, integers(B) if state and causal else None
    inputs = (u, *keys, v, bias, initial, earlier, lengths)
    o, memory = gated._gated_attention._init_fn(*inputs, C, causal, 0.5)
    gated._gated_attention_backward._init_fn(o, *inputs, memory, C, causal, 0.5, options, state)


def vq_attention(
    B: int, T: int, H: int, D: int, Dv: int, S: int, L: int, dtype: torch.dtype, causal: bool,
    bias: str = "none", state: bool = False, padded: bool = False, documents: int = 0,
) -> None:  # fmt: skip
    """`bias` is "none", "head" or "step". Of `documents` in one row, B = 1, if there are any."""
    offsets = L + 1 if causal else 2 * L + 1
    b = {"none": None, "head": meta(H, offsets), "step": meta(B, T, H, offsets)}[bias]
    q, k, v = (meta(B, T, H, n, dtype=dtype) for n in (D, D, Dv))
    inputs = (q, k, v, meta(H, S, D, dtype=dtype), integers(B, T, H), b)
    rows, ends_of = (documents, -(-T // L)) if documents else (B, B)
    sums, counts = (meta(rows, H, S, Dv), integers(rows, H, S)) if state else (None, None)
    ends = (integers(ends_of), integers(ends_of)) if padded or documents else (None, None)
    starts = integers(documents + 1) if documents else None
    outputs = vq._attention._init_fn(*inputs, sums, counts, *ends, L, causal, starts)
    backward = vq._attention_backward._init_fn
    backward(outputs[0], *inputs, sums, *ends, *outputs, L, causal, b is not None, state, starts)


def nearest_code(B: int, T: int, H: int, D: int, S: int, dtype: torch.dtype, padded: bool = False) -> None:
    k, codebook = meta(B, T, H, D, dtype=dtype), meta(H, S, D, dtype=dtype)
    nearest.nearest_code_fused._init_fn(k, codebook, meta(B, T, dtype=torch.bool) if padded else None)
