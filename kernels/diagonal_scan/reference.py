"""The definition of the diagonal scan, one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, zero_padding


def diagonal_scan_reference(
    x: Tensor,  # [B, T, D]
    a: Tensor,  # [D] or [B, T, D]
    initial_state: Tensor | None,  # [B, D]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    factor: Tensor | None,  # [D], real
) -> tuple[Tensor, Tensor]:
    B, T, D = x.shape
    dtype = accumulation_dtype(x.dtype)
    lengths = torch.full((B,), T, device=x.device) if lengths is None else lengths
    valid = valid_positions(lengths, T)[..., None].unbind(1)  # T times [B, 1]
    x_BTD, a_BTD = (zero_padding(y.to(dtype), lengths) for y in (x, a.expand(B, T, D)))
    if factor is not None:
        x_BTD = factor.to(dtype.to_real()) * x_BTD
    xs, gates = x_BTD.unbind(1), a_BTD.unbind(1)  # T times [B, D]

    h = torch.zeros_like(xs[0]) if initial_state is None else initial_state.to(dtype)
    outputs = [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        h = torch.where(valid[t], gates[t] * h + xs[t], h)
        outputs[t] = h
    return zero_padding(torch.stack(outputs, 1), lengths).to(x.dtype), h
