"""The selective scan as one node of an exported graph."""

from __future__ import annotations

from torch import Tensor

from ..common import accumulation_dtype
from ..documents import Documents, count_of, documents_from, starts_of
from ..nodes import as_node
from .chunked import selective_scan_chunked


def selective_scan_node(
    v: Tensor,  # [B, T, D]
    dt: Tensor,  # [B, T, D]
    A: Tensor,  # [D, N]
    write: Tensor,  # [B, T, N]
    read: Tensor,  # [B, T, N]
    initial_state: Tensor | None,  # [B, D, N]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    return _node(v, dt, A, write, read, initial_state, lengths, starts_of(documents), reverse)


def _run(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    documents = documents_from(starts, v.shape[1])
    y, state = selective_scan_chunked(v, dt, A, write, read, initial_state, reverse, lengths, documents)
    return y, state.contiguous()


def _empty(v, dt, A, write, read, initial_state, lengths, starts, reverse):
    R = count_of(starts, v.shape[0])
    return v.new_empty(v.shape), v.new_empty(R, *A.shape, dtype=accumulation_dtype(v.dtype))


_node = as_node("selective_scan", _run, _empty, shared={"A": 2})
