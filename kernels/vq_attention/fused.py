"""VQ attention in Triton: codes and window in one pass with a running maximum, without a matrix of weights in memory.

A key outside the window of a block of queries counts through its code, so that these queries see S columns, each the
mean of some values with the logarithm of their number as a bias, and then the keys of their window one by one:

    sums       the values of each block, and their number, added up by code: a product with a matrix of zeros and ones
    outside    of each block, the sum of those two or more before it and, if not causal, behind it; divided: means
    forward    a tile of queries: codes, then window

Backward takes weights from the logarithm of their sum. The gradient of q is made by tiles of queries, those of v and k
in the window by tiles of keys, that of the means by codes; `outside` hands the last one on to each value, the other way
round. Products are made some channels at a time and outputs are cut into channels too, so that heads and values may
have any width. Nothing is added to from two programs: the same bits in every run. Exponentials are powers of two.

Source: Lingle, "Transformer-VQ" (ICLR 2024), section 3; Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous, pad_channels, zero_padding
from ..derivatives import Outline, differentiable, pullback
from ..documents import Documents, count_of
from ..launching import launch
from .backward import _key_kernel, _means_kernel, _query_kernel, _value_kernel
from .chunked import plain_attention, seen_in_window
from .forward import _forward_kernel, _outside_kernel, _sums_kernel
from .outside import sums_outside
from .packed import PackedBlocks, of_blocks
from .state import VQState

PRECISIONS = {torch.float32: "tf32x3", torch.float16: "fp16", torch.bfloat16: "bf16"}
ADDED = 1024  # numbers that one program adds up over blocks


class Config(NamedTuple):
    """Of `forward`, of `query`, the gradient of q, of `key`, that of k, of `value`, those of v and of the means, and of
    `sums`."""

    queries: int  # in a tile
    keys: int  # or codes
    channels: int  # of a product at a time
    out: int  # channels of its output that a program has
    num_warps: int
    num_stages: int


BLOCKS = Blocks("vq_attention", Path(__file__).with_name("blocks.csv"), Config)


def vq_attention_fused(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    codebook: Tensor,  # [H, S, D]
    codes: Tensor,  # [B, T, H]
    *,
    block_len: int,
    bias: Tensor | None,
    causal: bool,
    initial_state: VQState | None,
    output_final_state: bool,
    lengths: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, VQState | None]:
    (B, T, H, _), S, Dv, L, out_dtype = q.shape, codebook.shape[1], v.shape[-1], block_len, v.dtype
    dtype, state, past = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype), None, initial_state
    if output_final_state:
        values = zero_padding(v, lengths).float()
        sequences = B if documents is None else documents.N
        state = past or VQState.empty(sequences, H, S, Dv, L, device=q.device, dtype=values.dtype)
        if documents is None:
            state = state.advance(codes, values, lengths)
        else:
            state = state.advance_documents(codes, values, documents)
    sums = counts = first = packed = None
    before = 0
    if past is None:
        L = min(L, T)
    if documents is not None:
        packed = PackedBlocks(documents, L, None if past is None else past.position.clamp(max=L))
        q, k = packed.row(q), packed.row(k)
        v = packed.row(v.to(dtype), None if past is None else past.values.to(dtype))
        codes = packed.row(codes.long(), None if past is None else past.codes)
        bias = bias if bias is None or bias.dim() == 2 else packed.row(bias)
        first, lengths = packed.bounds()
        if past is not None:
            sums, counts = past.sums.float(), past.counts
    elif past is not None:  # what it remembers one by one becomes the block in front
        before, first = L, L - past.position.clamp(max=L)
        lengths = torch.full_like(first, L + T) if lengths is None else L + lengths
        q, k = (F.pad(x, (0, 0, 0, 0, L, 0)) for x in (q, k))
        v, codes = torch.cat([past.values.to(dtype), v.to(dtype)], 1), torch.cat([past.codes, codes], 1)
        sums, counts = past.sums.float(), past.counts
        if bias is not None and bias.dim() == 4:
            bias = F.pad(bias, (0, 0, 0, 0, L, 0))
    q, k, v, codebook = (pad_channels(x.to(dtype)) for x in (q, k, v, codebook))
    sums = None if sums is None else pad_channels(sums)
    starts = None if packed is None else packed.starts
    y = _attention(q, Outline.apply(k), v, codebook, codes, bias, sums, counts, first, lengths, L, causal, starts)[0]
    if packed is not None:
        return packed.pieces.take_up(y[..., :Dv]).to(out_dtype), state
    return y[:, before:, :, :Dv].to(out_dtype), state


@torch.library.custom_op("seqzoo::vq_attention_fused", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,  # only to take a gradient
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,  # [H, offsets] or [B, T, H, offsets]
    past_sums: Tensor | None,  # [B, H, S, Dv], float32
    past_counts: Tensor | None,  # [B, H, S]
    first: Tensor | None,  # [B], the first valid position; with `starts`, [N], that of each block's document
    last: Tensor | None,  # as first, the one behind the last
    block_len: int,
    causal: bool,
    starts: Tensor | None = None,  # the first block of each document in a row, and N; then the past is of each
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o; log2 of the sums of weights [B, T, H]; and of keys outside each window, by code, means and numbers."""
    (B, T, H, D), S, Dv, L = q.shape, codebook.shape[1], v.shape[-1], block_len
    N = triton.cdiv(T, L)
    q, v, codes, codebook, bias, past_sums, first, last = contiguous(
        q, v, codes, codebook, bias, past_sums, first, last
    )

    sums = q.new_empty(B * H, N, S, Dv, dtype=torch.float32)
    counts = torch.empty(B * H, N, S, dtype=torch.int32, device=q.device)
    config = _config("sums", q, v)
    out = _width(config.out, Dv)
    launch(
        _sums_kernel,
        B * H * N * triton.cdiv(S, config.queries) * triton.cdiv(Dv, out),
        *(v, codes, sums, counts, first, last, T, H, S, Dv, L),
        PACKED=starts is not None,
        PRECISION=PRECISIONS[q.dtype],
        CODES=config.queries,
        KEYS=config.keys,
        OUT=out,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    counts = sums_outside(counts.unflatten(0, (B, H)), causal, starts)
    if past_counts is not None:
        counts += past_counts[:, :, None] if starts is None else of_blocks(past_counts, starts, N)
    means = v.new_empty(B, H, N, S, Dv)
    _outside(sums, _share(counts), past_sums, means, None, starts, before=True, behind=not causal)

    o, log_sum = v.new_empty(v.shape), q.new_empty(B, T, H, dtype=torch.float32)
    arguments = (*_arguments(q, v, codebook, codes, bias, means, counts), log_sum, first, last)
    config = _config("forward", q, v)
    out = _width(config.out, Dv)
    launch(
        _forward_kernel,
        B * H * N * triton.cdiv(L, config.queries) * triton.cdiv(Dv, out),
        *(*arguments, o, T, H, S, D, Dv, L, _offsets(bias)),
        **_meta(q, config, out, starts),
        CAUSAL=causal,
    )
    return o, log_sum, means, counts


@_attention.register_fake
def _(q, k, v, codebook, codes, bias, past_sums, past_counts, first, last, block_len, causal, starts=None):
    (B, T, H, _), S, Dv = q.shape, codebook.shape[1], v.shape[-1]
    N = -(-T // block_len)
    return (
        v.new_empty(v.shape),
        q.new_empty(B, T, H, dtype=torch.float32),
        v.new_empty(B, H, N, S, Dv),
        codes.new_empty(B, H, N, S, dtype=torch.int64),
    )


@torch.library.custom_op("seqzoo::vq_attention_fused_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,  # an outline, for a gradient of the gradient
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    past_sums: Tensor | None,  # as k
    first: Tensor | None,
    last: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    means: Tensor,
    counts: Tensor,
    block_len: int,
    causal: bool,
    bias_needs_gradient: bool,
    past_needs_gradient: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the bias and the past sums, the last two empty where none is to be had."""
    (B, T, H, D), S, Dv, L, N = q.shape, codebook.shape[1], v.shape[-1], block_len, counts.shape[2]
    delta = (do.float() * o).sum(-1)
    do, q, v, codes, codebook, bias, first, last = contiguous(do, q, v, codes, codebook, bias, first, last)
    q, keys, v, codebook, means, log_counts, bias, bias_stride = _arguments(q, v, codebook, codes, bias, means, counts)
    cells, offsets = B * H * N, _offsets(bias)

    dq, dk, dv = (x.new_empty(x.shape) for x in (q, q, v))
    d_bias = q.new_zeros(B, T, H, offsets, dtype=torch.float32) if bias_needs_gradient else None
    config = _config("query", q, v)
    out = _width(config.out, D)
    launch(
        _query_kernel,
        cells * triton.cdiv(L, config.queries) * triton.cdiv(D, out),
        *(q, keys, v, codebook, means, log_counts, bias, bias_stride, log_sum, first, last, do, delta, dq, d_bias),
        *(T, H, S, D, Dv, L, offsets),
        **_meta(q, config, out, starts),
        CAUSAL=causal,
    )
    config = _config("key", q, v)
    out = _width(config.out, D)
    launch(
        _key_kernel,
        cells * triton.cdiv(L, config.keys) * triton.cdiv(D, out),
        *(q, keys, v, bias, bias_stride, log_sum, first, last, do, delta, dk, T, H, D, Dv, L, offsets),
        **_meta(q, config, out, starts),
        CAUSAL=causal,
    )
    d_means, outside = (q.new_empty(B, H, N, S, Dv, dtype=torch.float32) for _ in range(2))
    config = _config("value", q, v)
    out = _width(config.out, Dv)
    launch(
        _means_kernel,
        cells * triton.cdiv(S, config.keys) * triton.cdiv(Dv, out),
        *(q, codebook, log_counts, log_sum, first, last, do, d_means, T, H, S, D, Dv, L),
        **_meta(q, config, out, starts),
    )
    sequences = count_of(starts, B)
    d_past = q.new_empty((sequences, H, S, Dv) if past_needs_gradient else (0,), dtype=torch.float32)
    whole = d_past if past_needs_gradient else None
    _outside(d_means, _share(counts), None, outside, whole, starts, before=not causal, behind=True, given=True)
    launch(
        _value_kernel,
        cells * triton.cdiv(L, config.keys) * triton.cdiv(Dv, out),
        *(q, keys, codes, outside, bias, bias_stride, log_sum, first, last, do, dv, T, H, S, D, Dv, L, offsets),
        **_meta(q, config, out, starts),
        CAUSAL=causal,
    )
    if d_bias is None:
        d_bias = q.new_empty(0, dtype=torch.float32)
    elif bias.dim() == 2:
        d_bias = d_bias.sum((0, 1))
    return dq, dk, dv, d_bias, d_past


@_attention_backward.register_fake
def _(
    do, q, k, v, codebook, codes, bias, past_sums, first, last, o, log_sum, means, counts, block_len, causal, biased,
    resumed, starts=None,
):  # fmt: skip
    d_bias, d_past = bias.shape if biased else (0,), past_sums.shape if resumed else (0,)
    inputs = (x.new_empty(x.shape) for x in (q, q, v))
    return *inputs, *(q.new_empty(shape, dtype=torch.float32) for shape in (d_bias, d_past))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, codebook, codes, bias, past_sums, _, first, last, ctx.block_len, ctx.causal, starts = inputs
    ctx.save_for_backward(q, k, v, codebook, codes, bias, past_sums, first, last, *output, starts)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, do: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    (*saved, starts), (biased, resumed) = ctx.saved_tensors, ctx.needs_input_grad[5:7]
    dq, dk, dv, d_bias, d_past = _written(do, *saved, ctx.block_len, ctx.causal, biased, resumed, starts)
    bias = saved[5]
    return dq, dk, dv, None, None, d_bias.to(bias.dtype) if biased else None, d_past if resumed else None, *(None,) * 6


def _plain(*arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_attention_backward`, for PyTorch to differentiate."""
    do, q, k, v, codebook, codes, bias, past_sums, first, last, _, _, _, counts, L, causal, _, _, starts = arguments
    (B, T, H, _), N = q.shape, counts.shape[2]
    first, last = (
        None if x is None else x[:, None] if starts is None else x.repeat_interleave(L) for x in (first, last)
    )
    position = torch.arange(T, device=q.device)
    valid = torch.ones(B, T, dtype=torch.bool, device=q.device)
    valid = valid if first is None else valid & (position >= first)
    valid = valid if last is None else valid & (position < last)

    def split(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, N, L, D]
        return F.pad(x, (0, 0, 0, 0, 0, -T % L)).transpose(1, 2).unflatten(2, (-1, L))

    def form(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, past_sums: Tensor | None) -> tuple[Tensor]:
        q_b, k_b, v_b = (split(torch.where(valid[..., None, None], x, 0).float()) for x in (q, k, v))
        biases = None if bias is None else split(bias.float().expand(B, T, H, -1))
        codes_b, valid_b = split(codes[..., None])[..., 0], split(valid[..., None, None])[..., 0]
        visible = seen_in_window(valid_b, 2 if causal else 3, starts)
        if past_sums is not None and starts is not None:
            past_sums = of_blocks(past_sums, starts, N)
        others = (past_sums, codebook.float(), codes_b, visible, counts, causal, starts)
        y = plain_attention(q_b, k_b, v_b, biases, *others)
        y = y.flatten(2, 3)[:, :, :T].transpose(1, 2)
        return (torch.where(valid[..., None, None], y, 0).to(v.dtype),)

    return pullback(form, (q, k, v, bias, past_sums), (do,))


_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_attention_backward, _plain)


def _outside(
    x: Tensor,
    share: Tensor,
    start: Tensor | None,
    out: Tensor,
    whole: Tensor | None,
    starts: Tensor | None,
    *,
    before: bool,
    behind: bool,
    given: bool = False,
) -> None:
    B, H, N, S, Dv = out.shape
    scratch = torch.empty_like(x) if before and behind else None
    sequences, heads = (B, None) if starts is None else (len(starts) - 1, H)
    launch(
        _outside_kernel,
        sequences * H * triton.cdiv(S * Dv, ADDED),
        *(x, share, start, scratch, out, whole, starts, heads, N, S, Dv),
        BEFORE=before,
        BEHIND=behind,
        GIVEN=given,
        BLOCK=ADDED,
    )


def _share(counts: Tensor) -> Tensor:
    return counts.clamp(min=1).float().reciprocal()


def _arguments(
    q: Tensor, v: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, means: Tensor, counts: Tensor
) -> tuple[Any, ...]:
    """What kernels that make weights begin with."""
    heads = torch.arange(len(codebook), device=q.device)
    bias_stride = 0 if bias is None or bias.dim() == 2 else bias[0, 0].numel()
    return q, codebook[heads, codes], v, codebook, means, counts.float().log2(), bias, bias_stride


def _offsets(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.shape[-1]


def _config(kernel: str, q: Tensor, v: Tensor) -> Config:
    return BLOCKS.of(kernel, q.device, q.dtype, max(q.shape[-1], v.shape[-1]))


def _width(most: int, channels: int) -> int:
    return max(16, min(most, triton.next_power_of_2(channels)))


def _meta(q: Tensor, config: Config, out: int, starts: Tensor | None) -> dict[str, Any]:
    return {
        "PACKED": starts is not None,
        "PRECISION": PRECISIONS[q.dtype],
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "CHANNELS": _width(config.channels, q.shape[-1]),
        "OUT": out,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
