"""The definition of the diagonal scan, one step at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, zero_padding
from ..documents import Documents


def diagonal_scan_reference(
    x: Tensor,  # [B, T, D]
    a: Tensor,  # [D] or [B, T, D]
    initial_state: Tensor | None,  # [B, D]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    factor: Tensor | None,  # [D], real
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    if documents is not None:
        return padded(diagonal_scan_reference, x, a, initial_state, reverse, factor, documents)
    B, T, D = x.shape
    dtype = accumulation_dtype(x.dtype)
    lengths = torch.full((B,), T, device=x.device) if lengths is None else lengths
    valid = valid_positions(lengths, T)[..., None].unbind(1)  # T times [B, 1]
    x_BTD, a_BTD = (zero_padding(y.to(dtype), lengths) for y in (x, a.expand(B, T, D)))
    if factor is not None:
        x_BTD = factor.to(x_BTD.real.dtype) * x_BTD
    xs, gates = x_BTD.unbind(1), a_BTD.unbind(1)  # T times [B, D]

    h = torch.zeros_like(xs[0]) if initial_state is None else initial_state.to(dtype)
    outputs = [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        h = torch.where(valid[t], gates[t] * h + xs[t], h)
        outputs[t] = h
    return zero_padding(torch.stack(outputs, 1), lengths).to(x.dtype), h


def padded(
    form: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    factor: Tensor | None,
    documents: Documents,
) -> tuple[Tensor, Tensor]:
    """What `form` makes of a document a row."""
    a = a if a.dim() == 1 else documents.padded(a)
    h, state = form(documents.padded(x), a, initial_state, reverse, documents.lengths, factor, None)
    return documents.unpadded(h), state
