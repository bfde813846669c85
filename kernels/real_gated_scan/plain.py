"""RG-LRU's scan in PyTorch: decays and roots, and a diagonal scan."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common import accumulation_dtype
from ..derivatives import by_hand
from ..diagonal_scan import diagonal_scan
from ..documents import Documents, starts_of

STEEPEST = 1000.0  # slope of the root by 1 - a², at most


def real_gated_scan_plain(
    v: Tensor,  # [B, T, D]
    recurrence_gate: Tensor,  # [B, T, D]
    input_gate: Tensor,  # [B, T, D]
    rate: Tensor,  # [D]
    initial_state: Tensor | None,  # [R, D], of R sequences
    begins: Tensor | None,  # [R]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    dtype, starts = accumulation_dtype(v.dtype), starts_of(documents)
    values = input_gate.to(dtype).sigmoid() * v
    log_a = recurrence_gate.to(dtype).sigmoid() * -rate.to(dtype)
    a, root = decay(log_a.masked_fill(_first(v, begins, reverse, lengths, documents)[..., None], -math.inf))
    ends: dict[str, Any] = {"reverse": reverse, "lengths": lengths, "cu_seqlens": starts, "backend": backend}
    h, state = diagonal_scan(root * values, a, initial_state=initial_state, output_final_state=True, **ends)
    return h.to(v.dtype), state


def _first(
    v: Tensor, begins: Tensor | None, reverse: bool, lengths: Tensor | None, documents: Documents | None
) -> Tensor:
    """Where a sequence begins with its first step, bool [T], [1, T] or [B, T]."""
    T = v.shape[1]
    if documents is not None:
        of, step = documents.of_steps(), documents.positions()
        first = step == (documents.lengths[of] - 1 if reverse else 0)
        return first if begins is None else (first & begins[of])[None]
    last: Any = T - 1 if lengths is None else lengths[:, None] - 1
    first = torch.arange(T, device=v.device) == (last if reverse else 0)
    return first if begins is None else first & begins[:, None]


class _Decay(torch.autograd.Function):
    """Keeps what it gives, and nothing else."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor) -> tuple[Tensor, Tensor]:
        a, root = log_a.exp(), (2 * log_a).expm1_().neg_().sqrt_()
        ctx.save_for_backward(a, root)
        return a, root

    @staticmethod
    def backward(ctx: Any, da: Tensor, d_root: Tensor) -> Tensor:
        a, root = ctx.saved_tensors
        return a * (da - d_root * a / root.clamp(min=0.5 / STEEPEST))


def decay(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """a and √(1 - a²), whose slope by 1 - a² is `STEEPEST` at most."""
    if by_hand():
        return _Decay.apply(log_a)
    x, bend = -torch.expm1(2 * log_a), 1 / (2 * STEEPEST) ** 2
    straight = x.detach().sqrt() + STEEPEST * (x - x.detach())
    return log_a.exp(), torch.where(x > bend, x.clamp(min=bend).sqrt(), straight)
