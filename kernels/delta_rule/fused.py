"""Launches of the delta rule's Triton kernels.

Time is cut into chunks. What all states have in common is made of all chunks at once: decayed pairs of queries and
keys, and the inverse of a chunk's triangular system, by substitution. Then a program with a head of a sequence and a
block of value channels goes through the sequence, with a state in registers, and leaves nothing behind but outputs
and, for the way back, the states before each chunk. That way is the same from the end: pairs anew, a pass with the
gradient of the state in registers, and all other gradients of all chunks at once.

The triangular system is made in float32 with full precision, and states are summed in it. Other products are in
bfloat16 for bfloat16, and with that inverse in three of it, which keep 16 bits; otherwise in float32 on the matrix
unit, in three TF32 products for float32, and one for float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous
from ..documents import Documents
from ..launching import launch
from ..measured import width_class
from .backward import _backward_kernel, _inner_kernel, _outer_kernel
from .forward import _forward_kernel, _pairs_kernel


class Config(NamedTuple):
    """`pairs` and `channel_pairs`, with a decay per channel, set the chunks of all kernels of a call."""

    size: int  # of these the steps in a chunk; of `outer` the channels of k, of others those of v at a time, at most
    num_warps: int
    num_stages: int  # blocks on their way at a time


BLOCKS = Blocks("delta_rule", Path(__file__).with_name("blocks.csv"), Config)
CHANNELS = 32  # of k in a product of `pairs`
VALUES = 32  # channels of v at a time, where `size` is of the channels of k
PRECISIONS = {  # of products, and of those with the inverse of a triangular system
    torch.float32: ("tf32x3", "tf32x3"), torch.float16: ("tf32", "tf32x3"), torch.bfloat16: ("bf16", "bf16x3"),
}  # fmt: skip


class Chunks(NamedTuple):
    """Of all heads: of R sequences in `slots` chunks of `steps`."""

    steps: int
    slots: int
    R: int
    lengths: Tensor | None  # [B]
    starts: Tensor | None  # [R + 1], of documents in one row
    before: Tensor | None  # [R + 1], the slots ahead of each document
    table: Tensor | None  # [slots, 4], of documents

    @classmethod
    def of(cls, v: Tensor, steps: int, lengths: Tensor | None, starts: Tensor | None) -> Chunks:
        B, T = v.shape[:2]
        if starts is None:
            return cls(steps, B * triton.cdiv(T, steps), B, contiguous(lengths)[0], None, None, None)
        pieces = Documents(starts, T).pieces(steps)
        of_documents = contiguous(starts, pieces.before, pieces.table())
        return cls(steps, len(pieces.document), len(starts) - 1, None, *of_documents)


class Prepared(NamedTuple):
    """What the states of a chunk have in common."""

    pairs: Tensor  # [slots, H, C, C], of queries and keys, as they are multiplied later on
    inverse: Tensor  # [slots, H, C, C], float32, of the triangular system
    total: Tensor | None  # [slots, H] or [slots, H, Dk], float32, what a chunk leaves of the state before
    through: Tensor | None  # [B, T, H], float32, what is left at a step of the state before its chunk
    after: Tensor | None  # what is left of a step behind its chunk
    decayed: tuple[Tensor, Tensor, Tensor] | None  # with a decay per channel instead of both, so decayed q, k and r


class Call(NamedTuple):
    """What all kernels of a call are told."""

    q: Tensor  # [B, T, G, Dk]
    k: Tensor  # [B, T, G, Dk]
    v: Tensor  # [B, T, H, Dv]
    beta: Tensor  # [B, T, H], float32
    g: Tensor | None  # [B, T, H] or [B, T, H, Dk], float32
    erase: Tensor | None  # [B, T, H, Dk]
    chunks: Chunks

    @classmethod
    def of(cls, *given: Tensor | None) -> Call:
        """Of q, k, v, beta, g, erase, lengths and where documents start."""
        q, k, v, beta, g, erase = contiguous(*given[:6])
        kernel = "channel_pairs" if g is not None and g.dim() == 4 else "pairs"
        steps = BLOCKS.of(kernel, q.device, q.dtype, width_class(q.shape[3])).size
        return cls(q, k, v, beta, g, erase, Chunks.of(v, steps, *given[6:]))

    @property
    def per_channel(self) -> bool:
        return self.g is not None and self.g.dim() == 4

    @property
    def outer(self) -> str:
        return "channel_outer" if self.per_channel else "outer"

    @property
    def blocks_of_channels(self) -> int:
        """Of how many programs `outer` makes the gradients of a chunk."""
        Dk = self.q.shape[3]
        return triton.cdiv(Dk, BLOCKS.of(self.outer, self.q.device, self.q.dtype, width_class(Dk)).size)

    @property
    def kept(self) -> torch.dtype:
        """Of what is multiplied later on."""
        return torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32

    def square(self, dtype: torch.dtype) -> Tensor:
        """Of each chunk and head, something of pairs."""
        C = self.chunks.steps
        return self.q.new_empty(self.chunks.slots, self.v.shape[2], C, C, dtype=dtype)

    def states(self) -> Tensor:
        """Of each chunk and head."""
        H, Dv = self.v.shape[2:]
        return self.q.new_empty(self.chunks.slots, H, self.q.shape[3], Dv, dtype=self.kept)

    def decayed(self, by: Prepared) -> Call:
        """With queries, keys and what erases as they meet states."""
        if by.decayed is None:
            return self
        q, k, erase = by.decayed
        return self._replace(q=q, k=k, erase=erase)

    def launch(self, kernel: Any, name: str, *tensors: Tensor | None) -> None:
        (T, G, Dk), (H, Dv), chunks = self.q.shape[1:], self.v.shape[2:], self.chunks
        config = BLOCKS.of(name, self.q.device, self.q.dtype, width_class(Dk))
        meta: dict[str, Any] = {"DK": width_class(Dk), "DV": min(width_class(Dv), config.size)}
        meta["STAGES"] = config.num_stages
        sizes: tuple[int, ...] = (T, H, G, Dk, Dv)
        places: tuple[Tensor | None, ...] = (chunks.table,)
        programs = chunks.slots * H
        precision, exact = PRECISIONS[self.q.dtype]
        if kernel in (_forward_kernel, _backward_kernel):
            programs, places = chunks.R * H * triton.cdiv(Dv, meta["DV"]), (chunks.starts, chunks.before)
        elif kernel is _outer_kernel:
            meta |= {"DK": min(width_class(Dk), config.size), "DV": min(width_class(Dv), VALUES)}
            programs *= triton.cdiv(Dk, meta["DK"])
        elif kernel is _pairs_kernel:
            sizes, exact = (T, H, G, Dk), "tf32x3"
            meta = {"DK": width_class(Dk), "CHANNELS": min(width_class(Dk), CHANNELS)}
        meta |= {"PER_CHANNEL": self.per_channel, "PRECISION": precision, "EXACT": exact, "STEPS": chunks.steps}
        launch(kernel, programs, *tensors, chunks.lengths, *places, *sizes, **meta, num_warps=config.num_warps)


def _prepared(call: Call) -> Prepared:
    (B, T, H), Dk = call.beta.shape, call.q.shape[3]
    pairs, inverse = call.square(call.kept), call.square(torch.float32)
    through, after, erasers, total = None, None, None, None
    if call.per_channel:
        through, after, erasers = (call.q.new_empty(B, T, H, Dk) for _ in range(3))
        total = call.beta.new_empty(call.chunks.slots, H, Dk)
    elif call.g is not None:
        through, after = torch.empty_like(call.beta), torch.empty_like(call.beta)
        total = call.beta.new_empty(call.chunks.slots, H)
    given, made = (call.q, call.k, call.beta, call.erase, call.g), (pairs, inverse, through, after, erasers, total)
    call.launch(_pairs_kernel, "channel_pairs" if call.per_channel else "pairs", *given, *made)
    if through is None or after is None or erasers is None:
        return Prepared(pairs, inverse, total, through, after, None)
    return Prepared(pairs, inverse, total, None, None, (through, after, erasers))


def outputs(call: Call, initial: Tensor | None, *, keep: bool, want_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, Dv]; the last states [R, H, Dk, Dv]; those before each chunk. Empty, what is not wanted."""
    (H, Dv), Dk = call.v.shape[2:], call.q.shape[3]
    o, last = torch.empty_like(call.v), call.beta.new_empty((call.chunks.R, H, Dk, Dv) if want_last else (0,))
    states = call.states() if keep else call.beta.new_empty(0)
    if call.chunks.starts is not None:
        states.zero_()  # behind the last document's, too
    made = (o, states if keep else None, last if want_last else None)
    by = _prepared(call)
    q, k, v, beta, _, erase, _ = call.decayed(by)
    decays = (by.through, by.after, by.total)
    given = (q, k, v, beta, erase, *decays, by.pairs, by.inverse, *contiguous(initial))
    call.decayed(by).launch(_forward_kernel, "forward", *given, *made)
    return o, last, states


