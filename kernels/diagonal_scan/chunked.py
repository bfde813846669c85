"""The diagonal scan without Triton: a compiled loop on CPU, a scan by doubling on other devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import accumulation_dtype, zero_padding
from ..documents import Documents, starts_of
from . import doubling
from .operator import register

_scan, _forward, _backward = register("diagonal_scan", doubling.scan, doubling.scan_backward)


def diagonal_scan_chunked(
    x: Tensor,  # [B, T, D]
    a: Tensor,  # [D] or [B, T, D]
    initial_state: Tensor | None,  # [B, D]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    factor: Tensor | None,  # [D], real
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    factor = None if factor is None else factor.to(accumulation_dtype(x.real.dtype))
    initial_state = None if initial_state is None else initial_state.to(dtype)
    if x.shape[1] == 1 and initial_state is not None and documents is None:
        return _one_step(x, a, initial_state, lengths, factor)
    starts = starts_of(documents)
    h, final_state = _scan(x.to(dtype), a.to(dtype), initial_state, reverse, lengths, factor, starts)
    return h.to(x.dtype), final_state


def _one_step(
    x: Tensor, a: Tensor, state: Tensor, lengths: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, which has no direction."""
    x_1 = zero_padding(x, lengths)[:, 0].to(state.dtype)
    a_1 = a if a.dim() == 1 else zero_padding(a, lengths)[:, 0]
    h = a_1.to(state.dtype) * state + (x_1 if factor is None else factor * x_1)
    if lengths is not None:
        h = torch.where((lengths > 0)[:, None], h, state)
    return zero_padding(h[:, None], lengths).to(x.dtype), h


@_forward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import loop  # imports Numba

    return loop.scan(*arguments)


@_backward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import loop

    return loop.scan_backward(*arguments)
