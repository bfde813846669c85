"""FAVOR attention in PyTorch: only numbers up to 0 are exponentiated, and what underflows is below rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype, product_dtype, valid_positions, without_autocast, zero_padding
from ..documents import Documents
from .bidirectional import bidirectional
from .causal import causal_by_chunks, eager
from .halves import causal_by_halves
from .state import FavorState

MIN_PIECE, MAX_PIECE = 32, 128  # steps: states take about as much room as features, padding less


def favor_attention_chunked(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    projection: Tensor,  # [H, M, D]
    causal: bool,
    initial_state: FavorState | None,
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
) -> tuple[Tensor, FavorState | None]:
    (B, T, H, _), M, Dv = q.shape, projection.shape[1], v.shape[-1]
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)

    # Autocast would compute features in half precision and keep the sums in it.
    with without_autocast(q.device):
        half = q.device.type == "cpu" and product_dtype(q, k, v) == torch.bfloat16
        narrow = torch.bfloat16 if half else dtype  # of features and their products
        q, k, v = (zero_padding(x, lengths).to(dtype) for x in (q, k, v))
        directions = projection.to(dtype).mT  # [H, D, M]
        hidden = None if lengths is None else ~valid_positions(lengths, T)[:, None, :, None]
        state = None
        if causal:
            rows = B if documents is None else documents.N
            first = initial_state or FavorState.empty(rows, H, M, Dv, device=q.device, dtype=dtype)
            first = FavorState(first.sums.to(dtype), first.log_scale.detach().to(dtype))
            if not eager(q, k, v, directions, *first):
                o, state = causal_by_halves(q, k, v, directions, first, hidden, documents)
            elif documents is None:
                o, state = causal_by_chunks(q, k, v, directions, first, hidden, narrow)
            else:
                o, state = _one_by_one(q, k, v, directions, first, narrow, documents)
        elif documents is not None and eager(q, k, v, directions) and documents.long:
            parts = documents.split(q, k, v)
            of_each = [_both_ways(q_n, k_n, v_n, directions, None, narrow) for q_n, k_n, v_n in parts if q_n.shape[1]]
            o = torch.cat(of_each, 1)
        elif documents is not None:
            o = _in_pieces(q, k, v, directions, narrow, documents)
        else:
            o = _both_ways(q, k, v, directions, hidden, narrow)
    return zero_padding(o, lengths).to(out_dtype).contiguous(), state


def _both_ways(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    directions: Tensor,
    hidden: Tensor | None,
    narrow: torch.dtype,
) -> Tensor:  # [B, T, H, Dv]
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return bidirectional(q, k, v, directions, hidden, narrow).transpose(1, 2)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, first: FavorState, narrow: torch.dtype, documents: Documents
) -> tuple[Tensor, FavorState]:
    """Chunks, which are done one after the other anyway, begin anew with each document."""
    starts = (FavorState(*state) for state in zip(*(x.split(1) for x in first), strict=True))
    found = [
        causal_by_chunks(q_n, k_n, v_n, directions, start, None, narrow)
        for (q_n, k_n, v_n), start in zip(documents.split(q, k, v), starts, strict=True)
    ]
    states = (torch.cat(each) for each in zip(*(state for _, state in found), strict=True))
    return torch.cat([o for o, _ in found], 1), FavorState(*states)


def _in_pieces(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, narrow: torch.dtype, documents: Documents
) -> Tensor:
    """Every query sees every key of its document: [1, T, H, Dv]."""
    steps = q.shape[1] // documents.N  # of a document
    pieces = documents.pieces(min(MAX_PIECE, max(MIN_PIECE, steps // 2)))
    q, k, v = (pieces.lay_out(x).unflatten(1, (-1, pieces.length))[0].transpose(1, 2).contiguous() for x in (q, k, v))
    o = bidirectional(q, k, v, directions, pieces.hidden()[:, None, :, None], narrow, pieces)  # [P, H, length, Dv]
    return pieces.take_up(o.transpose(1, 2).flatten(0, 1)[None])
