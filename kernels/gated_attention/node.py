"""Gated attention as one node of an exported graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import accumulation_dtype
from ..documents import Documents, count_of, documents_from, starts_of
from ..nodes import as_node
from .chunked import gated_attention_chunked
from .state import GatedAttentionState

EMPTY = (None,) * len(GatedAttentionState._fields)


def gated_attention_node(
    u: Tensor,  # [B, T, E]
    q_quad: Tensor,  # [B, T, S]
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,  # [B, T, E]
    *,
    chunk_len: int,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    initial_state: GatedAttentionState | None,
    output_final_state: bool,
    lengths: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, GatedAttentionState | None]:
    places = (lengths, starts_of(documents), chunk_len, causal, scale, output_final_state)
    o, *state = _node(u, q_quad, k_quad, q_lin, k_lin, v, bias, *(initial_state or EMPTY), *places)
    return o, GatedAttentionState(*state) if output_final_state else None


def _run(
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    bias: Tensor | None,
    memory: Tensor | None,
    past_k_quad: Tensor | None,
    past_k_lin: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    chunk_len: int,
    causal: bool,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state_parts: Any = (memory, past_k_quad, past_k_lin, past_v, position)
    past = None if position is None else GatedAttentionState(*state_parts)
    o, state = gated_attention_chunked(
        *(u, q_quad, k_quad, q_lin, k_lin, v),
        chunk_len=chunk_len,
        bias=bias,
        causal=causal,
        scale=scale,
        initial_state=past,
        output_final_state=output_final_state,
        lengths=lengths,
        documents=documents_from(starts, u.shape[1]),
    )
    return o, *(_state(v, q_quad, 0, 0) if state is None else state)


def _state(v: Tensor, q_quad: Tensor, R: int, chunk_len: int) -> GatedAttentionState:
    """Of R sequences, of any value."""
    S, E, dtype = q_quad.shape[2], v.shape[2], accumulation_dtype(v.dtype)
    return GatedAttentionState(
        v.new_empty(R, S, E, dtype=dtype),
        v.new_empty(R, chunk_len, S, dtype=dtype),
        v.new_empty(R, chunk_len, S, dtype=dtype),
        v.new_empty(R, chunk_len, E, dtype=dtype),
        v.new_empty(R, dtype=torch.int64),
    )


def _empty(u, q_quad, k_quad, q_lin, k_lin, v, bias, *others):
    *_, starts, chunk_len, _, _, output_final_state = others
    R = count_of(starts, u.shape[0])
    return v.new_empty(v.shape), *_state(v, q_quad, *((R, chunk_len) if output_final_state else (0, 0)))


_node = as_node("gated_attention", _run, _empty, shared={"bias": 1})
