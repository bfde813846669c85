"""Passes over time of linear attention in Triton.

One kernel does all passes without a decay, or with one per head. A program has one head of one sequence and a block of
value channels; it goes through the sequence chunk by chunk, takes pairs inside a chunk one by one and all earlier ones
from a state [Dk, Dv] that it keeps in registers. Every input is read once, every output written once. Where heads times
sequences do not fill the GPU, time is cut into segments: a first pass finds the state that each adds, a short one
carries the states on, and then all segments run at once. Another kernel does the same with a decay per channel.

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

from ..blocks import Blocks
from ..common import contiguous
from ..documents import Documents, Pieces
from ..launching import cut_time, launch
from .channel_recurrence import _channel_kernel
from .recurrence import _carry_kernel, _linear_kernel

_segment_len = partial(cut_time, least=512, wanted=2)
MAX_VALUES = 128  # channels of v in a program
CARRIED, LEAST_CARRIED = 1024, 128  # numbers of a state that one program carries from segment to segment
STEPS = 64  # segments of documents are multiples of it, and it of all chunks


class Config(NamedTuple):
    """Of `pass`, of `decayed`, a pass with a decay for each step, and of `channels`, one for each channel too."""

    steps: int  # in a chunk
    state: int  # numbers of the state that a program keeps, at most
    num_warps: int
    num_stages: int  # chunks on their way at a time; with `channels` there is a loop in each, and 1


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


class Plan(NamedTuple):
    config: Config
    DK: int
    DV: int
    segment_len: int
    segments: int


def _plan(q: Tensor, v: Tensor, g: Tensor | None, packed: Packed | None) -> Plan:
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    DK = max(16, triton.next_power_of_2(Dk))
    config = BLOCKS.of(_kind(g), q.device, q.dtype, DK)
    DV = max(16, min(triton.next_power_of_2(Dv), config.state // DK, MAX_VALUES))
    if packed is not None:
        return Plan(config, DK, DV, packed.pieces.length, len(packed.table))
    segment_len = _segment_len(B * H * triton.cdiv(Dv, DV), T, config.steps, q.device)
    return Plan(config, DK, DV, segment_len, triton.cdiv(T, segment_len))


def _kind(g: Tensor | None) -> str:
    """Of a pass: the decay between all pairs wants as many registers as the pairs, one per channel another kernel."""
    return {3: "decayed", 4: "channels"}.get(0 if g is None else g.dim(), "pass")


def pack(starts: Tensor | None, q: Tensor) -> Packed | None:
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


def one_pass(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    *,
    lengths: Tensor | None,
    packed: Packed | None,
    g: Tensor | None = None,  # [H], [B, T, H], or [B, T, H, Dk or Dv]
    of_values: bool = False,  # whose channels g has
    q_more: Tensor | None = None,  # [B, T, H]
    k_more: Tensor | None = None,
    norms: Tensor | None = None,  # [B, T, H], to be filled
    start: State | None = None,
    want_end: bool = False,
    causal: bool = True,
    late: bool = False,
    down: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, State | None]:
    """One pass of the kernel: [B, T, H, Dv] in `dtype`, q's by default, and the state behind the last step."""
    plan = _plan(q, v, g, packed)
    keys, values = norms is not None, q_more is not None or k_more is not None
    directions = {"late": late, "down": down, "more": values, "of_values": of_values}
    end = _empty(k, v, keys=keys, values=values, packed=packed) if want_end else None
    if packed is not None and end is not None:  # where a document has no step, no program comes by
        for last, first in zip(end, start or State(None), strict=True):
            if last is not None:
                last.copy_(torch.zeros_like(last) if first is None else first)
    if causal and plan.segments > 1 and (packed is None or plan.segment_len < q.shape[1]):
        added, through = _added(k, v, g, k_more, lengths, packed, keys=keys, **directions)
        if through is None or through.dim() == 2:
            start = carry(start, added, through, packed)
        else:
            start = _carry_channels(start, added, through, packed, of_values)
    elif causal and packed is not None and start is not None:
        start = State(*(None if x is None else _by_piece(x, packed.pieces) for x in start))
    o = q.new_empty(*v.shape, dtype=dtype or q.dtype)
    arrays = (q, k, v, g, q_more, k_more, o, norms)
    _launch(plan, arrays, start, end, None, lengths, packed, causal=causal, **directions)
    return o, end


