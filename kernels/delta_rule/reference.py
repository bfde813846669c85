"""The definition of the delta rule, one step at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import accumulation_dtype, query_heads, zero_padding
from ..documents import Documents


def delta_rule_reference(
    q: Tensor,  # [B, T, G, Dk]
    k: Tensor,  # [B, T, G, Dk]
    v: Tensor,  # [B, T, H, Dv]
    beta: Tensor,  # [B, T, H]
    log_decay: Tensor | None,  # [B, T, H] or [B, T, H, Dk]
    erase: Tensor | None,  # [B, T, H, Dk]
    initial_state: Tensor | None,  # [B or N, H, Dk, Dv]
    lengths: Tensor | None,  # [B]
    documents: Documents | None,  # N, of which B = 1
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    if documents is not None:
        given: Any = [None if x is None else documents.padded(x) for x in (q, k, v, beta, log_decay, erase)]
        given += [initial_state, documents.lengths, None, output_final_state]
        o, state = delta_rule_reference(*given)
        return documents.unpadded(o), state
    B, T, H, Dv = v.shape
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    g = q.new_zeros(B, T, H, 1) if log_decay is None else log_decay if log_decay.dim() == 4 else log_decay[..., None]
    q, k = query_heads(q, H), query_heads(k, H)
    q, k, v, beta, g = (zero_padding(x.to(dtype), lengths) for x in (q, k, v, beta, g))
    r = beta[..., None] * k if erase is None else zero_padding(erase.to(dtype), lengths)
    w = beta[..., None] * v
    qs, ks, ws, rs = (x.unbind(1) for x in (q, k, w, r))  # T times [B, H, D]
    decays = g.exp()[..., None].unbind(1)  # T times [B, H, 1 or Dk, 1]

    S = q.new_zeros(B, H, q.shape[3], Dv) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        S = decays[t] * S
        missing = ws[t] - torch.einsum("bhk,bhkv->bhv", rs[t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", ks[t], missing)
        outputs.append(torch.einsum("bhk,bhkv->bhv", qs[t], S))
    o = torch.stack(outputs, 1)  # [B, T, H, Dv]
    return zero_padding(o, lengths).to(out_dtype), S if output_final_state else None
