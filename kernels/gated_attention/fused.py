"""Gated attention in Triton, without a matrix of weights in memory.

With y the output before its gate, o = u ∘ y, s = scale q_quad kᵀ_quad + b inside a chunk, M the sum of k_lin vᵀ that a
chunk's queries see (over earlier chunks if causal, over all if not) and m the number of its terms,

    y_i = sum_j relu²(s_ij) v_j + Mᵀ q_lin_i / m_i

A program has a block of rows of one chunk and a block of channels of v, and goes through the chunk's keys block by
block. M is made before, by programs that go through the chunks and hold a block of it; where these would not fill the
GPU, time is cut into segments, as in linear attention. From a state, M begins as the state's, and PyTorch lays the
steps behind those rows of a chunk that the state holds.

Backward makes y and the weights again. With dy = do ∘ u and W the sum of q_lin dyᵀ / m over the queries that see a
chunk, or the state,

    du_i = do_i ∘ y_i
    dv_j = sum_i relu²(s_ij) dy_i + Wᵀ k_lin_j                       the same kernel, rows are keys
    dq_i = scale sum_j 2 relu(s_ij) (dy_i·v_j) k_j, and M dy_i / m_i
    dk_j = scale sum_i 2 relu(s_ij) (v_j·dy_i) q_i, and W v_j        the same kernel again, rows are keys
    dM = W                                                           of the state's M

The bias has a gradient for each offset, a sum over all chunks of all sequences. Square blocks along one diagonal of a
chunk hold the same offsets: a program adds up such blocks, of many chunks, and PyTorch the diagonals of what it writes.
Nothing is added to from two programs: the same bits in every run.

Products are in bfloat16 for bfloat16, otherwise in float32 on the matrix unit: three TF32 products for float32, one for
float16, whose range squares and sums would leave.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import backends
from ..blocks import Blocks
from ..common import contiguous, pad_channels, without_autocast, zero_padding
from ..derivatives import differentiable, pullback
from ..launching import launch
from ..linear_attention.fused import State, carry
from ..tiles import dot, valid_steps
from .chunked import by_offset, gated_attention_chunked, in_chunks
from .resume import Resumed
from .state import GatedAttentionState

PROGRAMS = 2  # wanted for each multiprocessor, before work is cut smaller
STEPS = 256  # that a sum over all of time is cut at
PRECISIONS = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "bf16"}


class Config(NamedTuple):
    """Of `values`, channels are those of v; of `scores` and `bias`, those of v in a step; `bias` has as many columns as
    rows; of `memory`, rows are steps, columns channels of k and channels those of v."""

    rows: int  # in a block
    columns: int
    channels: int
    num_warps: int
    num_stages: int


BLOCKS = Blocks("gated_attention", Path(__file__).with_name("blocks.csv"), Config)


@triton.jit
def _block(item, lengths, T, C, ROWS: tl.constexpr):
    """Of a block of rows: its sequence and how long that is, its chunk and how many rows of that are valid, its first
    row in the chunk."""
    blocks, chunks = tl.cdiv(C, ROWS), tl.cdiv(T, C)
    chunk = item // blocks % chunks
    b = (item // (blocks * chunks)).to(tl.int64)
    n = T
    if lengths is not None:
        n = valid_steps(lengths, b, T)
    return b, n, chunk, tl.minimum(tl.maximum(n - chunk * C, 0), C), item % blocks * ROWS


@triton.jit
def _share(b, n, chunk, earlier, C, CAUSAL: tl.constexpr):
    """1 / m: of each term of the sum that the queries of a chunk see."""
    terms = n
    if CAUSAL:
        terms = chunk * C
        if earlier is not None:
            terms += tl.load(earlier + b)
    return 1.0 / tl.maximum(terms, 1).to(tl.float32)


@triton.jit
def _tile(x, first, index, stride, channel, width, mask):
    """[rows, channels] of x [..., width], from row `first` on, `stride` from one to the next. Past here, offsets are
    short."""
    at = index[:, None] * stride + channel[None, :]
    return tl.load(x + first * stride + at, mask=mask[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def _root(products, bias, scale, row, column, live, CAUSAL: tl.constexpr, MIRRORED: tl.constexpr):
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
def _columns(first, live, CAUSAL: tl.constexpr, MIRRORED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """From where to where rows from `first` on see the rows of their chunk."""
    begin, end = 0, live
    if CAUSAL and MIRRORED:
        begin = first // COLUMNS * COLUMNS
    elif CAUSAL:
        end = tl.minimum(live, first + ROWS)
    return begin, tl.where(first < live, end, 0)


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
    b, n, chunk, live, first = _block(tl.program_id(0) // blocks, lengths, T, C, ROWS)
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
            q_t = _tile(q_lin, begin + first, down, key_row, part, S, row < live)
            sums += dot(q_t, _tile(memory, seen * S + low, across, E, channel, E, part < S), PRECISION)
        if not MIRRORED:
            sums *= _share(b, n, chunk, earlier, C, CAUSAL)

    if bias is not None:
        bias += middle
    q_t = _tile(q, begin + first, down, key_row, key, S, row < live)
    low, high = _columns(first, live, CAUSAL, MIRRORED, ROWS, COLUMNS)
    for start in tl.range(low, high, COLUMNS, num_stages=STAGES):
        column = start + across
        k_t = _tile(k, begin + start, across, key_row, key, S, column < live)
        v_t = _tile(v, begin + start, across, v_row, channel, E, column < live)
        products = dot(q_t, tl.trans(k_t), PRECISION)
        root = _root(products, bias, scale, row, column, live, CAUSAL, MIRRORED)
        sums += dot(root * root, v_t, PRECISION)

    at = down[:, None] * E + channel[None, :]
    inside = (row < tl.minimum(C, T - chunk * C))[:, None] & (channel < E)[None, :]
    if u is not None:
        u_t = _tile(u, begin + first, down, u_row, channel, E, row < live).to(tl.float32)
        if do is not None:
            do_t = _tile(do, begin + first, down, E, channel, E, row < live).to(tl.float32)
            tl.store(dy + (begin + first) * E + at, (do_t * u_t).to(dy.dtype.element_ty), mask=inside)
            sums *= do_t
        else:
            sums *= u_t
    tl.store(out + (begin + first) * E + at, sums.to(out.dtype.element_ty), mask=inside)


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
        x_t = _tile(x, begin + row, down, x_row, channel, width, row + down < live)
        y_t = _tile(y, begin + column, across, y_row, channel, width, column + across < live)
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
    b, n, chunk, live, first = _block(tl.program_id(0), lengths, T, C, ROWS)
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
            x_t = _tile(x, begin + first, down, x_row, channel, E, row < live)
            m_t = _tile(memory, seen * S, key, E, channel, E, key < S)
            sums += dot(x_t, tl.trans(m_t), PRECISION)
        if not MIRRORED:
            sums *= _share(b, n, chunk, earlier, C, CAUSAL)
    tl.store(dq_lin + at, sums.to(dq_lin.dtype.element_ty), mask=inside)

    if bias is not None:
        bias += middle
    sums = tl.zeros([ROWS, DS], tl.float32)
    low, high = _columns(first, live, CAUSAL, MIRRORED, ROWS, COLUMNS)
    for start in range(low, high, COLUMNS):
        products = _agreement(
            q, key_row, k, key_row, begin, first, start, live, S, ROWS, COLUMNS, CHANNELS, STAGES, PRECISION
        )
        d_weights = _agreement(
            x, x_row, v, v_row, begin, first, start, live, E, ROWS, COLUMNS, CHANNELS, STAGES, PRECISION
        )
        root = _root(products, bias, scale, row, start + across, live, CAUSAL, MIRRORED)
        k_t = _tile(k, begin + start, across, key_row, key, S, start + across < live)
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
            b, _, chunk, live, first = _block(item * blocks + block, lengths, T, C, ROWS)
            begin, column = b * T + chunk * C, first + diagonal * ROWS
            products = _agreement(
                q, key_row, k, key_row, begin, first, column, live, S, ROWS, ROWS, CHANNELS, STAGES, PRECISION
            )
            d_weights = _agreement(
                x, x_row, v, v_row, begin, first, column, live, E, ROWS, ROWS, CHANNELS, STAGES, PRECISION
            )
            root = _root(products, bias, scale, first + index, column + index, live, CAUSAL, False)
            total += 2 * root * d_weights
    at = tl.program_id(0).to(tl.int64) * ROWS * ROWS
    tl.store(sums + at + index[:, None] * ROWS + index[None, :], total)


@triton.jit(do_not_specialize=["T", "C", "chunks", "segments"])
def _memory_kernel(
    k,  # [B, T, S]
    v,  # [B, T, E]
    start,  # [B, segments, S, E], float32: the sum before each segment, or None: zero
    before,  # [B, N, S, E]: the sum before each chunk, or None: not wanted
    after,  # [B, segments, S, E], float32: the sum behind each segment, or None
    lengths,
    earlier,
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
    n = T
    if lengths is not None:
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
            k_t = _tile(k, begin + first, index, k_row, key, S, first + index < live)
            v_t = _tile(v, begin + first, index, v_row, channel, E, first + index < live)
            added += dot(tl.trans(k_t), v_t, PRECISION)
        if SHARED:
            added *= _share(b, n, chunk, earlier, C, CAUSAL)
        sums += added
    if after is not None:
        tl.store(after + item.to(tl.int64) * S * E + at, sums, mask=inside)


def gated_attention_fused(
    u: Tensor,  # [B, T, E]
    q_quad: Tensor,  # [B, T, S]
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,  # [B, T, E]
    *,
    chunk_len: int,
    bias: Tensor | None,  # [C] or [2 C - 1]
    causal: bool,
    scale: float,
    initial_state: GatedAttentionState | None,
    output_final_state: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, GatedAttentionState | None]:
    inputs = (u, q_quad, k_quad, q_lin, k_lin, v)
    dtype = reduce(torch.promote_types, (x.dtype for x in inputs))
    bias = None if bias is None else bias.float()
    options = (chunk_len, causal, scale)
    if initial_state is None and not output_final_state:
        o, _ = _gated_attention(*(pad_channels(x.to(dtype)) for x in inputs), bias, None, None, lengths, *options)
        return o[..., : v.shape[-1]].to(v.dtype), None

    B, T, E = v.shape
    S = q_quad.shape[-1]
    past = initial_state or GatedAttentionState.empty(B, S, E, chunk_len, device=v.device, dtype=torch.float32)
    resumed = Resumed(past, T, lengths)
    held = (None, None, past.k_quad, None, past.k_lin, past.v)
    rows = [resumed.rows(new.to(dtype), old) for new, old in zip(inputs, held, strict=True)]  # [B, N C, S or E]
    memory = pad_channels(pad_channels(past.memory.float()).mT).mT
    o, _ = _gated_attention(*map(pad_channels, rows), bias, memory, resumed.earlier(), resumed.end, *options)
    o = resumed.of_steps(o)[..., :E].to(v.dtype)
    if not output_final_state:
        return o, None
    _, _, k_quad, _, k_lin, v = rows
    with without_autocast(v.device):
        full = resumed.full * resumed.C
        added = zero_padding(k_lin, full).float().mT @ zero_padding(v, full).float()
        return o, resumed.state(added, k_quad, k_lin, v)


@torch.library.custom_op("seqzoo::gated_attention_fused", mutates_args=())
def _gated_attention(
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,  # [B, S, E], float32, the sum M before the first chunk
    earlier: Tensor | None,  # int64 [B], positions before the first chunk
    lengths: Tensor | None,
    chunk_len: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o, and the sum M that each chunk's queries see: [B, N, S, E] if causal, or else [B, S, E]; empty if it is 0."""
    (q_quad, k_quad, q_lin, k_lin), u, v = _alike(q_quad, k_quad, q_lin, k_lin), *_alike(u), *_alike(v)
    call = _call(v, bias, earlier, lengths, chunk_len, causal, scale)
    memory, _ = _memory(call, k_lin, v, initial)
    o = v.new_empty(v.shape)
    _values(call, q_quad, k_quad, q_lin, memory, v, o, u=u)
    return o, v.new_empty(0, dtype=_wide(v.dtype)) if memory is None else memory


