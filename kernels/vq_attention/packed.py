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
        self.pieces = documents.pieces(block_len, ahead).there()
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

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Of each block's document the first valid position, and the one behind its last: [P] each."""
        pieces, known = self.pieces, self.pieces.known
        first, last = pieces.before[:-1] * self.L, pieces.before[:-1] * self.L + pieces.documents.lengths
        if self.remembered is not None:
            first, last = first + self.L - self.remembered, last + self.L
        real = pieces.steps > 0
        return torch.where(real, first[known], 0), torch.where(real, last[known], 0)


def windows(starts: Tensor, N: int, W: int) -> Tensor:
    """The blocks in each block's window, counted from 1, where documents have these first blocks: [N, W].

    0 stands for none.
    """
    document = Documents(starts, N).of_steps()
    own = torch.arange(1, N + 1, device=starts.device)
    same = document[1:] == document[:-1]
    ahead = torch.where(F.pad(same, (1, 0)), own - 1, 0)
    behind = torch.where(F.pad(same, (0, 1)), own + 1, 0)
    return torch.stack([ahead, own, behind][:W], 1)


def of_blocks(x: Tensor, starts: Tensor, N: int) -> Tensor:
    """Of documents with these first blocks, for each of their blocks: [documents, H, ...] -> [1, H, N, ...]."""
    return x[Documents(starts, N).of_steps()].transpose(0, 1)[None]
