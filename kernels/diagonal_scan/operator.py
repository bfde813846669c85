"""A form of the diagonal scan as one operator with a gradient: what PyTorch has to know to trace and to compile it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from ..common import accumulation_dtype
from ..derivatives import differentiable, transformed
from ..documents import count_of
from . import doubling

Scan = Callable[..., tuple[Tensor, Tensor]]


def register(name: str, scan: Scan, scan_backward: Callable[..., Any]) -> tuple[Scan, CustomOpDef, CustomOpDef]:
    """The scan with all its derivatives, and the operators seqzoo::<name> and seqzoo::<name>_backward behind it.

    Args:
        name: of the operator.
        scan, scan_backward: functions as in `doubling`.
    """
    forward = custom_op(f"seqzoo::{name}", scan, mutates_args=())
    backward = custom_op(f"seqzoo::{name}_backward", scan_backward, mutates_args=())

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        return doubling.scan(*arguments) if transformed() else forward(*arguments)

    written = differentiable(backward, partial(doubling.gradients, run))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, a, initial_state, ctx.reverse, lengths, factor, starts = inputs
        ctx.save_for_backward(output[0], a, initial_state, lengths, factor, starts)

    def gradient(ctx: Any, dh: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        h, a, initial_state, lengths, factor, starts = ctx.saved_tensors
        dx, da, d_initial, d_factor = written(dh, d_state, h, a, initial_state, ctx.reverse, lengths, factor, starts)
        of_state, of_factor = None if initial_state is None else d_initial, None if factor is None else d_factor
        return dx, da, of_state, None, None, of_factor, None

    forward.register_fake(_fake)
    backward.register_fake(_fake_backward)
    forward.register_autograd(gradient, setup_context=setup_context)
    return run, forward, backward


def _fake(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    sequences = count_of(starts, x.shape[0])
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[-1], dtype=accumulation_dtype(x.dtype))


def _fake_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_factor = h.new_empty(0, dtype=h.dtype.to_real()) if factor is None else factor.new_empty(factor.shape)
    d_initial = torch.empty_like(d_state, memory_format=torch.contiguous_format)
    return h.new_empty(h.shape), a.new_empty(a.shape), d_initial, d_factor
