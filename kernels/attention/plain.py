"""Softmax attention for PyTorch to differentiate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype, without_autocast


def plain_attention(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v in quadratic memory.

    Of q [B, H, T, D], scaled, k [B, G, S, D] and v [B, G, S, Dv]; mask [B, 1, T or 1, S] of the keys that are seen.
    """
    dtype = accumulation_dtype(v.dtype)
    with without_autocast(q.device):
        share = q.shape[1] // k.shape[1]
        k, v = (x.to(dtype).repeat_interleave(share, dim=1) for x in (k, v))
        scores = q.to(dtype) @ k.mT
        if causal:
            before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            mask = before if mask is None else mask & before
        if mask is not None:
            scores = torch.where(mask, scores, torch.finfo(dtype).min)
        weights = scores.softmax(-1)
        return ((weights if mask is None else torch.where(mask, weights, 0)) @ v).to(q.dtype)
