"""A form of the diagonal scan as one operator with a gradient: what PyTorch has to know to trace and to compile it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from ..common import accumulation_dtype


def register(
    name: str, scan: Callable[..., tuple[Tensor, Tensor]], scan_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[CustomOpDef, CustomOpDef]:
    """The operators seqzoo::<name> and seqzoo::<name>_backward, of functions as in `doubling`."""
    forward = custom_op(f"seqzoo::{name}", scan, mutates_args=())
    backward = custom_op(f"seqzoo::{name}_backward", scan_backward, mutates_args=())

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, a, initial_state, ctx.reverse, lengths = inputs
        ctx.save_for_backward(output[0], a, initial_state, lengths)

    def gradient(ctx: Any, dh: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        h, a, initial_state, lengths = ctx.saved_tensors
        dx, da, d_initial = backward(dh, d_state, h, a, initial_state, ctx.reverse, lengths)
        return dx, da, None if initial_state is None else d_initial, None, None

    forward.register_fake(_fake)
    backward.register_fake(_fake_backward)
    forward.register_autograd(gradient, setup_context=setup_context)
    return forward, backward


def _fake(
    x: Tensor, a: Tensor, initial_state: Tensor | None, reverse: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, _, D = x.shape
    return x.new_empty(x.shape), x.new_empty(B, D, dtype=accumulation_dtype(x.dtype))


def _fake_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), a.new_empty(a.shape), torch.empty_like(d_state, memory_format=torch.contiguous_format)
