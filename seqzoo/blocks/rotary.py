from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..kernels.common import can_be_looked_at
from ..kernels.derivatives import transformed


def rotate(x: Tensor, position: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding: channels 2i and 2i + 1 turned by position · base^(-2i / D).

    The product of a query and a key rotated so depends on their distance only. With an odd D, the last channel stays.

    Args:
        x: [B, T, H, D].
        position: int64 [T], [1, T] or [B, T].

    Source: Su et al., "RoFormer" (2021), equation 34, interleaved pairs.
    """
    return turned(x, turns(position, x.shape[-1], torch.promote_types(x.dtype, torch.float32), base=base))


def turns(position: Tensor, channels: int, dtype: torch.dtype, *, base: float = 10_000.0) -> Tensor:
    """By what `rotate` turns each pair of channels: complex [T, 1, D // 2], or with a batch in front."""
    if can_be_looked_at(position) and not transformed():  # what a transform makes, none after it can use
        rates, one = _rates_and_one(channels // 2, dtype, base)
        return torch.polar(one, position[..., None, None] * rates)
    angle = position[..., None, None].to(dtype) * _rates(channels // 2, dtype, base, position.device)
    return torch.polar(torch.ones_like(angle), angle)


def _rates(pairs: int, dtype: torch.dtype, base: float, device: torch.device) -> Tensor:
    return base ** (-torch.arange(pairs, device=device, dtype=dtype) / max(pairs, 1))


@cache  # to a single step, making them anew is half the work
def _rates_and_one(pairs: int, dtype: torch.dtype, base: float) -> tuple[Tensor, Tensor]:
    device = torch.device("cpu")
    return _rates(pairs, dtype, base, device), torch.ones((), dtype=dtype, device=device)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """`x` [B, T, H, D] with as many pairs of its channels turned as `turn` has; those behind them stay."""
    pairs = turn.shape[-1]
    # One complex product is one pass over memory, and one back.
    paired, rest = x, None
    if 2 * pairs < x.shape[-1]:
        paired, rest = x.split((2 * pairs, x.shape[-1] - 2 * pairs), -1)
        paired = paired.contiguous()  # a row of odd length is no row of complex numbers
    points = torch.view_as_complex(paired.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (pairs, 2)))
    rotated = torch.view_as_real(points * turn).flatten(-2).to(x.dtype)
    return rotated if rest is None else torch.cat([rotated, rest], -1)
