"""Documents that lie one behind the other in one row.

All of it is made of tensors whose shapes follow from the number of documents and of steps: nothing waits for a device,
and graphs do not depend on where documents end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .common import can_be_looked_at

LONG = 16  # steps


class Documents(NamedTuple):
    """N documents in a row of T steps, some of which may be empty."""

    starts: Tensor  # int64 [N + 1], where each begins, and T
    T: int

    @property
    def N(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [N]."""
        return self.starts.diff()

    @property
    def longest(self) -> int:
        """No document has more steps: as few as there are where that can be seen, or else T."""
        return int(self.lengths.max()) if can_be_looked_at(self.starts) else self.T

    @property
    def long(self) -> bool:
        """Whether they are worth an operation each, where they may be as many as there are."""
        return self.T >= LONG * self.N

    def of_steps(self) -> Tensor:
        """The document of each step: int64 [T]."""
        steps = torch.arange(self.T, device=self.starts.device)
        return torch.searchsorted(self.starts[1:], steps, right=True)

    def positions(self) -> Tensor:
        """How many steps of its document are ahead of each step: int64 [T]."""
        return torch.arange(self.T, device=self.starts.device) - self.starts[self.of_steps()]

    def split(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of each document what rows [1, T, ...] have of it, [1, its steps, ...]. Waits for the device."""
        lengths = self.lengths.tolist()
        # Split, and not sliced: the gradient of each slice would be as long as the row.
        return zip(*(x.split(lengths, 1) for x in rows), strict=True)

    def padded(self, x: Tensor) -> Tensor:
        """A document a row, [1, T, ...] -> [N, longest, ...], zero behind each. Waits for the device."""
        room = x.new_zeros(self.N, max(1, int(self.lengths.max())), *x.shape[2:])
        return room.index_put((self.of_steps(), self.positions()), x[0])

    def unpadded(self, y: Tensor) -> Tensor:
        """What `padded` padded: [N, longest, ...] -> [1, T, ...]."""
        return y[self.of_steps(), self.positions()][None]

    def pieces(self, length: int, ahead: Tensor | None = None) -> Pieces:
        """Every document cut into pieces of `length` steps, the last of which may be shorter.

        A document may begin in the middle of its first piece: behind `ahead` rows, int64 [N], up to `length`, that
        count as steps of it. With these there can be N pieces more.
        """
        N, most = self.N, self.T // length + (1 if ahead is None else 2) * self.N
        lengths = self.lengths if ahead is None else self.lengths + ahead
        ends = ((lengths + length - 1) // length).cumsum(0)  # [N], pieces up to each document's end
        before = torch.cat([ends.new_zeros(1), ends])
        piece = torch.arange(most, device=ends.device)
        document = torch.searchsorted(ends, piece, right=True)
        known = document.clamp(max=N - 1)  # what is behind all pieces is read as the last document
        number = piece - before[known]
        start = self.starts[known] + number * length
        start = torch.where(document < N, start if ahead is None else start - ahead[known], self.T)
        steps = (self.starts[1:][known] - start).clamp(0, length)
        return Pieces(self, length, document, number, start, steps, before, ahead)


class Pieces(NamedTuple):
    """P pieces, as many as there can be: those behind the last one are of document N and have no step."""

    documents: Documents
    length: int
    document: Tensor  # int64 [P]
    number: Tensor  # int64 [P], how many pieces of its document are ahead of each
    start: Tensor  # int64 [P], its first step
    steps: Tensor  # int64 [P], how many it has
    before: Tensor  # int64 [N + 1], how many pieces are ahead of each document, and all there are
    ahead: Tensor | None  # int64 [N], how many of a document's first steps are none of the row, or None: 0

    @property
    def known(self) -> Tensor:
        """The document of each piece, of those behind the last one the last document: int64 [P]."""
        return self.document.clamp(max=self.documents.N - 1)

    def there(self) -> Pieces:
        """Without those behind the last one, where that can be seen."""
        if not can_be_looked_at(self.before):
            return self
        P = int(self.before[-1])
        of_pieces = {name: getattr(self, name)[:P] for name in ("document", "number", "start", "steps")}
        return self._replace(**of_pieces)

    def as_documents(self) -> Documents:
        """Documents whose steps are the pieces. Those behind the last one are taken for the last document's."""
        P = len(self.document)
        return Documents(torch.cat([self.before[:-1], self.before.new_full((1,), P)]), P)

    def rows(self) -> Tensor:
        """Where each step stands in a row in which every piece takes up `length` steps: int64 [T]."""
        moved = self.before[:-1] * self.length - self.documents.starts[:-1]
        moved = moved if self.ahead is None else moved + self.ahead
        return torch.arange(self.documents.T, device=moved.device) + moved[self.documents.of_steps()]

    def table(self) -> Tensor:
        """What a kernel's program has to know of its piece, int64 [P, 4]: its document, where that begins, how many
        steps it has (none behind the last piece), and how many of them are ahead of the piece."""
        lengths = torch.where(self.document < self.documents.N, self.of_documents(self.documents.lengths), 0)
        starts = self.of_documents(self.documents.starts[:-1])
        return torch.stack([self.known, starts, lengths, self.number * self.length], 1)

    def hidden(self) -> Tensor:
        """Where no step stands: bool [P, length]."""
        return torch.arange(self.length, device=self.steps.device) >= self.steps[:, None]

    def begin(self) -> Tensor:
        """Which pieces are the first of their document: bool [P]."""
        return self.number == 0

    def of_documents(self, x: Tensor) -> Tensor:
        """To each piece, what its document has: [N, ...] -> [P, ...]."""
        return x.index_select(0, self.known)

    def last(self, x: Tensor, otherwise: Tensor) -> Tensor:
        """Of each document what its last piece has, [P, ...] -> [N, ...], or where it is empty that of `otherwise`."""
        of_last = x.index_select(0, (self.before[1:] - 1).clamp(min=0))
        empty = (self.documents.lengths == 0).reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(empty, otherwise, of_last)

    def running_max(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima of a document's `first` [N, ...] and its pieces' x [P, ...], ahead of each piece and with it."""
        beyond = [1] * (x.dim() - 1)
        begin, start = self.begin().reshape(-1, *beyond), self.of_documents(first)
        after, distance = torch.where(begin, torch.maximum(x, start), x), 1
        while distance < len(x):  # over as many pieces, then over twice as many
            reaches = (self.number >= distance).reshape(-1, *beyond)
            after = torch.maximum(after, torch.where(reaches, after.roll(distance, 0), -torch.inf))
            distance *= 2
        return torch.where(begin, start, after.roll(1, 0)), after

    def shared_sum(self, x: Tensor) -> Tensor:
        """To each piece, the sum over the pieces of its document: [P, ...]."""
        sums = x.new_zeros(self.documents.N + 1, *x.shape[1:])
        return sums.index_add(0, self.document, x).index_select(0, self.document)

    def shared_max(self, x: Tensor) -> Tensor:
        """To each piece, the maximum over the pieces of its document: [P, ...]."""
        lowest = x.new_full((self.documents.N + 1, *x.shape[1:]), -torch.inf)
        index = self.document.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)
        return lowest.scatter_reduce(0, index, x, "amax").index_select(0, self.document)

    def lay_out(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [1, P · length, ...], zero where no step stands."""
        room = x.new_zeros(1, len(self.document) * self.length, *x.shape[2:])
        return room.index_copy_(1, self.rows(), x)

    def take_up(self, y: Tensor) -> Tensor:
        """What `lay_out` laid out: [1, P · length, ...] -> [1, T, ...]."""
        return y.index_select(1, self.rows())


def starts_of(documents: Documents | None) -> Tensor | None:
    """Where they begin, and T; None where there is none. As operators are told of them, and as `cu_seqlens`."""
    return None if documents is None else documents.starts


def documents_from(starts: Tensor | None, T: int) -> Documents | None:
    """The documents of a row of T steps that begin where `starts` says, as `starts_of` told operators."""
    return None if starts is None else Documents(starts, T)


def count_of(starts: Tensor | None, B: int) -> int:
    """How many sequences there are: documents that begin where `starts` says or, where there is none, B."""
    return B if starts is None else starts.shape[0] - 1


def check_documents(what: str, cu_seqlens: Tensor | None, lengths: Tensor | None, B: int, T: int) -> Documents | None:
    """The documents that end where `cu_seqlens`, int32 or int64 [N + 1], says; None where there is none.

    Values are looked at where that costs nothing: on a CPU, outside of graphs. Elsewhere they are trusted, but for ends
    past T or before the one ahead, which count as the nearest that is valid.

    Raises:
        ValueError: they are not integers [N + 1], do not begin at 0, fall or do not end at T; the batch is not one row;
            or there are lengths too.
    """
    if cu_seqlens is None:
        return None
    if lengths is not None:
        raise ValueError(
            f"{what}: got cu_seqlens and lengths; valid: cu_seqlens, for documents one behind the other in one row, or "
            "lengths, for sequences padded to a common length"
        )
    integers = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integers or cu_seqlens.dim() != 1:
        given = type(cu_seqlens).__name__
        if isinstance(cu_seqlens, Tensor):
            given = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(
            f"{what}: cu_seqlens must be int32 or int64 [N + 1], where each of N documents begins, and their end, "
            f"got {given}"
        )
    if len(cu_seqlens) < 2:
        raise ValueError(f"{what}: cu_seqlens must be of 1 document or more, [0, ..., T], got {cu_seqlens.tolist()}")
    if B != 1:
        raise ValueError(
            f"{what}: cu_seqlens are for documents in one row, a batch of 1, got {B}; x.reshape(1, -1, ...) makes one "
            "of rows without padding"
        )
    starts = cu_seqlens.long()
    if can_be_looked_at(starts):
        if (starts.diff() < 0).any() or starts[0] != 0 or starts[-1] != T:
            raise ValueError(
                f"{what}: cu_seqlens must begin with 0, never fall and end with T = {T}, got {starts.tolist()}"
            )
        return Documents(starts, T)
    starts = starts.clamp(0, T).cummax(0).values
    return Documents(torch.cat([starts.new_zeros(1), starts[1:-1], starts.new_full((1,), T)]), T)
