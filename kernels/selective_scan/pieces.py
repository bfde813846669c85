"""The selective scan piece by piece of time, for devices without a loop of their own.

States are [N, D] in here, so that what is next to each other is of one kind. Where each piece of `PIECE` steps begins,
counted along the row and in the direction of the recurrence, the forward pass keeps the state, and the backward pass
makes the states of the piece again from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common import without_autocast, zero_padding
from ..diagonal_scan import diagonal_scan, doubling
from ..documents import count_of

PIECE = 32  # steps


def at_once(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [R, N, D] of R sequences, in operations that PyTorch can differentiate.

    Of v, dt [B, T, D], A [N, D], write, read [B, T, N] and initial_state [R, N, D]; R is B, or as many as documents
    begin in `starts` [R + 1].
    """
    v, dt, write, read = (zero_padding(x, lengths) for x in (v, dt, write, read))
    initial_state = None if initial_state is None else initial_state.flatten(1)
    h, state = _scan(*_made(v, dt, A, write), initial_state, reverse, lengths, None, starts)
    with without_autocast(v.device):
        return (read[:, :, None] @ h.unflatten(-1, A.shape))[:, :, 0], state.unflatten(-1, A.shape)


def _made(v: Tensor, dt: Tensor, A: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """What is put into the states at each step, and by what they are multiplied: [B, T, N D] each."""
    return (write[..., None] * v[:, :, None]).flatten(2), (dt[:, :, None] * A).exp().flatten(2)


def _scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `doubling.scan`, in the form that is best for the device."""
    ends: dict[str, Any] = {"reverse": reverse, "lengths": lengths, "cu_seqlens": starts}
    return diagonal_scan(x, a, initial_state=initial_state, output_final_state=True, **ends)


class _Piece:
    """Of a row of T steps, those from `begin` to `end`."""

    def __init__(self, number: int, T: int, reverse: bool, lengths: Tensor | None, starts: Tensor | None) -> None:
        self.begin, self.end = number * PIECE, min(number * PIECE + PIECE, T)
        self.starts = starts
        self.first = self.end - 1 if reverse else self.begin  # the step that is taken first
        length = self.end - self.begin
        if lengths is not None:
            lengths = (lengths - self.begin).clamp(0, length)
        its = None if starts is None else starts.clamp(self.begin, self.end) - self.begin
        self.ends: tuple[Any, ...] = (reverse, lengths, its)

    def of(self, *rows: Tensor) -> list[Tensor]:
        return [x[:, self.begin : self.end] for x in rows]

    def kept(self, state: Tensor) -> Tensor:
        """What of the states [R, ...] where it begins has to be kept: of documents that of the one at the step."""
        return state if self.starts is None else state.index_select(0, self._document())

    def restored(self, kept: Tensor, initial_state: Tensor) -> Tensor:
        """The states again, [R, ...]; documents that are not in the piece get any."""
        return kept if self.starts is None else initial_state.index_copy(0, self._document(), kept)

    def _document(self) -> Tensor:
        assert self.starts is not None
        return torch.searchsorted(self.starts[1:], self.starts.new_full((1,), self.first), right=True)


def _pieces(T: int, *ends: Any) -> Iterator[tuple[int, _Piece]]:
    """All of them, as they are taken."""
    numbers = range(-(-T // PIECE))
    for number in reversed(numbers) if ends[0] else numbers:
        yield number, _Piece(number, T, *ends)


def scan(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `at_once`, and what the backward pass needs of the states if it is to `keep` that, [B, pieces, N, D]."""
    state = _initial(initial_state, v, A, starts)
    y, kept = torch.empty_like(v, memory_format=torch.contiguous_format), marks(v, A, keep)
    for number, piece in _pieces(v.shape[1], reverse, lengths, starts):
        if keep:
            kept[:, number] = piece.kept(state)
        its: tuple[Any, ...] = (*piece.of(v, dt), A, *piece.of(write, read), state)
        y[:, piece.begin : piece.end], state = at_once(*its, *piece.ends)
    return y, state, kept


def scan_backward(
    dy: Tensor,
    d_state: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of v, dt, A, write, read and the initial state, from those of y and of the final state."""
    rows = (v, dt, write, read)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in rows]
    dA, before = torch.zeros_like(A), _initial(initial_state, v, A, starts)
    for number, piece in reversed(list(_pieces(v.shape[1], reverse, lengths, starts))):
        state = piece.restored(kept[:, number], before)
        its: tuple[Any, ...] = (*piece.of(dy), d_state, *piece.of(v, dt), A, *piece.of(write, read), state)
        *of_rows, of_A, d_state = _piece_backward(*its, *piece.ends)
        for gradient, part in zip(piece.of(*gradients), of_rows, strict=True):
            gradient.copy_(part)
        dA += of_A
    dv, d_dt, d_write, d_read = gradients
    return dv, d_dt, dA, d_write, d_read, d_state


def _piece_backward(
    dy: Tensor,
    d_state: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    initial_state: Tensor,
    reverse: bool,
    lengths: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of v, dt, write, read, A and the initial state, the states made again."""
    dy, v, dt, write, read = (zero_padding(x, lengths) for x in (dy, v, dt, write, read))
    x, a = _made(v, dt, A, write)
    ends = (initial_state.flatten(1), reverse, lengths, None, starts)
    h, _ = _scan(x, a, *ends)
    dh = (read[..., None] * dy[:, :, None]).flatten(2)
    dx, da, d_initial, _ = doubling.gradients(_scan, dh, d_state.flatten(1), h, a, *ends)
    h, dx, exponents = (z.unflatten(-1, A.shape) for z in (h, dx, da * a))  # [B, T, N, D]
    with without_autocast(v.device):
        return (
            (write[:, :, None] @ dx)[:, :, 0],
            (exponents * A).sum(2),
            (dx @ v[..., None])[..., 0],
            (h @ dy[..., None])[..., 0],
            (exponents * dt[:, :, None]).sum((0, 1)),
            d_initial.unflatten(-1, A.shape),
        )


def _initial(initial_state: Tensor | None, v: Tensor, A: Tensor, starts: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    return v.new_zeros(count_of(starts, len(v)), *A.shape)


def marks(v: Tensor, A: Tensor, keep: bool) -> Tensor:
    """Room for the states where pieces begin."""
    return v.new_zeros(v.shape[0], -(-v.shape[1] // PIECE) if keep else 0, *A.shape)
