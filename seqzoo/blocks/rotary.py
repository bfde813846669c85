from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding: channels 2i and 2i + 1 turned by position · base^(-2i / D).

    The product of a query and a key rotated so depends on their distance only. With an odd D, the last channel stays.

    Args:
        x: [B, T, H, D].
        position: int64 [T], [1, T] or [B, T].

    Source: Su et al., "RoFormer" (2021), equation 34, interleaved pairs.
    """
    pairs = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(pairs, device=x.device, dtype=wide) / max(pairs, 1))
    angle = position[..., None, None].to(wide) * frequency  # [..., T, 1, D / 2]
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., 0 : 2 * pairs : 2].to(wide), x[..., 1 : 2 * pairs : 2].to(wide)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
    return torch.cat([rotated, x[..., 2 * pairs :]], -1)
