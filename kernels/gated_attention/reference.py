from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype, zero_padding
from ..documents import Documents
from .state import GatedAttentionState


def gated_attention_reference(
    u: Tensor,  # [B, T, E]
    q_quad: Tensor,  # [B, T, S]
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,  # [B, T, E]
    *,
    chunk_len: int,
    bias: Tensor | None,  # [C] or [2 C - 1]
    causal: bool,
    scale: float,
    initial_state: GatedAttentionState | None,
    output_final_state: bool,
    lengths: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, GatedAttentionState | None]:
    """All weights between all positions, masked. Padding and rows of the state not seen yet are keys of zero."""
    if documents is not None:
        rows = (documents.padded(x) for x in (u, q_quad, k_quad, q_lin, k_lin, v))
        o, state = gated_attention_reference(
            *rows,
            chunk_len=chunk_len,
            bias=bias,
            causal=causal,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            lengths=documents.lengths,
            documents=None,
        )
        return documents.unpadded(o), state
    (B, T, S), E, C = q_quad.shape, v.shape[-1], chunk_len
    out_dtype, dtype, device = v.dtype, accumulation_dtype(v.dtype), v.device
    u, q_quad, k_quad, q_lin, k_lin, v = (
        zero_padding(x, lengths).to(dtype) for x in (u, q_quad, k_quad, q_lin, k_lin, v)
    )
    past = initial_state or GatedAttentionState.empty(B, S, E, C, device=device, dtype=dtype)
    steps = torch.full((B,), T, device=device) if lengths is None else lengths
    rows = (zero_padding(x.to(dtype), past.position % C) for x in (past.k_quad, past.k_lin, past.v))
    k_quad, k_lin, v = (torch.cat([old, new], 1) for old, new in zip(rows, (k_quad, k_lin, v), strict=True))

    row = torch.arange(C, device=device)
    i = past.position[:, None] + torch.arange(T, device=device)  # [B, T], positions of the queries
    j = torch.cat([(past.position // C * C)[:, None] + row, i], 1)[:, None]  # [B, 1, C + T], of the keys
    i = i[..., None]  # [B, T, 1]
    near = (i // C == j // C) & ((j <= i) if causal else torch.ones_like(j <= i))
    far = (j // C < i // C) if causal else torch.ones_like(near)
    terms = i // C * C if causal else steps[:, None, None]
    scores = scale * q_quad @ k_quad.mT
    if bias is not None:
        scores = scores + bias.to(dtype)[(j - i + C - 1).clamp(0, len(bias) - 1)]
    quad = torch.where(near, scores.relu().square(), 0) @ v
    lin = torch.where(far, q_lin @ k_lin.mT, 0) @ v + q_lin @ past.memory.to(dtype)
    o = u * (quad + lin / terms.clamp(min=1))

    state = None
    if output_final_state:
        start = ((past.position + steps) // C * C)[:, None, None]  # [B, 1, 1], of the chunk that is not full
        full = (j < start).mT  # [B, C + T, 1]
        last = (j == start + row[:, None]).to(dtype)  # [B, C, C + T]
        memory = past.memory.to(dtype) + torch.where(full, k_lin, 0).mT @ v
        state = GatedAttentionState(memory, last @ k_quad, last @ k_lin, last @ v, past.position + steps)
    return zero_padding(o, lengths).to(out_dtype), state
