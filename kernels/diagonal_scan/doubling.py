"""The diagonal scan in log2(T) passes of PyTorch, for devices without a loop of their own.

A prefix scan of the pairs (a, x) under (a, x) then (a', x') = (a' a, a' x + x'), as in Hillis and Steele 1986: each
pass doubles the number of steps that a position has heard from.

Conjugates are numbers in memory here: inside an operator that runs in a compiled graph, PyTorch 2.13 multiplies with a
conjugate view as if it were none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common import valid_positions


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final state [B, D].

    Of x [B, T, D], a [D] or [B, T, D], initial_state [B, D] and a real factor of x [D].
    """
    B, T, D = x.shape
    valid_BT1, first, last = ends(x, reverse, lengths)
    batch = torch.arange(B, device=x.device)
    h = torch.where(valid_BT1, x, 0)
    h = h if factor is None else factor * h
    gate = a if a.dim() == 1 else torch.where(valid_BT1, a, 0)
    before = x.new_zeros(B, D) if initial_state is None else initial_state
    h[batch, first] += torch.where(valid_BT1[:, 0], (a if a.dim() == 1 else gate[batch, first]) * before, 0)

    span = 1
    while span < T:
        earlier, later = slice(None, -span), slice(span, None)
        source, target = (later, earlier) if reverse else (earlier, later)
        h_next = h.clone()
        if a.dim() == 1:
            h_next[:, target] += gate * h[:, source]
            gate = gate * gate
        else:
            h_next[:, target] += gate[:, target] * h[:, source]
            gate_next = torch.zeros_like(gate)
            gate_next[:, target] = gate[:, target] * gate[:, source]
            gate = gate_next
        h, span = h_next, 2 * span
    h = torch.where(valid_BT1, h, 0)
    return h, torch.where(valid_BT1[:, 0], h[batch, last], before)


def scan_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gradients`."""
    return gradients(scan, dh, d_state, h, a, initial_state, reverse, lengths, factor)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, the initial state and the factor, from those of h [B, T, D] and of the final state [B, D].

    They are made by a `scan`, and so are theirs if PyTorch can differentiate that. x is not needed: h - a^t h_0 is
    proportional to the factor, so that its gradient times itself is the sum of their products with the gradients of h.
    """
    B, _, D = h.shape
    valid_BT1, first, last = ends(h, reverse, lengths)
    batch = torch.arange(B, device=h.device)
    w = torch.where(valid_BT1, dh, 0)
    w[batch, last] += torch.where(valid_BT1[:, 0], d_state, 0)
    before = h.new_zeros(B, D) if initial_state is None else initial_state
    h_before = _shift(h, 1 if reverse else -1)
    h_before[batch, first] = before

    if a.dim() == 1:
        p, _ = scan(w, a.conj_physical(), None, not reverse, lengths, None)
        d_initial = a.conj_physical() * p[batch, first]
    else:
        a_conj = torch.where(valid_BT1, a.conj_physical(), 0)
        p, _ = scan(w, _shift(a_conj, -1 if reverse else 1), None, not reverse, lengths, None)
        d_initial = a_conj[batch, first] * p[batch, first]
    da = p * h_before.conj_physical()
    if a.dim() == 1:
        da = da.sum((0, 1))
    if factor is None:
        dx, d_factor = p, h.real.new_empty(0)
    else:
        dx = factor * p
        of_state = torch.where(valid_BT1[:, 0], d_initial * before.conj_physical(), 0)
        d_factor = ((w * h.conj_physical()).sum((0, 1)) - of_state.sum(0)).real / factor
    return dx, da, torch.where(valid_BT1[:, 0], d_initial, d_state), d_factor


def ends(x: Tensor, reverse: bool, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions are valid [B, T, 1], and the first and the last one that the scan visits [B]."""
    B, T, _ = x.shape
    lengths = torch.full((B,), T, device=x.device) if lengths is None else lengths
    end = (lengths - 1).clamp(min=0)
    first, last = (end, torch.zeros_like(end)) if reverse else (torch.zeros_like(end), end)
    return valid_positions(lengths, T)[..., None], first, last


def _shift(x: Tensor, steps: int) -> Tensor:
    """x_{t + steps} at t, zero where there is none."""
    shifted = torch.zeros_like(x)
    if steps > 0:
        shifted[:, :-steps] = x[:, steps:]
    else:
        shifted[:, -steps:] = x[:, :steps]
    return shifted
