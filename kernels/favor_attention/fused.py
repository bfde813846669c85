"""FAVOR attention in Triton, without features in memory.

With a and b the logarithms of the features of queries and keys, and of every feature m the largest b_jm as R_m, what a
query needs of the keys that it sees is a state, S_m = sum_j exp(b_jm - R_m) [v_j, 1]: then the query attends to M
features as to keys, with logits a_im + R_m and values S_m. Both halves are flash attention: a block of features goes
through the keys with a running maximum, a block of queries through the features. So do their gradients. With
P_i = [do_i, -o_i·do_i] and p_im = exp(a_im + R_m) / the denominator,

    da_im = p_im (P_i·S_m)        dS_m = sum_i p_im P_i        db_jm = exp(b_jm - R_m) (dS_m·[v_j, 1])

Causal, time is cut into segments of `SEGMENT` steps. The state before each is carried from segment to segment, and the
gradient of the state behind each back again, both rescaled by the rise of R. Pairs inside a segment are added: block by
block, the sum over m of exp(a_im + r_m) exp(b_jm - r_m), where r_m is the largest b_jm of the block of keys and so lies
between b_jm and R_im. Where queries stand among the keys of the block it may exceed R_im, but by no more than b rises
behind the first key. `GROUP` steps where that is more than `SAFE_RISE` are left out, and a second launch of the same
kernels takes exp(a_im + b_jm) there pair by pair. Keys must be several times as long as an estimate can bear for that.

Nothing is added to from two programs: the same bits in every run. Products are in bfloat16 for bfloat16, otherwise in
float32 on the matrix unit: three TF32 products for float32, one for float16, whose range sums would leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous, pad_channels
from ..derivatives import differentiable, pullback
from ..documents import Documents, Pieces, count_of, documents_from, starts_of
from ..launching import cut_time, launch
from .backward import _feature_kernel, _key_kernel, _query_kernel, _value_kernel
from .chunked import favor_attention_chunked
from .forward import _carry_kernel, _output_kernel, _sums_kernel
from .state import FavorState

SEGMENT = 256  # steps, causal: a state for each is a small part of its features
_segment_len = partial(cut_time, least=512, wanted=2)  # where time is cut only to give the GPU enough to do
CARRIED = 1024  # numbers of a state that one program carries from segment to segment
GROUP = 64  # steps that are taken in the same way; blocks of steps divide it, and it divides `SEGMENT`
SAFE_RISE = 40.0  # exp(40) times the least normal number of single precision is still below rounding
PRECISIONS = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "bf16"}


class Config(NamedTuple):
    """Of `sums`, the state that keys make; of `output`; of `feature`, the gradient of the state that queries see; and
    of `query`, `key` and `value`, those of q, k and v."""

    rows: int  # features of a block that goes through time, or steps of one that goes through features
    columns: int
    partners: int  # steps that rows of steps make pairs with at a time
    num_warps: int
    num_stages: int


BLOCKS = Blocks("favor_attention", Path(__file__).with_name("blocks.csv"), Config)


class State(NamedTuple):
    """What is carried, relative to exp(R), or its gradient: float32."""

    sums: Tensor  # [B, H, (segments,) M, Dv]
    norm: Tensor  # [B, H, (segments,) M], the column of ones


class States(NamedTuple):
    seen: State  # what the queries of a segment see of the keys outside it, or of all keys
    before: Tensor  # [B, H, segments, M], R of what they see
    behind: Tensor  # [B, H, segments, M], R behind the keys of a segment, or of all keys
    fades: Tensor  # [B, H, segments, M], what is left of a state behind each segment
    last: State  # behind the last key
    top: Tensor  # [B, H, M], R there
    steep: Tensor | None  # [B, H, groups of steps], bool, causal


class Packed(NamedTuple):
    """Documents in one row: segments are theirs, and states that are not of segments have N rows in place of B."""

    pieces: Pieces
    table: Tensor  # [P, 4], of them

    def by_segment(self, x: Tensor) -> Tensor:
        """[N, H, ...] -> [1, H, P, ...]."""
        return self.pieces.of_documents(x).transpose(0, 1)[None].contiguous()


def favor_attention_fused(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    projection: Tensor,  # [H, M, D]
    causal: bool,
    initial_state: FavorState | None,
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
) -> tuple[Tensor, FavorState | None]:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    Dv = v.shape[-1]
    q, k, w, directions = (pad_channels(x.to(dtype)) for x in (q, k, v, projection))
    sums = norm = log_scale = None
    if initial_state is not None:
        sums = pad_channels(initial_state.sums[..., :-1].float())
        norm = initial_state.sums[..., -1].float()
        log_scale = initial_state.log_scale.detach().float()
    starts = starts_of(documents)
    o, _, sums, norm, log_scale = _favor_attention(q, k, w, directions, sums, norm, log_scale, lengths, starts, causal)
    o = o[..., :Dv].to(v.dtype)
    return o, FavorState(torch.cat([sums[..., :Dv], norm[..., None]], -1), log_scale.detach()) if causal else None


@torch.library.custom_op("seqzoo::favor_attention_fused", mutates_args=())
def _favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    sums: Tensor | None,
    norm: Tensor | None,
    log_scale: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o; the logarithm of the sums of weights [B, T, H]; the state behind the last key: sums, norm and log_scale."""
    q, k, v, projection, lengths = contiguous(q, k, v, projection, lengths)
    plan = _plan(q, v, projection, causal, _packed(starts, q))
    states = _states(plan, k, v, projection, sums, norm, log_scale, lengths)
    o, log_sum = v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    top = states.before.contiguous()
    arguments = (q, k, v, projection, *states.seen, top, o, log_sum, states.steep, lengths)
    _launch_both(_output_kernel, plan, plan.config("output"), arguments)
    return o, log_sum, *states.last, states.top


