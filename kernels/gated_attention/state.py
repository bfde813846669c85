from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GatedAttentionState(NamedTuple):
    """What causal gated attention remembers: full chunks as a sum, the keys and values of the last one, not yet full.

    Row r of the last three belongs to position `position // chunk_len * chunk_len + r`; those not seen yet are zero.
    """

    memory: Tensor  # [B, S, E], the sum of k_linᵀ v over full chunks
    k_quad: Tensor  # [B, chunk_len, S]
    k_lin: Tensor  # [B, chunk_len, S]
    v: Tensor  # [B, chunk_len, E]
    position: Tensor  # int64 [B], positions seen

    @classmethod
    def empty(
        cls, B: int, S: int, E: int, chunk_len: int, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> GatedAttentionState:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(B, *shape, device=device, dtype=dtype)

        position = torch.zeros(B, dtype=torch.int64, device=device)
        return cls(zeros(S, E), zeros(chunk_len, S), zeros(chunk_len, S), zeros(chunk_len, E), position)
