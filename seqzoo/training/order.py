"""Which examples the batches of a stage are made of."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from ..config import StageConfig
from ..tasks import Split, epoch_order


class Order:
    """The endless row of epochs, each in an order of its own, and places in it: a function of the seed alone.

    A place is an example. With `room`, it is so many positions, and what is in it are the examples that begin in them:
    n places then hold n · room positions on average, and at most an example's more or less.

    Args:
        lengths: of the examples, int64 [N] on the CPU; none is longer than the room.
        seed: of the orders.
        room: positions of a place; None: a place is an example.
    """

    def __init__(self, lengths: Tensor, *, seed: int, room: int | None = None) -> None:
        self.lengths, self.seed, self.room = lengths, seed, room
        self.size = len(lengths) if room is None else int(lengths.sum())  # of an epoch

    def examples(self, start: int, count: int) -> Tensor:
        """What is in `count` places from the `start`-th on: int64 [n], on the CPU."""
        unit = 1 if self.room is None else self.room
        begin, left, parts = start * unit, count * unit, []
        while left > 0:
            epoch, offset = divmod(begin, self.size)
            here = min(left, self.size - offset)
            parts.append(self._within(epoch, offset, offset + here))
            begin, left = begin + here, left - here
        return torch.cat(parts)

    def _within(self, epoch: int, begin: int, end: int) -> Tensor:
        if self.room is None:
            return _order(len(self.lengths), self.seed, epoch)[begin:end]
        order, begins = _positions(self.lengths, self.seed, epoch)
        first, last = torch.searchsorted(begins, torch.tensor([begin, end])).tolist()
        return order[first:last]


def room_for(train: Split, passes: int) -> int:
    """Positions in which any example of `train` has room, in `passes` over it."""
    return passes * train.spec.num_inputs * train.spec.max_length


def budget(stage: StageConfig, n: int, tokens: int, room: int | None = None) -> tuple[int, int]:
    """A stage's budget in tokens and in steps, on a split of `n` examples that hold `tokens` in all.

    Args:
        room: of the places that batches are made of, see `Order`.
    """
    wanted = stage.tokens if stage.tokens is not None else round(cast(float, stage.epochs) * tokens)
    tokens_per_step = stage.batch_size * stage.accumulate * (tokens / n if room is None else room)
    return wanted, max(1, math.ceil(wanted / tokens_per_step))


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return epoch_order(n, seed=seed, epoch=epoch)


@lru_cache(maxsize=2)
def _positions(lengths: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """The order of an epoch, and how many positions are ahead of each example in it."""
    order = _order(len(lengths), seed, epoch)
    ordered = lengths[order]
    return order, ordered.cumsum(0) - ordered
