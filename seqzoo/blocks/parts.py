"""Sequences whose steps are shared out among ranks: each has a part of the time, and states go from one to the next.

What a recurrence remembers is all that later steps need of earlier ones. So a rank computes what its own part adds to
the memory and by what the part multiplies it, S -> A S + b; receives S from the rank before; sends A S + b on; and
continues from S. Nothing else is sent, and what is sent does not grow with the length. Ranks wait for each other for
the time of that line alone, which is short: A and b are there before it begins. In backward the gradient of S goes the
same way back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..kernels.common import accumulation_dtype, zero_padding

_sending: deque[tuple[Any, Tensor]] = deque()  # what may not be received yet, and must stay where it is
MOST_SENDING = 64


@dataclass(frozen=True)
class Part:
    """A rank's part of the T steps of sequences, which lie on the ranks of a group one part behind the other.

    Parts are as long as each other, or one step longer. Every rank calls a block, or a model, on its own part at the
    same time, in forward and in backward, and gets the outputs of its own steps.

    Args:
        T: steps of all parts together.
        group: of torch.distributed; None: all ranks.

    Raises:
        ValueError: there are more ranks than steps.
    """

    T: int
    group: Any = None

    def __post_init__(self) -> None:
        if self.ranks > self.T:
            raise ValueError(f"Part: {self.T} steps for {self.ranks} ranks; valid: one and more for each")

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def start(self) -> int:
        """How many steps are ahead of this part."""
        return self.rank * self.T // self.ranks

    @property
    def stop(self) -> int:
        """How many are up to its end."""
        return (self.rank + 1) * self.T // self.ranks

    def own(self, x: Tensor) -> Tensor:
        """This part of x [B, T, ...]."""
        return x[:, self.start : self.stop]

    def lengths(self, lengths: Tensor | None) -> Tensor | None:
        """How many steps of this part count, where `lengths` [B] of all T do; None: all."""
        return None if lengths is None else (lengths - self.start).clamp(0, self.stop - self.start)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what the ranks have, on each of them."""
        return _Total.apply(x, self)

    def neighbour(self, back: bool) -> int | None:
        """The rank of the group that has the steps behind this part or, `back`, those before it; None: nobody has."""
        rank = self.rank - 1 if back else self.rank + 1
        return rank if 0 <= rank < self.ranks else None

    def send(self, x: Tensor, *, back: bool) -> None:
        """Sends `x` to a neighbour, if there is one, and waits for nobody."""
        to = self.neighbour(back)
        if to is None:
            return
        x = _real(x).contiguous()
        _sending.append((dist.isend(x, group=self.group, group_dst=to), x))
        while len(_sending) > MOST_SENDING:
            _sending.popleft()[0].wait()

    def receive(self, like: Tensor, *, back: bool) -> Tensor:
        """What the neighbour on the other side sends, shaped as `like`; zeros, if there is none."""
        source = self.neighbour(not back)
        x = torch.zeros_like(like, memory_format=torch.contiguous_format)
        if source is not None:
            dist.recv(_real(x), group=self.group, group_src=source)
        return x


