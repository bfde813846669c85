"""The definition of the selective scan, one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, zero_padding
from ..documents import Documents


def selective_scan_reference(
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
    if documents is not None:
        rows = (documents.padded(x) for x in (v, dt, write, read))
        v, dt, write, read = rows
        y, state = selective_scan_reference(v, dt, A, write, read, initial_state, reverse, documents.lengths, None)
        return documents.unpadded(y), state
    B, T, D = v.shape
    dtype = accumulation_dtype(v.dtype)
    lengths = torch.full((B,), T, device=v.device) if lengths is None else lengths
    valid = valid_positions(lengths, T)[..., None, None].unbind(1)  # T times [B, 1, 1]
    vs, dts, writes, reads = (zero_padding(x, lengths).to(dtype).unbind(1) for x in (v, dt, write, read))

    h = v.new_zeros(B, D, A.shape[1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = [vs[0]] * T
    for t in reversed(range(T)) if reverse else range(T):
        decay = (dts[t][..., None] * A.to(dtype)).exp()
        h = torch.where(valid[t], decay * h + vs[t][..., None] * writes[t][:, None], h)
        outputs[t] = (h * reads[t][:, None]).sum(-1)
    return zero_padding(torch.stack(outputs, 1), lengths).to(v.dtype), h
