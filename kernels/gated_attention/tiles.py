"""What the kernels of gated attention share."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import valid_steps


@triton.jit
def locate(item, lengths, T, C, ROWS: tl.constexpr):
    """Of a block of rows: its sequence and how long that is, its chunk and how many rows of that are valid, its first
    row in the chunk."""
    blocks, chunks = tl.cdiv(C, ROWS), tl.cdiv(T, C)
    chunk = item // blocks % chunks
    b = (item // (blocks * chunks)).to(tl.int64)
    n = valid_steps(lengths, b, T)
    return b, n, chunk, tl.minimum(tl.maximum(n - chunk * C, 0), C), item % blocks * ROWS


@triton.jit
def share(b, n, chunk, earlier, C, CAUSAL: tl.constexpr):
    """1 / m: of each term of the sum that the queries of a chunk see."""
    terms = n
    if CAUSAL:
        terms = chunk * C
        if earlier is not None:
            terms += tl.load(earlier + b)
    return 1.0 / tl.maximum(terms, 1).to(tl.float32)


@triton.jit
def load_rows(x, first, index, stride, channel, width, mask):
    """[rows, channels] of x [..., width], from row `first` on, `stride` from one to the next. Past here, offsets are
    short."""
    at = index[:, None] * stride + channel[None, :]
    return tl.load(x + first * stride + at, mask=mask[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def relu_scores(products, bias, scale, row, column, live, CAUSAL: tl.constexpr, MIRRORED: tl.constexpr):
    """relu(scale q·k + b) of rows and columns of a chunk with `live` valid ones, 0 elsewhere; `bias` is at offset 0.

    `MIRRORED`, the rows are keys and the columns queries.
    """
    offset = column[None, :] - row[:, None]
    if MIRRORED:
        offset = row[:, None] - column[None, :]
    seen = (row < live)[:, None] & (column < live)[None, :]
    if CAUSAL:
        seen = seen & (offset <= 0)
    scores = products * scale
    if bias is not None:
        scores += tl.load(bias + offset, mask=seen, other=0.0)
    return tl.where(seen, tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)


@triton.jit
def seen_columns(first, live, CAUSAL: tl.constexpr, MIRRORED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """From where to where rows from `first` on see the rows of their chunk."""
    begin, end = 0, live
    if CAUSAL and MIRRORED:
        begin = first // COLUMNS * COLUMNS
    elif CAUSAL:
        end = tl.minimum(live, first + ROWS)
    return begin, tl.where(first < live, end, 0)
