"""What the kernels of VQ attention share."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..tiles import dot, head_rows, load_tile, valid_steps

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def product(
    x, x_row, x_stride, x_read, y, y_row, y_stride, y_read, width,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x yᵀ: [rows of x, rows of y]."""
    sums = tl.zeros([x_row.shape[0], y_row.shape[0]], tl.float32)
    for low in tl.range(0, width, CHANNELS, num_stages=STAGES):
        channel = low + tl.arange(0, CHANNELS)
        x_t = load_tile(x, x_row, x_stride, channel, width, x_read)
        y_t = load_tile(y, y_row, y_stride, channel, width, y_read)
        sums += dot(x_t, tl.trans(y_t), PRECISION)
    return sums


@triton.jit
def program(chunks, tiles, blocks, H):
    """Which channels, tile of a block, block, sequence and head a program has, and where its block lies in [B·H, N]."""
    index = tl.program_id(0)
    chunk, tile, block = index % chunks, index // chunks % tiles, index // (chunks * tiles) % blocks
    head = index // (chunks * tiles * blocks)
    b, cell = (head // H).to(tl.int64), head.to(tl.int64) * blocks + block
    return chunk, tile, block, b, head % H, cell


@triton.jit
def bounds(first, last, b, block, T, PACKED: tl.constexpr):
    """The first valid position of a sequence, and the one behind its last; `PACKED`, of the block's document."""
    at = b
    if PACKED:
        at = block
    begin = 0
    if first is not None:
        begin = valid_steps(first, at, T)
    return begin, valid_steps(last, at, T)


@triton.jit
def positions(block, tile, L, T, begin, end, SIZE: tl.constexpr):
    """Of a tile of a block: where it starts, its positions, which of them are the tile's, and which of these valid."""
    index = tile * SIZE + tl.arange(0, SIZE)
    position = block * L + index
    inside = (index < L) & (position < T)
    return block * L + tile * SIZE, position, inside, inside & (position >= begin) & (position < end)


@triton.jit
def bias_entry(row, query, key, seen, stride, offsets, CAUSAL: tl.constexpr):
    """Where the bias of a pair lies, and whether it has one. `row` counts from the first query of the tile."""
    reach = offsets - 1 if CAUSAL else offsets // 2
    entry = key - query + reach
    return row * stride + entry, seen & (entry >= 0) & (entry < offsets)


@triton.jit
def pair_scores(scores, bias, bias_stride, b, h, start, row, query, live, key, known, T, offsets, CAUSAL: tl.constexpr):
    """The scores with their biases, and which pairs there are. Queries, from `start` on, and keys have an axis each."""
    seen = live & known
    if CAUSAL:
        seen = seen & (key <= query)
    if bias is not None:
        at, has = bias_entry(row, query, key, seen, bias_stride, offsets, CAUSAL)
        bias += h * offsets + (b * T + start) * bias_stride  # those of a head, where all queries have the same
        scores += tl.load(bias + at, mask=has, other=0.0).to(tl.float32)
    return scores, seen


@triton.jit
def window_scores(
    q, keys, bias, bias_stride, b, h, start, row, query, live, low, column, key, known, T, H, D, offsets,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits, to base 2, of the queries at `start` and the keys at `low` in their window, and which pairs there are."""
    keys_t = head_rows(keys, b, low, T, h, H, D)
    scores = product(q, row, H * D, live, keys_t, column, H * D, known, D, PRECISION, CHANNELS, STAGES)
    scores, seen = pair_scores(
        scores, bias, bias_stride, b, h, start, row[:, None], query[:, None], live[:, None], key[None, :],
        known[None, :], T, offsets, CAUSAL,
    )  # fmt: skip
    return tl.where(seen, scores * LOG2_E, float("-inf")), seen
