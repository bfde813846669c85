"""Causal linear attention without a decay, of documents in one row of chunks that do not mind where documents begin.

Pairs of a chunk are made as everywhere, and those of two documents taken away. Of the documents of a chunk only the
first can have come from an earlier one, and only the last goes on: a state is carried for that one, and read and added
to by its steps alone. What is not finite in one document may so reach those that share a chunk with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ..common import without_autocast
from ..derivatives import gradient, transformed
from .reference import divide_by_normalizer

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def causal_of_documents(
    q: Tensor,  # [H * N, C, Dk]
    k: Tensor,  # [H * N, C, Dk]
    v: Tensor,  # [H * N, C, Dv]
    of: Tensor,  # [N, C], the document of each step
    normalize: bool,
) -> Tensor:  # [H * N, C, Dv]
    return (_plain if transformed() else _Packed.apply)(of, normalize, q, k, v)


class _Masks(NamedTuple):
    """All bits or none: what is taken away is 0 whatever it was, infinite too."""

    pairs: Tensor  # [N, C, C], a query and a key of the same document that is not ahead
    reads: Tensor  # [N, C, 1], of the document that the chunk before ends with
    adds: Tensor  # [N, C, 1], of the document that the chunk ends with
    keeps: Tensor  # [N, 1, 1], both

    @classmethod
    def of(cls, of: Tensor, dtype: torch.dtype) -> _Masks:
        before = torch.cat([of.new_full((1,), -1), of[:-1, -1]])[:, None]
        pairs = (of[:, :, None] == of[:, None]).tril()
        masks = pairs, (of == before)[..., None], (of == of[:, -1:])[..., None], (before == of[:, -1:])[..., None]
        return cls(*(-mask.to(BITS[dtype]) for mask in masks))


def _masked_(x: Tensor, mask: Tensor) -> Tensor:
    """x [H * N, ...] where `mask` [N, ...] has bits, in place. On a CPU `masked_fill_` takes ten times as long."""
    x.view(mask.dtype).view(-1, *mask.shape[:1], *x.shape[1:]).bitwise_and_(mask)
    return x


class _Packed(torch.autograd.Function):
    """As `_WithoutDecay`, with the same gradient."""

    @staticmethod
    def forward(ctx: Any, of: Tensor, normalize: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks = _Masks.of(of, q.dtype)
        k_added = _masked_(k.clone(), masks.adds)
        memory = torch.bmm(k_added.mT, v)  # [G, Dk, Dv]
        _carry_(memory, masks.keeps)
        o = _masked_(torch.bmm(q, memory), masks.reads)
        weights = _masked_(torch.bmm(q, k.mT), masks.pairs)
        o.baddbmm_(weights, v)
        total = n = None
        if normalize:
            total = k_added.sum(1)[..., None]  # [G, Dk, 1]
            _carry_(total, masks.keeps)
            n = _masked_(torch.bmm(q, total), masks.reads).add_(weights.sum(-1, keepdim=True))
            n = torch.where(n == 0, torch.inf, n)
            o.div_(n)
        ctx.normalize = normalize
        ctx.save_for_backward(of, q, k, v, memory, total, o, n)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        of, *saved = ctx.saved_tensors
        form = partial(_plain_outputs, of, ctx.normalize)
        return None, None, *gradient(partial(_gradients, do, of, *saved), form, saved[:3], (do,))


def _gradients(
    do: Tensor,
    of: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    total: Tensor | None,
    o: Tensor,
    n: Tensor | None,
) -> tuple[Tensor, ...]:
    with without_autocast(do.device):  # whatever `backward` is called under
        masks = _Masks.of(of, q.dtype)
        p = do if n is None else do / n
        p_read = _masked_(p.clone(), masks.reads)
        d_memory = torch.bmm(q.mT, p_read)
        _carry_(d_memory, masks.keeps, reverse=True)
        dq, dk = torch.bmm(p_read, memory.mT), torch.bmm(v, d_memory.mT)
        dw = torch.bmm(p, v.mT)
        if n is not None:
            assert total is not None
            dn = (p * o).sum(-1, keepdim=True).neg_()  # [G, C, 1]
            dn_read = _masked_(dn.clone(), masks.reads)
            d_total = torch.bmm(q.mT, dn_read)
            _carry_(d_total, masks.keeps, reverse=True)
            dq.baddbmm_(dn_read, total.mT)
            dk.add_(d_total.mT)
            dw.add_(dn)
        _masked_(dk, masks.adds)
        _masked_(dw, masks.pairs)
        dq.baddbmm_(dw, k)
        dk.baddbmm_(dw.mT, q)
        dv = _masked_(torch.bmm(k, d_memory), masks.adds)
        dv.baddbmm_(_masked_(torch.bmm(q, k.mT), masks.pairs).mT, p)
        return dq, dk, dv


def _carry_(updates: Tensor, keeps: Tensor, reverse: bool = False) -> None:
    """Puts what reaches each chunk in the place of what the chunk adds, with `reverse` from behind: [H * N, ...]."""
    if torch.compiler.is_compiling():
        updates.copy_(_carried(updates, keeps, reverse))
    else:
        _carry_by_steps_(updates, keeps, reverse)


@custom_op("seqzoo::carry_in_documents", mutates_args=())
def _carried(updates: Tensor, keeps: Tensor, reverse: bool) -> Tensor:
    """What reaches each chunk. In graphs: a compiler would unroll the loop."""
    reached = updates.clone(memory_format=torch.contiguous_format)
    _carry_by_steps_(reached, keeps, reverse)
    return reached


@_carried.register_fake
def _(updates: Tensor, keeps: Tensor, reverse: bool) -> Tensor:
    return updates.new_empty(updates.shape)


def _carry_by_steps_(updates: Tensor, keeps: Tensor, reverse: bool) -> None:
    steps = list(zip(updates.view(-1, len(keeps), *updates.shape[1:]).unbind(1), keeps, strict=True))
    state = torch.zeros_like(steps[0][0])
    for update, keep in reversed(steps) if reverse else steps:
        kept = (state.view(keep.dtype) & keep).view(state.dtype)
        state, _ = kept.add_(update), update.copy_(state)


def _plain(of: Tensor, normalize: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`_Packed` for PyTorch to differentiate."""
    with without_autocast(q.device):
        N, masks = len(of), _Masks(*(mask != 0 for mask in _Masks.of(of, q.dtype)))
        q, k, v = (x.unflatten(0, (-1, N)) for x in (q, k, v))  # [H, N, C, D]
        if normalize:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        updates = torch.where(masks.adds, k, 0).mT @ v
        states, state = [], torch.zeros_like(updates[:, 0])
        for update, keep in zip(updates.unbind(1), masks.keeps, strict=True):
            states.append(state)
            state = update + torch.where(keep, state, 0)
        o = torch.where(masks.reads, q @ torch.stack(states, 1), 0) + torch.where(masks.pairs, q @ k.mT, 0) @ v
        return (divide_by_normalizer(o) if normalize else o).flatten(0, 1)


def _plain_outputs(of: Tensor, normalize: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (_plain(of, normalize, q, k, v),)
