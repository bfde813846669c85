"""The operations of recurrent blocks over parts of the time; without a part, those of `seqzoo.kernels` themselves.

What a part adds to the memory is made apart from its outputs, in one product or one pass, so that the line of ranks
need not wait for these; see `parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..kernels.common import accumulation_dtype, without_autocast, zero_padding
from .parts import Part, carried


def linear_attention(
    part: Part | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    causal: bool,
    normalize: bool = False,
    turned: bool = False,
    lengths: Tensor | None = None,
    **states: Any,
) -> Any:
    """`seqzoo.kernels.linear_attention` over parts.

    Args:
        log_decay: [H] or, causal, [B, T, H].
        turned: the second half of the batch is sequences from their ends, see `Directions`.
        states: what a call without a part takes beside.
    """
    call = partial(kernels.linear_attention, q, k, log_decay=log_decay, causal=causal, lengths=lengths)
    if part is None:
        return call(v=v, normalize=normalize, **states)
    wide, T = accumulation_dtype(v.dtype), k.shape[1]
    k = zero_padding(k, lengths)

    def leaves(S: Tensor, rows: slice, *, turned: bool = False) -> Tensor:
        """The memory behind the part or, of a decay that is constant, ahead of it, for what comes from the other."""
        of_rows = None if lengths is None else lengths[rows]
        if log_decay is not None and log_decay.dim() == 3:
            way, whole = _decays(log_decay[rows], T, of_rows, wide)
            return whole * S + _Products.apply(k[rows], v[rows], way, normalize)
        way, whole = _decays(log_decay, T, of_rows, wide)
        keys = k[rows] if way is None else k[rows] * (way.flip(0) if turned else way)[..., None]
        return whole * S + _Products.apply(keys, v[rows], None, normalize)

    state = len(v), v.shape[2], k.shape[3], v.shape[3] + normalize
    if causal:
        memory = _passed(part, v, state, wide, leaves, turned=turned)
        return call(v=v, normalize=normalize, initial_state=memory)
    if log_decay is None:
        added = _Products.apply(k, v, None, normalize)
        earlier, later = (carried(part, v, state, wide, added.add, back=back) for back in (False, True))
        o = _Read.apply(q.new_zeros(*q.shape[:3], state[3], dtype=wide), q, None, earlier + added + later)
    else:
        everything = slice(None)
        earlier = carried(part, v, state, wide, lambda S: leaves(S, everything))
        later = carried(part, v, state, wide, lambda S: leaves(S, everything, turned=True), back=True)
        behind: Any
        once, (behind, _) = log_decay.to(wide).exp(), _decays(log_decay, T, None, wide)
        ways = torch.stack((behind.flip(0), behind)) * once
        if None in (part.neighbour(True), part.neighbour(False)):  # nothing comes from where sequences end
            ways, memory = ways[1:] if part.neighbour(True) is None else ways[:1], earlier + later
        else:
            memory = torch.cat((earlier, later), -1)
        values = F.pad(v, (0, 1), value=1.0) if normalize else v
        o = _Read.apply(call(v=values).to(wide), q, ways, memory)
    o = zero_padding(o, lengths)
    if normalize:
        o, n = o[..., :-1], o[..., -1:]
        o = o * torch.where(n == 0, 0.0, 1 / torch.where(n == 0, 1.0, n))
    return o.to(v.dtype)


def delta_rule(
    part: Part | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    turned: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """`seqzoo.kernels.delta_rule` over parts.

    A part multiplies the memory by a matrix [Dk, Dk], the product over its steps. It is what becomes of the identity,
    as Dk more columns of the state to which no value is written; what queries read there is by what they read the
    memory that reaches the part. Parts taken in their order would need none of it, and each would wait for all before.
    """
    if part is None:
        options |= {"initial_state": initial_state, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
        return kernels.delta_rule(q, k, v, beta, **options)
    (B, _, H, Dv), Dk, wide = v.shape, q.shape[-1], accumulation_dtype(v.dtype)
    first = F.pad(torch.eye(Dk, dtype=wide, device=v.device), (Dv, 0)).expand(B, H, -1, -1)
    o, last = kernels.delta_rule(q, k, F.pad(v, (0, Dk)), beta, initial_state=first, output_final_state=True, **options)
    o, queries = o.split((Dv, Dk), -1)
    added, product = last.split((Dv, Dk), -1)
    memory = _passed(part, v, (B, H, Dk, Dv), wide, lambda S, rows: product[rows] @ S + added[rows], turned=turned)
    return _Read.apply(o.to(wide), queries, None, memory).to(v.dtype)


def diagonal_scan(
    part: Part | None,
    x: Tensor,
    a: Tensor,
    *,
    factor: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: Any = False,
    **options: Any,
) -> Any:
    """`seqzoo.kernels.diagonal_scan` over parts, of coefficients that are constant in time: a [D]."""
    if part is None:
        return kernels.diagonal_scan(x, a, factor=factor, lengths=lengths, reverse=reverse, **options)
    if reverse == "both":
        return tuple(_Scan.apply(part, way, lengths, x, a, factor) for way in (False, True))
    return _Scan.apply(part, reverse, lengths, x, a, factor)


class _Scan(torch.autograd.Function):
    """Where others wait, it runs once more for the last state alone, and so does its reverse on the way back. Autograd
    would pass over memory more often: it would differentiate that run, too."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, reverse: bool, lengths: Tensor | None, x: Tensor, a: Tensor, factor: Tensor | None
    ) -> Tensor:
        ctx.part, ctx.reverse, ctx.lengths = part, reverse, lengths
        scan = partial(kernels.diagonal_scan, reverse=reverse, lengths=lengths, output_final_state=True)
        ctx.first = part.receive(x.new_empty(len(x), x.shape[2]), back=reverse)
        if part.neighbour(reverse) is not None:
            added = scan(x, a, factor=factor)[1]
            part.send(power(a, x.shape[1]) * ctx.first + added, back=reverse)
        with torch.enable_grad():
            ctx.given = [None if y is None else y.detach().requires_grad_() for y in (x, a, factor)]
            x, a, factor = ctx.given
            ctx.made = scan(x, a, factor=factor, initial_state=ctx.first)
        return ctx.made[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        part, back = ctx.part, not ctx.reverse
        behind = part.receive(ctx.first, back=back)
        if part.neighbour(back) is not None:
            a = ctx.given[1].detach().conj().resolve_conj()
            added = kernels.diagonal_scan(dh, a, reverse=back, lengths=ctx.lengths, output_final_state=True)[1]
            part.send(a * added + power(a, dh.shape[1]) * behind, back=back)
        wanted = [y for y in ctx.given if y is not None]
        found = iter(torch.autograd.grad(ctx.made, wanted, (dh, behind)))
        ctx.made = ()
        return None, None, None, *(None if y is None else next(found) for y in ctx.given)


def power(a: Tensor, n: int) -> Tensor:
    """a^n, by way of double precision: what rounds an angle once, single precision rounds n times as far."""
    return (a.to(torch.promote_types(a.dtype, torch.float64)) ** n).to(a.dtype)


def _passed(
    part: Part,
    source: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    leaves: Callable[..., Tensor],
    *,
    turned: bool,
) -> Tensor:
    """The memory, of `shape`, that reaches the part; `leaves` makes what leaves it of rows of the batch."""
    if not turned:
        return carried(part, source, shape, dtype, lambda S: leaves(S, slice(None)))
    half = shape[0] // 2
    ways = [(slice(half), False), (slice(half, None), True)]
    return torch.cat(
        [carried(part, source, (half, *shape[1:]), dtype, partial(leaves, rows=rows), back=back) for rows, back in ways]
    )


def _decays(log_decay: Tensor | None, T: int, lengths: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Any]:
    """From each step to the last of the part, [T, H] or [B, T, H], and over all of it, [H, 1, 1] or [B, H, 1, 1]."""
    if log_decay is None:
        return None, 1.0
    if log_decay.dim() == 1:
        g = log_decay.to(dtype)
        return (g * torch.arange(T - 1, -1, -1, device=g.device)[:, None]).exp(), (g * T).exp()[:, None, None]
    g = zero_padding(log_decay.to(dtype), lengths)
    later = F.pad(g[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    return later.exp(), g.sum(1).exp()[..., None, None]


# On a CPU, products of all heads at once would lay all of their rows out anew: these go by sequences.


class _Products(torch.autograd.Function):
    """Σ_t weights_t k_t v_tᵀ, and with `ones`, without weights, Σ_t k_t beside it.

    k [B, T, G, Dk], v [B, T, H, Dv], G dividing H, weights [B, T, H] or None: [B, H, Dk, Dv (+ 1)].
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, weights: Tensor | None, ones: bool) -> Tensor:
        wide, ctx.ones = accumulation_dtype(v.dtype), ones
        ctx.save_for_backward(k, v, weights)
        with without_autocast(k.device):
            k, v = k.to(wide), v.to(wide)
            v = v if weights is None else v * weights[..., None]
            G, H = k.shape[2], v.shape[2]
            S = torch.stack(
                [rows.permute(1, 2, 0) @ of.transpose(0, 1) for rows, of in zip(k, _grouped(v, G), strict=True)]
            )
            S = S.unflatten(-1, (H // G, -1)).transpose(2, 3).flatten(1, 2)
            return torch.cat([S, k.sum(1)[..., None]], -1) if ones else S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dS: Tensor) -> tuple[Tensor | None, ...]:
        k, v, weights = ctx.saved_tensors
        (B, T, G, Dk), (H, Dv) = k.shape, v.shape[2:]
        with without_autocast(k.device):
            weighted = v.to(dS.dtype) if weights is None else v.to(dS.dtype) * weights[..., None]
            of_groups = dS[..., :Dv].unflatten(1, (G, H // G)).transpose(2, 3).flatten(3)  # [B, G, Dk, R Dv]
            dk, dv = k.new_empty(B, T, G, Dk, dtype=dS.dtype), v.new_empty(B, T, G, H // G * Dv, dtype=dS.dtype)
            for b, of in enumerate(_grouped(weighted, G)):
                dk[b] = (of.transpose(0, 1) @ of_groups[b].mT).transpose(0, 1)
                dv[b] = (k[b].to(dS.dtype).transpose(0, 1) @ of_groups[b]).transpose(0, 1)
            dv = dv.view_as(v)
            if ctx.ones:
                dk += dS[:, None, ..., Dv]
            d_weights = None
            if weights is not None:
                d_weights, dv = (dv * v).sum(-1), dv * weights[..., None]
        return dk.to(k.dtype), dv.to(v.dtype), d_weights, None


class _Read(torch.autograd.Function):
    """o + Σ_m weights_m ∘ (memory_mᵀ q): o [B, T, H, Dv], q [B, T, H, Dk], memory [B, H, Dk, M Dv] and weights
    [M, T, H], which have no gradient; without them, M is 1."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor, weights: Tensor | None, memory: Tensor) -> Tensor:
        ctx.save_for_backward(q, weights, memory)
        y = torch.empty_like(o, memory_format=torch.contiguous_format)
        with without_autocast(o.device):
            for b, S in enumerate(memory):
                read = (q[b].to(S.dtype).transpose(0, 1) @ S).transpose(0, 1)  # [T, H, M Dv]
                if weights is None:
                    torch.add(o[b], read, out=y[b])
                    continue
                y[b] = o[b]
                for way, of in zip(weights, read.unflatten(-1, (len(weights), -1)).unbind(2), strict=True):
                    y[b].addcmul_(way[..., None], of)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, weights, memory = ctx.saved_tensors
        dq, d_memory = q.new_empty(q.shape), torch.empty_like(memory)
        with without_autocast(dy.device):
            for b, S in enumerate(memory):
                of = dy[b] if weights is None else torch.cat([dy[b] * way[..., None] for way in weights], -1)
                of = of.transpose(0, 1)
                dq[b] = (of @ S.mT).transpose(0, 1)
                torch.matmul(q[b].to(S.dtype).permute(1, 2, 0), of, out=d_memory[b])
        return dy, dq, None, d_memory


def _grouped(v: Tensor, G: int) -> Tensor:
    """[B, T, H, Dv] -> [B, T, G, H / G · Dv]."""
    return v.unflatten(2, (G, -1)).flatten(3)
