"""The definition of RG-LRU's scan, one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import accumulation_dtype, zero_padding
from ..documents import Documents


def real_gated_scan_reference(
    v: Tensor,  # [B, T, D]
    recurrence_gate: Tensor,  # [B, T, D]
    input_gate: Tensor,  # [B, T, D]
    rate: Tensor,  # [D]
    initial_state: Tensor | None,  # [B, D]
    begins: Tensor | None,  # [B]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    if documents is not None:
        of = documents.lengths
        v, recurrence_gate, input_gate = (documents.padded(x) for x in (v, recurrence_gate, input_gate))
        h, state = real_gated_scan_reference(
            v, recurrence_gate, input_gate, rate, initial_state, begins, reverse, of, None
        )
        return documents.unpadded(h), state
    B, T, D = v.shape
    dtype = accumulation_dtype(v.dtype)
    lengths = torch.full((B,), T, device=v.device) if lengths is None else lengths
    begins = torch.ones(B, dtype=torch.bool, device=v.device) if begins is None else begins
    state = v.new_zeros(B, D, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    v, recurrence_gate, input_gate = (zero_padding(x, lengths) for x in (v, recurrence_gate, input_gate))
    log_a = -rate.to(dtype) * recurrence_gate.to(dtype).sigmoid()
    steps = (input_gate.to(dtype).sigmoid() * v).unbind(1)
    found = [torch.zeros_like(state)] * T
    for t in reversed(range(T)) if reverse else range(T):
        first = (t == (lengths - 1 if reverse else torch.zeros_like(lengths))) & begins
        a = torch.where(first[:, None], 0, log_a[:, t].exp())
        root = torch.where(first[:, None], 1, (-torch.expm1(2 * log_a[:, t])).sqrt())
        state = torch.where((t < lengths)[:, None], a * state + root * steps[t], state)
        found[t] = state
    return zero_padding(torch.stack(found, 1), lengths).to(v.dtype), state
