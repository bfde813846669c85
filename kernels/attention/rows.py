"""Softmax attention of a batch, by PyTorch's scaled_dot_product_attention or with weights that are kept."""

from __future__ import annotations

from itertools import groupby, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import can_be_looked_at, zero_padding
from ..derivatives import differentiable_twice, forward_mode, gradient, pullback
from .kept import attention_kept, keeps
from .plain import plain_attention


def attention_of_rows(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, Dv]
    *,
    causal: bool,
    lengths: Tensor | None,
    scale: float | Tensor,
    position: Tensor | None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    B, T, S = *q.shape[:2], k.shape[1]
    if position is None and window is None and keeps(q, k, v):
        return _kept(q, k, v, causal, lengths, scale)
    if causal and T == 1 and window is None and position is not None and can_be_looked_at(position):
        return attention_of_one(q, k, v, lengths, scale, position)
    if position is None and window is not None:
        position = torch.zeros(B, dtype=torch.int64, device=q.device)
    # Padding stands last, so that no valid causal query ever sees it: the causal kernel then needs no mask of keys.
    mask = None
    if position is not None:
        here = position[:, None] + torch.arange(T, device=q.device)  # [B, T]
        end = torch.full_like(position, S) if lengths is None else lengths
        live = here < end[:, None]
        there = torch.arange(S, device=q.device)
        last = torch.where(live, here, 0) if causal else (end - 1)[:, None]
        mask = (there <= last[..., None])[:, None]  # [B, 1, T or 1, S]
        if window is not None:
            mask = mask & in_window(here, there, window)[:, None]
        q = torch.where(live[..., None, None], q, 0)
    elif lengths is not None:
        live = torch.arange(T, device=q.device) < lengths[:, None]
        q = zero_padding(q, lengths)
        if not causal:
            mask = live[:, None, None, :]
    k, v = zero_padding(k, lengths), zero_padding(v, lengths)

    y = attend((q * scale).to(q.dtype), k, v, mask, causal and mask is None)
    if lengths is None and position is None:
        return y
    return torch.where(live[..., None, None], y, 0)


def attention_of_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | Tensor, position: Tensor
) -> Tensor:  # [B, 1, H, Dv]
    """The same of a single causal query in each sequence, which reads no more of a cache than it sees, and copies none.

    Queries that share keys take the place of queries one behind the other.
    """
    S, shared = k.shape[1], q.shape[2] // k.shape[2]
    ends = repeat(S) if lengths is None else lengths.tolist()
    seen = [max(0, here + 1) if here < end else 0 for here, end in zip(position.tolist(), ends, strict=False)]
    q = (q * scale).to(q.dtype)
    if shared > 1:
        q = q[:, 0].unflatten(1, (-1, shared)).transpose(1, 2)  # [B, H / G, G, D]
    if seen.count(S) == len(seen):
        y = attend(q, k, v, None, False)
    else:
        parts, first = [], 0
        for keys, equal in groupby(seen):
            row = slice(first, first := first + len(list(equal)))
            if keys:
                parts.append(attend(q[row], k[row, :keys], v[row, :keys], None, False))
            else:
                parts.append(v.new_zeros(row.stop - row.start, *q.shape[1:3], v.shape[-1]))
        y = torch.cat(parts)
    return y if shared == 1 else y.transpose(1, 2).flatten(1, 2)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """By q [B, T, H, D], scaled, to the keys that are seen, `mask` [B, 1, T or 1, S]: [B, T, H, Dv]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if forward_mode() or differentiable_twice(q, k, v):
        y = plain_attention(mask, causal, q, k, v)
    else:
        y = _sdpa(mask, causal, q, k, v)
        if y.requires_grad and _second_derivatives():
            y = _Attention.apply(mask, causal, y, q, k, v)
    return y.transpose(1, 2)


def in_window(here: Tensor, there: Tensor, window: tuple[int, int]) -> Tensor:
    """Which keys, from where they are [S], are within the window of queries, from where those are [B, T]: [B, T, S]."""
    distance = there - here[..., None]
    return (distance >= -window[0]) & (distance <= window[1])


def _kept(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None, scale: float | Tensor
) -> Tensor:  # [B, T, H, Dv]
    B, T, H, _ = q.shape

    def by_head(x: Tensor) -> Tensor:  # [B, T, H or G, D] -> [B * H, T, D]
        return x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2).reshape(B * H, T, -1).contiguous()

    of_heads = None if lengths is None else lengths.repeat_interleave(H)
    y, _ = attention_kept(by_head((q * scale).to(q.dtype)), by_head(k), by_head(v), of_heads, causal)
    return y.view(B, H, T, -1).transpose(1, 2)


# All of q [B, H, T, D], k [B, G, S, D] and v [B, G, S, Dv], scaled; mask [B, 1, T or 1, S] of the keys that are seen.


def _sdpa(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=bool(q.shape[1] != k.shape[1])
    )


def _second_derivatives() -> bool:
    """Whether they can be asked for: PyTorch refuses those of graphs, and has its own way in function transforms."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


class _Attention(torch.autograd.Function):
    """y = _sdpa(q, k, v), which PyTorch differentiates once, with the derivatives of the plain form beyond the first.

    Once, PyTorch's own gradient of y runs; where another is to follow, it is made again, by an operation that has one.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor | None, causal: bool, y: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.causal = causal
        ctx.save_for_backward(mask, q, k, v)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled() and not forward_mode():
            return None, None, dy, None, None, None
        mask, *inputs = ctx.saved_tensors

        def written() -> tuple[Tensor | None, ...]:
            return pullback(lambda *x: (_sdpa(mask, ctx.causal, *x),), inputs, (dy,))

        def form(*inputs: Tensor) -> tuple[Tensor]:
            return (plain_attention(mask, ctx.causal, *inputs),)

        return None, None, None, *gradient(written, form, inputs, (dy,))
