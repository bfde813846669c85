from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FavorState(NamedTuple):
    """What causal FAVOR attention remembers: the sum of √M φ(k) [v, 1]ᵀ over the keys seen, each feature scaled.

    Feature m's sum is exp(log_scale_m) · sums_m. Its scale is the largest value that it had for a key so far, so that
    the normaliser lies between 1 and the number of keys.
    """

    sums: Tensor  # [B, H, M, Dv + 1], the normaliser in the last column
    log_scale: Tensor  # [B, H, M], -inf while no key has been seen

    @classmethod
    def empty(
        cls, B: int, H: int, M: int, Dv: int, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> FavorState:
        return cls(
            sums=torch.zeros(B, H, M, Dv + 1, device=device, dtype=dtype),
            log_scale=torch.full((B, H, M), -torch.inf, device=device, dtype=dtype),
        )
