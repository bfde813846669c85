"""The delta rule in Triton as one operator with a gradient."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..derivatives import differentiable, pullback
from ..documents import Documents, documents_from, starts_of
from .chunked import delta_rule_chunked
from .fused import Call, gradients, outputs


def delta_rule_fused(
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
    dtype = reduce(torch.promote_types, (x.dtype for x in (q, k, v, erase) if x is not None))
    of_kernels = [None if x is None else x.to(dtype) for x in (q, k, v, erase)]
    single = [None if x is None else x.float() for x in (beta, log_decay, initial_state)]
    given = (*of_kernels[:3], *single[:2], of_kernels[3], single[2])
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    o, last, _ = _delta_rule(*given, lengths, starts_of(documents), output_final_state, keep)
    return o.to(v.dtype), last if output_final_state else None


@torch.library.custom_op("seqzoo::delta_rule_fused", mutates_args=())
def _delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    output_final_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o; the last states, if asked for; the states before each chunk, if they are to be kept for the gradient."""
    call = Call.of(q, k, v, beta, log_decay, erase, lengths, starts)
    return outputs(call, initial_state, keep=keep, want_last=output_final_state)


@_delta_rule.register_fake
def _(q, k, v, beta, log_decay, erase, initial_state, lengths, starts, output_final_state, keep):
    call = Call.of(q, k, v, beta, log_decay, erase, lengths, starts)
    last = (call.chunks.R, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    nothing = q.new_empty(0, dtype=torch.float32)
    return v.new_empty(v.shape), q.new_empty(last, dtype=torch.float32), call.states() if keep else nothing


@torch.library.custom_op("seqzoo::delta_rule_fused_backward", mutates_args=())
def _delta_rule_backward(
    do: Tensor,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    states: Tensor,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay, erase and initial_state, empty where there is no such input."""
    call = Call.of(q, k, v, beta, log_decay, erase, lengths, starts)
    found = gradients(call, do.to(v.dtype), d_last, states, of_initial=initial_state is not None)
    dq, dk, dv, d_beta, dg, dr, d_initial = (q.new_empty(0) if x is None else x for x in found)
    return dq, dk, dv, d_beta, dg, dr, d_initial


@_delta_rule_backward.register_fake
def _(do, d_last, *given):
    return tuple(given[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in given[:7])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.output_final_state, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _gradient(ctx: Any, do: Tensor | None, d_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[2]) if do is None else do
    found = _written(do, d_last if ctx.output_final_state else None, *saved, ctx.output_final_state)
    return *(None if x is None else dx for x, dx in zip(saved, found, strict=False)), None, None, None, None


def _plain(*arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_delta_rule_backward`, for PyTorch to differentiate."""
    do, d_last, *given, lengths, starts, _, final = arguments
    documents = documents_from(starts, given[0].shape[1])

    def form(*inputs: Any) -> tuple[Tensor, Tensor | None]:
        arguments: Any = (*inputs, lengths, documents, final)
        return delta_rule_chunked(*arguments)

    return pullback(form, given, (do, d_last))


_delta_rule.register_autograd(_gradient, setup_context=_keep)
_written = differentiable(_delta_rule_backward, _plain)
