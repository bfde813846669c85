"""Bidirectional FAVOR attention in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import without_autocast
from ..derivatives import gradient, transformed
from ..documents import Pieces
from .features import exp_, finite, log_features, on_cache_lines, with_ones


def bidirectional(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, H, T, D]
    v: Tensor,  # [B, H, T, Dv]
    directions: Tensor,  # [H, D, M]
    hidden: Tensor | None,  # [B, 1, T, 1], keys that are padding
    narrow: torch.dtype,  # of features and their products; exponents are as the inputs
    pieces: Pieces | None = None,  # of documents, where rows are these: queries see the keys of all of their document
) -> Tensor:  # [B, H, T, Dv]
    if transformed():
        return _bidirectional(q, k, v, directions, hidden, pieces)
    return _Bidirectional.apply(q, k, v, directions, hidden, narrow, pieces)


class _Bidirectional(torch.autograd.Function):
    """Every query sees every key, so each feature has one mean of the values, and each query mixes those means.

    o_i = sum_m softmax_m(a_i + L) μ_m and μ_m = sum_j softmax_j(b_m) v_j, L_m = log sum_j exp(b_jm).
    Written out because features are the widest tensors there are: autograd would hold three times as many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        directions: Tensor,
        hidden: Tensor | None,
        narrow: torch.dtype,
        pieces: Pieces | None,
    ) -> Tensor:
        M, given = directions.shape[-1], directions
        directions = on_cache_lines(directions)
        b = log_features(k, directions, hidden)
        R = finite(_max(b.amax(2, keepdim=True), pieces))
        b = exp_(b.sub_(R))
        # The largest is exp(0), unless there is no key at all.
        count = _sum(b.sum(2, keepdim=True), pieces).clamp_(min=1)
        b = b.to(narrow)
        means = _sum(b.mT @ v.to(narrow), pieces).div_(count.mT)  # [B, H, M, Dv]
        L = R + count.log()  # [B, H, 1, M]
        L[..., M:] = -torch.inf
        a = (q @ directions).add_(L).softmax(-1).to(narrow)
        o = (a @ means).to(v.dtype)
        ctx.pieces = pieces
        ctx.save_for_backward(q, k, v, given, hidden, a, b, means, count, o)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, hidden, *kept = ctx.saved_tensors

        def written() -> tuple[Tensor | None, ...]:
            return _gradients(ctx.needs_input_grad[3], ctx.pieces, do, q, k, v, directions, *kept)

        def form(q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> tuple[Tensor]:
            return (_bidirectional(q, k, v, directions, hidden, ctx.pieces),)

        return *gradient(written, form, (q, k, v, directions), (do,)), None, None, None


def _gradients(
    learnt: bool,
    pieces: Pieces | None,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    a: Tensor,
    b: Tensor,
    means: Tensor,
    count: Tensor,
    o: Tensor,
) -> tuple[Tensor | None, ...]:
    with without_autocast(do.device):  # whatever `backward` is called under
        M, directions = directions.shape[-1], on_cache_lines(directions)
        dn = (do * o).sum(-1, keepdim=True).neg_()  # [B, H, T, 1]
        q_n, k_n, v_n, do, dn, directions = (x.to(a.dtype) for x in (q, k, v, do, dn, directions))
        d_means = _sum(a.mT @ do, pieces).div_(count.mT)  # [B, H, M, Dv]
        d_count = _sum(dn.mT @ a, pieces).div_(count)  # [B, H, 1, M]
        da = (do @ means.mT).add_(dn).mul_(a)
        dq = da @ directions.mT
        d_directions = q_n.mT @ da if learnt else None
        del da
        dv = b @ d_means
        db = (v_n @ d_means.mT).add_(d_count).mul_(b)
        dk = (db @ directions.mT).sub_(k * db.sum(-1, keepdim=True))
        if d_directions is not None:
            d_directions = (d_directions + k_n.mT @ db).sum(0, dtype=k.dtype)[..., :M]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_directions


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, hidden: Tensor | None, pieces: Pieces | None
) -> Tensor:
    """`_Bidirectional` for PyTorch to differentiate."""
    with without_autocast(q.device):
        b = k @ directions - k.square().sum(-1, keepdim=True) / 2
        b = b if hidden is None else b.masked_fill(hidden, -torch.inf)
        R = finite(_max(b.detach().amax(2, keepdim=True), pieces))
        sums = _sum((b - R).exp().mT @ with_ones(v), pieces)
        count = sums[..., -1:].clamp(min=1)
        a = (q @ directions + R + count.mT.log()).softmax(-1)
        return a @ (sums / count)[..., :-1]


def _sum(x: Tensor, pieces: Pieces | None) -> Tensor:
    return x if pieces is None else pieces.shared_sum(x)


def _max(x: Tensor, pieces: Pieces | None) -> Tensor:
    return x if pieces is None else pieces.shared_max(x)
