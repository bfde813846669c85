"""Softmax attention."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..backends import Backend, choose, fit
from ..common import check_lengths
from ..documents import Documents, check_documents
from .chunked import attention_chunked
from .flash import attention_flash
from .reference import attention_reference

FARTHEST = 2**29  # steps that a window reaches: all there are, with room in 32 bits for what is added
MAX_CHANNELS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}  # of a head, in the fused form


def _fused(*arguments: Any, **options: Any) -> Tensor:
    from .fused import attention_fused  # imports Triton

    return attention_fused(*arguments, **options)


FORMS = {"chunked": attention_chunked, "reference": attention_reference, "fused": _fused, "flash": attention_flash}


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
    cu_seqlens: Tensor | None = None,
    query_cu_seqlens: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    backend: Backend | Literal["flash"] = "auto",
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
        position: int64 [B], where each sequence's first query stands; None is 0. Below 0 it stands ahead of all keys.
        cu_seqlens: integers [N + 1], in place of `lengths`, with B = 1: where each of N documents begins that lie one
            behind the other in the S keys, and S. No query sees another document than its own.
        query_cu_seqlens: integers [N + 1], the same of the T queries where they are others in number than the keys:
            those of a document are then the last of its steps if causal, so that the last query sees all its keys and
            one that stands ahead of the first key gives zeros; or of another sequence (cross attention) if not.
        window: how far a query sees: keys less than `window` steps away, its own among them; of them those up to its
            own place if causal. Or a pair, how many keys it sees ahead of its own place and how many behind it.
        backend: "auto", "fused", "chunked" (PyTorch's scaled_dot_product_attention), "reference", or, in float16 and
            bfloat16 on a GPU and without padding, "flash": the package flash-attn, which "auto" never takes.

    Returns:
        [B, T, H, Dv] in v's dtype.

    Raises:
        ValueError: shapes that do not fit together, lengths that are no integers [B] or, on a CPU, lie outside [0, S],
            causal queries other in number than the keys without `position`, documents that do not end where the row
            does or have a position, a window of nothing or over another sequence, or an unknown backend.

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
    documents, queries = _documents(cu_seqlens, query_cu_seqlens, lengths, query_lengths, position, (B, T, S))
    if causal and position is None and documents is None and S != T:
        raise ValueError(f"attention: {T} causal queries against {S} keys need position, where the first query stands")
    if query_lengths is not None and (causal or position is not None):
        raise ValueError("attention: query_lengths are for causal=False without position; valid: lengths")
    others = query_lengths is not None or query_cu_seqlens is not None or (position is None and S != T)
    across = others and not causal
    reach = _reach(window, causal, across)
    if isinstance(scale, Tensor) and list(scale.shape) not in ([T], [B, T]):
        raise ValueError(f"attention: a scale per query is [{T}] or [{B}, {T}], got {list(scale.shape)}")
    lengths = check_lengths("attention", lengths, B, S)
    if documents is None and across:
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
    places = {"lengths": lengths, "position": position, "documents": documents, "queries": queries}
    return run(q, k, v, causal=causal, scale=scale, window=reach, **places)


def _reach(window: int | tuple[int, int] | None, causal: bool, across: bool) -> tuple[int, int] | None:
    """How many keys ahead of its own place a query sees, and how many behind it."""
    if window is None:
        return None
    reach = window if isinstance(window, tuple) else (window - 1,) * 2 if isinstance(window, int) else ()
    if isinstance(window, bool) or len(reach) != 2 or not all(isinstance(x, int) and x >= 0 for x in reach):
        raise ValueError(
            f"attention: window={window!r}; valid: an integer of 1 or more, or how many keys are seen ahead of a "
            "query's own and how many behind it, two of 0 or more"
        )
    if across:
        raise ValueError("attention: a window is over the queries' own sequence; valid across sequences: window=None")
    ahead, behind = (min(x, FARTHEST) for x in reach)
    return ahead, 0 if causal else behind


def _documents(
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    position: Tensor | None,
    shape: tuple[int, int, int],
) -> tuple[Documents | None, Documents | None]:
    """Those of the keys, and of the queries where they have others."""
    B, T, S = shape
    if cu_seqlens is None:
        if query_cu_seqlens is not None:
            raise ValueError("attention: query_cu_seqlens are beside cu_seqlens, the documents of the keys; got none")
        return None, None
    if position is not None or query_lengths is not None:
        raise ValueError(
            "attention: got cu_seqlens and a position or query_lengths; valid: query_cu_seqlens, where queries are "
            "the last of their document's steps or of another sequence"
        )
    documents = check_documents("attention", cu_seqlens, lengths, B, S)
    if query_cu_seqlens is None:
        if T != S:
            raise ValueError(f"attention: {T} queries against {S} keys in documents need query_cu_seqlens")
        return documents, None
    if len(query_cu_seqlens) != len(cu_seqlens):
        raise ValueError(
            "attention: cu_seqlens and query_cu_seqlens must be of the same documents, "
            f"got {len(cu_seqlens) - 1} and {len(query_cu_seqlens) - 1}"
        )
    return documents, check_documents("attention (query_cu_seqlens)", query_cu_seqlens, None, B, T)


def _of_valid_queries(scale: Tensor, lengths: Tensor | None, position: Tensor | None, S: int) -> Tensor:
    """`scale` [B, T] with zeros where no query counts, whatever stands there."""
    if lengths is None and position is None:
        return scale
    here = torch.arange(scale.shape[1], device=scale.device)
    here = here if position is None else here + position[:, None]
    return torch.where(here < (S if lengths is None else lengths[:, None]), scale, 0)
