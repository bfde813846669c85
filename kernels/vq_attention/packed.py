"""Documents in one row, laid out as blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents


class PackedBlocks:
    """P blocks of L positions, counted from the beginning of each document.

    With a state, what it remembers one by one is the block ahead of its document, [N, L, ...], of which `remembered`
    [N] positions, the last ones, are there.
    """

    def __init__(self, documents: Documents, block_len: int, remembered: Tensor | None) -> None:
        self.L, self.remembered = block_len, remembered
        ahead = None if remembered is None else torch.full_like(remembered, block_len)
        self.pieces = documents.pieces(block_len, ahead)
        self.starts = self.pieces.as_documents().starts  # the first block of each document, and P

    def row(self, new: Tensor, old: Tensor | None = None) -> Tensor:
        """Of the steps [1, T, ...] and the state, or zeros in its place: [1, P · L, ...]."""
        row = self.pieces.lay_out(new)
        if old is None:
            return row
        return row.unflatten(1, (-1, self.L)).index_copy(1, self.pieces.before[:-1], old[None]).flatten(1, 2)

    def valid(self) -> Tensor:
        """Which positions there are: bool [1, P · L]."""
        position = torch.arange(self.L, device=self.starts.device)
        valid = position < self.pieces.steps[:, None]
        if self.remembered is not None:
            known = position >= self.L - self.remembered[self.pieces.known][:, None]
            valid = valid & (known | (self.pieces.number > 0)[:, None])
        return valid.flatten()[None]

    def windows(self, causal: bool) -> Tensor:
        """The blocks in each block's window, counted from 1; 0 stands for none. [P, 2] causal, else [P, 3]."""
        document = self.pieces.document
        own = torch.arange(1, len(document) + 1, device=document.device)
        same = document[1:] == document[:-1]
        ahead = torch.where(F.pad(same, (1, 0)), own - 1, 0)
        if causal:
            return torch.stack([ahead, own], 1)
        return torch.stack([ahead, own, torch.where(F.pad(same, (0, 1)), own + 1, 0)], 1)
