"""The delta rule as one node of an exported graph."""

from __future__ import annotations

from torch import Tensor

from ..common import accumulation_dtype
from ..documents import Documents, count_of, documents_from, starts_of
from ..nodes import as_node
from .chunked import delta_rule_chunked


def delta_rule_node(
    q: Tensor,  # [B, T, G, Dk]
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    beta: Tensor,  # [B, T, H]
    log_decay: Tensor | None,
    erase: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    documents: Documents | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    inputs = (q, k, v, beta, log_decay, erase, initial_state)
    o, state = _node(*inputs, lengths, starts_of(documents), output_final_state)
    return o, state if output_final_state else None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    documents = documents_from(starts, q.shape[1])
    inputs = (q, k, v, beta, log_decay, erase, initial_state)
    o, state = delta_rule_chunked(*inputs, lengths, documents, output_final_state)
    return o, v.new_empty(0, dtype=accumulation_dtype(v.dtype)) if state is None else state


def _empty(q, k, v, beta, log_decay, erase, initial_state, lengths, starts, output_final_state):
    R = count_of(starts, q.shape[0])
    state = (R, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape), v.new_empty(state, dtype=accumulation_dtype(v.dtype))


_node = as_node("delta_rule", _run, _empty, shared={})
