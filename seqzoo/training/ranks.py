"""Which examples a rank of torchrun trains on, and which part of their time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..blocks import Block, Part

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Place(NamedTuple):
    """Where a rank stands: some that follow each other have the same examples, and a part of their time each."""

    rank: int  # among those whose examples are others
    ranks: int
    group: Any = None  # of torch.distributed, those that have the same; None: no other has

    def part(self, T: int) -> Part | None:
        """Of T steps, those of this rank; None: all of them."""
        return None if self.group is None else Part(T, self.group)


_places: WeakKeyDictionary[Fabric, Place] = WeakKeyDictionary()


def place_of(fabric: Fabric) -> Place:
    """The place of this process."""
    return _places.get(fabric, Place(fabric.global_rank, fabric.world_size))


def share_time(fabric: Fabric, ranks: int) -> None:
    """From now on every `ranks` that follow each other have the same examples, and each a part of their time."""
    groups = [
        torch.distributed.new_group(list(range(first, first + ranks))) for first in range(0, fabric.world_size, ranks)
    ]
    rank = fabric.global_rank // ranks
    _places[fabric] = Place(rank, fabric.world_size // ranks, groups[rank])


def require_parts(model: nn.Module) -> None:
    """Raises ValueError where a block of `model` cannot be given parts of the time."""
    for block in model.modules():
        if isinstance(block, Block):
            block.require_parts()
