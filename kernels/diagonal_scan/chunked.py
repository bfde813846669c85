"""The diagonal scan without Triton: a compiled loop on CPU, a scan by doubling on other devices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common import accumulation_dtype
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
    starts = starts_of(documents)
    h, final_state = _scan(x.to(dtype), a.to(dtype), initial_state, reverse, lengths, factor, starts)
    return h.to(x.dtype), final_state


@_forward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import loop  # imports Numba

    return loop.scan(*arguments)


@_backward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import loop

    return loop.scan_backward(*arguments)
