"""The selective scan as one operator: a compiled loop on CPU, on other devices piece by piece of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..common import accumulation_dtype
from ..derivatives import differentiable, pullback, transformed
from ..documents import Documents, count_of, starts_of
from . import pieces
from .pieces import at_once


def selective_scan_chunked(
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
    dtype = accumulation_dtype(v.dtype)
    before = None if initial_state is None else initial_state.mT
    inputs: list[Any] = [None if x is None else x.to(dtype) for x in (v, dt, A.mT, write, read, before)]
    ends: tuple[Any, ...] = (reverse, lengths, starts_of(documents))
    if transformed():
        y, state = at_once(*inputs, *ends)
    else:
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        y, state, _ = _forward(*inputs, *ends, keep)
    return y.to(v.dtype), state.mT


def _plain(dy: Tensor, d_state: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """As `pieces.scan_backward`, for PyTorch to differentiate."""
    inputs, ends = arguments[:6], arguments[6:9]
    return pullback(lambda *inputs: at_once(*inputs, *ends), inputs, (dy, d_state))


_forward = custom_op("seqzoo::selective_scan", pieces.scan, mutates_args=())
_backward = custom_op("seqzoo::selective_scan_backward", pieces.scan_backward, mutates_args=())
_written = differentiable(_backward, _plain)


@_forward.register_fake
def _(v, dt, A, write, read, initial_state, reverse, lengths, starts, keep):
    state = v.new_empty(count_of(starts, v.shape[0]), *A.shape)
    return v.new_empty(v.shape), state, pieces.marks(v, A, keep)


@_backward.register_fake
def _(dy, d_state, v, dt, A, write, read, initial_state, reverse, lengths, starts, marks):
    return tuple(x.new_empty(x.shape) for x in (v, dt, A, write, read, d_state))


@_forward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import loop  # imports Numba

    return loop.scan(*arguments)


@_backward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import loop

    return loop.scan_backward(*arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, lengths, starts, _ = inputs
    ctx.save_for_backward(*tensors, lengths, starts, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx: Any, dy: Tensor, d_state: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, lengths, starts, marks = ctx.saved_tensors
    *gradients, d_initial = _written(dy, d_state, *inputs, ctx.reverse, lengths, starts, marks)
    return *gradients, None if inputs[-1] is None else d_initial, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)