class _Within(NamedTuple):
    """What the backward pass knows of each chunk, behind its way through the states."""

    d_states: Tensor  # [slots, H, Dk, Dv], of those behind each chunk
    dw: Tensor  # [B, T, H, Dv], float32, of what each step would write by itself
    u: Tensor  # [B, T, H, Dv], what it writes
    d_reading: Tensor  # [slots, H, C, C], of the pairs of queries and keys
    d_erasing: Tensor  # of what erases and keys


def _within(call: Call, do: Tensor, d_last: Tensor | None, states: Tensor, d_initial: Tensor | None) -> _Within:
    by = _prepared(call)
    q, k, v, beta, g, erase, _ = decayed = call.decayed(by)
    dw, d_states = beta.new_empty(v.shape), call.states()
    given: Any = (q, k, beta, erase, by.through, by.after, by.total, by.pairs, by.inverse, do, d_last)
    decayed.launch(_backward_kernel, "backward", *given, dw, d_states, d_initial)
    u, d_reading, d_erasing = torch.empty_like(v), by.pairs, torch.empty_like(by.pairs)
    of_head = None if call.per_channel else g
    given = (k, v, beta, erase, of_head, by.through, by.inverse, states, do, dw)
    decayed.launch(_inner_kernel, "inner", *given, u, d_reading, d_erasing)
    return _Within(d_states, dw, u, d_reading, d_erasing)


