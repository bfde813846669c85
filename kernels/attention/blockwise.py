"""Softmax attention on a CPU in blocks of queries against the keys that any of them sees: within a window, and over
documents in graphs, where they cannot be taken one by one.

No weights are kept, and none are made between what does not see each other: the way back makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ..common import accumulation_dtype, product_dtype, without_autocast
from ..derivatives import differentiable, pullback, transformed
from ..documents import Documents, documents_from
from .reference import padded
from .rows import attention_of_rows

BLOCK = 1 << 20  # weights made at a time
FEWEST = 64  # queries in a block, at least


class Ends(NamedTuple):
    """Where sequences end: rows of a batch, or documents of one row."""

    lengths: Tensor | None  # [B]
    position: Tensor | None  # [B]
    starts: Tensor | None  # [N + 1]
    query_starts: Tensor | None  # [N + 1], where queries are others than the keys


class Block(NamedTuple):
    batch: slice
    queries: slice
    keys: slice
    hidden: Tensor | None  # [queries, keys], which keys each query does not see


def attention_blockwise(
    q: Tensor,  # [B, T, H, D], scaled
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, Dv]
    ends: Ends,
    left: int,  # how many keys ahead of its own place a query sees, and how many behind it; -1: all there are
    right: int,
) -> Tensor:
    arguments = (q, k, v, *ends, left, right)
    return _plain(*arguments) if transformed() else _attention(*arguments)


@custom_op("seqzoo::attention_blockwise", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    query_starts: Tensor | None,
    left: int,
    right: int,
) -> Tensor:
    o = v.new_zeros(*q.shape[:3], v.shape[-1])
    with without_autocast(q.device):
        for block in _blocks(q, k, Ends(lengths, position, starts, query_starts), left, right):
            weights, _, _, v_b = _weights(q, k, v, block)
            _put(o, block.batch, block.queries, weights @ v_b)
    return o


@custom_op("seqzoo::attention_blockwise_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    query_starts: Tensor | None,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype)) for x in (q, k, v))
    with without_autocast(q.device):
        for block in _blocks(q, k, Ends(lengths, position, starts, query_starts), left, right):
            weights, q_b, k_b, v_b = _weights(q, k, v, block)
            do_b = _by_head(do, block.batch, block.queries, k.shape[2], v_b.dtype)
            d_scores = torch._softmax_backward_data(do_b @ v_b.mT, weights, -1, weights.dtype)
            _put(dq, block.batch, block.queries, d_scores @ k_b)
            _put(dk, block.batch, block.keys, d_scores.mT @ q_b)
            _put(dv, block.batch, block.keys, weights.mT @ do_b)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _weights(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a block [B, G, H / G · queries, keys], and its q, k and v, by the heads that keys have."""
    G, dtype = k.shape[2], product_dtype(q, k, v)
    q_b = _by_head(q, block.batch, block.queries, G, dtype)
    k_b, v_b = (_by_head(x, block.batch, block.keys, G, dtype) for x in (k, v))
    scores = q_b @ k_b.mT
    if block.hidden is not None:
        scores.unflatten(2, (-1, len(block.hidden))).masked_fill_(block.hidden, -torch.inf)
    return scores.softmax(-1), q_b, k_b, v_b


def _by_head(x: Tensor, batch: slice, rows: slice, G: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] -> [b, G, H / G · rows, D]."""
    return x[batch, rows].to(dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _put(x: Tensor, batch: slice, rows: slice, values: Tensor) -> None:
    """Adds to x what is as `_by_head` made it."""
    target = x[batch, rows]
    share = target.shape[2] // values.shape[1]
    target += values.unflatten(2, (share, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _blocks(q: Tensor, k: Tensor, ends: Ends, left: int, right: int) -> Iterator[Block]:
    (_, _, H, _), unseen = q.shape, k.shape[1]
    before, behind = (unseen if reach < 0 else reach for reach in (left, right))
    for batch, queries, keys, position in _sequences(q, k, ends):
        n, sequences = keys.stop - keys.start, batch.stop - batch.start
        first = max(0, -position) if left >= 0 or right >= 0 else 0
        last = min(queries.stop - queries.start, n - position)
        if n == 0 or first >= last:
            continue
        # As many queries as there are keys beside them, or as weights fit.
        span = min(n, 1 + before + behind)
        rows = min(max(FEWEST, span // 2), max(1, BLOCK // max(1, sequences * H * min(n, span + FEWEST))))
        for i in range(first, last, rows):
            j, here = min(i + rows, last), position + i
            low, high = max(0, here - before), min(n, position + j + behind)
            hidden = None
            if (left >= 0 or right >= 0) and high > low:
                seen = torch.ones(j - i, high - low, dtype=torch.bool, device=q.device)
                seen = seen.tril(here + behind - low).triu(here - before - low)
                hidden = ~seen
            where = (slice(queries.start + i, queries.start + j), slice(keys.start + low, keys.start + high))
            yield Block(batch, *where, hidden)


def _sequences(q: Tensor, k: Tensor, ends: Ends) -> Iterator[tuple[slice, slice, slice, int]]:
    """Rows of the batch, queries, keys, and where among these the first query stands."""
    (B, T), S = q.shape[:2], k.shape[1]
    if ends.starts is not None:
        keys = ends.starts.tolist()
        queries = keys if ends.query_starts is None else ends.query_starts.tolist()
        for n in range(len(keys) - 1):
            late = keys[n + 1] - keys[n] - queries[n + 1] + queries[n]
            yield slice(0, 1), slice(queries[n], queries[n + 1]), slice(keys[n], keys[n + 1]), late
    elif ends.lengths is None and ends.position is None:
        yield slice(0, B), slice(0, T), slice(0, S), 0
    else:
        lengths = [S] * B if ends.lengths is None else ends.lengths.tolist()
        position = [0] * B if ends.position is None else ends.position.tolist()
        for b in range(B):
            yield slice(b, b + 1), slice(0, T), slice(0, lengths[b]), position[b]


@_attention.register_fake
def _(q, k, v, lengths, position, starts, query_starts, left, right):
    return v.new_empty(*q.shape[:3], v.shape[-1])


@_attention_backward.register_fake
def _(do, q, k, v, lengths, position, starts, query_starts, left, right):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _plain(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """As `_attention`, for PyTorch to differentiate."""
    lengths, position, starts, query_starts, left, right = others
    causal, window = right == 0, (left, right) if left >= 0 else None
    if starts is None:
        ends = {"lengths": lengths, "position": position}
        return attention_of_rows(q, k, v, causal=causal, scale=1.0, window=window, **ends)
    queries = documents_from(query_starts, q.shape[1])
    return padded(attention_of_rows, q, k, v, causal, 1.0, window, Documents(starts, k.shape[1]), queries)


def _plain_gradients(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *ends: Any) -> tuple[Tensor | None, ...]:
    return pullback(lambda *qkv: (_plain(*qkv, *ends),), (q, k, v), (do,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.left, ctx.right = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    return *_written(do, *ctx.saved_tensors, ctx.left, ctx.right), *(None,) * 6


_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_attention_backward, _plain_gradients)
