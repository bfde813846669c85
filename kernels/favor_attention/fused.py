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

from .. import backends
from ..blocks import Blocks
from ..common import contiguous, pad_channels
from ..derivatives import differentiable, pullback
from ..documents import Documents
from ..launching import launch
from .backward import _feature_kernel, _key_kernel, _query_kernel, _value_kernel
from .chunked import favor_attention_chunked
from .forward import _carry_kernel, _output_kernel, _sums_kernel
from .state import FavorState

SEGMENT = 256  # steps, causal: a state for each is a small part of its features
MIN_SEGMENT = 512  # steps, where time is cut only to give the GPU enough to do
PROGRAMS = 2  # wanted for each multiprocessor, before time is cut
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
    tops: Tensor  # [B, H, segments + 1, M], R before each segment and behind the last
    last: State  # behind the last key
    steep: Tensor | None  # [B, H, groups of steps], bool, causal


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
    q, k, w, directions = (pad_channels(x.to(dtype)) for x in (q, k, v, projection.detach()))
    sums = norm = log_scale = None
    if initial_state is not None:
        sums = pad_channels(initial_state.sums[..., :-1].float())
        norm = initial_state.sums[..., -1].float()
        log_scale = initial_state.log_scale.detach().float()
    o, _, sums, norm, log_scale = _favor_attention(q, k, w, directions, sums, norm, log_scale, lengths, causal)
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
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o; the logarithm of the sums of weights [B, T, H]; the state behind the last key: sums, norm and log_scale."""
    q, k, v, projection, lengths = contiguous(q, k, v, projection, lengths)
    seen, tops, last, steep = _states(k, v, projection, sums, norm, log_scale, lengths, causal)
    o, log_sum = v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    plan = _plan(q, v, projection, causal)
    top = (tops[:, :, :-1] if causal else tops[:, :, -1:]).contiguous()
    _launch_both(
        _output_kernel, plan, plan.config("output"), (q, k, v, projection, *seen, top, o, log_sum, steep, lengths)
    )
    return o, log_sum, last.sums, last.norm, tops[:, :, -1].clone(memory_format=torch.contiguous_format)


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
    states = States(State(last_sums, last_norm), last_log_scale[:, :, None], State(last_sums, last_norm), None)
    if causal:
        states = _states(k, v, projection, sums, norm, log_scale, lengths, causal)
    seen, tops, _, steep = states
    before, behind = (tops[:, :, :-1].contiguous(), tops[:, :, 1:].contiguous()) if causal else (tops, tops)

    plan = _plan(q, v, projection, causal)
    around = (log_sum, delta)
    _launch_both(
        _query_kernel, plan, plan.config("query"), (q, k, v, do, projection, *seen, before, *around, dq, steep, lengths)
    )

    cut = plan if causal else _cut(plan, "feature")
    d_seen = _empty(v, projection, cut.segments)
    _launch(_feature_kernel, cut, cut.config("feature"), (q, do, projection, before, log_sum, delta, *d_seen, lengths))
    d_start = State(*(q.new_empty(0, dtype=torch.float32) for _ in range(2)))
    if causal:
        d_last = contiguous(d_last_sums, d_last_norm)
        d_behind, d_first = _carry(d_last, d_seen, None, _fades(tops), keep=True, down=True)
        d_start = d_start if sums is None else d_first
    else:
        d_behind = State(*(x.sum(2) for x in d_seen))
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
def _(q, k, v, projection, sums, norm, log_scale, lengths, causal):
    (B, T, H, _), M, Dv = q.shape, projection.shape[1], v.shape[-1]
    shapes = (B, T, H), (B, H, M, Dv), (B, H, M), (B, H, M)
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
    do = torch.zeros_like(ctx.saved_tensors[8]) if do is None else do
    *gradients, d_first_sums, d_first_norm = _written(do, d_sums, d_norm, *ctx.saved_tensors, ctx.causal)
    starts = ctx.needs_input_grad[4]
    return *gradients, None, d_first_sums if starts else None, d_first_norm if starts else None, *(None,) * 3


def _plain(*arguments: Any) -> tuple[Tensor | None, ...]:
    """As `_favor_attention_backward`, for PyTorch to differentiate."""
    do, d_last_sums, d_last_norm, q, k, v, projection, sums, norm, log_scale, lengths, *_, causal = arguments

    def form(
        q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        first = None
        if sums is not None and norm is not None and log_scale is not None:
            first = FavorState(torch.cat([sums, norm[..., None]], -1), log_scale)
        o, last = favor_attention_chunked(q, k, v, projection, causal, first, lengths, None)
        return (o, None, None) if last is None else (o, last.sums[..., :-1], last.sums[..., -1])

    return pullback(form, (q, k, v, sums, norm), (do, d_last_sums, d_last_norm))


_favor_attention.register_autograd(_gradient, setup_context=_setup_context)
_written = differentiable(_favor_attention_backward, _plain)


def _states(
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    sums: Tensor | None,  # [B, H, M, Dv]
    norm: Tensor | None,  # [B, H, M]
    log_scale: Tensor | None,  # [B, H, M]
    lengths: Tensor | None,
    causal: bool,
) -> States:
    plan = _plan(k, v, projection, causal)
    plan = plan if causal else _cut(plan, "sums")
    added = _empty(v, projection, plan.segments)
    top = torch.empty_like(added.norm)
    (B, T, H, M, _, _), rows = plan.sizes, plan.config("sums").rows
    steep = k.new_zeros(B, H, triton.cdiv(M, rows), triton.cdiv(T, GROUP), dtype=torch.bool) if causal else None
    arguments = (k, v, projection, *added, top, steep, lengths)
    _launch(_sums_kernel, plan, plan.config("sums"), arguments, GROUP=GROUP, RISE=SAFE_RISE)
    start = torch.full_like(top[:, :, 0], -torch.inf) if log_scale is None else log_scale
    tops = torch.cat([start[:, :, None], top], 2).cummax(2).values  # [B, H, segments + 1, M]
    gains = (top - _or_zero(tops[:, :, 1:])).exp()
    first = contiguous(sums, norm)
    before, last = _carry(first, added, gains, _fades(tops), keep=causal)
    return States(before if causal else last, tops, last, None if steep is None else steep.any(2))


def _fades(tops: Tensor) -> Tensor:
    """What is left of a state behind each segment, [B, H, segments, M]."""
    return (tops[:, :, :-1] - _or_zero(tops[:, :, 1:])).exp()


def _or_zero(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0)


def _carry(
    first: Sequence[Tensor | None], added: State, gains: Tensor | None, fades: Tensor, *, keep: bool, down: bool = False
) -> tuple[State, State]:
    """What each segment starts from, if it is to be kept, and what the last one ends with."""
    kept: list[Any] = [torch.empty_like(x) if keep else None for x in added]
    last = [torch.empty_like(x[:, :, 0]) for x in added]
    B, H, segments, M = fades.shape
    for start, add, carried, end in zip(first, added, kept, last, strict=True):
        width = add.shape[4] if add.dim() == 5 else 1
        launch(
            _carry_kernel,
            B * H * triton.cdiv(M * width, CARRIED),
            *(start, add, gains, fades, carried, end, M, width, segments),
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
    meta: dict[str, Any]

    def config(self, kernel: str) -> Config:
        return BLOCKS.of(kernel, self.device, self.dtype, max(self.meta["DK"], self.meta["DV"]))


def _plan(q: Tensor, v: Tensor, projection: Tensor, causal: bool) -> Plan:
    (B, T, H, D), M, Dv = q.shape, projection.shape[1], v.shape[-1]
    DK, DV = (max(16, triton.next_power_of_2(width)) for width in (D, Dv))
    segment_len = SEGMENT if causal else T
    meta = {"CAUSAL": causal, "PRECISION": PRECISIONS[q.dtype], "DK": DK, "DV": DV}
    return Plan(q.device, q.dtype, (B, T, H, M, D, Dv), segment_len, triton.cdiv(T, segment_len), meta)


def _cut(plan: Plan, kernel: str) -> Plan:
    """With time in segments where blocks of features are too few for the GPU."""
    (B, T, H, M, _, _), config = plan.sizes, plan.config(kernel)
    programs = B * H * triton.cdiv(M, config.rows)
    segments = min(PROGRAMS * backends.multiprocessors(plan.device) // programs, T // MIN_SEGMENT)
    if segments < 2:
        return plan
    segment_len = triton.cdiv(triton.cdiv(T, segments), config.columns) * config.columns
    return plan._replace(segment_len=segment_len, segments=triton.cdiv(T, segment_len))


def _launch(kernel: Any, plan: Plan, config: Config, arguments: tuple[Any, ...], **meta: Any) -> None:
    B, T, H, M, _, _ = plan.sizes
    through_time = kernel in (_sums_kernel, _feature_kernel)
    blocks = plan.segments * triton.cdiv(M, config.rows) if through_time else triton.cdiv(T, config.rows)
    launch(
        kernel,
        B * H * blocks,
        *arguments,
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
