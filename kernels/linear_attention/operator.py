"""Linear attention in Triton as one operator with a gradient.

The gradients are linear attention too. With p the gradient of the output before it was normalised, and dn that of the
normaliser,

    dq_i = sum_{j ≤ i} D_ij (p_i·v_j + dn_i) k_j        queries p, keys v, values k
    dk_j = sum_{i ≥ j} D_ij (v_j·p_i + dn_i) q_i        queries v, keys p, values q, backwards in time
    dv_j = sum_{i ≥ j} D_ij (k_j·q_i) p_i               queries k, keys q, values p, backwards in time

so that backward is three passes like the one forward, where a query or a key may have one more channel (dn) whose
partner is 1. Decays D_ij per channel of k are of the values in the first two, of the keys in the third. Their gradient
follows from q·dq and k·dk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import differentiable, pullback
from ..documents import Documents, count_of, documents_from, starts_of
from .channel_decays import channel_decay_gradient
from .chunked import linear_attention_chunked
from .decays import decay_gradient
from .fused import State, one_pass, pack, whole_state


def linear_attention_fused(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    log_decay: Tensor | None,  # [H], [B, T, H] or [B, T, H, Dk]
    causal: bool,
    normalize: bool,
    initial_state: Tensor | None,  # [B, H, Dk, Dv (+ 1)]
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    log_decay, initial_state = (None if x is None else x.float() for x in (log_decay, initial_state))
    starts = starts_of(documents)
    inputs = (*(x.to(dtype) for x in (q, k, v)), log_decay, initial_state, lengths, starts)
    o, state, _ = _linear_attention(*inputs, causal, normalize, output_final_state)
    return o.to(v.dtype), state if output_final_state else None


@torch.library.custom_op("seqzoo::linear_attention_fused", mutates_args=())
def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    causal: bool,
    normalize: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o; the last state, if asked for or if all see it; normalisers [B, T, H], infinite for 0, if there are any."""
    B, T, H, _ = q.shape
    norms = q.new_empty((B, T, H) if normalize else (0,), dtype=torch.float32)
    ends: dict[str, Any] = {"lengths": lengths, "packed": pack(starts, q)}
    options = {**ends, "norms": norms if normalize else None}
    if causal:
        start = _split(initial_state, normalize)
        o, end = one_pass(q, k, v, g=log_decay, start=start, want_end=output_final_state, **options)
    else:
        end = whole_state(k, v, **ends, keys=normalize)
        o, _ = one_pass(q, k, v, start=end, causal=False, **options)
    return o, q.new_empty(0, dtype=torch.float32) if end is None else _joined(end, H), norms


@_linear_attention.register_fake
def _(q, k, v, log_decay, initial_state, lengths, starts, causal, normalize, output_final_state):
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    rows = count_of(starts, B)
    state = (rows, H, Dk, Dv + normalize) if output_final_state or not causal else (0,)
    norms = (B, T, H) if normalize else (0,)
    return v.new_empty(v.shape), *(q.new_empty(shape, dtype=torch.float32) for shape in (state, norms))


