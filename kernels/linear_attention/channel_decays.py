"""The gradient of decays per channel in Triton, where those of queries and keys are known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import contiguous
from ..documents import count_of
from ..launching import launch
from ..tiles import valid_steps

STEPS = 64
CHANNELS = 16  # in a program


def channel_decay_gradient(
    q: Tensor,  # [B, T, H, D]
    dq: Tensor,
    k: Tensor,
    dk: Tensor,
    g: Tensor,
    lengths: Tensor | None,  # [B]
    starts: Tensor | None,  # [N + 1], of documents
    of_last: Tensor | None,  # [B or N, H, D], the last state times its gradient
) -> Tensor:
    """As `decay_gradient`, [B, T, H, D]. 0 where everything is forgotten."""
    B, T, H, D = g.shape
    rows = count_of(starts, B) * H
    dg = torch.empty_like(g, memory_format=torch.contiguous_format)
    inputs = contiguous(q, dq, k, dk, g, of_last, lengths, starts)
    programs = rows * triton.cdiv(D, CHANNELS)
    launch(_decay_kernel, programs, *inputs, dg, T, H, D, STEPS=STEPS, CHANNELS=CHANNELS)
    return dg


@triton.jit
def _double(x, mask):
    return tl.load(x, mask=mask, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit(do_not_specialize=["T"])
def _decay_kernel(q, dq, k, dk, g, of_last, lengths, starts, dg, T, H, D, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """From the last step to the first. In double precision, as terms cancel that no later step or state reads."""
    blocks = tl.cdiv(D, CHANNELS)
    item = tl.program_id(0) // blocks
    b, h = (item // H).to(tl.int64), item % H
    i, c = tl.arange(0, STEPS), tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    if starts is None:
        origin, n, end = b * T, valid_steps(lengths, b, T), T
    else:
        origin = tl.load(starts + b)
        n = (tl.load(starts + b + 1) - origin).to(tl.int32)
        end = n
    behind = tl.zeros([CHANNELS], tl.float64)
    if of_last is not None:
        behind += tl.load(of_last + item.to(tl.int64) * D + c, mask=c < D, other=0.0)
    chunks = tl.cdiv(end, STEPS)
    for chunk in range(chunks):
        step = (chunks - 1 - chunk) * STEPS + i
        at = ((origin + step) * H + h)[:, None] * D + c[None, :]
        there = (step < n)[:, None] & (c < D)[None, :]
        change = _double(q + at, there) * _double(dq + at, there) - _double(k + at, there) * _double(dk + at, there)
        found = tl.cumsum(change, 0, reverse=True) + behind[None, :]
        lasting = there & (tl.exp(tl.load(g + at, mask=there, other=0.0)) != 0)
        tl.store(dg + at, tl.where(lasting, found, 0.0).to(tl.float32), mask=(step < end)[:, None] & (c < D)[None, :])
        behind += tl.sum(change, 0)
