"""What the kernels of softmax attention share."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..tiles import valid_steps

LOG2_E = tl.constexpr(math.log2(math.e))
FAR_AHEAD = tl.constexpr(-(2**29))  # where a first query stands at least, with room in 32 bits for what is added


@triton.jit
def sequence(lengths, position, b, S):
    """How many keys of a sequence are valid, and where its first query stands: ahead of the keys, if below 0."""
    n, before = valid_steps(lengths, b, S), 0
    if position is not None:
        before = tl.minimum(tl.maximum(tl.load(position + b), FAR_AHEAD), S).to(tl.int32)
    return n, before


@triton.jit
def in_row(starts, document):
    """Where a document begins, and how many steps it has."""
    begin = tl.load(starts + document)
    return begin, (tl.load(starts + document + 1) - begin).to(tl.int32)


@triton.jit
def keys_and_queries(starts, query_starts, document):
    """Where a document's keys begin and how many they are, the same of its queries, and where the first of these is."""
    held, S = in_row(starts, document)
    asked, T, before = held, S, 0
    if query_starts is not None:
        asked, T = in_row(query_starts, document)
        before = S - T
    return held, S, asked, T, before


@triton.jit
def query_scale(scales, scale, b, T, query, live):
    """Of the queries' scores, by row."""
    if scales is None:
        return tl.zeros(query.shape, tl.float32) + scale
    else:
        return tl.load(scales + b * T + query, mask=live, other=0.0)


@triton.jit
def seen_keys(first, n, left, right, CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """How many keys, in whole blocks, all queries of a block from position `first` on see, and how many any of them.

    Within a window, where those begin that any of them sees, and where they end.
    """
    end, free = n, n
    if CAUSAL:
        end, free = tl.minimum(n, first + QUERIES), tl.minimum(n, first + 1)
    if left is not None:
        end, free = tl.minimum(n, first + QUERIES + right), first - left
    if first >= n:
        end, free = 0, 0
    return tl.maximum(free, 0) // KEYS * KEYS, end


@triton.jit
def visible(key, here, n, left, right, CAUSAL: tl.constexpr):
    """Which of `n` keys each query sees, from where it stands: [queries, keys]."""
    seen = (key < n)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= here[:, None])
    if left is not None:
        seen = seen & (key[None, :] >= here[:, None] - left) & (key[None, :] <= here[:, None] + right)
    return seen
