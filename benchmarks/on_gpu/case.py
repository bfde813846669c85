"""What is checked, as a call whose answer is known in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
WIDE = {torch.complex64: torch.complex128}  # of others, float64


@dataclass(frozen=True)
class Case:
    operation: str
    label: str
    width: int  # the class it counts for
    make: Callable[[Maker], Tensors]
    call: Callable[[Tensors, str], Tensors]  # of the tensors and the form
    terms: int  # of its longest sum
    linear: tuple[str, ...]  # tensors that results are linear in
    constant: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    exact: str = "reference"  # the form that is right in float64
    only: tuple[int, ...] | None = None  # sequences whose results are compared; all tensors begin with those, then
    roundings: int = 8  # to the dtype, at most, on the way to a gradient: inside a kernel, of what is kept, of results
    risk: int = 9  # what goes first is 0


class Sizes(NamedTuple):
    widths: tuple[int, ...]
    short: int  # steps
    long: int  # enough for time to be cut
    batch: int  # of Long Range Arena, of `steps`
    steps: int
    heads: int  # where they are many programs
    extras: bool = True  # what takes an interpreter too long


class Maker(NamedTuple):
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        drawn = torch.randn(*shape, device=self.device, dtype=dtype if dtype.is_complex else torch.float32)
        return drawn.to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        """In float32, which what stands beside the dtype's tensors is kept in."""
        return torch.rand(*shape, device=self.device)


def ends(x: Tensor, *of: int, form: str = "", most: int = 0) -> Tensor:
    """Lengths. Given `most`, the fused form gets what it must bear: strided ones and, on a GPU, beyond `most`."""
    if not most or form != "fused":
        return torch.tensor(of, device=x.device)
    beyond = 37 if x.is_cuda else 0  # on a CPU they are looked at
    pairs = [[n + beyond if n == most else n, -1] for n in of]
    return torch.tensor(pairs, device=x.device)[:, 0]


def spoilt(x: Tensors, names: Iterable[str], *of: int) -> Tensors:
    """With NaN past the lengths."""
    for name in names:
        for row, end in zip(x[name], of, strict=True):
            row[end:] = float("nan")
    return x


def in_two_calls(
    operation: Callable[..., Any], x: Tensors, over_time: Iterable[str], cut: int, **options: Any
) -> Tensors:
    """The second from the state of the first: states come out and go in, and their gradients the other way."""
    first = {name: y[:, :cut] if name in over_time else y for name, y in x.items()}
    second = {name: y[:, cut:] if name in over_time else y for name, y in x.items()}
    o, state = operation(**first, output_final_state=True, **options)
    rest, state = operation(**second, initial_state=state, output_final_state=True, **options)
    left = {"state": state} if isinstance(state, Tensor) else state._asdict()
    return {"o": torch.cat([o, rest], 1), **{name: y for name, y in left.items() if y.is_floating_point()}}
