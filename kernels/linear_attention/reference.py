"""The definition of linear attention, one step at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, zero_padding
from ..documents import Documents


def linear_attention_reference(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    log_decay: Tensor | None,  # [H], [B, T, H] or [B, T, H, Dk]
    causal: bool,
    normalize: bool,
    initial_state: Tensor | None,  # [B or N, H, Dk, Dv (+ 1)]
    lengths: Tensor | None,  # [B]
    documents: Documents | None,  # N, of which B = 1
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    if documents is not None:
        q, k, v = (documents.padded(x) for x in (q, k, v))
        g = documents.padded(log_decay) if log_decay is not None and log_decay.dim() > 1 else log_decay
        o, state = linear_attention_reference(
            q, k, v, g, causal, normalize, initial_state, documents.lengths, None, output_final_state
        )
        return documents.unpadded(o), state
    B, T, H, Dk = q.shape
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    g = q.new_zeros(H) if log_decay is None else log_decay
    g = (g if g.dim() == 4 else g[..., None]).expand(B, T, H, -1)  # of all channels or of each
    q, k, v, g = (zero_padding(x.to(dtype), lengths) for x in (q, k, v, g))
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    qs, ks, vs = q.unbind(1), k.unbind(1), v.unbind(1)  # T times [B, H, D]
    decays = g.exp()[..., None].unbind(1)  # T times [B, H, 1 or Dk, 1]

    S = q.new_zeros(B, H, Dk, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        S = decays[t] * S + torch.einsum("bhk,bhv->bhkv", ks[t], vs[t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", qs[t], S))
    if not causal:
        R = torch.zeros_like(S)  # what later steps send back
        for t in reversed(range(T)):
            outputs[t] = outputs[t] + torch.einsum("bhk,bhkv->bhv", qs[t], R)
            R = decays[t] * (R + torch.einsum("bhk,bhv->bhkv", ks[t], vs[t]))
    o = torch.stack(outputs, 1)  # [B, T, H, Dv (+ 1)]
    if normalize:
        o = divide_by_normalizer(o)
    return zero_padding(o, lengths).to(out_dtype), S if output_final_state else None


def divide_by_normalizer(o: Tensor) -> Tensor:
    """Divides [..., Dv + 1] by its last column: [..., Dv], zero in value and gradient where that column is 0."""
    o, n = o[..., :-1], o[..., -1:]
    return o / torch.where(n == 0, torch.inf, n)
