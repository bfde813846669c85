"""The gradients of queries and keys, and of the bias, from weights that are made again.

Arguments that nothing is said of are those of `forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot
from .tiles import load_rows, locate, relu_scores, seen_columns, share


@triton.jit
def _agreement(
    x, x_row, y, y_row, begin, row, column, live, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x yᵀ of blocks of rows and columns of the chunk at `begin`, that begin in its `row` and `column`."""
    down, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for low in tl.range(0, width, CHANNELS, num_stages=STAGES):
        channel = low + tl.arange(0, CHANNELS)
        x_t = load_rows(x, begin + row, down, x_row, channel, width, row + down < live)
        y_t = load_rows(y, begin + column, across, y_row, channel, width, column + across < live)
        sums += dot(x_t, tl.trans(y_t), PRECISION)
    return sums


@triton.jit(do_not_specialize=["middle", "T", "C"])
def _scores_kernel(
    q,  # [B, T, S]: q_quad, k_quad; mirrored: k_quad, q_quad
    k,
    bias,
    memory,
    x,  # [B, T, E]: dy, v; mirrored: v, dy
    v,
    dq,  # [B, T, S]
    dq_lin,  # [B, T, S]
    lengths,
    earlier,
    scale,
    middle,
    key_row,  # of q and k
    x_row,
    v_row,
    T,
    C,
    S,
    E,
    CAUSAL: tl.constexpr,
    MIRRORED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of queries, of both attentions; mirrored, of keys."""
    b, n, chunk, live, first = locate(tl.program_id(0), lengths, T, C, ROWS)
    begin = b * T + chunk * C
    down, across, key = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DS)
    row = first + down
    at = (begin + first) * S + (down[:, None] * S + key[None, :])
    inside = (row < tl.minimum(C, T - chunk * C))[:, None] & (key < S)[None, :]
    sums = tl.zeros([ROWS, DS], tl.float32)
    if memory is not None:
        seen = b
        if CAUSAL:
            seen = b * tl.cdiv(T, C) + chunk
        for low in tl.range(0, E, CHANNELS, num_stages=STAGES):
            channel = low + tl.arange(0, CHANNELS)
            x_t = load_rows(x, begin + first, down, x_row, channel, E, row < live)
            m_t = load_rows(memory, seen * S, key, E, channel, E, key < S)
            sums += dot(x_t, tl.trans(m_t), PRECISION)
        if not MIRRORED:
            sums *= share(b, n, chunk, earlier, C, CAUSAL)
    tl.store(dq_lin + at, sums.to(dq_lin.dtype.element_ty), mask=inside)

    if bias is not None:
        bias += middle
    sums = tl.zeros([ROWS, DS], tl.float32)
    low, high = seen_columns(first, live, CAUSAL, MIRRORED, ROWS, COLUMNS)
    for start in range(low, high, COLUMNS):
        products = _agreement(
            q, key_row, k, key_row, begin, first, start, live, S, ROWS, COLUMNS, CHANNELS, STAGES, PRECISION
        )
        d_weights = _agreement(
            x, x_row, v, v_row, begin, first, start, live, E, ROWS, COLUMNS, CHANNELS, STAGES, PRECISION
        )
        root = relu_scores(products, bias, scale, row, start + across, live, CAUSAL, MIRRORED)
        k_t = load_rows(k, begin + start, across, key_row, key, S, start + across < live)
        sums += dot(2 * root * d_weights, k_t, PRECISION)
    tl.store(dq + at, (sums * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["middle", "T", "C", "items", "groups"])
def _bias_kernel(
    q,  # [B, T, S]
    k,
    bias,
    x,  # [B, T, E]
    v,
    sums,  # [groups, diagonals, ROWS, ROWS], float32
    lengths,
    scale,
    middle,
    key_row,
    x_row,
    v_row,
    T,
    C,
    S,
    E,
    items,  # chunks of all sequences
    groups,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of scores, summed over the square blocks of one diagonal, of the chunks of one group."""
    blocks = tl.cdiv(C, ROWS)  # along a side of a chunk
    diagonals = blocks if CAUSAL else 2 * blocks - 1
    diagonal = tl.program_id(0) % diagonals - (blocks - 1)  # the block of keys less that of queries
    index = tl.arange(0, ROWS)
    bias += middle
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for item in range(tl.program_id(0) // diagonals, items, groups):
        for block in range(tl.maximum(-diagonal, 0), blocks - tl.maximum(diagonal, 0)):
            b, _, chunk, live, first = locate(item * blocks + block, lengths, T, C, ROWS)
            begin, column = b * T + chunk * C, first + diagonal * ROWS
            products = _agreement(
                q, key_row, k, key_row, begin, first, column, live, S, ROWS, ROWS, CHANNELS, STAGES, PRECISION
            )
            d_weights = _agreement(
                x, x_row, v, v_row, begin, first, column, live, E, ROWS, ROWS, CHANNELS, STAGES, PRECISION
            )
            root = relu_scores(products, bias, scale, first + index, column + index, live, CAUSAL, False)
            total += 2 * root * d_weights
    at = tl.program_id(0).to(tl.int64) * ROWS * ROWS
    tl.store(sums + at + index[:, None] * ROWS + index[None, :], total)
