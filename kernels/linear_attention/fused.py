"""Linear attention in Triton.

One kernel does all passes. A program has one head of one sequence and a block of value channels; it goes through the
sequence chunk by chunk, takes pairs inside a chunk one by one and all earlier ones from a state [Dk, Dv] that it keeps
in registers. Every input is read once, every output written once. Where heads times sequences do not fill the GPU, time
is cut into segments: a first pass finds the state that each adds, a short one carries the states on, and then all
segments run at once.

The gradients are linear attention too. With p the gradient of the output before it was normalised, and dn that of the
normaliser,

    dq_i = sum_{j ≤ i} D_ij (p_i·v_j + dn_i) k_j        queries p, keys v, values k
    dk_j = sum_{i ≥ j} D_ij (v_j·p_i + dn_i) q_i        queries v, keys p, values q, backwards in time
    dv_j = sum_{i ≥ j} D_ij (k_j·q_i) p_i               queries k, keys q, values p, backwards in time

so that backward is the same kernel, three times, where a query or a key may have one more channel (dn) whose partner is
1. That of the decay follows from q·dq and k·dk.

Without causality there is one reduction of keys and values to a state, and one product with it. Products are in
bfloat16 for bfloat16, otherwise in float32 on the matrix unit: three TF32 products for float32, one for float16, whose
range sums would leave.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import backends
from ..blocks import Blocks
from ..common import contiguous
from ..derivatives import differentiable, pullback
from ..documents import Documents, Pieces, starts_of
from ..launching import launch
from .chunked import linear_attention_chunked
from .decays import decay_gradient
from .recurrence import _carry_kernel, _linear_kernel

MIN_SEGMENT = 512  # steps
PROGRAMS = 2  # wanted for each multiprocessor, before time is cut
MAX_VALUES = 128  # channels of v in a program
CARRIED = 1024  # numbers of a state that one program carries from segment to segment
STEPS = 64  # segments of documents are multiples of it, and it of all chunks


class Config(NamedTuple):
    """Of `pass`, and of `decayed`, a pass with a decay for each step."""

    steps: int  # in a chunk
    state: int  # numbers of the state that a program keeps, at most
    num_warps: int
    num_stages: int


BLOCKS = Blocks("linear_attention", Path(__file__).with_name("blocks.csv"), Config)
PRECISIONS = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "bf16"}


class State(NamedTuple):
    """What is carried through time, float32; the last two where there is such a channel."""

    memory: Any  # [B·H, Dk, Dv], sum of k vᵀ
    keys: Tensor | None = None  # [B·H, Dk], sum of k · 1: the normaliser's
    values: Tensor | None = None  # [B·H, Dv], sum of 1 · v, or of dn · v: of the channel that is 1 or dn


class Packed(NamedTuple):
    """Documents in one row, whose states have N·H rows."""

    pieces: Pieces  # the segments of all
    table: Tensor  # [P, 4], of them


def linear_attention_fused(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    log_decay: Tensor | None,  # [H] or [B, T, H]
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
    """o; the last state, if asked for or if all see it; 1 / the normaliser [B, T, H], if there is one."""
    B, T, H, _ = q.shape
    inverse = q.new_empty((B, T, H) if normalize else (0,), dtype=torch.float32)
    ends: dict[str, Any] = {"lengths": lengths, "packed": _packed(starts, q)}
    options = {**ends, "inverse": inverse if normalize else None}
    if causal:
        start = _split(initial_state, normalize)
        o, end = _run(q, k, v, g=log_decay, start=start, want_end=output_final_state, **options)
    else:
        end = _reduce(k, v, **ends, keys=normalize)
        o, _ = _run(q, k, v, start=end, causal=False, **options)
    return o, q.new_empty(0, dtype=torch.float32) if end is None else _joined(end, H), inverse


@_linear_attention.register_fake
def _(q, k, v, log_decay, initial_state, lengths, starts, causal, normalize, output_final_state):
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    rows = B if starts is None else starts.shape[0] - 1
    state = (rows, H, Dk, Dv + normalize) if output_final_state or not causal else (0,)
    inverse = (B, T, H) if normalize else (0,)
    return v.new_empty(v.shape), *(q.new_empty(shape, dtype=torch.float32) for shape in (state, inverse))


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
    inverse: Tensor,
    causal: bool,
    normalize: bool,
    output_final_state: bool,
    decay_needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the decay and the initial state, the last two empty where none is to be had."""
    H = q.shape[2]
    p, dn = do, None
    if normalize:
        p = (do * inverse[..., None]).to(q.dtype)
        dn = (p.float() * o).sum(-1).neg_()  # [B, T, H], of p as the kernel has it: the two cancel in a first step
    p = p.to(q.dtype)
    ends: dict[str, Any] = {"lengths": lengths, "packed": _packed(starts, q)}
    options = {**ends, "dtype": torch.float32 if decay_needs_gradient else q.dtype}
    d_initial, dg = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    if causal:
        start = _split(initial_state, normalize)
        d_end = _split(d_state, normalize)
        dq, _ = _run(p, v, k, g=log_decay, start=_transposed(start), q_more=dn, **options)
        options |= {"g": log_decay, "late": True, "down": True}
        dk, d_start = _run(v, p, q, start=_transposed(d_end), k_more=dn, want_end=start is not None, **options)
        dv, _ = _run(k, q, p, start=None if d_end is None else State(d_end.memory), **options)
        if d_start is not None:
            d_initial = _joined(_transposed(d_start), H)
    else:
        d_end = _reduce(p, q, **ends, more=dn)
        options["causal"] = False
        dq, _ = _run(p, v, k, start=_transposed(_split(state, normalize)), q_more=dn, **options)
        dk, _ = _run(v, p, q, start=d_end, k_more=dn, **options)
        dv, _ = _run(k, q, p, start=State(d_end.memory.mT.contiguous()), **options)
    if decay_needs_gradient:
        assert log_decay is not None
        of_last = None if d_state is None else (state * d_state).sum((-2, -1))
        dg = decay_gradient(q, dq, k, dk, lengths, starts, of_last)
        dg = dg.sum((0, 1)) if log_decay.dim() == 1 else dg.masked_fill(log_decay == -torch.inf, 0)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dg, d_initial


