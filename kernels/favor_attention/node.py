"""FAVOR attention as one node of an exported graph."""

from __future__ import annotations

from torch import Tensor

from ..common import accumulation_dtype
from ..documents import Documents, count_of, documents_from, starts_of
from ..nodes import as_node
from .chunked import favor_attention_chunked
from .state import FavorState


def favor_attention_node(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    projection: Tensor,  # [H, M, D]
    causal: bool,
    initial_state: FavorState | None,
    lengths: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, FavorState | None]:
    past = initial_state or (None, None)
    o, *state = _node(q, k, v, projection, *past, lengths, starts_of(documents), causal)
    return o, FavorState(*state) if causal else None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    sums: Tensor | None,
    log_scale: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    past = None if sums is None or log_scale is None else FavorState(sums, log_scale)
    documents = documents_from(starts, q.shape[1])
    o, state = favor_attention_chunked(q, k, v, projection, causal, past, lengths, documents)
    return o, *(state or _nothing(v))


def _nothing(v: Tensor) -> FavorState:
    nothing = v.new_empty(0, dtype=accumulation_dtype(v.dtype))
    return FavorState(nothing, nothing.clone())


def _empty(q, k, v, projection, sums, log_scale, lengths, starts, causal):
    o = v.new_empty(v.shape)
    if not causal:
        return o, *_nothing(v)
    rows = (count_of(starts, q.shape[0]), *projection.shape[:2])
    state = v.new_empty(*rows, v.shape[3] + 1, dtype=accumulation_dtype(v.dtype))
    return o, state, state.new_empty(rows)


_node = as_node("favor_attention", _run, _empty, shared={"projection": 3})
