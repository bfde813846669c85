from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import zero_padding


def attention_chunked(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, Dv]
    *,
    causal: bool,
    lengths: Tensor | None,
    scale: float | Tensor,
    position: Tensor | None,
) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    # Padding stands last, so that no valid causal query ever sees it: the causal kernel then needs no mask of keys.
    mask = None
    if position is not None:
        here = position[:, None] + torch.arange(T, device=q.device)  # [B, T]
        end = torch.full_like(position, S) if lengths is None else lengths
        live = here < end[:, None]
        there = torch.arange(S, device=q.device)
        last = torch.where(live, here, 0) if causal else (end - 1)[:, None]
        mask = (there <= last[..., None])[:, None]  # [B, 1, T or 1, S]
        q = torch.where(live[..., None, None], q, 0)
    elif lengths is not None:
        live = torch.arange(T, device=q.device) < lengths[:, None]
        q = zero_padding(q, lengths)
        if not causal:
            mask = live[:, None, None, :]
    k, v = zero_padding(k, lengths), zero_padding(v, lengths)

    y = F.scaled_dot_product_attention(
        (q * scale).transpose(1, 2).to(q.dtype),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=1.0,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if lengths is None and position is None:
        return y
    return torch.where(live[..., None, None], y, 0)