def carried(part: Part, like: Tensor, following: Callable[[Tensor], Tensor], *, back: bool = False) -> Tensor:
    """The state that reaches this part, zeros where sequences begin; with its gradient.

    Args:
        like: of the state's shape, dtype and device, and made from what `following` is made from.
        following: makes the state that leaves the part from the one that reaches it.
        back: states go from the last part to the first.
    """
    reached = _Reached.apply(like, part, back)
    return _Left.apply(reached, following(reached), part, back)


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, part: Part, back: bool) -> Tensor:
        ctx.part, ctx.back = part, back
        return part.receive(like, back=back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.part.send(gradient, back=not ctx.back)
        return None, None, None


class _Left(torch.autograd.Function):
    """Autograd goes back in the order in which things were made, the last first: so ranks meet in the same order there,
    and what is computed from the state that reached a part has its gradient before that is sent."""

    @staticmethod
    def forward(ctx: Any, reached: Tensor, leaving: Tensor, part: Part, back: bool) -> Tensor:
        ctx.part, ctx.back = part, back
        part.send(leaving, back=back)
        return reached.view_as(reached)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, ctx.part.receive(gradient, back=not ctx.back), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return _summed(x, part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.part), None


def _summed(x: Tensor, part: Part) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=part.group)
    return x


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def with_neighbours(part: Part, x: Tensor, before: int, behind: int) -> Tensor:
    """[B, T, D] with so many steps before and behind it, zeros where sequences end: [B, before + T + behind, D]."""

    def edge(steps: int, back: bool) -> Tensor:
        def following(reached: Tensor) -> Tensor:  # where a part is shorter than the edge, it reaches beyond
            return torch.cat([x, reached], 1)[:, :steps] if back else torch.cat([reached, x], 1)[:, -steps:]

        like = x[:, :1].expand(-1, steps, -1)
        return carried(part, like, following, back=back)

    ahead = [edge(before, False)] if before else []
    return torch.cat([*ahead, x, *([edge(behind, True)] if behind else [])], 1)