@_linear_attention_backward.register_fake
def _(do, d_state, q, k, v, log_decay, initial_state, lengths, starts, o, state, inverse, causal, *options):
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
    documents = None if starts is None else Documents(starts, q.shape[1])

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


class Plan(NamedTuple):
    config: Config
    DK: int
    DV: int
    segment_len: int
    segments: int


def _plan(q: Tensor, v: Tensor, g: Tensor | None, packed: Packed | None) -> Plan:
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    DK = max(16, triton.next_power_of_2(Dk))
    per_step = g is not None and g.dim() == 3  # the decay between all pairs wants as many registers as the pairs
    config = BLOCKS.of("decayed" if per_step else "pass", q.device, q.dtype, DK)
    DV = max(16, min(triton.next_power_of_2(Dv), config.state // DK, MAX_VALUES))
    if packed is not None:
        return Plan(config, DK, DV, packed.pieces.length, len(packed.table))
    segment_len = _segment_len(B * H * triton.cdiv(Dv, DV), T, config.steps, q.device)
    return Plan(config, DK, DV, segment_len, triton.cdiv(T, segment_len))


def _segment_len(programs: int, T: int, steps: int, device: torch.device) -> int:
    """All of T, or a multiple of `steps` such that the GPU has enough to do."""
    segments = min(PROGRAMS * backends.multiprocessors(device) // programs, T // MIN_SEGMENT)
    return T if segments < 2 else triton.cdiv(triton.cdiv(T, segments), steps) * steps


def _packed(starts: Tensor | None, q: Tensor) -> Packed | None:
    if starts is None:
        return None
    _, T, H, _ = q.shape
    pieces = Documents(starts, T).pieces(_segment_len(H, T, STEPS, q.device))
    return Packed(pieces, pieces.table())


def _empty(k: Tensor, v: Tensor, *shape: int, keys: bool, values: bool, packed: Packed | None = None) -> State:
    make = partial(k.new_empty, dtype=torch.float32)
    (B, _, H, Dk), Dv = k.shape, v.shape[-1]
    shape = ((B if packed is None else packed.pieces.documents.N) * H, *shape)
    return State(make(*shape, Dk, Dv), make(*shape, Dk) if keys else None, make(*shape, Dv) if values else None)


def _run(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    *,
    lengths: Tensor | None,
    packed: Packed | None,
    g: Tensor | None = None,  # [H] or [B, T, H]
    q_more: Tensor | None = None,  # [B, T, H]
    k_more: Tensor | None = None,
    inverse: Tensor | None = None,  # [B, T, H], to be filled
    start: State | None = None,
    want_end: bool = False,
    causal: bool = True,
    late: bool = False,
    down: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, State | None]:
    """One pass of the kernel: [B, T, H, Dv] in `dtype`, q's by default, and the state behind the last step."""
    plan = _plan(q, v, g, packed)
    keys, values = inverse is not None, q_more is not None or k_more is not None
    directions = {"late": late, "down": down, "more": values}
    end = _empty(k, v, keys=keys, values=values, packed=packed) if want_end else None
    if packed is not None and end is not None:  # where a document has no step, no program comes by
        for last, first in zip(end, start or State(None), strict=True):
            if last is not None:
                last.copy_(torch.zeros_like(last) if first is None else first)
    if causal and plan.segments > 1 and (packed is None or plan.segment_len < q.shape[1]):
        added, through = _added(k, v, g, k_more, lengths, packed, keys=keys, **directions)
        start = carry(start, added, through, packed)
    elif causal and packed is not None and start is not None:
        start = State(*(None if x is None else _by_piece(x, packed.pieces) for x in start))
    o = q.new_empty(*v.shape, dtype=dtype or q.dtype)
    arrays = (q, k, v, g, q_more, k_more, o, inverse)
    _launch(plan, arrays, start, end, None, lengths, packed, causal=causal, **directions)
    return o, end


def _by_piece(x: Tensor, pieces: Pieces) -> Tensor:
    """[N·H, ...] -> [H·P, ...]."""
    return pieces.of_documents(x.unflatten(0, (pieces.documents.N, -1))).transpose(0, 1).flatten(0, 1)


def _reduce(
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None,
    packed: Packed | None,
    keys: bool = False,
    more: Tensor | None = None,
) -> State:
    """The state that all steps make together."""
    added, _ = _added(k, v, None, more, lengths, packed, keys=keys, more=more is not None, all_wanted=True)
    if packed is None:
        return State(*(None if x is None else x.sum(1) for x in added))
    totals = _empty(k, v, keys=keys, values=more is not None, packed=packed)
    for add, total in zip(added, totals, strict=True):
        if add is not None:
            _carry(None, add, None, None, total, packed)
    return totals


def _added(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    k_more: Tensor | None,
    lengths: Tensor | None,
    packed: Packed | None,
    *,
    keys: bool,
    more: bool,
    late: bool = False,
    down: bool = False,
    all_wanted: bool = False,  # what the last segment of a document adds, too
) -> tuple[State, Tensor | None]:
    """What each segment adds to a state [B·H, segments, ...], and its sum of log decays [B·H, segments]."""
    plan = _plan(k, v, g, packed)
    added = _empty(k, v, plan.segments, keys=keys, values=more)
    through = None if g is None else k.new_empty(added.memory.shape[:2], dtype=torch.float32)
    arrays = (k, k, v, g, None, k_more, None, None)
    causal = packed is None or not all_wanted
    _launch(plan, arrays, None, added, through, lengths, packed, causal=causal, late=late, down=down, more=more)
    return added, through


def carry(start: State | None, added: State, through: Tensor | None, packed: Packed | None = None) -> State:
    """The states that segments start from, [B·H, segments, ...]."""
    before = State(*(None if x is None else torch.empty_like(x) for x in added))
    for first, add, out in zip(start or State(None), added, before, strict=True):
        if add is not None:
            _carry(first, add, through, out, None, packed)
    return before


def _carry(
    first: Tensor | None,
    added: Tensor,
    through: Tensor | None,
    before: Tensor | None,
    last: Tensor | None,
    packed: Packed | None,
) -> None:
    heads, segments = added.shape[:2]
    size = added[0, 0].numel()
    rows, firsts, H = heads, None, None
    if packed is not None:
        rows, firsts, H = packed.pieces.documents.N * heads, packed.pieces.before, heads
    programs = rows * triton.cdiv(size, CARRIED)
    launch(_carry_kernel, programs, first, added, through, before, last, firsts, size, segments, H, BLOCK=CARRIED)


def _launch(
    plan: Plan,
    arrays: tuple[Tensor | None, ...],  # q, k, v, g, q_more, k_more, o, inverse
    start: State | None,
    end: State | None,
    through: Tensor | None,
    lengths: Tensor | None,
    packed: Packed | None,
    *,
    causal: bool,
    late: bool,
    down: bool,
    more: bool,
) -> None:
    q, k, v, g, q_more, k_more, o, inverse = arrays
    assert q is not None
    assert v is not None
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    launch(
        _linear_kernel,
        B * H * plan.segments * triton.cdiv(Dv, plan.DV),
        *contiguous(q, k, v, g, q_more, k_more),
        o,
        inverse,
        *(start or State(None)),
        *(end or State(None)),
        through,
        *contiguous(lengths, None if packed is None else packed.table),
        T,
        H,
        Dk,
        Dv,
        plan.segment_len,
        plan.segments,
        CAUSAL=causal,
        PER_STEP=g is not None and g.dim() == 3,
        LATE=late,
        DOWN=down,
        MORE=more,
        PRECISION=PRECISIONS[q.dtype],
        STEPS=plan.config.steps,
        DK=plan.DK,
        DV=plan.DV,
        STAGES=plan.config.num_stages,
        num_warps=plan.config.num_warps,
    )
