"""VQ attention as one node of an exported graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..documents import Documents, count_of, documents_from, starts_of
from ..nodes import as_node
from .chunked import vq_attention_chunked
from .state import VQState

EMPTY = (None,) * len(VQState._fields)


def vq_attention_node(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    codebook: Tensor,  # [H, S, D]
    codes: Tensor,  # [B, T, H]
    *,
    block_len: int,
    bias: Tensor | None,
    causal: bool,
    initial_state: VQState | None,
    output_final_state: bool,
    lengths: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, VQState | None]:
    places = (lengths, starts_of(documents), block_len, causal, output_final_state)
    y, *state = _node(q, k, v, codebook, codes, bias, *(initial_state or EMPTY), *places)
    return y, VQState(*state) if output_final_state else None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    past_codes: Tensor | None,
    past_values: Tensor | None,
    past_counts: Tensor | None,
    past_sums: Tensor | None,
    position: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    block_len: int,
    causal: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state_parts: Any = (past_codes, past_values, past_counts, past_sums, position)
    past = None if position is None else VQState(*state_parts)
    y, state = vq_attention_chunked(
        *(q, k, v, codebook, codes),
        block_len=block_len,
        bias=bias,
        causal=causal,
        initial_state=past,
        output_final_state=output_final_state,
        lengths=lengths,
        documents=documents_from(starts, q.shape[1]),
    )
    return y, *(_state(v, codebook, codes, 0, 0) if state is None else state)


def _state(v: Tensor, codebook: Tensor, codes: Tensor, R: int, block_len: int) -> VQState:
    """Of R sequences, of any value."""
    (H, S, _), Dv = codebook.shape, v.shape[3]
    rows = (R, block_len, H)
    return VQState(
        codes.new_empty(rows),
        v.new_empty(*rows, Dv),
        codes.new_empty(R, H, S),
        v.new_empty(R, H, S, Dv),
        codes.new_empty(R),
    )


def _empty(q, k, v, codebook, codes, bias, *others):
    *_, starts, block_len, _, output_final_state = others
    R = count_of(starts, q.shape[0])
    state = _state(v, codebook, codes, *((R, block_len) if output_final_state else (0, 0)))
    past = others[:5]
    if past[1] is not None and output_final_state:
        state = VQState(*(x.new_empty(y.shape) for x, y in zip(past, state, strict=True)))
    return v.new_empty(v.shape), *state


_node = as_node("vq_attention", _run, _empty, shared={"codebook": 3, "bias": 2})
