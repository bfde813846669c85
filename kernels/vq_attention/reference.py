from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, zero_padding
from ..documents import Documents
from .codes import straight_through
from .state import VQState


def vq_attention_reference(
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
    """Quadratic attention over every quantised key; keys from before the call stand in the state."""
    if documents is not None:
        q, k, v, codes = (documents.padded(x) for x in (q, k, v, codes))
        y, state = vq_attention_reference(
            q,
            k,
            v,
            codebook,
            codes,
            block_len=block_len,
            bias=bias if bias is None or bias.dim() == 2 else documents.padded(bias),
            causal=causal,
            initial_state=initial_state,
            output_final_state=output_final_state,
            lengths=documents.lengths,
            documents=None,
        )
        return documents.unpadded(y), state
    (B, T, H, _), S, Dv, out_dtype = q.shape, codebook.shape[1], v.shape[-1], v.dtype
    q, k, v = (zero_padding(x, lengths).to(accumulation_dtype(x.dtype)) for x in (q, k, v))
    codebook = codebook.to(q.dtype)
    past = initial_state or VQState.empty(B, H, S, Dv, block_len, device=q.device, dtype=v.dtype)
    past = past._replace(values=past.values.to(v.dtype), sums=past.sums.to(v.dtype))

    i, j = torch.arange(T)[:, None], torch.arange(-block_len, T)[None, :]
    quantised = torch.cat([codebook[torch.arange(H), past.codes], straight_through(k, codebook, codes)], 1)
    near = (i // block_len - j // block_len).abs() <= 1
    scores = torch.where(
        near,
        torch.einsum("bihd,bjhd->bhij", q, quantised),
        torch.einsum("bihd,bjhd->bhij", q, quantised.detach()),
    )
    if bias is not None:
        n = bias.shape[-1]
        entry = j - i + (n - 1 if causal else n // 2)  # [T, L + T]
        by_query = bias.expand(B, T, H, n).transpose(1, 2)  # [B, H, T, n]
        biases = by_query.gather(-1, entry.clamp(0, n - 1).expand(B, H, T, -1))
        scores = scores + torch.where((entry >= 0) & (entry < n), biases, 0)

    valid = torch.ones(B, T, dtype=torch.bool) if lengths is None else valid_positions(lengths, T)
    remembered = torch.arange(-block_len, 0) >= -past.position[:, None]
    sees = torch.cat([remembered, valid], 1)[:, None, :] & ((j <= i) if causal else torch.ones_like(j <= i))
    scores = scores.masked_fill(~sees[:, None], -torch.inf)
    by_code = torch.einsum("bihd,hsd->bhis", q, codebook) + past.counts[:, :, None].to(q.dtype).log()

    everything = torch.cat([scores, by_code], -1)
    weights = torch.where(valid[:, None, :, None], everything, 0).softmax(-1)
    means = past.sums / past.counts.clamp(min=1)[..., None]
    y = torch.einsum("bhij,bjhd->bihd", weights[..., :-S], torch.cat([past.values, v], 1))
    y = y + torch.einsum("bhis,bhsd->bihd", weights[..., -S:], means)
    state = past.advance(codes, v, lengths) if output_final_state else None
    return zero_padding(y, lengths).to(out_dtype), state