@torch.library.custom_op("seqzoo::favor_attention_fused_backward", mutates_args=())
def _favor_attention_backward(
    do: Tensor,
    d_last_sums: Tensor | None,
    d_last_norm: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    sums: Tensor | None,
    norm: Tensor | None,
    log_scale: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    last_sums: Tensor,
    last_norm: Tensor,
    last_log_scale: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and the initial state's sums and norm, empty where there is none.

    The states between segments are made again: kept, they would take as much room as q, k and v.
    """
    delta = (do.float() * o).sum(-1)
    q, k, v, projection, lengths, do = contiguous(q, k, v, projection, lengths, do)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    packed = _packed(starts, q)
    plan = _plan(q, v, projection, causal, packed)
    if causal:
        seen, before, behind, fades, *_, steep = _states(plan, k, v, projection, sums, norm, log_scale, lengths)
        before, behind = contiguous(before, behind)
    else:
        seen, steep = _for_all(State(last_sums, last_norm), packed), None
        before = behind = last_log_scale if packed is None else packed.by_segment(last_log_scale)
    around = (log_sum, delta)
    _launch_both(
        _query_kernel, plan, plan.config("query"), (q, k, v, do, projection, *seen, before, *around, dq, steep, lengths)
    )

    cut = _cut(plan, "feature")
    d_seen = _empty(v, projection, cut.segments)
    _launch(_feature_kernel, cut, cut.config("feature"), (q, do, projection, before, log_sum, delta, *d_seen, lengths))
    d_start = State(*(q.new_empty(0, dtype=torch.float32) for _ in range(2)))
    if causal:
        d_last = contiguous(d_last_sums, d_last_norm)
        d_behind, d_first = _carry(d_last, d_seen, None, fades, packed, keep=True, down=True)
        d_start = d_start if sums is None else d_first
    elif packed is None:
        d_behind = State(*(x.sum(2) for x in d_seen))
    else:
        _, d_all = _carry((None, None), d_seen, None, torch.ones_like(d_seen.norm), packed, keep=False)
        d_behind = _for_all(d_all, packed)
    _launch_both(
        _key_kernel, plan, plan.config("key"), (q, k, v, do, projection, behind, *d_behind, *around, dk, steep, lengths)
    )
    _launch_both(
        _value_kernel,
        plan,
        plan.config("value"),
        (q, k, do, projection, behind, d_behind.sums, log_sum, dv, steep, lengths),
    )
    return dq, dk, dv, d_start.sums, d_start.norm


@_favor_attention.register_fake
def _(q, k, v, projection, sums, norm, log_scale, lengths, starts, causal):
    (B, T, H, _), M, Dv = q.shape, projection.shape[1], v.shape[-1]
    rows = count_of(starts, B)
    shapes = (B, T, H), (rows, H, M, Dv), (rows, H, M), (rows, H, M)
    return v.new_empty(v.shape), *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


@_favor_attention_backward.register_fake
def _(do, d_last_sums, d_last_norm, q, k, v, projection, sums, norm, *_):
    d_state = [q.new_empty((0,) if x is None else x.shape, dtype=torch.float32) for x in (sums, norm)]
    return *(x.new_empty(x.shape) for x in (q, k, v)), *d_state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, do: Tensor | None, _: None, d_sums: Tensor | None, d_norm: Tensor | None, __: None
) -> tuple[Tensor | None, ...]:
    do = torch.zeros_like(ctx.saved_tensors[9]) if do is None else do
    *gradients, d_first_sums, d_first_norm = _written(do, d_sums, d_norm, *ctx.saved_tensors, ctx.causal)
    starts = ctx.needs_input_grad[4]
    return *gradients, None, d_first_sums if starts else None, d_first_norm if starts else None, *(None,) * 4


def _plain(*arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_favor_attention_backward`, for PyTorch to differentiate."""
    do, d_last_sums, d_last_norm, q, k, v, projection, sums, norm, log_scale, lengths, starts, *_, causal = arguments
    documents = documents_from(starts, q.shape[1])

    def form(
        q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        first = None
        if sums is not None and norm is not None and log_scale is not None:
            first = FavorState(torch.cat([sums, norm[..., None]], -1), log_scale)
        o, last = favor_attention_chunked(q, k, v, projection, causal, first, lengths, documents)
        return (o, None, None) if last is None else (o, last.sums[..., :-1], last.sums[..., -1])

    return pullback(form, (q, k, v, sums, norm), (do, d_last_sums, d_last_norm))


_favor_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_favor_attention_backward, _plain)


def _states(
    plan: Plan,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    sums: Tensor | None,  # [B, H, M, Dv]
    norm: Tensor | None,  # [B, H, M]
    log_scale: Tensor | None,  # [B, H, M]
    lengths: Tensor | None,
) -> States:
    causal, packed, plan = plan.meta["CAUSAL"], plan.packed, _cut(plan, "sums")
    added = _empty(v, projection, plan.segments)
    top = torch.empty_like(added.norm)
    (B, T, H, M, _, _), rows = plan.sizes, plan.config("sums").rows
    steep = k.new_zeros(B, H, triton.cdiv(M, rows), triton.cdiv(T, GROUP), dtype=torch.bool) if causal else None
    arguments = (k, v, projection, *added, top, steep, lengths)
    _launch(_sums_kernel, plan, plan.config("sums"), arguments, GROUP=GROUP, RISE=SAFE_RISE)
    if packed is None:
        start = torch.full_like(top[:, :, 0], -torch.inf) if log_scale is None else log_scale
        tops = torch.cat([start[:, :, None], top], 2).cummax(2).values  # [B, H, segments + 1, M]
        before, behind, end = tops[:, :, :-1], tops[:, :, 1:], tops[:, :, -1]
    else:
        start = top.new_full((packed.pieces.documents.N, H, M), -torch.inf) if log_scale is None else log_scale
        before, behind = packed.pieces.running_max(top[0].transpose(0, 1), start)  # [P, H, M]
        end = packed.pieces.last(behind, start)
        before, behind = (x.transpose(0, 1)[None].contiguous() for x in (before, behind))
    gains, fades = ((x - _or_zero(behind)).exp() for x in (top, before))
    seen, last = _carry(contiguous(sums, norm), added, gains, fades, packed, keep=causal)
    if not causal:
        seen = _for_all(last, packed)
        before = behind = end[:, :, None] if packed is None else packed.by_segment(end)
    end = end.clone(memory_format=torch.contiguous_format)
    return States(seen, before, behind, fades, last, end, None if steep is None else steep.any(2))


def _for_all(state: State, packed: Packed | None) -> State:
    """As every segment sees a state that all keys make."""
    return state if packed is None else State(*map(packed.by_segment, state))


def _or_zero(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0)


def _carry(
    first: Sequence[Tensor | None],
    added: State,
    gains: Tensor | None,
    fades: Tensor,
    packed: Packed | None,
    *,
    keep: bool,
    down: bool = False,
) -> tuple[State, State]:
    """What each segment starts from, if it is to be kept, and what the last one ends with."""
    kept: list[Any] = [torch.empty_like(x) if keep else None for x in added]
    B, H, segments, M = fades.shape
    rows, firsts, heads = B, None, None
    if packed is not None:
        rows, firsts, heads = packed.pieces.documents.N, packed.pieces.before, H
    last = [x.new_empty(rows, H, *x.shape[3:]) for x in added]
    for start, add, carried, end in zip(first, added, kept, last, strict=True):
        width = add.shape[4] if add.dim() == 5 else 1
        launch(
            _carry_kernel,
            rows * H * triton.cdiv(M * width, CARRIED),
            *(start, add, gains, fades, carried, end, firsts, M, width, segments, heads),
            DOWN=down,
            BLOCK=CARRIED,
            num_warps=4,
        )
    return State(*kept), State(*last)


def _empty(v: Tensor, projection: Tensor, segments: int) -> State:
    (B, _, H, Dv), M = v.shape, projection.shape[1]
    make = partial(v.new_empty, dtype=torch.float32)
    return State(make(B, H, segments, M, Dv), make(B, H, segments, M))


class Plan(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, ...]  # B, T, H, M, D, Dv
    segment_len: int
    segments: int
    packed: Packed | None
    meta: dict[str, Any]

    def config(self, kernel: str) -> Config:
        return BLOCKS.of(kernel, self.device, self.dtype, max(self.meta["DK"], self.meta["DV"]))


def _packed(starts: Tensor | None, q: Tensor) -> Packed | None:
    if starts is None:
        return None
    pieces = Documents(starts, q.shape[1]).pieces(SEGMENT)
    return Packed(pieces, pieces.table())


def _plan(q: Tensor, v: Tensor, projection: Tensor, causal: bool, packed: Packed | None) -> Plan:
    (B, T, H, D), M, Dv = q.shape, projection.shape[1], v.shape[-1]
    DK, DV = (max(16, triton.next_power_of_2(width)) for width in (D, Dv))
    segment_len = SEGMENT if causal else T
    if packed is not None:  # a piece counts for as many steps
        segment_len, T = SEGMENT, SEGMENT * len(packed.table)
    meta = {"CAUSAL": causal, "PRECISION": PRECISIONS[q.dtype], "DK": DK, "DV": DV}
    return Plan(q.device, q.dtype, (B, T, H, M, D, Dv), segment_len, triton.cdiv(T, segment_len), packed, meta)


def _cut(plan: Plan, kernel: str) -> Plan:
    """With time in segments where blocks of features are too few for the GPU, unless it is in some already."""
    if plan.meta["CAUSAL"] or plan.packed is not None:
        return plan
    (B, T, H, M, _, _), config = plan.sizes, plan.config(kernel)
    programs = B * H * triton.cdiv(M, config.rows)
    length = _segment_len(programs, T, config.columns, plan.device)
    return plan._replace(segment_len=length, segments=triton.cdiv(T, length))


def _launch(kernel: Any, plan: Plan, config: Config, arguments: tuple[Any, ...], **meta: Any) -> None:
    B, T, H, M, _, _ = plan.sizes
    through_time = kernel in (_sums_kernel, _feature_kernel)
    blocks = plan.segments * triton.cdiv(M, config.rows) if through_time else triton.cdiv(T, config.rows)
    launch(
        kernel,
        B * H * blocks,
        *arguments,
        None if plan.packed is None else plan.packed.table,
        *plan.sizes[1:],
        plan.segment_len,
        plan.segments,
        **plan.meta,
        **meta,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def _launch_both(kernel: Any, plan: Plan, config: Config, arguments: tuple[Any, ...]) -> None:
    """Where keys are not steep, and where they are."""
    for careful in (False, True) if plan.meta["CAUSAL"] else (False,):
        _launch(kernel, plan, config, arguments, CAREFUL=careful, PARTNERS=config.partners, GROUP=GROUP)