def gradients(
    call: Call, do: Tensor, d_last: Tensor | None, states: Tensor, *, of_initial: bool
) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, beta, g, erase and the initial states, None where there is none."""
    q, k, v, beta, g, erase, chunks = call
    (G, Dk), (B, T, H, Dv) = q.shape[2:], v.shape
    do, d_last = contiguous(do, d_last)
    d_initial = beta.new_empty(chunks.R, H, Dk, Dv) if of_initial else None
    within = _within(call, do, d_last, states, d_initial)

    dq, dk = (q.new_empty(B, T, H, Dk, dtype=q.dtype if G == H else call.kept) for _ in range(2))
    dv, dr = torch.empty_like(v), None if erase is None else torch.empty_like(erase)
    d_beta, dg = beta.new_empty(B, T, H, call.blocks_of_channels), None
    if g is not None:
        dg = torch.empty_like(g) if call.per_channel else torch.empty_like(d_beta)
    given = (q, k, v, beta, erase, g, states, within.d_states, do, *within[1:])
    call.launch(_outer_kernel, call.outer, *given, dq, dk, dv, d_beta, dr, dg)
    if G != H:
        dq, dk = (x.unflatten(2, (G, H // G)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
    if dg is not None and not call.per_channel:
        dg = dg.sum(-1)
    return dq, dk, dv, d_beta.sum(-1), dg, dr, d_initial
