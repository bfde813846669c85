"""The definition of FAVOR attention: quadratic, every product of two features on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, zero_padding
from ..documents import Documents
from ..linear_attention.reference import divide_by_normalizer
from .state import FavorState


def favor_attention_reference(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    projection: Tensor,  # [H, M, D]
    causal: bool,
    initial_state: FavorState | None,
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
) -> tuple[Tensor, FavorState]:
    if documents is not None:
        q, k, v = (documents.padded(x) for x in (q, k, v))
        o, state = favor_attention_reference(q, k, v, projection, causal, initial_state, documents.lengths, None)
        return documents.unpadded(o), state
    (B, T, H, _), M, Dv = q.shape, projection.shape[1], v.shape[-1]
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    q, k, v = (zero_padding(x, lengths).to(dtype) for x in (q, k, v))
    a, b = (log_features(x, projection.to(dtype)) for x in (q, k))  # [B, H, T, M]
    v = F.pad(v, (0, 1), value=1.0).transpose(1, 2)  # [B, H, T, Dv + 1]
    past = initial_state or FavorState.empty(B, H, M, Dv, device=q.device, dtype=dtype)
    past = FavorState(past.sums.to(dtype), past.log_scale.detach().to(dtype))

    seen = torch.ones(B, T, dtype=torch.bool, device=q.device) if lengths is None else valid_positions(lengths, T)
    seen = seen[:, None, None, :]  # [B, 1, 1, T]
    visible = seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if causal else seen
    by_key = a[..., :, None, :] + b[..., None, :, :]  # [B, H, T, T, M]
    by_key = by_key.masked_fill(~visible[..., None], -torch.inf)
    by_past = a + past.log_scale[:, :, None]  # [B, H, T, M]
    top = torch.maximum(by_key.detach().amax((-2, -1)), by_past.detach().amax(-1))[..., None]  # [B, H, T, 1]
    top = top.masked_fill(top == -torch.inf, 0)
    o = (by_key - top[..., None]).exp().sum(-1) @ v + (by_past - top).exp() @ past.sums
    o = divide_by_normalizer(o)
    o = zero_padding(o.transpose(1, 2), lengths).to(out_dtype)

    b = b.masked_fill(~seen.mT, -torch.inf)
    log_scale = torch.maximum(b.detach().amax(2), past.log_scale)  # [B, H, M]
    finite = log_scale.masked_fill(log_scale == -torch.inf, 0)
    sums = (past.log_scale - finite).exp()[..., None] * past.sums + (b - finite[:, :, None]).exp().mT @ v
    return o, FavorState(sums, log_scale)


def log_features(x: Tensor, projection: Tensor) -> Tensor:
    """log(√M φ(x)) = W x - |x|²/2: [B, T, H, D] and [H, M, D] -> [B, H, T, M]."""
    return torch.einsum("bthd,hmd->bhtm", x, projection) - x.square().sum(-1).mT[..., None] / 2
