from __future__ import annotations

import torch
from torch import Tensor

from ..common import zero_padding


def attention_reference(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, Dv]
    *,
    causal: bool,
    lengths: Tensor | None,
    scale: float | Tensor,
    position: Tensor | None,
) -> Tensor:
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    k, v = (zero_padding(x, lengths).repeat_interleave(H // G, dim=2) for x in (k, v))
    here = torch.arange(T).expand(B, T) if position is None else position[:, None] + torch.arange(T)  # [B, T]
    there = torch.arange(S)
    end = torch.full((B,), S) if lengths is None else lengths
    sees = (there < end[:, None])[:, None, :].expand(B, T, S)
    if causal:
        sees = sees & (there <= here[..., None])
    live = (here < end[:, None])[..., None, None]  # [B, T, 1, 1]
    q = torch.where(live, q, 0)

    scores = torch.einsum("bthd,bshd->bhts", scale * q, k).masked_fill(~sees[:, None], -torch.inf)
    weights = torch.where(sees.any(-1)[:, None, :, None], scores, 0).softmax(-1)
    return torch.where(live, torch.einsum("bhts,bshd->bthd", weights, v), 0)
