"""What a causal block remembers, as a value: a NamedTuple of tensors, batch first, with what is done to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..kernels.common import accumulation_dtype

S = TypeVar("S", bound="State")
Kind = TypeVar("Kind", bound=type)


class State(Protocol):
    """A NamedTuple of tensors, batch first, or of tuples of such states, that `state_of` has given these methods.

    It belongs to the sequences, and nothing of it to a module: any state can be continued, as often as one likes, and
    stays what it was. `torch.save` writes it, and `torch.load` reads it where `seqzoo.blocks` is imported.
    """

    @property
    def position(self) -> Tensor:
        """int64 [B], how many steps each sequence has taken."""

    def fork(self: S) -> S:
        """The same state, to be continued in another way. Nothing is copied before that, and then only a cache of keys,
        for whichever is continued second."""

    def select(self: S, rows: Tensor | Sequence[int] | slice) -> S:
        """The state of some of the sequences, in this order: indices, which may repeat, a bool for each, or a slice."""

    def repeat(self: S, times: int) -> S:
        """The state of each sequence so often, next to each other."""

    def to(self: S, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> S:
        """The same on another device, or in another precision: caches in `dtype`, sums in single precision at least.

        Raises:
            ValueError: `dtype` is none of floating point.
        """


class Held:
    """A state on its way through a module's hooks, some of which change the tensors that they find among arguments:
    FSDP2's round them all to the precision of its products, in which nothing can be summed for long."""

    def __init__(self, state: Any) -> None:
        self.state = state

    @staticmethod
    def of(state: Any) -> Any:
        """The state itself, held or not."""
        return state.state if isinstance(state, Held) else state


def state_of(*caches: str) -> Callable[[Kind], Kind]:
    """Makes a NamedTuple the `State` of a block.

    Args:
        caches: names of the parts that are kept as parameters are, and not in single precision at least.
    """

    def decorate(kind: Kind) -> Kind:
        def to(self: Any, device: Any = None, dtype: torch.dtype | None = None) -> Any:
            if isinstance(device, torch.dtype):
                device, dtype = None, device
            if dtype is not None and not dtype.is_floating_point:
                raise ValueError(
                    f"a state is kept in floating point, got {dtype}; valid: torch.float32, torch.bfloat16"
                )

            def moved(name: str, part: Any) -> Any:
                if not isinstance(part, Tensor):
                    return tuple(state.to(device, dtype) for state in part)
                if dtype is None or not part.is_floating_point():
                    return part.to(device)
                return part.to(device, dtype if name in caches else accumulation_dtype(dtype))

            return type(self)(*(moved(*named) for named in zip(self._fields, self, strict=True)))

        for name, method in {"fork": _fork, "select": _select, "repeat": _repeat, "to": to}.items():
            setattr(kind, name, method)
        torch.serialization.add_safe_globals([kind])
        return kind

    return decorate


def _fork(self: Any) -> Any:
    return type(self)(*self)


def _select(self: Any, rows: Any) -> Any:
    if not isinstance(rows, slice):
        rows = torch.as_tensor(rows, device=self.position.device)
        rows = rows if rows.numel() else rows.long()  # [] is of floating point
    parts = (part[rows] if isinstance(part, Tensor) else tuple(s.select(rows) for s in part) for part in self)
    return type(self)(*parts)


def _repeat(self: Any, times: int) -> Any:
    rows = torch.arange(len(self.position), device=self.position.device)
    return self.select(rows.repeat_interleave(times))


@state_of()
class MemoryState(NamedTuple):
    """Of blocks that remember a matrix in each head, and nothing else."""

    memory: Tensor  # [B, H, Dk, Dv], at least float32
    position: Tensor  # int64 [B]

    @classmethod
    def empty(cls, B: int, *memory: int, device: torch.device | str | None, dtype: torch.dtype) -> MemoryState:
        """Of B sequences of which nothing has been seen, with a memory [B, ...]."""
        return cls(
            torch.zeros(B, *memory, device=device, dtype=accumulation_dtype(dtype)),
            torch.zeros(B, dtype=torch.int64, device=device),
        )
