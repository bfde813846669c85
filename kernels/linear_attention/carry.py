"""States that are carried from chunk to chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Pieces


def carry(
    updates: Tensor,  # [B, H, N, Dk, Dv], what each chunk adds
    decays: Tensor,  # [..., N or 1, 1 or Dk, 1], of each chunk
    state: Tensor,  # [B, H, Dk, Dv], ahead of the first one
    pieces: Pieces | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The state that reaches each chunk [B, H, N, Dk, Dv], and the one that leaves the last [B, H, Dk, Dv].

    Of pieces, `state` and those that leave are of documents, [N, H, Dk, Dv].
    """
    N = updates.shape[2]
    steps = list(zip(updates.unbind(2), decays.expand(*decays.shape[:-3], N, -1, -1).unbind(-3), strict=True))
    if pieces is not None:
        return _carry_in_documents(steps, state, pieces)
    states = []
    for update, decay in reversed(steps) if reverse else steps:
        states.append(state)
        state = torch.addcmul(update, decay, state)
    return torch.stack(states[::-1] if reverse else states, 2), state


def _carry_in_documents(steps: list[tuple[Tensor, Tensor]], first: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    starts, begin = pieces.of_documents(first)[:, None], pieces.begin()  # P times [1, H, Dk, Dv]
    before, after = [], [starts[0]]
    for (update, decay), start, anew in zip(steps, starts, begin, strict=True):
        before.append(torch.where(anew, start, after[-1]))
        after.append(torch.addcmul(update, decay, before[-1]))
    return torch.stack(before, 2), pieces.last(torch.cat(after[1:]), first)
