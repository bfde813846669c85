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
import triton.language as tl
from torch import Tensor

from .. import backends
from ..blocks import Blocks
from ..common import contiguous, pad_channels
from ..derivatives import differentiable, pullback
from ..launching import launch
from ..tiles import dot, head_rows, load_tile, valid_steps
from .chunked import favor_attention_chunked
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


@triton.jit
def _finite(maximum):
    """A maximum over no key at all, -inf, as 0: what it is subtracted from is -inf itself."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _half_square(k_t):
    k_f = k_t.to(tl.float32)
    return tl.sum(k_f * k_f, 1) / 2


@triton.jit
def _length(lengths, b, T):
    return T if lengths is None else valid_steps(lengths, b, T)


@triton.jit
def _column(x, at, AXIS: tl.constexpr):
    """x without the axis, where it is `at`."""
    index = tl.arange(0, x.shape[AXIS])
    here = (index == at)[None, :] if AXIS == 1 else (index == at)[:, None]
    return tl.sum(tl.where(here, x, 0.0), AXIS)  # a maximum would lose NaN on a GPU


@triton.jit
def _left_out(steep, head, first, T, CAREFUL: tl.constexpr, GROUP: tl.constexpr):
    """Whether the steps from `first` on are for the other launch."""
    is_steep = tl.load(steep + head.to(tl.int64) * tl.cdiv(T, GROUP) + first // GROUP) != 0
    return is_steep != CAREFUL


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _sums_kernel(
    k,  # [B, T, H, D]
    v,  # [B, T, H, Dv]
    projection,  # [H, M, D]
    sums,  # [B, H, segments, M, Dv], float32
    norm,  # [B, H, segments, M], float32
    top,  # the same: the maxima
    steep,  # [B, H, blocks of features, groups of steps], bool, where b rises too far; or None
    lengths,  # [B] or None
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    RISE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state that the keys of a segment make, a block of features a program."""
    blocks = tl.cdiv(M, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    item = tl.program_id(0) // blocks
    segment, head = item % segments, item // segments
    b, h = (head // H).to(tl.int64), head % H
    n = _length(lengths, b, T)
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    inside = first + row < M
    w_t = load_tile(projection + (h * M + first) * D, row, D, channel, D, inside)
    S, z = tl.zeros([ROWS, DV], tl.float32), tl.zeros([ROWS], tl.float32)
    R = tl.full([ROWS], float("-inf"), tl.float32)
    since, rises = R, 0  # b of the group's first key, and whether it rose too far
    start = segment * segment_len
    for past in tl.range(start, min(start + segment_len, n), COLUMNS, num_stages=STAGES):
        seen = past + column < n
        k_t = load_tile(head_rows(k, b, past, T, h, H, D), column, H * D, channel, D, seen)
        v_t = load_tile(head_rows(v, b, past, T, h, H, Dv), column, H * Dv, value_channel, Dv, seen)
        scores = dot(w_t, tl.trans(k_t), PRECISION) - _half_square(k_t)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.max(scores, 1)
        if CAUSAL:
            begins = past % GROUP == 0
            since = tl.where(begins, _column(scores, 0, 1), since)
            rises = tl.where(begins, 0, rises) | tl.max((peak > since + RISE).to(tl.int32), 0)
            at = (head.to(tl.int64) * blocks + first // ROWS) * tl.cdiv(T, GROUP) + past // GROUP
            tl.store(steep + at, rises != 0)
        highest = tl.maximum(R, peak)
        level = _finite(highest)
        weights = tl.exp(scores - level[:, None])
        fading = tl.exp(R - level)
        z = z * fading + tl.sum(weights, 1)
        S = S * fading[:, None] + dot(weights, v_t, PRECISION)
        R = highest
    at = item.to(tl.int64) * M + first
    in_values = inside[:, None] & (value_channel < Dv)[None, :]
    tl.store(sums + at * Dv + row[:, None] * Dv + value_channel[None, :], S, mask=in_values)
    tl.store(norm + at + row, z, mask=inside)
    tl.store(top + at + row, R, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def _carry_kernel(
    first,  # [B·H, M, width], or None: zero
    added,  # [B·H, segments, M, width]
    gains,  # [B·H, segments, M], what is added times this, or None
    fades,  # [B·H, segments, M], what was there times this
    carried,  # [B·H, segments, M, width]: what each segment starts from, or None: not wanted
    last,  # [B·H, M, width]
    M,
    width,
    segments,
    DOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A state carried through the segments, with `DOWN` from the last to the first."""
    size = M * width
    blocks = tl.cdiv(size, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    feature, inside = at // width, at < size
    S = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        S = tl.load(first + head * size + at, mask=inside, other=0.0)
    for count in range(segments):
        item = head * segments + (segments - 1 - count if DOWN else count)
        if carried is not None:
            tl.store(carried + item * size + at, S, mask=inside)
        x = tl.load(added + item * size + at, mask=inside, other=0.0)
        if gains is not None:
            x *= tl.load(gains + item * M + feature, mask=inside, other=0.0)
        S = S * tl.load(fades + item * M + feature, mask=inside, other=0.0) + x
    tl.store(last + head * size + at, S, mask=inside)


@triton.jit
def _pairs(
    q_t, query, k_t, first, n, projection, M, D, channel, CAREFUL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTNERS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights of keys for queries, [ROWS, PARTNERS], times exp(-level), and the level [ROWS]."""
    index, column = tl.arange(0, PARTNERS), tl.arange(0, COLUMNS)
    half = _half_square(k_t)
    pairs = tl.zeros([ROWS, PARTNERS], tl.float32)
    level = tl.full([ROWS], float("-inf"), tl.float32)
    for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
        inside = start + column < M
        w_t = load_tile(projection + start * D, column, D, channel, D, inside)
        b = dot(w_t, tl.trans(k_t), PRECISION) - half[None, :]
        b = tl.where(inside[:, None] & (first + index < n)[None, :], b, float("-inf"))
        a = dot(q_t, tl.trans(w_t), PRECISION)
        if CAREFUL:
            for j in range(PARTNERS):
                x = tl.where((query >= first + j)[:, None], a + _column(b, j, 1)[None, :], float("-inf"))
                highest = tl.maximum(level, tl.max(x, 1))
                base = _finite(highest)
                weights = tl.sum(tl.exp(x - base[:, None]), 1)
                pairs = pairs * tl.exp(level - base)[:, None] + tl.where((index == j)[None, :], weights[:, None], 0.0)
                level = highest
        else:
            r = tl.max(b, 1)
            x = tl.where((query >= first)[:, None], a + r[None, :], float("-inf"))
            highest = tl.maximum(level, tl.max(x, 1))
            base = _finite(highest)
            pairs *= tl.exp(level - base)[:, None]
            pairs += dot(tl.exp(x - base[:, None]), tl.exp(b - _finite(r)[:, None]), PRECISION)
            level = highest
    return pairs, level


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _output_kernel(
    q,  # [B, T, H, D]
    k,
    v,
    projection,
    sums,  # [B, H, segments, M, Dv], float32: the state that each segment sees
    norm,  # [B, H, segments, M], float32
    top,  # the same
    o,  # [B, T, H, Dv]
    log_sum,  # [B, T, H], float32: the logarithm of the sum of weights, inf where there is none
    steep,  # [B, H, groups of steps], bool, causal, or None
    lengths,
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    CAREFUL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTNERS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(T, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks
    if CAUSAL:
        if _left_out(steep, head, first, T, CAREFUL, GROUP):
            return
    b, h = (head // H).to(tl.int64), head % H
    n = _length(lengths, b, T)
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    query, partner = first + row, tl.arange(0, PARTNERS)
    live = query < n
    directions = projection + h * M * D
    q_t = load_tile(head_rows(q, b, first, T, h, H, D), row, H * D, channel, D, live)
    out, total = tl.zeros([ROWS, DV], tl.float32), tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        S_t = load_tile(sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        z = tl.load(norm + state + start + column, mask=inside, other=0.0)
        R = tl.load(top + state + start + column, mask=inside, other=float("-inf"))
        scores = dot(q_t, tl.trans(w_t), PRECISION) + R[None, :]
        highest = tl.maximum(m, tl.max(scores, 1))
        level = _finite(highest)
        weights = tl.exp(scores - level[:, None])
        fading = tl.exp(m - level)
        total = total * fading + tl.sum(weights * z[None, :], 1)
        out = out * fading[:, None] + dot(weights, S_t, PRECISION)
        m = highest

    if CAUSAL:
        for past in tl.range(first // segment_len * segment_len, min(first + ROWS, n), PARTNERS, num_stages=1):
            k_t = load_tile(head_rows(k, b, past, T, h, H, D), partner, H * D, channel, D, past + partner < n)
            v_t = load_tile(head_rows(v, b, past, T, h, H, Dv), partner, H * Dv, value_channel, Dv, past + partner < n)
            pairs, height = _pairs(
                q_t, query, k_t, past, n, directions, M, D, channel,
                CAREFUL, ROWS, COLUMNS, PARTNERS, STAGES, PRECISION,
            )  # fmt: skip
            pairs = tl.where(query[:, None] >= past + partner[None, :], pairs, 0.0)
            highest = tl.maximum(m, height)
            level = _finite(highest)
            pairs *= tl.exp(height - level)[:, None]
            fading = tl.exp(m - level)
            total = total * fading + tl.sum(pairs, 1)
            out = out * fading[:, None] + dot(pairs, v_t, PRECISION)
            m = highest

    any_seen = live & (total > 0)
    out = tl.where(any_seen[:, None], out / tl.where(any_seen, total, 1.0)[:, None], 0.0)
    tl.store(
        head_rows(o, b, first, T, h, H, Dv) + row[:, None] * (H * Dv) + value_channel[None, :],
        out.to(o.dtype.element_ty),
        mask=(query < T)[:, None] & (value_channel < Dv)[None, :],
    )
    log = tl.where(any_seen, m + tl.log(tl.where(any_seen, total, 1.0)), float("inf"))
    tl.store(head_rows(log_sum, b, first, T, h, H, 1) + row * H, log, mask=query < T)


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _feature_kernel(
    q,
    do,  # [B, T, H, Dv]
    projection,
    top,
    log_sum,
    delta,  # [B, T, H], float32: o·do
    d_sums,  # [B, H, segments, M, Dv], float32
    d_norm,  # [B, H, segments, M], float32
    lengths,
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of the state that the queries of a segment see, a block of features a program."""
    blocks = tl.cdiv(M, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    item = tl.program_id(0) // blocks
    segment, head = item % segments, item // segments
    b, h = (head // H).to(tl.int64), head % H
    n = _length(lengths, b, T)
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    inside = first + row < M
    w_t = load_tile(projection + (h * M + first) * D, row, D, channel, D, inside)
    state = (item if CAUSAL else head).to(tl.int64) * M + first
    R = tl.load(top + state + row, mask=inside, other=float("-inf"))
    dS, dz = tl.zeros([ROWS, DV], tl.float32), tl.zeros([ROWS], tl.float32)
    start = segment * segment_len
    for past in tl.range(start, min(start + segment_len, n), COLUMNS, num_stages=STAGES):
        live = past + column < n
        q_t = load_tile(head_rows(q, b, past, T, h, H, D), column, H * D, channel, D, live)
        do_t = load_tile(head_rows(do, b, past, T, h, H, Dv), column, H * Dv, value_channel, Dv, live)
        log = tl.load(head_rows(log_sum, b, past, T, h, H, 1) + column * H, mask=live, other=float("inf"))
        delta_t = tl.load(head_rows(delta, b, past, T, h, H, 1) + column * H, mask=live, other=0.0)
        weights = tl.exp(dot(w_t, tl.trans(q_t), PRECISION) + R[:, None] - log[None, :])
        dz -= tl.sum(weights * delta_t[None, :], 1)
        dS += dot(weights, do_t, PRECISION)
    at = item.to(tl.int64) * M + first
    in_values = inside[:, None] & (value_channel < Dv)[None, :]
    tl.store(d_sums + at * Dv + row[:, None] * Dv + value_channel[None, :], dS, mask=in_values)
    tl.store(d_norm + at + row, dz, mask=inside)


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _query_kernel(
    q,
    k,
    v,
    do,
    projection,
    sums,
    norm,
    top,
    log_sum,
    delta,
    dq,
    steep,
    lengths,
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    CAREFUL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTNERS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of q, a block of queries a program."""
    blocks = tl.cdiv(T, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks
    if CAUSAL:
        if _left_out(steep, head, first, T, CAREFUL, GROUP):
            return
    b, h = (head // H).to(tl.int64), head % H
    n = _length(lengths, b, T)
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    query, partner = first + row, tl.arange(0, PARTNERS)
    live = query < n
    directions = projection + h * M * D
    q_t = load_tile(head_rows(q, b, first, T, h, H, D), row, H * D, channel, D, live)
    do_t = load_tile(head_rows(do, b, first, T, h, H, Dv), row, H * Dv, value_channel, Dv, live)
    log = tl.load(head_rows(log_sum, b, first, T, h, H, 1) + row * H, mask=live, other=float("inf"))
    delta_t = tl.load(head_rows(delta, b, first, T, h, H, 1) + row * H, mask=live, other=0.0)
    dq_t = tl.zeros([ROWS, DK], tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        S_t = load_tile(sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        z = tl.load(norm + state + start + column, mask=inside, other=0.0)
        R = tl.load(top + state + start + column, mask=inside, other=float("-inf"))
        weights = tl.exp(dot(q_t, tl.trans(w_t), PRECISION) + R[None, :] - log[:, None])
        da = weights * (dot(do_t, tl.trans(S_t), PRECISION) - delta_t[:, None] * z[None, :])
        dq_t += dot(da, w_t, PRECISION)

    if CAUSAL:
        for past in tl.range(first // segment_len * segment_len, min(first + ROWS, n), PARTNERS, num_stages=1):
            seen = past + partner < n
            k_t = load_tile(head_rows(k, b, past, T, h, H, D), partner, H * D, channel, D, seen)
            v_t = load_tile(head_rows(v, b, past, T, h, H, Dv), partner, H * Dv, value_channel, Dv, seen)
            half = _half_square(k_t)
            d_pairs = dot(do_t, tl.trans(v_t), PRECISION) - delta_t[:, None]
            d_pairs = tl.where(query[:, None] >= past + partner[None, :], d_pairs, 0.0)
            for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
                inside = start + column < M
                w_t = load_tile(directions + start * D, column, D, channel, D, inside)
                a = dot(q_t, tl.trans(w_t), PRECISION)
                bs = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
                bs = tl.where(seen[:, None] & inside[None, :], bs, float("-inf"))
                da = tl.zeros([ROWS, COLUMNS], tl.float32)
                if CAREFUL:
                    for j in range(PARTNERS):
                        x = tl.where((query >= past + j)[:, None], a + _column(bs, j, 0)[None, :], float("-inf"))
                        da += tl.exp(x - log[:, None]) * _column(d_pairs, j, 1)[:, None]
                else:
                    r = tl.max(bs, 0)
                    x = tl.where((query >= past)[:, None], a + r[None, :], float("-inf"))
                    da = tl.exp(x - log[:, None]) * dot(d_pairs, tl.exp(bs - _finite(r)[None, :]), PRECISION)
                dq_t += dot(da, w_t, PRECISION)

    tl.store(
        head_rows(dq, b, first, T, h, H, D) + row[:, None] * (H * D) + channel[None, :],
        dq_t.to(dq.dtype.element_ty),
        mask=(query < T)[:, None] & (channel < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _key_kernel(
    q,
    k,
    v,
    do,
    projection,
    top,  # [B, H, segments, M], float32: the maxima behind each segment
    d_sums,  # [B, H, segments, M, Dv], float32: the gradient of the state behind each segment
    d_norm,  # [B, H, segments, M], float32
    log_sum,
    delta,
    dk,
    steep,
    lengths,
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    CAREFUL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTNERS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of k, a block of keys a program. Pairs are made with keys as rows: nothing is transposed."""
    blocks = tl.cdiv(T, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks
    if CAUSAL:
        if _left_out(steep, head, first, T, CAREFUL, GROUP):
            return
    b, h = (head // H).to(tl.int64), head % H
    n = _length(lengths, b, T)
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    key, partner = first + row, tl.arange(0, PARTNERS)
    seen = key < n
    directions = projection + h * M * D
    k_t = load_tile(head_rows(k, b, first, T, h, H, D), row, H * D, channel, D, seen)
    v_t = load_tile(head_rows(v, b, first, T, h, H, Dv), row, H * Dv, value_channel, Dv, seen)
    half = _half_square(k_t)
    dk_t, db_sum = tl.zeros([ROWS, DK], tl.float32), tl.zeros([ROWS], tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        dS_t = load_tile(d_sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        dz = tl.load(d_norm + state + start + column, mask=inside, other=0.0)
        R = tl.load(top + state + start + column, mask=inside, other=0.0)
        bs = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
        weights = tl.exp(tl.where(seen[:, None] & inside[None, :], bs - _finite(R)[None, :], float("-inf")))
        db = weights * (dot(v_t, tl.trans(dS_t), PRECISION) + dz[None, :])
        dk_t += dot(db, w_t, PRECISION)
        db_sum += tl.sum(db, 1)

    if CAUSAL:
        end = min(first // segment_len * segment_len + segment_len, n)
        for ahead in tl.range(first, end, PARTNERS, num_stages=1):
            live = ahead + partner < end
            q_t = load_tile(head_rows(q, b, ahead, T, h, H, D), partner, H * D, channel, D, live)
            do_t = load_tile(head_rows(do, b, ahead, T, h, H, Dv), partner, H * Dv, value_channel, Dv, live)
            log = tl.load(head_rows(log_sum, b, ahead, T, h, H, 1) + partner * H, mask=live, other=float("inf"))
            delta_t = tl.load(head_rows(delta, b, ahead, T, h, H, 1) + partner * H, mask=live, other=0.0)
            visible = key[:, None] <= ahead + partner[None, :]
            d_pairs = tl.where(visible, dot(v_t, tl.trans(do_t), PRECISION) - delta_t[None, :], 0.0)
            for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
                inside = start + column < M
                w_t = load_tile(directions + start * D, column, D, channel, D, inside)
                bs = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
                bs = tl.where(seen[:, None] & inside[None, :], bs, float("-inf"))
                a = dot(q_t, tl.trans(w_t), PRECISION) - log[:, None]
                db = tl.zeros([ROWS, COLUMNS], tl.float32)
                if CAREFUL:
                    for i in range(PARTNERS):
                        x = tl.where((key <= ahead + i)[:, None], bs + _column(a, i, 0)[None, :], float("-inf"))
                        db += tl.exp(x) * _column(d_pairs, i, 1)[:, None]
                else:
                    r = tl.max(bs, 0)
                    weights = tl.exp(bs - _finite(r)[None, :])
                    db = weights * dot(d_pairs, tl.exp(a + r[None, :]), PRECISION)
                dk_t += dot(db, w_t, PRECISION)
                db_sum += tl.sum(db, 1)

    dk_t -= k_t.to(tl.float32) * db_sum[:, None]
    tl.store(
        head_rows(dk, b, first, T, h, H, D) + row[:, None] * (H * D) + channel[None, :],
        dk_t.to(dk.dtype.element_ty),
        mask=(key < T)[:, None] & (channel < D)[None, :],
    )


@triton.jit(do_not_specialize=["T", "segment_len", "segments"])
def _value_kernel(
    q,
    k,
    do,
    projection,
    top,  # [B, H, segments, M], float32: the maxima behind each segment
    d_sums,  # [B, H, segments, M, Dv], float32: the gradient of the state behind each segment
    log_sum,
    dv,
    steep,
    lengths,
    T,
    H,
    M,
    D,
    Dv,
    segment_len,
    segments,
    CAUSAL: tl.constexpr,
    CAREFUL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTNERS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of v, a block of keys a program."""
    blocks = tl.cdiv(T, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks
    if CAUSAL:
        if _left_out(steep, head, first, T, CAREFUL, GROUP):
            return
    b, h = (head // H).to(tl.int64), head % H
    n = _length(lengths, b, T)
    row, column, channel, value_channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DK), tl.arange(0, DV)
    key, partner = first + row, tl.arange(0, PARTNERS)
    seen = key < n
    directions = projection + h * M * D
    k_t = load_tile(head_rows(k, b, first, T, h, H, D), row, H * D, channel, D, seen)
    half = _half_square(k_t)
    dv_t = tl.zeros([ROWS, DV], tl.float32)

    state = (head.to(tl.int64) * segments + first // segment_len) * M
    for start in tl.range(0, tl.where(first < n, M, 0), COLUMNS, num_stages=STAGES):
        inside = start + column < M
        w_t = load_tile(directions + start * D, column, D, channel, D, inside)
        dS_t = load_tile(d_sums + (state + start) * Dv, column, Dv, value_channel, Dv, inside)
        R = tl.load(top + state + start + column, mask=inside, other=0.0)
        bs = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
        weights = tl.exp(tl.where(seen[:, None] & inside[None, :], bs - _finite(R)[None, :], float("-inf")))
        dv_t += dot(weights, dS_t, PRECISION)

    if CAUSAL:
        end = min(first // segment_len * segment_len + segment_len, n)
        for ahead in tl.range(first, end, PARTNERS, num_stages=1):
            live = ahead + partner < end
            q_t = load_tile(head_rows(q, b, ahead, T, h, H, D), partner, H * D, channel, D, live)
            do_t = load_tile(head_rows(do, b, ahead, T, h, H, Dv), partner, H * Dv, value_channel, Dv, live)
            log = tl.load(head_rows(log_sum, b, ahead, T, h, H, 1) + partner * H, mask=live, other=float("inf"))
            pairs = tl.zeros([ROWS, PARTNERS], tl.float32)
            for start in tl.range(0, M, COLUMNS, num_stages=STAGES, disable_licm=True):
                inside = start + column < M
                w_t = load_tile(directions + start * D, column, D, channel, D, inside)
                bs = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
                bs = tl.where(seen[:, None] & inside[None, :], bs, float("-inf"))
                a_t = dot(w_t, tl.trans(q_t), PRECISION) - log[None, :]
                if CAREFUL:
                    for i in range(PARTNERS):
                        x = tl.where((key <= ahead + i)[:, None], bs + _column(a_t, i, 1)[None, :], float("-inf"))
                        pairs += tl.where((partner == i)[None, :], tl.sum(tl.exp(x), 1)[:, None], 0.0)
                else:
                    r = tl.max(bs, 0)
                    pairs += dot(tl.exp(bs - _finite(r)[None, :]), tl.exp(a_t + r[:, None]), PRECISION)
            pairs = tl.where(key[:, None] <= ahead + partner[None, :], pairs, 0.0)
            dv_t += dot(pairs, do_t, PRECISION)

    tl.store(
        head_rows(dv, b, first, T, h, H, Dv) + row[:, None] * (H * Dv) + value_channel[None, :],
        dv_t.to(dv.dtype.element_ty),
        mask=(key < T)[:, None] & (value_channel < Dv)[None, :],
    )


def favor_attention_fused(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    projection: Tensor,  # [H, M, D]
    causal: bool,
    initial_state: FavorState | None,
    lengths: Tensor | None,  # [B]
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
    return o, log_sum, last.sums, last.norm, tops[:, :, -1].contiguous()


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


def _plain(
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
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """As `_favor_attention_backward`, for PyTorch to differentiate."""
    *_, causal = rest

    def form(
        q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        first = None
        if sums is not None and norm is not None and log_scale is not None:
            first = FavorState(torch.cat([sums, norm[..., None]], -1), log_scale)
        o, last = favor_attention_chunked(q, k, v, projection, causal, first, lengths)
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
