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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def carried(
    part: Part,
    source: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    following: Callable[[Tensor], Tensor],
    *,
    back: bool = False,
) -> Tensor:
    """The state that reaches this part, zeros where sequences begin; with its gradient.

    Args:
        source: what `following` computes from; where it has a gradient, so has the state.
        shape, dtype: of the state.
        following: makes the state that leaves the part from the one that reaches it; asked where somebody waits for it.
        back: states go from the last part to the first.
    """
    reached = _Reached.apply(source, shape, dtype, part, back)
    return reached if part.neighbour(back) is None else _Left.apply(reached, following(reached), part, back)


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, shape: tuple[int, ...], dtype: torch.dtype, part: Part, back: bool) -> Tensor:
        ctx.part, ctx.back = part, back
        return part.receive(source.new_empty(shape, dtype=dtype), back=back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.part.send(gradient, back=not ctx.back)
        return None, None, None, None, None


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

        return carried(part, x, (len(x), steps, x.shape[2]), x.dtype, following, back=back)

    ahead = [edge(before, False)] if before else []
    return torch.cat([*ahead, x, *([edge(behind, True)] if behind else [])], 1)
