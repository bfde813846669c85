"""The delta rule in PyTorch: a triangular system inside chunks of time, a state carried between them.

With x the queries of a chunk, what reads (q) and what erases (r), and P their decayed products with its keys, the chunk
writes u = (I + P_r)^-1 (beta v - r S), and its outputs are q S + P_q u. This is linear attention from x to u, which
answers r too, and its gradient is that: of both answers it is y = (do, -dw), where dw = (I + P_r)^-T du.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import full_precision, in_cache, without_autocast
from ..documents import Documents, Pieces
from .decays import PerChannel, PerHead

CHUNK = 64  # steps, a power of two


class Chunks(NamedTuple):
    """Time in N chunks of C steps; of documents with states, every piece is one."""

    C: int
    N: int
    room: int  # N, or how many pieces there can be
    pieces: Pieces | None

    @classmethod
    def of(cls, T: int, starts: Tensor | None) -> Chunks:
        most, C = T if starts is None else -(-T // (len(starts) - 1)), CHUNK
        while 2 * most <= C:
            C //= 2
        if starts is None:
            return cls(C, -(-T // C), -(-T // C), None)
        pieces = Documents(starts, T).pieces(C)
        there = pieces.there()
        return cls(C, len(there.document), len(pieces.document), there)

    def slabs(self, v: Tensor, Dk: int) -> list[slice]:
        """A few chunks at a time."""
        (B, _, H, Dv), C = v.shape, self.C
        found = in_cache(self.N, B * H * (C * (3 * Dk + 2 * Dv + 2 * C) + Dk * Dv), v)
        return [slice(at.start, min(at.stop, self.N)) for at in found]

    def lay_out(self, x: Any) -> Any:
        return x if x is None or self.pieces is None else self.pieces.lay_out(x)

    def take_up(self, y: Tensor) -> Tensor:
        return y if self.pieces is None else self.pieces.take_up(y)

    def read(self, x: Tensor, at: slice, H: int, dtype: torch.dtype) -> Tensor:
        """The chunks `at` of [B, T, H or G, D] or [B, T, H], one behind the other: [M, C, D or 1], M = n B H."""
        x, steps = x if x.dim() == 4 else x[..., None], (at.stop - at.start) * self.C
        x = x[:, at.start * self.C : at.stop * self.C].to(dtype)
        if x.shape[1] < steps:
            x = F.pad(x, (0, 0, 0, 0, 0, steps - x.shape[1]))
        x = x.unflatten(1, (-1, self.C)).permute(1, 0, 3, 2, 4)  # [n, B, H or G, C, D]
        if x.shape[2] != H:
            x = x[:, :, :, None].expand(-1, -1, -1, H // x.shape[2], -1, -1)
        return x.flatten(0, -3)

    def write(self, into: Tensor, at: slice, H: int, y: Tensor) -> None:
        """To its place what `read` would read, the sum of heads that read the same."""
        into = into if into.dim() == 4 else into[..., None]
        B, _, G, D = into.shape
        y = y.view(at.stop - at.start, B, G, H // G if G else 1, self.C, D)
        y = (y[:, :, :, 0] if y.shape[3] == 1 else y.sum(3)).permute(1, 0, 3, 2, 4)  # [B, n, C, G, D]
        into = into[:, at.start * self.C : at.stop * self.C]
        if into.shape[1] == y.shape[1] * self.C:
            into.unflatten(1, (-1, self.C)).copy_(y)
        else:
            into.copy_(y.flatten(1, 2)[:, : into.shape[1]])


class _Slab(NamedTuple):
    """M chunks."""

    x: Tensor  # [M, 2C, Dk], of each step q and r
    k: Tensor  # [M, C, Dk]
    v: Tensor  # [M, C, Dv]
    beta: Tensor  # [M, C, 1]
    decays: PerHead | PerChannel
    pairs: Tensor  # [M, C, 2, C], of x and k
    x_through: Tensor  # [M, 2C, Dk], as they meet the state before the chunk
    k_after: Tensor  # [M, C, Dk], as they are left in the state behind it
    total: Tensor | None  # [M, 1 or Dk, 1], what is left of the one in the other; None: all

    @classmethod
    def of(
        cls,
        chunks: Chunks,
        at: slice,
        dtype: torch.dtype,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        erase: Tensor | None,
    ) -> _Slab:
        def read(x: Tensor) -> Tensor:
            return chunks.read(x, at, v.shape[2], dtype)

        k_, v_, beta_ = read(k), read(v), read(beta)
        x = torch.stack([read(q), beta_ * k_ if erase is None else read(erase)], 2).flatten(1, 2)
        if log_decay is None:
            without = PerHead.none(k_)
            return cls(x, k_, v_, beta_, without, without.pairs(x, k_), x, k_, None)
        decays: PerHead | PerChannel
        decays = PerHead.of(read(log_decay)) if log_decay.dim() == 3 else PerChannel.of(read(log_decay))
        x_through = (x.unflatten(1, (-1, 2)) * decays.through[:, :, None]).flatten(1, 2)
        total = decays.through[:, -1:].mT
        return cls(x, k_, v_, beta_, decays, decays.pairs(x, k_), x_through, k_ * decays.after, total)


@contextmanager
def _exactly(x: Tensor) -> Iterator[None]:
    """Whatever the caller, or that of a gradient, allows elsewhere."""
    with without_autocast(x.device), full_precision():
        yield


def _solved(pairs: Tensor, missing: Tensor, transposed: bool = False) -> Tensor:
    """(I + P_r)^-1, or its transpose, by what is missing [M, C, Dv]: by substitution, as powers of P would grow beyond
    all bounds where keys resemble each other."""
    triangle = pairs[:, :, 1].mT if transposed else pairs[:, :, 1]
    return torch.linalg.solve_triangular(triangle, missing, upper=transposed, unitriangular=True)


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    first: Tensor,
    starts: Tensor | None,  # int64 [N + 1], of documents that have states
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs [B, T, H, Dv], the last states, for PyTorch to differentiate; and for `gradients` the states before
    each chunk, [N B, H, Dk, Dv], and what is written, [B, T, H, Dv]."""
    (B, T, H, _), Dk, dtype = v.shape, k.shape[3], first.dtype
    chunks, R = Chunks.of(T, starts), B * H
    laid_out = [chunks.lay_out(x) for x in (q, k, v, beta, log_decay, erase)]
    begin, anew = _beginnings(first, chunks.pieces)
    S, before, behind, o, written = anew[0], [], [], [], []
    with _exactly(q):
        for at in chunks.slabs(v, Dk):
            slab = _Slab.of(chunks, at, dtype, *laid_out)
            w, rows = slab.beta * slab.v, []
            for i in range(at.start, at.stop):
                m = slice((i - at.start) * R, (i - at.start + 1) * R)
                S = S if begin is None else torch.where(begin[i], anew[i], S)
                before.append(S)
                answers = torch.bmm(slab.x_through[m], S)  # [R, 2C, Dv]
                u = _solved(slab.pairs[m], w[m] - answers[:, 1::2])
                rows.append(torch.stack([torch.baddbmm(answers[:, ::2], slab.pairs[m, :, 0], u), u]))
                S = torch.baddbmm(S if slab.total is None else S * slab.total[m], slab.k_after[m].mT, u)
                behind.append(S)
            steps = torch.stack(rows, 1).unflatten(2, (B, H)).permute(0, 2, 1, 4, 3, 5).flatten(2, 3)
            steps = steps[:, :, : laid_out[2].shape[1] - at.start * chunks.C]
            o.append(steps[0].to(v.dtype))
            written.append(steps[1])
        states = torch.stack(before).unflatten(1, (B, H)).flatten(0, 1)
        last = S.view(first.shape) if chunks.pieces is None else chunks.pieces.last(torch.stack(behind), first)
        states = F.pad(states, (0, 0, 0, 0, 0, 0, 0, chunks.room * B - len(states)))
        return chunks.take_up(torch.cat(o, 1)), last, states, chunks.take_up(torch.cat(written, 1))


