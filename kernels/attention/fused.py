"""Softmax attention in Triton, without a matrix of weights in memory.

A program has a block of queries of one head and goes through the keys block by block with a running maximum (Milakov
and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, "FlashAttention-2"). Backward makes weights
again from the logarithm of their sum: one kernel for q, by blocks of queries, one for k and v, by blocks of keys, which
goes through all query heads that share them. Nothing is added to from two programs: the same bits in every run.
Exponentials are powers of two.

Documents in one row are cut into blocks by themselves, and a program has one of those. Blocks of keys that no query of
a block sees, or no key is seen from, are left out: with a window, time is linear in T.
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
from ..documents import Documents, documents_from, starts_of
from ..launching import launch
from .backward import _key_kernel, _query_kernel
from .chunked import attention_chunked
from .forward import _forward_kernel

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
    window: tuple[int, int] | None,
    documents: Documents | None = None,
    queries: Documents | None = None,
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    scales = scale.reshape(q.shape[:2]).float() if isinstance(scale, Tensor) else None
    number = 1.0 if isinstance(scale, Tensor) else float(scale)
    aligned = (pad_channels(x.to(dtype)) for x in (q, k, v))
    starts = starts_of(documents), starts_of(queries)
    left, right = window or (-1, -1)
    causal = causal and window is None  # which says so already
    o, _ = _attention(*aligned, scales, number, lengths, position, causal, *starts, left, right)
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
    starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    left: int = -1,
    right: int = -1,
) -> tuple[Tensor, Tensor]:
    """o, and the logarithm of the sums of weights [B, T, H], to base 2.

    Of queries that see `left` keys ahead of their own place and `right` behind it, or -1: as many as there are.
    """
    (B, T, H, _), Dv = q.shape, v.shape[-1]
    o = q.new_empty(B, T, H, Dv)
    log_sum = q.new_empty(B, T, H, dtype=torch.float32)
    q, k, v, scales = contiguous(q, k, v, scales)
    config = _config("forward", q, v)
    blocks, ends = _ends(q, config.queries, starts, query_starts, lengths, position, left, right)
    launch(
        _forward_kernel,
        H * blocks,
        *(q, k, v, scales, scale, o, log_sum, *ends, *_sizes(q, k, v)),
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
    starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    left: int = -1,
    right: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    H, G = q.shape[2], k.shape[2]
    delta = (do.float() * o).sum(-1)
    q, k, v, scales, do = contiguous(q, k, v, scales, do)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    arguments, places = (q, k, v, scales, scale, do, log_sum, delta), (lengths, position, left, right)
    sizes = _sizes(q, k, v)
    config = _config("query", q, v)
    blocks, ends = _ends(q, config.queries, starts, query_starts, *places)
    launch(_query_kernel, H * blocks, *arguments, dq, *ends, *sizes, **_meta(q, v, config, causal))
    config = _config("key", q, v)
    blocks, ends = _ends(k, config.keys, starts, query_starts, *places, of_keys=True)
    launch(_key_kernel, G * blocks, *arguments, dk, dv, *ends, *sizes, **_meta(q, v, config, causal))
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, scales, scale, lengths, position, causal, starts=None, query_starts=None, left=-1, right=-1):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, T, H, dtype=torch.float32)


@_attention_backward.register_fake
def _(do, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scales, ctx.scale, lengths, position, ctx.causal, starts, query_starts, *ctx.reach = inputs
    ctx.save_for_backward(q, k, v, scales, lengths, position, *output, starts, query_starts)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, scales, lengths, position, o, log_sum, *starts = ctx.saved_tensors
    given = (q, k, v, scales, ctx.scale, lengths, position, o, log_sum, ctx.causal, *starts, *ctx.reach)
    return *_written(do, *given), *(None,) * 9


def _plain(*arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_attention_backward`, for PyTorch to differentiate."""
    do, q, k, v, scales, scale, lengths, position, _, _, causal, starts, query_starts, left, right = arguments
    given = {"causal": causal, "lengths": lengths, "position": position}
    given["scale"] = scale if scales is None else scales[..., None, None]
    given["window"] = None if left < 0 else (left, right)
    given["documents"] = documents_from(starts, k.shape[1])
    given["queries"] = documents_from(query_starts, q.shape[1])

    def form(*qkv: Tensor) -> tuple[Tensor]:
        return (attention_chunked(*qkv, **given),)

    return pullback(form, (q, k, v), (do,))


_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_attention_backward, _plain)


def _ends(
    x: Tensor,
    block: int,
    starts: Tensor | None,
    query_starts: Tensor | None,
    lengths: Tensor | None,
    position: Tensor | None,
    left: int,
    right: int,
    *,
    of_keys: bool = False,
) -> tuple[int, tuple[Any, ...]]:
    """How many blocks of queries or keys x [B, T, ...] has, for each head, and what a kernel is told of sequences."""
    (B, T), window = x.shape[:2], (None, None) if left < 0 else (left, right)
    if starts is None:
        return B * triton.cdiv(T, block), (*contiguous(lengths, position), *(None,) * 6, *window)
    rows = contiguous(starts, query_starts)
    pieces = Documents(starts if of_keys or query_starts is None else query_starts, T).pieces(block)
    count = len(pieces.document)
    return count, (None, None, *rows, pieces.document, pieces.number, count, len(starts) - 1, *window)


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
