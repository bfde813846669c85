"""Documents in one row, laid out as chunks that are attended each by itself: of the others a chunk sees a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import accumulation_dtype, without_autocast, zero_padding
from ..diagonal_scan import diagonal_scan
from ..documents import Documents
from .state import GatedAttentionState

Attend = Callable[[list[Tensor], Tensor | None, Tensor, Tensor], Tensor]


def over_documents(
    attend: Attend,
    inputs: Sequence[Tensor],
    documents: Documents,
    chunk_len: int,
    causal: bool,
    past: GatedAttentionState | None,
) -> tuple[Tensor, GatedAttentionState | None]:
    """What `attend` makes of all chunks, and the state behind each document, if there is one from before.

    Args:
        attend: from the inputs as P chunks of C rows [P, C, ...], the sum of k_linᵀ v that each sees [P, S, E], or None
            where all see none, the number of positions that it is over, [P], and that of the rows in use [P], makes
            their output [P, C, E].
        inputs: ..., k_quad, q_lin, k_lin, v, each [1, T, ...].
    """
    held = (None,) * 4 if past is None else (past.k_quad, None, past.k_lin, past.v)
    old = [*(None,) * (len(inputs) - 4), *held]
    packed = PackedChunks(documents, chunk_len, past)
    rows = [packed.rows(x, state) for x, state in zip(inputs, old, strict=True)]
    *_, k_quad, _, k_lin, v = rows
    seen = last = None
    if not (causal and packed.single):
        wide = accumulation_dtype(v.dtype)
        with without_autocast(v.device):
            updates = k_lin.to(wide).mT @ v.to(wide)
            seen, last = packed.sums_ahead(updates) if causal else (packed.sums(updates), None)
    o = packed.of_steps(attend(rows, seen, packed.terms(causal), packed.live))
    return o, None if past is None or last is None else packed.state(past, last, updates, k_quad, k_lin, v)


class PackedChunks:
    """P chunks of C rows.

    A document that follows a state begins in the row of a chunk where it stopped, behind those that the state holds.
    """

    def __init__(self, documents: Documents, chunk_len: int, past: GatedAttentionState | None) -> None:
        self.documents = documents
        self.C = min(chunk_len, max(1, documents.longest)) if past is None else chunk_len
        self.single = past is None and documents.longest <= self.C  # no document has a second chunk
        position = torch.zeros_like(documents.lengths) if past is None else past.position
        self.held = position % chunk_len  # [N], rows of the state
        self.earlier = position - self.held  # [N], positions before each document's first chunk
        self.initial = None if past is None else past.memory
        self.pieces = documents.pieces(self.C, None if past is None else self.held).there()
        self.live = self.pieces.steps  # [P], rows of each chunk that are in use

    def rows(self, new: Tensor, old: Tensor | None = None) -> Tensor:
        """Of the steps [1, T, D] and the state, if any, [N, C, D]: [P, C, D]."""
        rows = self.pieces.lay_out(new)[0].unflatten(0, (-1, self.C))
        if old is None:
            return rows
        # A document without chunks holds nothing, which may be added to anything.
        first = self.pieces.before[:-1].clamp(max=len(rows) - 1)
        return rows.index_add(0, first, zero_padding(old.to(new.dtype), self.held))

    def of_steps(self, rows: Tensor) -> Tensor:
        """[P, C, D] -> [1, T, D]."""
        return self.pieces.take_up(rows.flatten(0, 1)[None])

    def terms(self, causal: bool) -> Tensor:
        """How many positions the sum is over that each chunk sees, [P]: those ahead of it, or all of its document."""
        if not causal:
            return self.documents.lengths[self.pieces.known]
        return self.earlier[self.pieces.known] + self.pieces.number * self.C

    def sums_ahead(self, updates: Tensor) -> tuple[Tensor, Tensor]:
        """From what each chunk adds to the memory [P, S, E], the memory that it sees, and that the last chunk of each
        document sees [N, S, E]."""
        follows = (self.pieces.number > 0) & (self.live > 0)
        added = torch.where(follows[:, None, None], updates.roll(1, 0), 0)
        initial = None if self.initial is None else self.initial.to(updates.dtype).flatten(1)
        seen, last = self._scan(added, initial_state=initial, output_final_state=True)
        return seen.view_as(updates), last.view(-1, *updates.shape[1:])

    def sums(self, updates: Tensor) -> Tensor:
        """The memory of each chunk's document, [P, S, E]."""
        if self.single:
            return updates
        ahead = self._scan(updates).view_as(updates)
        return ahead[(self.pieces.before[1:] - 1)[self.pieces.known]]  # with the last chunk's: that of all

    def _scan(self, x: Tensor, **options: Any) -> Any:
        x = x.flatten(1)[None]
        return diagonal_scan(x, x.new_ones(x.shape[-1]), cu_seqlens=self.pieces.as_documents().starts, **options)

    def state(
        self, past: GatedAttentionState, last: Tensor, updates: Tensor, k_quad: Tensor, k_lin: Tensor, v: Tensor
    ) -> GatedAttentionState:
        """The state behind each document, from the memory that its last chunk sees, updates and rows."""
        end = self.held + self.documents.lengths  # [N], rows from those of the first chunk on
        chunk = (self.pieces.before[:-1] + end // self.C).clamp(max=len(updates) - 1)  # not full, if there is one

        def partial(rows: Tensor) -> Tensor:
            return zero_padding(rows[chunk].to(last.dtype), end % self.C)

        ends_full = (end > 0) & (end % self.C == 0)
        full = (self.pieces.before[1:] - 1).clamp(min=0)
        memory = last + torch.where(ends_full[:, None, None], updates[full], 0)
        position = past.position + self.documents.lengths
        return GatedAttentionState(memory, partial(k_quad), partial(k_lin), partial(v), position)
