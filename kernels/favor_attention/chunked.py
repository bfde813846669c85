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
    if documents is not None:
        q, k, v = (documents.padded(x) for x in (q, k, v))
        o, state = favor_attention_chunked(q, k, v, projection, causal, initial_state, documents.lengths, None)
        return documents.unpadded(o), state
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
            first = initial_state or FavorState.empty(B, H, M, Dv, device=q.device, dtype=dtype)
            first = FavorState(first.sums.to(dtype), first.log_scale.detach().to(dtype))
            if eager(q, k, v, directions, *first):
                o, state = causal_by_chunks(q, k, v, directions, first, hidden, narrow)
            else:
                o, state = causal_by_halves(q, k, v, directions, first, hidden)
        else:
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [B, H, T, .]
            o = bidirectional(q, k, v, directions, hidden, narrow).transpose(1, 2)  # [B, T, H, Dv]
    return zero_padding(o, lengths).to(out_dtype).contiguous(), state
