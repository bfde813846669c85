"""Linear attention as one node of an exported graph."""

from __future__ import annotations

from torch import Tensor

from ..common import accumulation_dtype
from ..documents import Documents, count_of, documents_from, starts_of
from ..nodes import as_node
from .chunked import linear_attention_chunked
from .shared import linear_attention_shared


def linear_attention_node(
    q: Tensor,  # [B, T, G, Dk], G = H but where heads share queries and keys
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    log_decay: Tensor | None,
    causal: bool,
    normalize: bool,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    documents: Documents | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    arguments = (q, k, v, log_decay, initial_state, lengths, starts_of(documents))
    o, state = _node(*arguments, causal, normalize, output_final_state)
    return o, state if output_final_state else None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    causal: bool,
    normalize: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    form = linear_attention_chunked if q.shape[2] == v.shape[2] else linear_attention_shared
    documents = documents_from(starts, q.shape[1])
    o, state = form(q, k, v, log_decay, causal, normalize, initial_state, lengths, documents, output_final_state)
    return o, v.new_empty(0, dtype=accumulation_dtype(v.dtype)) if state is None else state


def _empty(q, k, v, log_decay, initial_state, lengths, starts, causal, normalize, output_final_state):
    R = count_of(starts, q.shape[0])
    state = (R, v.shape[2], q.shape[3], v.shape[3] + normalize) if output_final_state else (0,)
    return v.new_empty(v.shape), v.new_empty(state, dtype=accumulation_dtype(v.dtype))


_node = as_node("linear_attention", _run, _empty, shared={"log_decay": 1})
