"""The delta rule without Triton: a compiled loop on a CPU, chunks in PyTorch on other devices and for transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..common import accumulation_dtype
from ..derivatives import differentiable, pullback, transformed
from ..documents import Documents, starts_of
from .chunks import CHUNK, Chunks, gradients, outputs


def delta_rule_chunked(
    q: Tensor,  # [B, T, G, Dk]
    k: Tensor,  # [B, T, G, Dk]
    v: Tensor,  # [B, T, H, Dv]
    beta: Tensor,  # [B, T, H]
    log_decay: Tensor | None,  # [B, T, H] or [B, T, H, Dk]
    erase: Tensor | None,  # [B, T, H, Dk]
    initial_state: Tensor | None,  # [B or N, H, Dk, Dv]
    lengths: Tensor | None,  # [B]
    documents: Documents | None,  # N, of which B = 1
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    (B, _, H, Dv), dtype = v.shape, accumulation_dtype(v.dtype)
    shape = (B if documents is None else documents.N, H, q.shape[3], Dv)
    first = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    form: Any = outputs if transformed() else _forward
    o, final_state, *_ = form(q, k, v, beta, log_decay, erase, first, lengths, starts_of(documents))
    return o, final_state if output_final_state else None


_forward = custom_op("seqzoo::delta_rule", outputs, mutates_args=())
_backward = custom_op("seqzoo::delta_rule_backward", gradients, mutates_args=())


@_forward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from . import loop  # imports Numba

    return loop.forward(*arguments)


@_backward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from . import loop

    return loop.backward(*arguments)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, first, _, starts = others
    # Sequences shorter than a chunk have one: nothing is asked of a length that may be any.
    room = -(-v.shape[1] // CHUNK) if starts is None else Chunks.of(v.shape[1], starts).room
    states = first.new_empty(room * v.shape[0], *first.shape[1:])
    return v.new_empty(v.shape), first.new_empty(first.shape), states, first.new_empty(v.shape)


@_backward.register_fake
def _(do: Tensor, d_last: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return *(d_last.new_empty(0) if x is None else x.new_empty(x.shape) for x in given[:6]), d_last.new_empty(
        d_last.shape
    )


def _plain_gradients(do: Tensor, d_last: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
    """As `_backward`, for PyTorch to differentiate."""
    lengths, starts = given[7:9]

    def form(*inputs: Any) -> tuple[Tensor, ...]:
        arguments: Any = (*inputs, lengths, starts)
        return outputs(*arguments)[:2]

    return pullback(form, given[:7], (do, d_last))


_gradients_by_hand = differentiable(_backward, _plain_gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _gradient(ctx: Any, do: Tensor | None, d_last: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[2]) if do is None else do
    d_last = torch.zeros_like(saved[6]) if d_last is None else d_last
    found = _gradients_by_hand(do, d_last, *saved)
    return *(None if x is None else dx for x, dx in zip(saved, found, strict=False)), None, None


_forward.register_autograd(_gradient, setup_context=_keep)
