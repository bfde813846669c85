from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import zero_padding
from .state import GatedAttentionState


class Resumed:
    """T steps that follow a state, laid out as the rows of N whole chunks of C.

    A sequence starts in the row where it stopped: before it are the rows of its chunk that the state holds, behind it
    rows that belong to nothing. How many of each differs from sequence to sequence, what they are in does not.
    """

    def __init__(self, past: GatedAttentionState, T: int, lengths: Tensor | None) -> None:
        self.past, self.C = past, past.v.shape[1]
        self.N = -(-(self.C - 1 + T) // self.C)  # enough wherever in a chunk a sequence stands
        self.held = past.position % self.C  # [B], rows of the state
        self.steps = T if lengths is None else lengths
        self.end = self.held + self.steps  # [B], rows up to the last step
        self.full = self.end // self.C  # [B], chunks that are full then
        self.row = (self.held[:, None] + torch.arange(T, device=past.v.device))[..., None]  # [B, T, 1], of each step

    def earlier(self) -> Tensor:
        """Positions before the first chunk, [B]."""
        return self.past.position - self.held

    def rows(self, new: Tensor, old: Tensor | None = None) -> Tensor:
        """Of the steps [B, T, D] and the state [B, C, D], or zeros in its place: [B, N C, D]."""
        if old is None:
            rows = new.new_zeros(new.shape[0], self.N * self.C, new.shape[2])
        else:
            rows = F.pad(zero_padding(old.to(new.dtype), self.held), (0, 0, 0, (self.N - 1) * self.C))
        return rows.scatter(1, self.row.expand_as(new), new)

    def of_steps(self, rows: Tensor) -> Tensor:
        """[B, N C, D] -> [B, T, D]."""
        return rows.gather(1, self.row.expand(-1, -1, rows.shape[2]))

    def state(self, added: Tensor, k_quad: Tensor, k_lin: Tensor, v: Tensor) -> GatedAttentionState:
        """The state behind the last step, from what full chunks add to the memory, [B, S, E], and rows."""
        index = self.full[:, None] * self.C + torch.arange(self.C, device=added.device)
        index = index.clamp(max=self.N * self.C - 1)[..., None]  # [B, C, 1]

        def partial(rows: Tensor) -> Tensor:
            last = rows.gather(1, index.expand(-1, -1, rows.shape[2]))
            return zero_padding(last, self.end % self.C).to(added.dtype)

        memory = self.past.memory.to(added.dtype) + added
        return GatedAttentionState(memory, partial(k_quad), partial(k_lin), partial(v), self.past.position + self.steps)