# The operations of `seqzoo.kernels` over parts: without one, these are the operations themselves.


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
    T, wide = q.shape[1], accumulation_dtype(v.dtype)
    values = F.pad(v, (0, 1), value=1.0) if normalize else v
    behind, whole = _decays(log_decay, T, lengths, wide)
    added = _products(k, values, behind, lengths)
    if causal:
        return call(v=v, normalize=normalize, initial_state=_passed(part, added, lambda S: whole * S, turned=turned))
    if log_decay is None:
        memory = added + carried(part, added, added.add) + carried(part, added, added.add, back=True)
        o = _read(q, memory)
    else:
        ahead = behind.flip(0)  # of a step to the first of the part
        first = _products(k, values, ahead, lengths)
        earlier = carried(part, added, lambda S: whole * S + added)
        later = carried(part, first, lambda S: whole * S + first, back=True)
        once = log_decay.to(wide).exp()
        q = q.to(wide)
        queries = torch.cat([q * (ahead * once)[..., None], q * (behind * once)[..., None]], -1)
        o = call(v=values).to(wide) + _read(queries, torch.cat([earlier, later], 2))
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
    memory that reaches the part. To go through parts in their order would need none of it, and each would wait for all
    before.
    """
    if part is None:
        states: dict[str, Any] = {"initial_state": initial_state, "output_final_state": output_final_state}
        return kernels.delta_rule(q, k, v, beta, **options, **states, cu_seqlens=cu_seqlens)
    (B, _, H, Dv), Dk, wide = v.shape, q.shape[-1], accumulation_dtype(v.dtype)
    first = F.pad(torch.eye(Dk, dtype=wide, device=v.device), (Dv, 0)).expand(B, H, -1, -1)
    o, last = kernels.delta_rule(q, k, F.pad(v, (0, Dk)), beta, initial_state=first, output_final_state=True, **options)
    o, queries = o.split((Dv, Dk), -1)
    added, product = last.split((Dv, Dk), -1)
    memory = _passed(part, added, lambda S: product @ S, turned=turned)
    return (o + _read(queries, memory)).to(v.dtype)


def diagonal_scan(
    part: Part | None, x: Tensor, a: Tensor, *, factor: Tensor | None = None, lengths: Tensor | None, **options: Any
) -> Any:
    """`seqzoo.kernels.diagonal_scan` over parts, of coefficients that are constant in time: a [D]."""
    if part is None:
        return kernels.diagonal_scan(x, a, factor=factor, lengths=lengths, **options)
    if options["reverse"] == "both":
        return tuple(_Scan.apply(part, reverse, lengths, x, a, factor) for reverse in (False, True))
    return _Scan.apply(part, options["reverse"], lengths, x, a, factor)


class _Scan(torch.autograd.Function):
    """It runs twice, once for the last state alone, and its reverse on the way back: autograd would pass over memory
    more often for that, as it would have to differentiate it."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, reverse: bool, lengths: Tensor | None, x: Tensor, a: Tensor, factor: Tensor | None
    ) -> Tensor:
        ctx.part, ctx.reverse, ctx.lengths = part, reverse, lengths
        scan = partial(kernels.diagonal_scan, reverse=reverse, lengths=lengths, output_final_state=True)
        _, added = scan(x, a, factor=factor)
        whole = a ** x.shape[1]
        first = part.receive(added, back=reverse)
        part.send(whole * first + added, back=reverse)
        with torch.enable_grad():
            ctx.given = [None if y is None else y.detach().requires_grad_() for y in (x, a, factor)]
            x, a, factor = ctx.given
            ctx.made = scan(x, a, factor=factor, initial_state=first)
        return ctx.made[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        part, back = ctx.part, not ctx.reverse
        x, a, _ = ctx.given
        conj = a.detach().conj().resolve_conj()
        _, last = kernels.diagonal_scan(dh, conj, reverse=back, lengths=ctx.lengths, output_final_state=True)
        behind = part.receive(last, back=back)
        part.send(conj * last + conj ** x.shape[1] * behind, back=back)
        wanted = [y for y in ctx.given if y is not None]
        found = iter(torch.autograd.grad(ctx.made, wanted, (dh, behind)))
        ctx.made = ()
        return None, None, None, *(None if y is None else next(found) for y in ctx.given)


def _passed(part: Part, added: Tensor, multiplied: Callable[[Tensor], Tensor], *, turned: bool) -> Tensor:
    """The memory [B, ...] that reaches the part, and leaves it `multiplied` and with `added`."""
    if not turned:
        return carried(part, added, lambda S: multiplied(S) + added)
    half = len(added) // 2
    nothing = torch.zeros_like(added[:half])

    def following(S: Tensor) -> Tensor:
        return multiplied(torch.cat([S, nothing]))[:half] + added[:half]

    def preceding(S: Tensor) -> Tensor:
        return multiplied(torch.cat([nothing, S]))[half:] + added[half:]

    forward = carried(part, added[:half], following)
    return torch.cat([forward, carried(part, added[half:], preceding, back=True)])


def _decays(log_decay: Tensor | None, T: int, lengths: Tensor | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """From each step to the last of the part, [T, H] or [B, T, H], and over all of it, [H, 1, 1] or with a batch; or
    1."""
    if log_decay is None:
        return None, 1.0
    if log_decay.dim() == 1:
        g = log_decay.to(dtype)
        return (g * torch.arange(T - 1, -1, -1, device=g.device)[:, None]).exp(), (g * T).exp()[:, None, None]
    g = zero_padding(log_decay.to(dtype), lengths)
    later = F.pad(g[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    return later.exp(), g.sum(1).exp()[..., None, None]


def _products(k: Tensor, v: Tensor, weights: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Σ_t weights_t k_t v_tᵀ: [B, T, G, Dk], [B, T, H, Dv] and [T, H] or [B, T, H] -> [B, H, Dk, Dv]."""
    G, H, wide = k.shape[2], v.shape[2], accumulation_dtype(v.dtype)
    k, v = zero_padding(k, lengths).to(wide), v.to(wide)
    v = v if weights is None else v * weights[..., None]
    k, v = k.transpose(1, 2), v.unflatten(2, (G, H // G)).permute(0, 2, 1, 3, 4).flatten(3)  # [B, G, T, ...]
    return (k.mT @ v).unflatten(-1, (H // G, -1)).transpose(2, 3).flatten(1, 2)


def _read(q: Tensor, memory: Tensor) -> Tensor:
    """[B, T, H, Dk], [B, H, Dk, Dv] -> [B, T, H, Dv]."""
    return (q.to(memory.dtype).transpose(1, 2) @ memory).transpose(1, 2)
