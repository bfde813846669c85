"""Softmax attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import choose, fit
from ..common import check_lengths
from .chunked import attention_chunked
from .reference import attention_reference

MAX_CHANNELS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}  # of a head, in the fused form


def _fused(*arguments: Any, **options: Any) -> Tensor:
    from .fused import attention_fused  # imports Triton

    return attention_fused(*arguments, **options)


FORMS = {"chunked": attention_chunked, "reference": attention_reference, "fused": _fused}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    scale: float | Tensor | None = None,
    position: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale · q kᵀ) v, with grouped key/value heads.

    Query i of a sequence stands at `position + i`, key j at j; a causal query sees the keys up to its own place, and
    the keys may be more than the queries (a cache and what is new). Queries that are as many as the keys are those of
    the same sequence; any other number, if not causal, is of another one (cross attention), of which all count.

    Args:
        q: [B, T, H, D].
        k: [B, S, G, D]; G divides H, and head h reads key/value head h // (H / G).
        v: [B, S, G, Dv].
        causal: hide the keys after each query.
        lengths: integers [B], how many keys are valid. Queries of the same sequence that stand past it give zeros.
        query_lengths: integers [B], how many queries are valid, if not causal, where that is not what `lengths` says:
            those past it give zeros. Cross attention that happens to have as many queries as keys needs it.
        scale: a number, or one per query: [T] or [B, T], such as the entropy-invariant log n / (log 512 · √D).
            None is 1/√D.
        position: int64 [B], where each sequence's first query stands; None is 0.
        backend: "auto", "fused", "chunked" (PyTorch's scaled_dot_product_attention) or "reference".

    Returns:
        [B, T, H, Dv] in v's dtype.

    Raises:
        ValueError: shapes that do not fit together, lengths that are no integers [B] or, on a CPU, lie outside [0, S],
            causal queries other in number than the keys without `position`, or an unknown backend.

    Source: Vaswani et al. 2017, equation 1; the per-query scale: Su, "Entropy invariance of attention" (2021).
    """
    B, T, H, D = q.shape
    _, S, G, _ = k.shape
    if k.shape != (B, S, G, D) or v.shape[:3] != (B, S, G):
        raise ValueError(
            f"attention: k must be [{B}, S, G, {D}] and v [{B}, S, G, Dv], got {list(k.shape)}, {list(v.shape)}"
        )
    if H % G:
        raise ValueError(f"attention: {G} key/value heads do not divide {H} query heads")
    if causal and position is None and S != T:
        raise ValueError(f"attention: {T} causal queries against {S} keys need position, where the first query stands")
    if query_lengths is not None and (causal or position is not None):
        raise ValueError("attention: query_lengths are for causal=False without position; valid: lengths")
    if isinstance(scale, Tensor) and list(scale.shape) not in ([T], [B, T]):
        raise ValueError(f"attention: a scale per query is [{T}] or [{B}, {T}], got {list(scale.shape)}")
    lengths = check_lengths("attention", lengths, B, S)
    if not causal and position is None and (query_lengths is not None or S != T):
        # Where a query stands says only whether it counts.
        end = torch.full((B,), S, device=q.device) if lengths is None else lengths
        asked = check_lengths("attention (query_lengths)", query_lengths, B, T)
        position = end - (T if asked is None else asked)
    learnt = "no kernel has a gradient of the scale" if isinstance(scale, Tensor) and scale.requires_grad else None
    run = choose("attention", backend, FORMS, fit(q, k, v, channels=MAX_CHANNELS, also=learnt))
    if scale is None:
        scale = 1 / math.sqrt(D)
    elif isinstance(scale, Tensor):
        scale = _of_valid_queries(scale.expand(B, T), lengths, position, S)[:, :, None, None]
    return run(q, k, v, causal=causal, lengths=lengths, scale=scale, position=position)


def _of_valid_queries(scale: Tensor, lengths: Tensor | None, position: Tensor | None, S: int) -> Tensor:
    """`scale` [B, T] with zeros where no query counts, whatever stands there."""
    if lengths is None and position is None:
        return scale
    here = torch.arange(scale.shape[1], device=scale.device)
    here = here if position is None else here + position[:, None]
    return torch.where(here < (S if lengths is None else lengths[:, None]), scale, 0)
