"""Gated attention in Triton, without a matrix of weights in memory.

With y the output before its gate, o = u ∘ y, s = scale q_quad kᵀ_quad + b inside a chunk, M the sum of k_lin vᵀ that a
chunk's queries see (over earlier chunks if causal, over all if not) and m the number of its terms,

    y_i = sum_j relu²(s_ij) v_j + Mᵀ q_lin_i / m_i

A program has a block of rows of one chunk and a block of channels of v, and goes through the chunk's keys block by
block. M is made before, by programs that go through the chunks and hold a block of it; where these would not fill the
GPU, time is cut into segments, as in linear attention. From a state, M begins as the state's, and PyTorch lays the
steps behind those rows of a chunk that the state holds. Of documents in one row it makes M too, and lays out their
chunks as a batch of sequences of one.

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

from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous, pad_channels, without_autocast, zero_padding
from ..derivatives import differentiable, pullback
from ..documents import Documents
from ..launching import cut_work, launch
from ..linear_attention.fused import State, carry
from .backward import _bias_kernel, _scores_kernel
from .chunked import by_offset, gated_attention_chunked, in_chunks, in_one_chunk
from .forward import _memory_kernel, _values_kernel
from .packed import over_documents
from .resume import Resumed
from .state import GatedAttentionState

_pieces = partial(cut_work, wanted=2)
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
    documents: Documents | None,
) -> tuple[Tensor, GatedAttentionState | None]:
    inputs = (u, q_quad, k_quad, q_lin, k_lin, v)
    dtype = reduce(torch.promote_types, (x.dtype for x in inputs))
    bias = None if bias is None else bias.float()
    options = (chunk_len, causal, scale)
    (B, T, E), S = v.shape, q_quad.shape[-1]
    past = initial_state
    if past is None and output_final_state:
        sequences = B if documents is None else documents.N
        past = GatedAttentionState.empty(sequences, S, E, chunk_len, device=v.device, dtype=torch.float32)
    if documents is not None:

        def attend(rows: list[Tensor], seen: Tensor | None, terms: Tensor, live: Tensor) -> Tensor:
            if seen is not None and not causal:  # the kernel takes the rows of a chunk for the terms of what it sees
                seen = seen * (live / terms.clamp(min=1))[:, None, None]
            memory = None if seen is None else pad_channels(pad_channels(seen).mT).mT
            earlier = terms if causal and seen is not None else None
            return _gated_attention(*map(pad_channels, rows), bias, memory, earlier, live, *options)[0][..., :E]

        o, state = over_documents(attend, [x.to(dtype) for x in inputs], documents, chunk_len, causal, past)
        return o.to(v.dtype), state
    if past is None:
        o, _ = _gated_attention(*(pad_channels(x.to(dtype)) for x in inputs), bias, None, None, lengths, *options)
        return o[..., :E].to(v.dtype), None

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
    initial: Tensor | None,  # [B, S, E], float32, the sum M before the first chunk; if not causal, M
    earlier: Tensor | None,  # int64 [B], positions before the first chunk
    lengths: Tensor | None,
    chunk_len: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o, and the sum M that each chunk's queries see: [B, N, S, E] if causal, or else [B, S, E]; empty if it is 0."""
    (q_quad, k_quad, q_lin, k_lin), u, v = _alike(q_quad, k_quad, q_lin, k_lin), *_alike(u), *_alike(v)
    call = _call(v, bias, initial, earlier, lengths, chunk_len=chunk_len, causal=causal, scale=scale)
    memory, _ = _memory(call, k_lin, v)
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
    call = _call(v, bias, initial, earlier, lengths, chunk_len=chunk_len, causal=causal, scale=scale)
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


def _plain(do: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_gated_attention_backward`, for PyTorch to differentiate."""
    *inputs, earlier, lengths, _, chunk_len, causal, scale, _, _ = arguments

    def form(*inputs: Any) -> tuple[Tensor]:
        *rows, bias, initial = inputs
        if initial is None:
            options: dict[str, Any] = {"chunk_len": chunk_len, "causal": causal, "scale": scale, "lengths": lengths}
            options |= {"initial_state": None, "output_final_state": False, "documents": None}
            return (gated_attention_chunked(*rows, bias=bias, **options)[0],)
        u, q_quad, k_quad, q_lin, k_lin, v = (zero_padding(x, lengths).float() for x in rows)
        with without_autocast(v.device):
            offsets = None if bias is None else by_offset(bias, chunk_len, causal)
            if v.shape[1] <= chunk_len:
                seen = initial, earlier if causal else lengths
                y = in_one_chunk(q_quad, k_quad, q_lin, v, offsets, causal, scale, *seen)
            else:
                y = in_chunks(q_quad, k_quad, q_lin, k_lin, v, offsets, chunk_len, scale, earlier, initial)
        return (zero_padding(u * y, lengths).to(rows[-1].dtype),)

    return pullback(form, inputs, (do,))


_gated_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_gated_attention_backward, _plain)


class Call(NamedTuple):
    """What all kernels of a call are told."""

    bias: Tensor | None  # [offsets]
    initial: Tensor | None  # [B, S, E]
    earlier: Tensor | None  # [B]
    lengths: Tensor | None  # [B]
    C: int  # positions in a chunk
    middle: int  # where the bias of offset 0 stands
    causal: bool
    scale: float


def _call(v: Tensor, *tensors: Tensor | None, chunk_len: int, causal: bool, scale: float) -> Call:
    bias, initial, earlier, lengths = contiguous(*tensors)
    return Call(bias, initial, earlier, lengths, min(chunk_len, v.shape[1]), chunk_len - 1, causal, scale)


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
    *,
    mirrored: bool = False,
    want_end: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The sum of k vᵀ over the chunks that each chunk sees, None if no chunk sees any; and over all, if wanted.

    Mirrored, over those that see it, of q dyᵀ / m; and over all, which see what there was before.
    """
    (B, T, S), E = k.shape, v.shape[-1]
    config = _config("memory", k)
    C = call.C if call.causal else STEPS
    N = triton.cdiv(T, C)
    start = None if mirrored else call.initial
    alone = T <= call.C and (call.causal or call.initial is not None)  # a chunk that sees no other
    if alone and start is not None:
        memory = start.to(_wide(k.dtype), copy=True)
        return memory[:, None] if call.causal else memory, None
    if alone and not want_end:
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

    if segments > 1 or not call.causal:
        added = sums()
        run(None, None, added)
        if not call.causal:
            whole = added.sum(1)
            return (None, whole) if alone else (whole.to(_wide(k.dtype)), None)
        start = carry(None if start is None else State(start), State(added), None).memory
    before = None if alone else k.new_empty(B, N, S, E, dtype=_wide(k.dtype))
    end = sums() if want_end else None
    run(start, before, end)
    return before, None if end is None else end[:, -1].clone(memory_format=torch.contiguous_format)


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
