"""Softmax attention on a CPU that keeps its weights for the gradient, where they are few enough.

Matrix products of this processor's own dtype, in blocks of rows whose weights stay in its caches between the product
that makes them, the softmax and the product that reads them. Steps past a sequence's length are left out of all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..common import future, product_dtype, valid_positions, without_autocast, zero_padding
from ..derivatives import by_hand, differentiable, pullback
from ..nodes import exporting
from .plain import plain_attention

MOST_WEIGHTS = 1 << 26  # of a call, kept until its gradient: 128 MiB in half precision
MOST_KEYS = 2048
BLOCK = 1 << 20  # weights made at a time


def keeps(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_kept` can run on q [B, T, H, D], k and v, and is the faster form."""
    half = q.dtype == k.dtype == v.dtype == torch.bfloat16 == product_dtype(q)
    if not half or q.device.type != "cpu" or exporting() or not (torch.compiler.is_compiling() or by_hand()):
        return False
    B, T, H, _ = q.shape
    return T == k.shape[1] <= MOST_KEYS and B * H * T * T <= MOST_WEIGHTS


@custom_op("seqzoo::attention_kept", mutates_args=())
def attention_kept(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ) v, and the weights, as `_blocks` has them one behind the other.

    Of contiguous tensors of one dtype: [G, T, D], [G, T, D], [G, T, Dv] and int64 [G] -> [G, T, Dv], zero past
    `lengths`.
    """
    G, T, _ = q.shape
    weights = q.new_empty(G * T * T)
    y = (v.new_zeros if lengths is not None else v.new_empty)(G, T, v.shape[-1])
    with without_autocast(q.device):
        for g, rows, keys, w in _blocks(lengths, T, G, causal, weights):
            scores = torch.bmm(q[g, rows], k[g, keys].mT)
            if causal:
                scores[..., rows].masked_fill_(future(scores.shape[1], q.device), -torch.inf)
            torch.softmax(scores, -1, out=w)
            y[g, rows] = torch.bmm(w, v[g, keys])
    return y, weights


@custom_op("seqzoo::attention_kept_backward", mutates_args=())
def attention_kept_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, lengths: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    G, T, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    with without_autocast(q.device):
        for g, rows, keys, w in _blocks(lengths, T, G, causal, weights):
            dy_r = dy[g, rows]
            d_scores = torch._softmax_backward_data(torch.bmm(dy_r, v[g, keys].mT), w, -1, w.dtype)
            dq[g, rows] = torch.bmm(d_scores, k[g, keys])
            dk[g, keys] += torch.bmm(d_scores.mT, q[g, rows])
            dv[g, keys] += torch.bmm(w.mT, dy_r)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(
    lengths: Tensor | None, T: int, G: int, causal: bool, weights: Tensor
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Sequences, their queries, the keys that any of these sees, and their weights [sequences, queries, keys]."""
    start = 0
    for first, last, length in _equally_long(lengths, T, G):
        rows = min(length, max(1, BLOCK // length))
        together = max(1, BLOCK // (rows * length))
        for g in range(first, last, together):
            sequences = slice(g, min(g + together, last))
            for i in range(0, length, rows):
                queries = slice(i, min(i + rows, length))
                keys = slice(0, queries.stop if causal else length)
                shape = (sequences.stop - g, queries.stop - i, keys.stop)
                end = start + shape[0] * shape[1] * shape[2]
                yield sequences, queries, keys, weights[start:end].view(shape)
                start = end


def _equally_long(lengths: Tensor | None, T: int, G: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of sequences that are equally long, and how long, 1 at least."""
    first = 0
    for length, equal in groupby([T] * G if lengths is None else lengths.tolist()):
        last = first + len(list(equal))
        if length:
            yield first, last, length
        first = last


@attention_kept.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    G, T, _ = q.shape
    return v.new_empty(v.shape), q.new_empty(G * T * T)


@attention_kept_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, lengths: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _plain_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, lengths: Tensor | None, causal: bool
) -> tuple[Tensor | None, ...]:
    def form(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        mask = None
        if lengths is not None:
            q, k, v = (zero_padding(x, lengths) for x in (q, k, v))
            mask = valid_positions(lengths, q.shape[1])[:, None, None]
        y = plain_attention(mask, causal, *(x[:, None] for x in (q, k, v)))[:, 0]
        return (zero_padding(y, lengths),)

    return pullback(form, (q, k, v), (dy,))


_backward = differentiable(attention_kept_backward, _plain_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.causal = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[1], lengths)


def _gradient(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    return *_backward(dy.contiguous(), *ctx.saved_tensors, ctx.causal), None, None


attention_kept.register_autograd(_gradient, setup_context=_setup_context)
