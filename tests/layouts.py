"""Tensors as users have them: the same shapes in other places of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NOTHING = 10**9  # no length and no code of anything


def _stored_as(x: Tensor, first: int, second: int) -> Tensor:
    return x.transpose(first, second).contiguous().transpose(first, second)


def _within(x: Tensor, before: int, step: int) -> Tensor:
    """Every `step`-th channel of a wider tensor, with what must not be read in between."""
    wider = x.new_full(
        (*x.shape[:-1], before + step * x.shape[-1] + 1), NOTHING if x.dtype == torch.int64 else torch.nan
    )
    wider[..., before : before + step * x.shape[-1] : step] = x
    return wider[..., before : before + step * x.shape[-1] : step]


# Values stay, but where one is expanded.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "rows of a wider tensor": lambda x: _within(x, 3, 1),
    "every other channel": lambda x: _within(x, 1, 2),
    "one for the batch": lambda x: x[:1].expand(x.shape),
    "time first": lambda x: _stored_as(x, 0, 1) if x.dim() > 1 else x,
    "channels first": lambda x: _stored_as(x, 1, -1) if x.dim() > 1 else x,
    "heads first": lambda x: _stored_as(x, 1, 2) if x.dim() > 2 else x,
}
KINDS = ("int64", "strided", "expanded", "int32")


def lay_out(x: Tensor, layout: str, index: int = 0) -> Tensor:
    """With `layout` "mixed", as the index-th layout has it; "conjugate" is that of a complex tensor."""
    if layout == "conjugate":
        return x.conj_physical().conj()
    if layout == "mixed":
        layout = [*LAYOUTS][index % len(LAYOUTS)]
    return LAYOUTS[layout](x)


def integers(kind: str, values: Sequence[int]) -> Tensor:
    """[B] of them; "expanded", the first one for all."""
    x = torch.tensor(values)
    if kind == "strided":
        return torch.stack([x, x + NOTHING], 1)[:, 0]
    if kind == "expanded":
        return x[:1].expand(x.shape)
    return x.to(torch.int32) if kind == "int32" else x