def _beginnings(first: Tensor, pieces: Pieces | None) -> tuple[Tensor | None, Tensor]:
    """Which chunks begin a document, and with what state, [N, R, Dk, Dv]; without documents the first state alone."""
    return (None, first.flatten(0, 1)[None]) if pieces is None else (pieces.begin(), pieces.of_documents(first))


def gradients(
    do: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    first: Tensor,
    starts: Tensor | None,
    last: Tensor,
    states: Tensor,
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Those of q, k, v, beta, log_decay, erase and first; something empty in the place of what is not there."""
    (B, T, H, Dv), Dk, dtype = v.shape, k.shape[3], first.dtype
    chunks, R = Chunks.of(T, starts), B * H
    do, u, *laid_out = (chunks.lay_out(x) for x in (do, u, q, k, v, beta, log_decay, erase))
    made = [d_last.new_empty(0) if x is None else x.new_empty(x.shape) for x in laid_out]
    ending, anew = _endings(d_last, chunks.pieces)
    D, reached = anew[-1], []
    with _exactly(q):
        for at in reversed(chunks.slabs(v, Dk)):
            slab = _Slab.of(chunks, at, dtype, *laid_out)
            S, written = states[at.start * B : at.stop * B].flatten(0, 1), chunks.read(u, at, H, dtype)
            y = S.new_empty(len(S), 2 * chunks.C, Dv)
            y[:, ::2] = chunks.read(do, at, H, dtype)
            du, behind = torch.bmm(slab.pairs[:, :, 0].mT, y[:, ::2]), torch.empty_like(S)
            for i in reversed(range(at.start, at.stop)):
                m = slice((i - at.start) * R, (i - at.start + 1) * R)
                D = D if ending is None else torch.where(ending[i], anew[i], D)
                behind[m] = D
                dw = _solved(slab.pairs[m], torch.baddbmm(du[m], slab.k_after[m], D), transposed=True)
                torch.neg(dw, out=y[m, 1::2])
                D = torch.baddbmm(D if slab.total is None else D * slab.total[m], slab.x_through[m].mT, y[m])
                if ending is not None:
                    reached.append(D)
            for into, gradient in zip(made, _of_slab(slab, S, behind, written, y, erase is None), strict=True):
                if gradient is not None:
                    chunks.write(into, at, H, gradient)
        if chunks.pieces is None:
            d_first = D.view(first.shape)
        else:
            firsts = torch.stack(reached[::-1]).index_select(0, chunks.pieces.before[:-1].clamp(max=chunks.N - 1))
            empty = chunks.pieces.documents.lengths == 0
            d_first = torch.where(empty[:, None, None, None], d_last, firsts)
    dq, dk, dv, d_beta, dg, dr = (chunks.take_up(y) if y.dim() > 1 else y for y in made)
    return dq, dk, dv, d_beta, dg, dr, d_first


def _endings(d_last: Tensor, pieces: Pieces | None) -> tuple[Tensor | None, Tensor]:
    """As `_beginnings`: which chunks end a document, and what gradient of a state reaches them from there."""
    if pieces is None:
        return None, d_last.flatten(0, 1)[None]
    number = torch.arange(len(pieces.known), device=d_last.device)
    return pieces.before[1:][pieces.known] == number + 1, pieces.of_documents(d_last)


def _of_slab(
    slab: _Slab,
    S: Tensor,  # [M, Dk, Dv], the states before
    D: Tensor,  # [M, Dk, Dv], the gradients of those behind
    u: Tensor,  # [M, C, Dv]
    y: Tensor,  # [M, 2C, Dv]
    by_default: bool,  # r is beta k
) -> tuple[Tensor | None, ...]:
    """The gradients of what `outputs` takes at each step."""
    x, k, v, beta, decays, pairs = slab[:6]
    d_pairs = torch.bmm(y, u.mT).unflatten(1, (-1, 2))  # [M, C, 2, C]
    d_pairs[:, :, 1].diagonal(dim1=1, dim2=2).zero_()  # what a step erases was there before it
    dx, dk, inner = decays.pairs_gradient(d_pairs, pairs, x, k)
    dx, x = dx.unflatten(1, (-1, 2)), x.unflatten(1, (-1, 2))
    of_x, of_k, dg = torch.bmm(y, S.mT).view(dx.shape), torch.bmm(u, D.mT), None
    if inner is not None:
        of_x, of_k = of_x.mul_(decays.through[:, :, None]), of_k.mul_(decays.after)
        by_log = (of_x * x).sum(2), of_k * k, (D * S).sum(-1)[:, None] * decays.through[:, -1:]
        dg = decays.log_gradient(inner, *by_log)
    dx, dk = dx.add_(of_x), dk.add_(of_k)
    dr, dw = dx[:, :, 1], y[:, 1::2].neg()
    d_beta = (v * dw).sum(-1, keepdim=True)
    if by_default:
        dk.add_(beta * dr)
        d_beta.add_((k * dr).sum(-1, keepdim=True))
    return dx[:, :, 0], dk, beta * dw, d_beta, dg, None if by_default else dr