def _by_piece(x: Tensor, pieces: Pieces) -> Tensor:
    """[N·H, ...] -> [H·P, ...]."""
    return pieces.of_documents(x.unflatten(0, (pieces.documents.N, -1))).transpose(0, 1).flatten(0, 1)


def whole_state(
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
    of_values: bool = False,
    all_wanted: bool = False,  # what the last segment of a document adds, too
) -> tuple[State, Tensor | None]:
    """What each segment adds to a state [B·H, segments, ...], and its sums of log decays [B·H, segments, ...]."""
    plan = _plan(k, v, g, packed)
    added = _empty(k, v, plan.segments, keys=keys, values=more)
    through = None
    if g is not None:
        through = k.new_empty(*added.memory.shape[:2], *g.shape[3:], dtype=torch.float32)
    arrays = (k, k, v, g, None, k_more, None, None)
    causal = packed is None or not all_wanted
    directions = {"late": late, "down": down, "more": more, "of_values": of_values}
    _launch(plan, arrays, None, added, through, lengths, packed, causal=causal, **directions)
    return added, through


def carry(start: State | None, added: State, through: Tensor | None, packed: Packed | None = None) -> State:
    """The states that segments start from, [B·H, segments, ...]."""
    before = State(*(None if x is None else torch.empty_like(x) for x in added))
    for first, add, out in zip(start or State(None), added, before, strict=True):
        if add is not None:
            _carry(first, add, through, out, None, packed)
    return before


def _carry_channels(
    start: State | None, added: State, through: Tensor, packed: Packed | None, of_values: bool
) -> State:
    """As `carry`, with `through` [B·H, segments, channels]: every channel is one more head."""
    R, _, C = through.shape
    through = through.movedim(-1, 1).flatten(0, 1).contiguous()

    def carried(first: Tensor | None, add: Tensor, axis: int) -> Tensor:
        by_channel = add.movedim(axis, 1).flatten(0, 1).contiguous()  # [B·H·channels, segments, ...]
        first = None if first is None else first.movedim(axis, 1).flatten(0, 1).contiguous()
        before = torch.empty_like(by_channel)
        block = max(LEAST_CARRIED, min(triton.next_power_of_2(by_channel[0, 0].numel()), CARRIED))
        _carry(first, by_channel, through, before, None, packed, block)
        return before.unflatten(0, (R, C)).movedim(1, axis).contiguous()

    axes = (-1 if of_values else -2, -1, -1)
    pairs = zip(start or State(None), added, axes, strict=True)
    return State(*(None if add is None else carried(first, add, axis) for first, add, axis in pairs))


def _carry(
    first: Tensor | None,
    added: Tensor,
    through: Tensor | None,
    before: Tensor | None,
    last: Tensor | None,
    packed: Packed | None,
    block: int = CARRIED,
) -> None:
    heads, segments = added.shape[:2]
    size = added[0, 0].numel()
    rows, firsts, H = heads, None, None
    if packed is not None:
        rows, firsts, H = packed.pieces.documents.N * heads, packed.pieces.before, heads
    programs = rows * triton.cdiv(size, block)
    launch(_carry_kernel, programs, first, added, through, before, last, firsts, size, segments, H, BLOCK=block)


def _launch(
    plan: Plan,
    arrays: tuple[Tensor | None, ...],  # q, k, v, g, q_more, k_more, o, norms
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
    of_values: bool = False,
) -> None:
    q, k, v, g, q_more, k_more, o, norms = arrays
    assert q is not None
    assert v is not None
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    kernel: Any = _channel_kernel
    switches: dict[str, Any] = {"OF_VALUES": of_values}
    if _kind(g) != "channels":
        kernel = _linear_kernel
        switches = {"CAUSAL": causal, "PER_STEP": _kind(g) == "decayed", "STAGES": plan.config.num_stages}
    launch(
        kernel,
        B * H * plan.segments * triton.cdiv(Dv, plan.DV),
        *contiguous(q, k, v, g, q_more, k_more),
        o,
        norms,
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
        **switches,
        LATE=late,
        DOWN=down,
        MORE=more,
        PRECISION=PRECISIONS[q.dtype],
        STEPS=plan.config.steps,
        DK=plan.DK,
        DV=plan.DV,
        num_warps=plan.config.num_warps,
    )
