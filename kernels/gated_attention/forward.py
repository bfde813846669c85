"""The sums M over chunks, and outputs. Backward runs the same kernels with other arguments, some with rows as keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, valid_steps
from .tiles import load_rows, locate, relu_scores, seen_columns, share


@triton.jit(do_not_specialize=["T", "C", "chunks", "segments"])
def _memory_kernel(
    k,  # [B, T, S]
    v,  # [B, T, E]
    start,  # [B, segments, S, E], float32: the sum before each segment, or None: zero
    before,  # [B, N, S, E]: the sum before each chunk, or None: not wanted
    after,  # [B, segments, S, E], float32: the sum behind each segment, or None
    lengths,  # [B] or None
    earlier,  # [B], positions before the first chunk, or None: 0
    k_row,
    v_row,
    T,
    C,
    S,
    E,
    chunks,  # in a segment
    segments,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,  # a chunk adds its sum / m
    DOWN: tl.constexpr,  # from the last chunk to the first
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    DS: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of k vᵀ over chunks. Segments and chunks are counted in the direction of the pass."""
    wide, high = tl.cdiv(E, DV), tl.cdiv(S, DS)
    channel = tl.program_id(0) % wide * DV + tl.arange(0, DV)
    key = tl.program_id(0) // wide % high * DS + tl.arange(0, DS)
    item = tl.program_id(0) // (wide * high)
    segment, b = item % segments, (item // segments).to(tl.int64)
    n = valid_steps(lengths, b, T)
    N = tl.cdiv(T, C)
    index = tl.arange(0, ROWS)
    at, inside = key[:, None] * E + channel[None, :], (key < S)[:, None] & (channel < E)[None, :]
    sums = tl.zeros([DS, DV], tl.float32)
    if start is not None:
        sums = tl.load(start + item.to(tl.int64) * S * E + at, mask=inside, other=0.0)
    for step in range(segment * chunks, tl.minimum((segment + 1) * chunks, N)):
        chunk = step
        if DOWN:
            chunk = N - 1 - step
        if before is not None:
            tl.store(before + (b * N + chunk) * S * E + at, sums.to(before.dtype.element_ty), mask=inside)
        live = tl.minimum(n - chunk * C, C)
        begin = b * T + chunk * C
        added = tl.zeros([DS, DV], tl.float32)
        for first in tl.range(0, live, ROWS, num_stages=STAGES):
            k_t = load_rows(k, begin + first, index, k_row, key, S, first + index < live)
            v_t = load_rows(v, begin + first, index, v_row, channel, E, first + index < live)
            added += dot(tl.trans(k_t), v_t, PRECISION)
        if SHARED:
            added *= share(b, n, chunk, earlier, C, CAUSAL)
        sums += added
    if after is not None:
        tl.store(after + item.to(tl.int64) * S * E + at, sums, mask=inside)


@triton.jit(do_not_specialize=["middle", "T", "C"])
def _values_kernel(
    q,  # [B, T, S]: q_quad, k_quad, q_lin; mirrored: k_quad, q_quad, k_lin
    k,
    q_lin,
    bias,  # [offsets], float32, or None
    memory,  # [B, N, S, E] if causal, else [B, S, E], or None: zero
    v,  # [B, T, E]
    u,  # [B, T, E], or None: no gate
    do,  # [B, T, E], or None: forward
    out,  # [B, T, E]: u ∘ y; with `do`, do ∘ y; without a gate, y
    dy,  # [B, T, E]: do ∘ u, or None
    lengths,  # [B] or None
    earlier,  # [B], positions before the first chunk, or None: 0
    scale,
    middle,  # where the bias of offset 0 stands
    key_row,  # numbers from one row of q, k and q_lin to the next; of v; of u. All else is contiguous
    v_row,
    u_row,
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
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(E, DV)
    channel = tl.program_id(0) % blocks * DV + tl.arange(0, DV)
    b, n, chunk, live, first = locate(tl.program_id(0) // blocks, lengths, T, C, ROWS)
    begin = b * T + chunk * C  # of the chunk
    across, down, key = tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, DS)
    row = first + down  # of the chunk
    sums = tl.zeros([ROWS, DV], tl.float32)
    if memory is not None:
        seen = b  # which of the sums
        if CAUSAL:
            seen = b * tl.cdiv(T, C) + chunk
        for low in tl.range(0, S, COLUMNS, num_stages=STAGES):
            part = low + across
            q_t = load_rows(q_lin, begin + first, down, key_row, part, S, row < live)
            sums += dot(q_t, load_rows(memory, seen * S + low, across, E, channel, E, part < S), PRECISION)
        if not MIRRORED:
            sums *= share(b, n, chunk, earlier, C, CAUSAL)

    if bias is not None:
        bias += middle
    q_t = load_rows(q, begin + first, down, key_row, key, S, row < live)
    low, high = seen_columns(first, live, CAUSAL, MIRRORED, ROWS, COLUMNS)
    for start in tl.range(low, high, COLUMNS, num_stages=STAGES):
        column = start + across
        k_t = load_rows(k, begin + start, across, key_row, key, S, column < live)
        v_t = load_rows(v, begin + start, across, v_row, channel, E, column < live)
        products = dot(q_t, tl.trans(k_t), PRECISION)
        root = relu_scores(products, bias, scale, row, column, live, CAUSAL, MIRRORED)
        sums += dot(root * root, v_t, PRECISION)

    at = down[:, None] * E + channel[None, :]
    inside = (row < tl.minimum(C, T - chunk * C))[:, None] & (channel < E)[None, :]
    if u is not None:
        u_t = load_rows(u, begin + first, down, u_row, channel, E, row < live).to(tl.float32)
        if do is not None:
            do_t = load_rows(do, begin + first, down, E, channel, E, row < live).to(tl.float32)
            tl.store(dy + (begin + first) * E + at, (do_t * u_t).to(dy.dtype.element_ty), mask=inside)
            sums *= do_t
        else:
            sums *= u_t
    tl.store(out + (begin + first) * E + at, sums.to(out.dtype.element_ty), mask=inside)
