"""The diagonal scan as one registered operator: a compiled loop on CPU, a scan by doubling on other devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import accumulation_dtype
from . import doubling


def diagonal_scan_chunked(
    x: Tensor,  # [B, T, D]
    a: Tensor,  # [D] or [B, T, D]
    initial_state: Tensor | None,  # [B, D]
    reverse: bool,
    lengths: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    h, final_state = _scan(x.to(dtype), a.to(dtype), initial_state, reverse, lengths)
    return h.to(x.dtype), final_state


@torch.library.custom_op("seqzoo::diagonal_scan", mutates_args=())
def _scan(
    x: Tensor, a: Tensor, initial_state: Tensor | None, reverse: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    return doubling.scan(x, a, initial_state, reverse, lengths)


@torch.library.custom_op("seqzoo::diagonal_scan_backward", mutates_args=())
def _scan_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return doubling.scan_backward(dh, d_state, h, a, initial_state, reverse, lengths)


@_scan.register_kernel("cpu")
def _(
    x: Tensor, a: Tensor, initial_state: Tensor | None, reverse: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    from . import loop  # imports Numba

    return loop.scan(x, a, initial_state, reverse, lengths)


@_scan_backward.register_kernel("cpu")
def _(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import loop

    return loop.scan_backward(dh, d_state, h, a, initial_state, reverse, lengths)


@_scan.register_fake
def _(
    x: Tensor, a: Tensor, initial_state: Tensor | None, reverse: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, _, D = x.shape
    return x.new_empty(x.shape), x.new_empty(B, D)


@_scan_backward.register_fake
def _(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), a.new_empty(a.shape), h.new_empty(d_state.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, a, initial_state, ctx.reverse, lengths = inputs
    ctx.save_for_backward(output[0], a, initial_state, lengths)


def _backward(ctx: Any, dh: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    h, a, initial_state, lengths = ctx.saved_tensors
    dx, da, d_initial = _scan_backward(dh, d_state, h, a, initial_state, ctx.reverse, lengths)
    return dx, da, None if initial_state is None else d_initial, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)