@torch.library.custom_op("seqzoo::linear_attention_fused_backward", mutates_args=())
def _linear_attention_backward(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    o: Tensor,
    state: Tensor,
    norms: Tensor,
    causal: bool,
    normalize: bool,
    output_final_state: bool,
    decay_needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the decay and the initial state, the last two empty where none is to be had."""
    H = q.shape[2]
    p, dn = do, None
    if normalize:
        p = (do / norms[..., None]).to(q.dtype)
        dn = (p.float() * o).sum(-1).neg_()  # [B, T, H], of p as the kernel has it: the two cancel in a first step
    p = p.to(q.dtype)
    ends: dict[str, Any] = {"lengths": lengths, "packed": pack(starts, q)}
    options = {**ends, "dtype": torch.float32 if decay_needs_gradient else q.dtype}
    d_initial, dg = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    if causal:
        start = _split(initial_state, normalize)
        d_end = _split(d_state, normalize)
        options |= {"g": log_decay}
        dq, _ = one_pass(p, v, k, start=_transposed(start), q_more=dn, of_values=True, **options)
        options |= {"late": True, "down": True}
        ends_of_k = {"start": _transposed(d_end), "want_end": start is not None}
        dk, d_start = one_pass(v, p, q, **ends_of_k, k_more=dn, of_values=True, **options)
        dv, _ = one_pass(k, q, p, start=None if d_end is None else State(d_end.memory), **options)
        if d_start is not None:
            d_initial = _joined(_transposed(d_start), H)
    else:
        d_end = whole_state(p, q, **ends, more=dn)
        options["causal"] = False
        dq, _ = one_pass(p, v, k, start=_transposed(_split(state, normalize)), q_more=dn, **options)
        dk, _ = one_pass(v, p, q, start=d_end, k_more=dn, **options)
        dv, _ = one_pass(k, q, p, start=State(d_end.memory.mT.contiguous()), **options)
    if decay_needs_gradient:
        assert log_decay is not None
        of_last = None if d_state is None else (state * d_state).sum(-1)
        if log_decay.dim() == 4:
            dg = channel_decay_gradient(q, dq, k, dk, log_decay, lengths, starts, of_last)
        else:
            dg = decay_gradient(q, dq, k, dk, lengths, starts, None if of_last is None else of_last.sum(-1))
            dg = (dg.sum((0, 1)) if log_decay.dim() == 1 else dg).masked_fill(log_decay.exp() == 0, 0)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dg, d_initial


@_linear_attention_backward.register_fake
def _(do, d_state, q, k, v, log_decay, initial_state, lengths, starts, o, state, norms, causal, *options):
    *_, decays = options
    d_inputs = [x.new_empty(x.shape) for x in (q, k, v)]
    dg = log_decay.shape if decays else (0,)
    d_initial = (0,) if initial_state is None or not causal else initial_state.shape
    return *d_inputs, *(q.new_empty(shape, dtype=torch.float32) for shape in (dg, d_initial))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, causal, normalize, output_final_state = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.options = causal, normalize, output_final_state


def _gradient(ctx: Any, do: Tensor | None, d_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    do = torch.zeros_like(ctx.saved_tensors[7]) if do is None else do
    decays, starts = ctx.needs_input_grad[3:5]
    dq, dk, dv, dg, d_initial = _written(do, d_state, *ctx.saved_tensors, *ctx.options, decays)
    return dq, dk, dv, dg if decays else None, d_initial if starts else None, *(None,) * 5


def _plain(*arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_linear_attention_backward`, for PyTorch to differentiate."""
    do, d_state, q, k, v, log_decay, initial_state, lengths, starts, *_, causal, normalize, final, _ = arguments
    documents = documents_from(starts, q.shape[1])

    def form(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return linear_attention_chunked(q, k, v, g, causal, normalize, start, lengths, documents, final)

    return pullback(form, (q, k, v, log_decay, initial_state), (do, d_state))


_linear_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_linear_attention_backward, _plain)


def _split(state: Tensor | None, normalize: bool) -> State | None:
    """[B, H, Dk, Dv], with `normalize` one column more, as the kernel has it."""
    if state is None:
        return None
    state = state.flatten(0, 1)
    if not normalize:
        return State(state.contiguous())
    return State(state[..., :-1].contiguous(), state[..., -1].contiguous())


def _joined(state: State, H: int) -> Tensor:
    columns = state.memory if state.keys is None else torch.cat([state.memory, state.keys[..., None]], -1)
    return columns.unflatten(0, (-1, H))


def _transposed(state: State | None) -> Any:
    """With keys in the place of values."""
    return None if state is None else State(state.memory.mT.contiguous(), state.values, state.keys)
