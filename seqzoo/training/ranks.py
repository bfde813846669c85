"""Which examples a rank of torchrun trains on, and which part of their time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from ..blocks import Block, Part

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Place(NamedTuple):
    """Where a rank stands: some that follow each other have the same examples, and a part of their time each."""

    rank: int  # among those whose examples are others
    ranks: int
    group: Any = None  # of torch.distributed, those that have the same; None: no other has
    sharded: bool = False  # whether each has a shard of the model

    def part(self, T: int) -> Part | None:
        """Of T steps, those of this rank; None: all of them."""
        return None if self.group is None else Part(T, self.group)


_places: WeakKeyDictionary[Fabric, Place] = WeakKeyDictionary()


def place_of(fabric: Fabric) -> Place:
    """The place of this process."""
    return _places.get(fabric, Place(fabric.global_rank, fabric.world_size))


def arrange(fabric: Fabric, *, parts: int, sharded: bool) -> None:
    """From now on every `parts` ranks that follow each other have the same examples, and each a part of their time;
    and, if `sharded`, each of all a shard of the model."""
    ranks, rank = fabric.world_size // parts, fabric.global_rank // parts
    group = None
    if parts > 1:
        group = [torch.distributed.new_group(list(range(n * parts, (n + 1) * parts))) for n in range(ranks)][rank]
    _places[fabric] = Place(rank, ranks, group, sharded)


def set_up(fabric: Fabric, model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """Both, such that passes and steps are those of all ranks. Of a model in shards they are anyway."""
    return (model, optimizer) if place_of(fabric).sharded else fabric.setup(model, optimizer)


@contextmanager
def without_sync(fabric: Fabric, model: Any, enabled: bool) -> Iterator[None]:
    """Where gradients stay those of a rank, if that is `enabled`."""
    if place_of(fabric).sharded:
        model.set_requires_gradient_sync(not enabled)
        yield
        return
    with fabric.no_backward_sync(model, enabled=enabled):
        yield


def require_parts(model: nn.Module) -> None:
    """Raises ValueError where a block of `model` cannot be given parts of the time."""
    for block in model.modules():
        if isinstance(block, Block):
            block.require_parts()
