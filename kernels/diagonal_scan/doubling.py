"""The diagonal scan in log2(T) passes of PyTorch, for devices without a loop of their own.

A prefix scan of the pairs (a, x) under (a, x) then (a', x') = (a' a, a' x + x'), as in Hillis and Steele 1986: each
pass doubles the number of steps that a position has heard from.

Conjugates are numbers in memory here: inside an operator that runs in a compiled graph, PyTorch 2.13 multiplies with a
conjugate view as if it were none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import valid_positions
from ..documents import Documents


class Ends(NamedTuple):
    """Where R sequences lie in [B, T], and how a pass in one direction goes through them."""

    valid: Tensor  # [B, T, 1], which steps count
    some: Tensor  # [R, 1], which sequences have a step
    row: Tensor  # [R]
    first: Tensor  # [R], the first step that the pass takes of each
    last: Tensor  # [R]
    ahead: (
        Tensor | None
    )  # [1, T, 1], how many steps of its document the pass takes ahead of each; None: one sequence a row

    def of(self, x: Tensor, step: Tensor) -> Tensor:
        """[B, T, D] at one step of each sequence, `first` or `last`: [R, D]."""
        return x[self.row, step]

    def add(self, x: Tensor, step: Tensor, values: Tensor) -> None:
        """Adds values [R, D] to x [B, T, D] at one step of each sequence that has one."""
        x.index_put_((self.row, step), torch.where(self.some, values, 0), accumulate=True)


def ends(x: Tensor, reverse: bool, lengths: Tensor | None, starts: Tensor | None) -> Ends:
    B, T, _ = x.shape
    if starts is not None:
        documents = Documents(starts, T)
        lengths, begin, ahead = documents.lengths, starts[:-1], documents.positions()
        if reverse:
            ahead = lengths[documents.of_steps()] - 1 - ahead
        valid, row = torch.ones_like(ahead, dtype=torch.bool)[None, :, None], torch.zeros_like(begin)
    else:
        lengths = torch.full((B,), T, device=x.device) if lengths is None else lengths
        begin, ahead, row = torch.zeros_like(lengths), None, torch.arange(B, device=x.device)
        valid = valid_positions(lengths, T)[..., None]
    low = begin.clamp(max=T - 1)  # where nothing is, anything is read
    high = (begin + lengths - 1).clamp(min=0)
    first, last = (high, low) if reverse else (low, high)
    return Ends(valid, (lengths > 0)[:, None], row, first, last, None if ahead is None else ahead[None, :, None])


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final state [R, D] of R sequences: B, or as many as documents begin in `starts` [R + 1].

    Of x [B, T, D], a [D] or [B, T, D], initial_state [R, D] and a real factor of x [D].
    """
    _, T, D = x.shape
    end = ends(x, reverse, lengths, starts)
    h = torch.where(end.valid, x, 0)
    h = h if factor is None else factor * h
    gate = a if a.dim() == 1 else torch.where(end.valid, a, 0)
    before = x.new_zeros(len(end.some), D) if initial_state is None else initial_state
    end.add(h, end.first, (a if a.dim() == 1 else end.of(gate, end.first)) * before)

    span = 1
    while span < T:
        earlier, later = slice(None, -span), slice(span, None)
        source, target = (later, earlier) if reverse else (earlier, later)
        # What comes from another document counts as 0, whatever it is.
        own = None if end.ahead is None else end.ahead[:, target] >= span
        h_next = h.clone()
        if a.dim() == 1:
            h_next[:, target] += gate * _kept(h[:, source], own)
            gate = gate * gate
        else:
            h_next[:, target] += gate[:, target] * _kept(h[:, source], own)
            gate_next = torch.zeros_like(gate)
            gate_next[:, target] = gate[:, target] * _kept(gate[:, source], own)
            gate = gate_next
        h, span = h_next, 2 * span
    h = torch.where(end.valid, h, 0)
    return h, torch.where(end.some, end.of(h, end.last), before)


def scan_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gradients`."""
    return gradients(scan, dh, d_state, h, a, initial_state, reverse, lengths, factor, starts)


def gradients(
    scan: Callable[..., tuple[Tensor, Tensor]],
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, the initial state and the factor, from those of h [B, T, D] and of the final state [R, D].

    They are made by a `scan`, and so are theirs if PyTorch can differentiate that. x is not needed: h - a^t h_0 is
    proportional to the factor, so that its gradient times itself is the sum of their products with the gradients of h.
    """
    end = ends(h, reverse, lengths, starts)
    w = torch.where(end.valid, dh, 0)
    end.add(w, end.last, d_state)
    before = torch.zeros_like(d_state) if initial_state is None else initial_state
    own = None if end.ahead is None else end.ahead > 0
    h_before = _kept(_shift(h, 1 if reverse else -1), own)
    end.add(h_before, end.first, before)

    if a.dim() == 1:
        p, _ = scan(w, a.conj_physical(), None, not reverse, lengths, None, starts)
        d_initial = a.conj_physical() * end.of(p, end.first)
    else:
        a_conj = torch.where(end.valid, a.conj_physical(), 0)
        after = _shift(_kept(a_conj, own), -1 if reverse else 1)
        p, _ = scan(w, after, None, not reverse, lengths, None, starts)
        d_initial = end.of(a_conj, end.first) * end.of(p, end.first)
    da = p * h_before.conj_physical()
    if a.dim() == 1:
        da = da.sum((0, 1))
    if factor is None:
        dx, d_factor = p, h.real.new_empty(0)
    else:
        dx = factor * p
        of_state = torch.where(end.some, d_initial * before.conj_physical(), 0)
        d_factor = ((w * h.conj_physical()).sum((0, 1)) - of_state.sum(0)).real / factor
    return dx, da, torch.where(end.some, d_initial, d_state), d_factor


def _kept(x: Tensor, own: Tensor | None) -> Tensor:
    return x if own is None else torch.where(own, x, 0)


def _shift(x: Tensor, steps: int) -> Tensor:
    """x_{t + steps} at t, zero where there is none."""
    shifted = torch.zeros_like(x)
    if steps > 0:
        shifted[:, :-steps] = x[:, steps:]
    else:
        shifted[:, -steps:] = x[:, :steps]
    return shifted
