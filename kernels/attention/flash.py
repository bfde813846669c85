"""Softmax attention by the package flash-attn (Dao 2023, "FlashAttention-2"), on a GPU where it is installed.

As versions 2.3 to 2.8 have it: causal queries are the last of their document's steps, as here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents


def attention_flash(
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
    """Raises ValueError where flash-attn is not installed, or has no such attention."""
    package, width = _package(), v.shape[-1]
    if lengths is not None or (position is not None and (causal or window is not None)):
        raise ValueError(
            'attention: backend="flash" knows neither lengths nor a position; valid: cu_seqlens, or another backend'
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            'attention: backend="flash" computes in float16 and bfloat16, all three alike, '
            f"got {q.dtype}, {k.dtype} and {v.dtype}; valid: these, or another backend"
        )
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": window or (-1, -1),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if isinstance(scale, Tensor):
        q, scale = (q * scale).to(q.dtype), 1.0
    # Heads of one width alone: channels of 0 change no score, and no value.
    widest = max(q.shape[-1], width)
    q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    T, S = q.shape[1], k.shape[1]
    if documents is None:
        counts = None
        if position is not None:  # of another sequence, where it says no more than which queries count
            counts = (position[:, None] + torch.arange(T, device=q.device) < S)[..., None, None]
            q = torch.where(counts, q, 0)
        o = package.flash_attn_func(q, k, v, softmax_scale=scale, **options)[..., :width]
        return o if counts is None else torch.where(counts, o, 0)
    # No document is longer than the row, and to ask how long the longest is would wait for the device.
    starts = (given.starts.int() for given in (queries or documents, documents))
    row = package.flash_attn_varlen_func(q[0], k[0], v[0], *starts, T, S, softmax_scale=scale, **options)
    return row[None, ..., :width]


def _package() -> Any:
    try:
        import flash_attn  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError(
            f'attention: backend="flash" needs flash-attn ({error}); pip install "seqzoo[flash]", or another backend'
        ) from error
    return flash_attn