@_gated_attention.register_fake
def _(u, q_quad, k_quad, q_lin, k_lin, v, bias, initial, earlier, lengths, chunk_len, causal, scale):
    (B, T, S), E = q_quad.shape, v.shape[-1]
    N = -(-T // min(chunk_len, T))
    shape = (B, S, E) if not causal else (B, N, S, E) if N > 1 or initial is not None else (0,)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=_wide(v.dtype))


@torch.library.custom_op("seqzoo::gated_attention_fused_backward", mutates_args=())
def _gated_attention_backward(
    do: Tensor,
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    earlier: Tensor | None,
    lengths: Tensor | None,
    memory: Tensor,
    chunk_len: int,
    causal: bool,
    scale: float,
    bias_needs_gradient: bool,
    initial_needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight inputs, the last two empty where they are not wanted."""
    (q_quad, k_quad, q_lin, k_lin), u, v = _alike(q_quad, k_quad, q_lin, k_lin), *_alike(u), *_alike(v)
    call = _call(v, bias, earlier, lengths, chunk_len, causal, scale)
    seen = memory if memory.numel() else None
    du, dv, dy = (v.new_empty(v.shape, dtype=dtype) for dtype in (u.dtype, v.dtype, _wide(v.dtype)))
    _values(call, q_quad, k_quad, q_lin, seen, v, du, u=u, do=do.contiguous(), dy=dy)
    seeing, d_initial = _memory(call, q_lin, dy, mirrored=True, want_end=initial_needs_gradient)
    _values(call, k_quad, q_quad, k_lin, seeing, dy, dv, mirrored=True)
    dq_quad, dq_lin = _scores(call, q_quad, k_quad, seen, dy, v)
    dk_quad, dk_lin = _scores(call, k_quad, q_quad, seeing, v, dy, mirrored=True)
    d_bias = _bias_gradient(call, q_quad, k_quad, dy, v) if bias_needs_gradient else v.new_empty(0, dtype=torch.float32)
    d_initial = v.new_empty(0, dtype=torch.float32) if d_initial is None else d_initial
    return du, dq_quad, dk_quad, dq_lin, dk_lin, dv, d_bias, d_initial


@_gated_attention_backward.register_fake
def _(
    do, u, q_quad, k_quad, q_lin, k_lin, v, bias, initial, earlier, lengths, memory, chunk_len, causal, scale, d_bias,
    d_initial,
):  # fmt: skip
    (B, _, S), E = q_quad.shape, v.shape[-1]
    d_inputs = [x.new_empty(x.shape) for x in (u, q_quad, k_quad, q_lin, k_lin, v)]
    shapes = (bias.shape if d_bias else (0,), (B, S, E) if d_initial else (0,))
    return *d_inputs, *(v.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, chunk_len, causal, scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)
    ctx.options = chunk_len, causal, scale


def _gradient(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[6:8]
    *gradients, d_bias, d_initial = _written(do, *ctx.saved_tensors, *ctx.options, *wanted)
    return *gradients, d_bias if wanted[0] else None, d_initial if wanted[1] else None, *(None,) * 5


def _plain(
    do: Tensor,
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    earlier: Tensor | None,
    lengths: Tensor | None,
    memory: Tensor,
    chunk_len: int,
    causal: bool,
    scale: float,
    bias_needs_gradient: bool,
    initial_needs_gradient: bool,
) -> tuple[Tensor | None, ...]:
    """As `_gated_attention_backward`, for PyTorch to differentiate."""

    def form(*inputs: Any) -> tuple[Tensor]:
        *rows, bias, initial = inputs
        if earlier is None:
            options: dict[str, Any] = {"chunk_len": chunk_len, "causal": causal, "scale": scale, "lengths": lengths}
            options |= {"initial_state": None, "output_final_state": False}
            return (gated_attention_chunked(*rows, bias=bias, **options)[0],)
        u, q_quad, k_quad, q_lin, k_lin, v = (zero_padding(x, lengths).float() for x in rows)
        with without_autocast(v.device):
            offsets = None if bias is None else by_offset(bias, chunk_len, causal)
            o = u * in_chunks(scale * q_quad, k_quad, q_lin, k_lin, v, offsets, chunk_len, earlier, initial)
        return (zero_padding(o, lengths).to(rows[-1].dtype),)

    return pullback(form, (u, q_quad, k_quad, q_lin, k_lin, v, bias, initial), (do,))


_gated_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_gated_attention_backward, _plain)


class Call(NamedTuple):
    """What all kernels of a call are told."""

    bias: Tensor | None  # [offsets]
    earlier: Tensor | None  # [B], positions before the first chunk
    lengths: Tensor | None  # [B]
    C: int  # positions in a chunk
    middle: int  # where the bias of offset 0 stands
    causal: bool
    scale: float


def _call(
    v: Tensor,
    bias: Tensor | None,
    earlier: Tensor | None,
    lengths: Tensor | None,
    chunk_len: int,
    causal: bool,
    scale: float,
) -> Call:
    bias, earlier, lengths = contiguous(bias, earlier, lengths)
    return Call(bias, earlier, lengths, min(chunk_len, v.shape[1]), chunk_len - 1, causal, scale)


def _values(
    call: Call,
    q: Tensor,  # [B, T, S]
    k: Tensor,
    q_lin: Tensor,
    memory: Tensor | None,  # [B, N, S, E] or [B, S, E]
    v: Tensor,  # [B, T, E]
    out: Tensor,  # [B, T, E], to be filled
    *,
    u: Tensor | None = None,
    do: Tensor | None = None,
    dy: Tensor | None = None,  # to be filled
    mirrored: bool = False,
) -> None:
    (B, T, S), E = q.shape, v.shape[-1]
    config = _config("values", q)
    DV = _at_most(config.channels, E)
    blocks = B * triton.cdiv(T, call.C) * triton.cdiv(call.C, config.rows)
    launch(
        _values_kernel,
        blocks * triton.cdiv(E, DV),
        *(q, k, q_lin, call.bias, memory, v, u, do, out, dy),
        *(call.lengths, call.earlier, call.scale, call.middle),
        *(q.stride(1), v.stride(1), v.stride(1) if u is None else u.stride(1), T, call.C, S, E),
        MIRRORED=mirrored,
        COLUMNS=config.columns,
        DS=_channels(S),
        DV=DV,
        **_meta(call, q, config),
    )


def _scores(
    call: Call, q: Tensor, k: Tensor, memory: Tensor | None, x: Tensor, v: Tensor, *, mirrored: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of q_lin, x those of y; mirrored, of k and of k_lin."""
    (B, T, S), E = q.shape, v.shape[-1]
    dq, dq_lin = q.new_empty(q.shape), q.new_empty(q.shape)
    config = _config("scores", q)
    launch(
        _scores_kernel,
        B * triton.cdiv(T, call.C) * triton.cdiv(call.C, config.rows),
        *(q, k, call.bias, memory, x, v, dq, dq_lin),
        *(call.lengths, call.earlier, call.scale, call.middle),
        *(q.stride(1), x.stride(1), v.stride(1), T, call.C, S, E),
        MIRRORED=mirrored,
        DS=_channels(S),
        COLUMNS=config.columns,
        CHANNELS=_at_most(config.channels, E),
        **_meta(call, q, config),
    )
    return dq, dq_lin


def _bias_gradient(call: Call, q: Tensor, k: Tensor, dy: Tensor, v: Tensor) -> Tensor:
    """[offsets]."""
    assert call.bias is not None
    (B, T, S), E = q.shape, v.shape[-1]
    config = _config("bias", q)
    side = config.rows
    blocks = triton.cdiv(call.C, side)
    diagonals = blocks if call.causal else 2 * blocks - 1
    items = B * triton.cdiv(T, call.C)
    groups = _pieces(diagonals, items, q.device)
    sums = q.new_empty(groups, diagonals, side, side, dtype=torch.float32)
    launch(
        _bias_kernel,
        groups * diagonals,
        *(q, k, call.bias, dy, v, sums),
        *(call.lengths, call.scale, call.middle, q.stride(1), dy.stride(1), v.stride(1), T, call.C, S, E),
        *(items, groups),
        CHANNELS=_at_most(config.channels, E),
        **_meta(call, q, config),
    )
    # A row of a block is moved by its number, so that an offset is a column; neighbouring blocks share offsets.
    rows = F.pad(F.pad(sums.sum(0), (0, side - 2)).flatten(1), (side - 1, 1)).unflatten(1, (side, 2 * side - 1))
    low, high = F.pad(rows.sum(1), (0, 1)).chunk(2, -1)  # [diagonals, side]
    by_offset = (F.pad(low, (0, 0, 0, 1)) + F.pad(high, (0, 0, 1, 0))).flatten()  # from 1 - blocks side on
    missing = call.middle + 1 - blocks * side
    return F.pad(by_offset, (missing, call.bias.numel() - missing - by_offset.numel()))


def _memory(
    call: Call,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None = None,  # [B, S, E], float32, what the first chunk sees
    *,
    mirrored: bool = False,
    want_end: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The sum of k vᵀ over the chunks that each chunk sees, None if no chunk sees any; and over all, if wanted.

    Mirrored, over those that see it, of q dyᵀ / m; and over all, which see the state.
    """
    (B, T, S), E = k.shape, v.shape[-1]
    config = _config("memory", k)
    C = call.C if call.causal else STEPS
    N = triton.cdiv(T, C)
    if call.causal and N == 1 and initial is None and not want_end:
        return None, None
    DS, DV = _at_most(config.columns, S), _at_most(config.channels, E)
    programs = B * triton.cdiv(S, DS) * triton.cdiv(E, DV)
    chunks = triton.cdiv(N, _pieces(programs, N, k.device))
    segments = triton.cdiv(N, chunks)

    def run(start: Tensor | None, before: Tensor | None, after: Tensor | None) -> None:
        launch(
            _memory_kernel,
            programs * segments,
            *(k, v, start, before, after, call.lengths, call.earlier),
            *(k.stride(1), v.stride(1), T, C, S, E, chunks, segments),
            SHARED=mirrored,
            DOWN=mirrored,
            DS=DS,
            DV=DV,
            **_meta(call, k, config),
        )

    def sums() -> Tensor:
        return k.new_empty(B, segments, S, E, dtype=torch.float32)

    start = None if initial is None else initial.contiguous()
    if segments > 1 or not call.causal:
        added = sums()
        run(None, None, added)
        if not call.causal:
            return added.sum(1).to(_wide(k.dtype)), None
        start = carry(None if start is None else State(start), State(added), None).memory
    before = k.new_empty(B, N, S, E, dtype=_wide(k.dtype))
    end = sums() if want_end else None
    run(start, before, end)
    return before, None if end is None else end[:, -1].contiguous()


def _alike(*tensors: Tensor) -> list[Tensor]:
    """[B, T, channels], all rows as far from the next as in the others: slices of one tensor stay what they are."""
    rows = {x.stride(1) for x in tensors}
    regular = all(x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)
    return list(tensors) if regular and len(rows) == 1 else [x.contiguous() for x in tensors]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of what is kept between kernels: what products are made in."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _at_most(block: int, width: int) -> int:
    return min(block, _channels(width))


def _channels(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _pieces(programs: int, most: int, device: torch.device) -> int:
    """How many pieces to cut the work of each of so many programs into, such that the GPU has enough to do."""
    return max(1, min(PROGRAMS * backends.multiprocessors(device) // programs, most))


def _config(kernel: str, q: Tensor) -> Config:
    return BLOCKS.of(kernel, q.device, q.dtype, q.shape[-1])


def _meta(call: Call, q: Tensor, config: Config) -> dict[str, Any]:
    return {
        "CAUSAL": call.causal,
        "PRECISION": PRECISIONS[q.dtype],
        "ROWS": config.rows,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
