from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common import zero_padding
from ..documents import Documents


def attention_reference(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, Dv]
    *,
    causal: bool,
    lengths: Tensor | None,
    scale: float | Tensor,
    position: Tensor | None,
    window: tuple[int, int] | None,
    documents: Documents | None = None,  # of the keys
    queries: Documents | None = None,  # of the queries, where they have others
) -> Tensor:
    if documents is not None:
        return padded(attention_reference, q, k, v, causal, scale, window, documents, queries)
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    k, v = (zero_padding(x, lengths).repeat_interleave(H // G, dim=2) for x in (k, v))
    here = torch.arange(T).expand(B, T) if position is None else position[:, None] + torch.arange(T)  # [B, T]
    there = torch.arange(S)
    end = torch.full((B,), S) if lengths is None else lengths
    sees = (there < end[:, None])[:, None, :].expand(B, T, S)
    if causal:
        sees = sees & (there <= here[..., None])
    if window is not None:
        left, right = window
        sees = sees & (there >= here[..., None] - left) & (there <= here[..., None] + right)
    live = ((here < end[:, None]) & sees.any(-1))[..., None, None]  # [B, T, 1, 1]
    q = torch.where(live, q, 0)

    scores = torch.einsum("bthd,bshd->bhts", scale * q, k).masked_fill(~sees[:, None], -torch.inf)
    weights = torch.where(sees.any(-1)[:, None, :, None], scores, 0).softmax(-1)
    return torch.where(live, torch.einsum("bhts,bshd->bthd", weights, v), 0)


def padded(
    form: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | Tensor,
    window: tuple[int, int] | None,
    documents: Documents,
    queries: Documents | None,
) -> Tensor:
    """What `form` makes of a document a row."""
    asked = queries or documents
    o = form(
        asked.padded(q),
        documents.padded(k),
        documents.padded(v),
        causal=causal,
        lengths=documents.lengths,
        scale=asked.padded(scale) if isinstance(scale, Tensor) else scale,
        position=None if queries is None else documents.lengths - queries.lengths,
        window=window,
    )
    return asked.unpadded(o)
