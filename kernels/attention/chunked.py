"""Softmax attention without Triton."""

from __future__ import annotations

from torch import Tensor

from ..common import can_be_looked_at
from ..derivatives import transformed
from ..documents import Documents, starts_of
from .blockwise import Ends, attention_blockwise
from .packed import attention_masked, attention_packed
from .rows import attention_of_rows


def attention_chunked(
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
    if documents is None and window is None:
        return attention_of_rows(q, k, v, causal=causal, lengths=lengths, scale=scale, position=position)
    q = (q * scale).to(q.dtype)
    known = all(each is None or can_be_looked_at(each.starts) for each in (documents, queries))
    if documents is not None and window is None and known:
        return attention_packed(q, k, v, causal, documents, queries)
    if q.device.type != "cpu" or (transformed() and not known):
        if documents is not None:
            return attention_masked(q, k, v, causal, window, documents, queries)
        return attention_of_rows(q, k, v, causal=causal, lengths=lengths, scale=1.0, position=position, window=window)
    starts = starts_of(documents), starts_of(queries)
    left, right = window or (-1, 0 if causal else -1)
    return attention_blockwise(q, k, v, Ends(lengths, position, *starts), left, right)
