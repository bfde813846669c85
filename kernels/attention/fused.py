"""Softmax attention in Triton, without a matrix of weights in memory.

A program has a block of queries of one head and goes through the keys block by block with a running maximum (Milakov
and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, "FlashAttention-2"). Backward makes weights
again from the logarithm of their sum: one kernel for q, by blocks of queries, one for k and v, by blocks of keys, which
goes through all query heads that share them. Nothing is added to from two programs: the same bits in every run.
Exponentials are powers of two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous, pad_channels
from ..derivatives import differentiable, pullback
from ..documents import Documents
from ..launching import launch
from .backward import _key_kernel, _query_kernel
from .chunked import attention_chunked
from .forward import _forward_kernel
from .reference import padded

PRECISIONS = {torch.float32: "tf32x3", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Config(NamedTuple):
    """Of `forward`, of `query`, the gradient of q, and of `key`, those of k and v."""

    queries: int  # in a block
    keys: int
    num_warps: int
    num_stages: int


BLOCKS = Blocks("attention", Path(__file__).with_name("blocks.csv"), Config)


def attention_fused(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, Dv]
    *,
    causal: bool,
    lengths: Tensor | None,
    scale: float | Tensor,
    position: Tensor | None,
    documents: Documents | None = None,
    queries: Documents | None = None,
) -> Tensor:
    if documents is not None:
        return padded(attention_fused, q, k, v, causal, scale, documents, queries)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    scales = scale.reshape(q.shape[:2]).float() if isinstance(scale, Tensor) else None
    number = 1.0 if isinstance(scale, Tensor) else float(scale)
    aligned = (pad_channels(x.to(dtype)) for x in (q, k, v))
    o, _ = _attention(*aligned, scales, number, lengths, position, causal)
    return o[..., : v.shape[-1]].to(v.dtype)


@torch.library.custom_op("seqzoo::attention_fused", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    position: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """o, and the logarithm of the sums of weights [B, T, H], to base 2."""
    (B, T, H, _), Dv = q.shape, v.shape[-1]
    o = q.new_empty(B, T, H, Dv)
    log_sum = q.new_empty(B, T, H, dtype=torch.float32)
    q, k, v, scales, lengths, position = contiguous(q, k, v, scales, lengths, position)
    config = _config("forward", q, v)
    launch(
        _forward_kernel,
        B * H * triton.cdiv(T, config.queries),
        *(q, k, v, scales, scale, o, log_sum, lengths, position, *_sizes(q, k, v)),
        **_meta(q, v, config, causal),
    )
    return o, log_sum


@torch.library.custom_op("seqzoo::attention_fused_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    position: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    delta = (do.float() * o).sum(-1)
    q, k, v, scales, lengths, position, do = contiguous(q, k, v, scales, lengths, position, do)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    arguments, ends = (q, k, v, scales, scale, do, log_sum, delta), (lengths, position, *_sizes(q, k, v))
    config = _config("query", q, v)
    programs = B * H * triton.cdiv(T, config.queries)
    launch(_query_kernel, programs, *arguments, dq, *ends, **_meta(q, v, config, causal))
    config = _config("key", q, v)
    programs = B * G * triton.cdiv(S, config.keys)
    launch(_key_kernel, programs, *arguments, dk, dv, *ends, **_meta(q, v, config, causal))
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, scales, scale, lengths, position, causal):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, T, H, dtype=torch.float32)


@_attention_backward.register_fake
def _(do, q, k, v, scales, scale, lengths, position, o, log_sum, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scales, ctx.scale, lengths, position, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, scales, lengths, position, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, scales, lengths, position, o, log_sum = ctx.saved_tensors
    gradients = _written(do, q, k, v, scales, ctx.scale, lengths, position, o, log_sum, ctx.causal)
    return *gradients, *(None,) * 5


def _plain(*arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_attention_backward`, for PyTorch to differentiate."""
    do, q, k, v, scales, scale, lengths, position, _, _, causal = arguments
    by_query = scale if scales is None else scales[..., None, None]

    def form(*qkv: Tensor) -> tuple[Tensor]:
        return (attention_chunked(*qkv, causal=causal, lengths=lengths, scale=by_query, position=position),)

    return pullback(form, (q, k, v), (do,))


_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_attention_backward, _plain)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    (_, T, H, D), (S, G, Dv) = q.shape, v.shape[1:]
    return T, S, H, G, D, Dv


def _channels(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _config(kernel: str, q: Tensor, v: Tensor) -> Config:
    return BLOCKS.of(kernel, q.device, q.dtype, max(_channels(q), _channels(v)))


def _meta(q: Tensor, v: Tensor, config: Config, causal: bool) -> dict[str, Any]:
    return {
        "CAUSAL": causal,
        "PRECISION": PRECISIONS[q.dtype],
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "DK": _channels(q),
        "DV": _channels(v),
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
