"""The diagonal scan as one node of an exported graph, to which complex numbers are pairs of real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype
from ..documents import Documents, count_of, documents_from, starts_of
from ..nodes import as_node
from .chunked import diagonal_scan_chunked


def diagonal_scan_node(
    x: Tensor,  # [B, T, D]
    a: Tensor,  # [D] or [B, T, D]
    initial_state: Tensor | None,  # [B, D]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    factor: Tensor | None,  # [D], real
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    pairs, given = x.is_complex(), [x, a, initial_state]
    if pairs:
        given = [None if z is None else torch.view_as_real(z) for z in given]
    h, state = _node(*given, lengths, factor, starts_of(documents), reverse, pairs)
    return (torch.view_as_complex(h), torch.view_as_complex(state)) if pairs else (h, state)


def _run(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None,
    reverse: bool,
    pairs: bool,
) -> tuple[Tensor, Tensor]:
    documents = documents_from(starts, x.shape[1])
    if not pairs:
        return diagonal_scan_chunked(x, a, initial_state, reverse, lengths, factor, documents)
    state = None if initial_state is None else torch.view_as_complex(initial_state.contiguous())
    x, a = (torch.view_as_complex(z.contiguous()) for z in (x, a))
    h, state = diagonal_scan_chunked(x, a, state, reverse, lengths, factor, documents)
    return torch.view_as_real(h), torch.view_as_real(state)


def _empty(x, a, initial_state, lengths, factor, starts, reverse, pairs):
    R = count_of(starts, x.shape[0])
    return x.new_empty(x.shape), x.new_empty(R, *x.shape[2:], dtype=accumulation_dtype(x.dtype))


_node = as_node("diagonal_scan", _run, _empty, shared={"a": 2, "factor": 1})
