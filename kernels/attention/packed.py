"""Softmax attention over documents in one row, outside of graphs one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents
from .rows import attend, attention_of_rows, in_window

# Of q [1, T, H, D], scaled, k [1, S, G, D] and v [1, S, G, Dv].


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents, queries: Documents | None
) -> Tensor:
    """Document by document. Where they end is looked at: for a CPU, outside of graphs."""
    rows = zip((queries or documents).split(q), documents.split(k, v), strict=True)
    return torch.cat([_of_document(q_n, k_n, v_n, causal) for (q_n,), (k_n, v_n) in rows], 1)


def _of_document(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    blind = T if S == 0 else max(0, T - S) if causal else 0  # queries ahead of all keys
    nothing = v.new_zeros(1, blind, q.shape[2], v.shape[-1])
    if blind == T:
        return nothing
    place = torch.tensor([S - T], device=q.device) if causal and T < S else None
    y = attention_of_rows(q[:, blind:], k, v, causal=causal, lengths=None, scale=1.0, position=place)
    return y if blind == 0 else torch.cat([nothing, y], 1)


def attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: tuple[int, int] | None,
    documents: Documents,
    queries: Documents | None,
) -> Tensor:
    """Under a mask of all queries against all keys: for a device that would have to be waited for."""
    asked = queries or documents
    own, late = asked.of_steps(), documents.lengths - asked.lengths
    here, there = asked.positions() + late[own], documents.positions()  # [T], [S]
    mask = own[:, None] == documents.of_steps()
    if causal:
        mask = mask & (there <= here[:, None])
    if window is not None:
        mask = mask & in_window(here, there, window)
    y = attend(q, k, v, mask[None, None], False)
    return y if queries is None else torch.where(mask.any(-1)[:, None, None], y, 0)
