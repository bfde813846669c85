"""Linear attention with a decay per channel: a compiled loop on a CPU, PyTorch on other devices and for transforms.

The loop takes one decay for all channels of a head too.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ..common import accumulation_dtype
from ..derivatives import differentiable, pullback, transformed
from ..documents import Documents, count_of, starts_of
from .reference import divide_by_normalizer
from .secondary import secondary_chunks


def linear_attention_per_channel(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    log_decay: Tensor,  # [B, T, H, Dk or 1]
    causal: bool,
    normalize: bool,
    initial_state: Tensor | None,  # [B or N, H, Dk, Dv (+ 1)]
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    q, k, v, g = (x.to(dtype) for x in (q, k, v, log_decay))
    first = None if initial_state is None else initial_state.to(dtype)
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    form = _in_loop if q.device.type == "cpu" and not transformed() else _plain
    o, state = form(q, k, v, g, first, lengths, starts_of(documents), causal)
    if normalize:
        o = divide_by_normalizer(o)
    return o.to(out_dtype), state if output_final_state else None


def _plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return secondary_chunks(q, k, v, g.expand_as(k), *others)


def _loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    first: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    from . import loop  # imports Numba

    return loop.forward(q, k, v, g, first, lengths, starts, causal)


def _loop_backward(
    do: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    first: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import loop

    return loop.backward(do, d_state, q, k, v, g, first, lengths, starts, causal)


_in_loop = custom_op("seqzoo::linear_attention_per_channel", _loop, mutates_args=(), device_types="cpu")
_backward = custom_op(
    "seqzoo::linear_attention_per_channel_backward", _loop_backward, mutates_args=(), device_types="cpu"
)


@_in_loop.register_fake
def _(q, k, v, g, first, lengths, starts, causal):
    R = count_of(starts, q.shape[0])
    return v.new_empty(v.shape), v.new_empty(R, *q.shape[2:], v.shape[3])


@_backward.register_fake
def _(do, d_state, *inputs):
    return *(x.new_empty(x.shape) for x in inputs[:4]), d_state.new_empty(d_state.shape)


def _gradients(do: Tensor, d_state: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_backward`, for PyTorch to differentiate."""
    inputs, ends = arguments[:5], arguments[5:]
    return pullback(lambda *inputs: _plain(*inputs, *ends), inputs, (do, d_state))


_gradients_by_hand = differentiable(_backward, _gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, do: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    *gradients, d_first = _gradients_by_hand(do, d_state, *inputs, ctx.causal)
    return *gradients, None if inputs[4] is None else d_first, None, None, None


_in_loop.register_autograd(_gradient, setup_context=_keep)
