"""The scan of RG-LRU: real decays that a gate sets, and inputs that are scaled by what they leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, choose, fit
from ..common import accumulation_dtype, autocast_dtype, can_be_looked_at, check_lengths, zero_padding
from ..derivatives import by_hand
from ..diagonal_scan import CHANNELS
from ..documents import Documents, check_documents
from .plain import real_gated_scan_plain
from .reference import real_gated_scan_reference
from .unit import Gate, real_gated_unit_in_loop

__all__ = ["Gate", "real_gated_scan", "real_gated_unit"]

FORMS: dict[str, Callable[..., Any]] = {
    "chunked": real_gated_scan_plain,
    "reference": real_gated_scan_reference,
    "fused": partial(real_gated_scan_plain, backend="fused"),
}


class Ends(NamedTuple):
    """Where R sequences begin and end, as forms take it."""

    initial_state: Tensor | None  # [R, D]
    begins: Tensor | None  # [R]
    reverse: bool
    lengths: Tensor | None  # [B]
    documents: Documents | None


def real_gated_scan(
    v: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    rate: Tensor,
    *,
    initial_state: Tensor | None = None,
    begins: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """A diagonal recurrence of which every step forgets as its gate says,

        h_t = a_t ∘ h_{t-1} + √(1 - a_t²) ∘ σ(input_gate_t) ∘ v_t,    a_t = exp(-rate ∘ σ(recurrence_gate_t))

    where a is 0, and so the root 1, at the step that a sequence begins with; with `reverse`, the same from the last
    valid step of each sequence down to the first. The root's slope by 1 - a² is cut at `STEEPEST`.

    Args:
        v: [B, T, D], floating point.
        recurrence_gate, input_gate: [B, T, D], ahead of their sigmoids.
        rate: [D], at least 0.
        initial_state: [B, D], what comes before the first step taken.
        begins: bool [B], which sequences begin with their first step, whatever their `initial_state`; None is all
            where there is no state, and none where there is one.
        output_final_state: whether to return the state after the last step taken too.
        reverse: whether to run from the last step to the first.
        lengths: int64 [B], the valid steps of each sequence; all T by default. What lies past them changes nothing.
        cu_seqlens: integers [N + 1], in place of `lengths`, with B = 1: where each document begins in the row, and T.
            None hears of another; states have a row for each, and that of an empty one passes unchanged.
        backend: "auto", "fused", "chunked" or "reference".

    Returns:
        h [B, T, D] in v's dtype, zero past `lengths`; with `output_final_state`, (h, final state [B, D]), at least
        float32. Half precision is computed in float32.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend; on a CPU, lengths outside [0, T], or cu_seqlens that
            do not rise from 0 to T.

    Source: De et al. 2024, "Griffin", arXiv 2402.19427, equations 1 to 4.
    """
    shapes = [list(x.shape) for x in (v, recurrence_gate, input_gate, rate)]
    if v.dim() != 3 or v.shape[1] == 0 or shapes != [shapes[0], shapes[0], shapes[0], shapes[0][2:]]:
        raise ValueError(f"real_gated_scan: expected v and two gates [B, T, D] with T >= 1, and rate [D], got {shapes}")
    ends = _checked(v, initial_state, begins, reverse, lengths, cu_seqlens)
    v, recurrence_gate, input_gate = (zero_padding(x, ends.lengths) for x in (v, recurrence_gate, input_gate))
    implementation = choose("real_gated_scan", backend, FORMS, fit(v, channels=CHANNELS, width=0))
    h, state = implementation(v, recurrence_gate, input_gate, rate, *ends)
    return (h, state) if output_final_state else h


def real_gated_unit(
    u: Tensor,
    recurrence_gate: Gate,
    input_gate: Gate,
    rate: Tensor,
    *,
    initial_state: Tensor | None = None,
    begins: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """`real_gated_scan` of u [B, T, D], whose gates are layers of u too. A CPU keeps no gates for the gradient."""
    ends = _checked(u, initial_state, begins, reverse, lengths, cu_seqlens)
    u = zero_padding(u, ends.lengths)
    form = choose("real_gated_scan", "auto", FORMS, fit(u, channels=CHANNELS, width=0))
    if form is real_gated_scan_plain and by_hand() and can_be_looked_at(u):
        h, state = real_gated_unit_in_loop(u, recurrence_gate, input_gate, rate, *ends)
        h = h.to(u.dtype)
    else:
        dtype = autocast_dtype(u)
        h, state = form(u, recurrence_gate.plainly(u, dtype), input_gate.plainly(u, dtype), rate, *ends)
    return (h, state) if output_final_state else h


def _checked(
    v: Tensor,
    initial_state: Tensor | None,
    begins: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Ends:
    B, T = v.shape[:2]
    documents = check_documents("real_gated_scan", cu_seqlens, lengths, B, T)
    lengths = check_lengths("real_gated_scan", lengths, B, T)
    rows = B if documents is None else documents.N
    for name, x, shape in (("initial_state", initial_state, [rows, v.shape[2]]), ("begins", begins, [rows])):
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"real_gated_scan: {name} must be {shape}, a row for each sequence, got {list(x.shape)}")
    if initial_state is not None:
        initial_state = initial_state.to(accumulation_dtype(v.dtype))
        begins = torch.zeros(rows, dtype=torch.bool, device=v.device) if begins is None else begins
    return Ends(initial_state, begins, reverse, lengths, documents)
