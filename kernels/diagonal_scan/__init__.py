"""The diagonal scan: a first-order linear recurrence, one independent channel beside the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from ..backends import Backend, Sequences, choose, fit
from ..common import check_lengths
from ..documents import Documents, check_documents
from ..nodes import or_as_one
from .chunked import diagonal_scan_chunked
from .node import diagonal_scan_node
from .reference import diagonal_scan_reference

__all__ = ["diagonal_scan"]


def _fused(*arguments: Any) -> tuple[Tensor, Tensor]:
    from .fused import diagonal_scan_fused  # imports Triton

    return diagonal_scan_fused(*arguments)


def _fused_both(*arguments: Any) -> tuple[Tensor, Tensor]:
    from .fused import both_scans_fused

    return both_scans_fused(*arguments)


def _one_by_one(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda x, a, lengths, factor, documents: (
        scan(x, a, None, False, lengths, factor, documents)[0],
        scan(x, a, None, True, lengths, factor, documents)[0],
    )


# Of the fused form: any number.
CHANNELS = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16, torch.complex64), sys.maxsize)
FORMS = {
    "chunked": or_as_one(diagonal_scan_chunked, diagonal_scan_node),
    "reference": diagonal_scan_reference,
    "fused": _fused,
}
BOTH = {name: _fused_both if name == "fused" else _one_by_one(form) for name, form in FORMS.items()}


class Options(Sequences, total=False):
    factor: Tensor | None
    initial_state: Tensor | None


@overload
def diagonal_scan(
    x: Tensor,
    a: Tensor,
    *,
    output_final_state: Literal[False] = False,
    reverse: bool = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def diagonal_scan(
    x: Tensor, a: Tensor, *, output_final_state: Literal[True], reverse: bool = False, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def diagonal_scan(
    x: Tensor, a: Tensor, *, output_final_state: bool, reverse: bool = False, **options: Unpack[Options]
) -> Any: ...
@overload
def diagonal_scan(
    x: Tensor, a: Tensor, *, reverse: Literal["both"], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
def diagonal_scan(
    x: Tensor,
    a: Tensor,
    *,
    factor: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool | Literal["both"] = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """The linear recurrence with diagonal coefficients, real or complex,

        h_t = a_t ∘ h_{t-1} + f ∘ x_t        with h_0 = `initial_state`, zero by default, and f = `factor`, 1 by default

    and, with `reverse`, h_t = a_t ∘ h_{t+1} + f ∘ x_t from the last valid step of each sequence down to the first;
    both, with reverse="both".

    Args:
        x: [B, T, D] floating point or complex.
        a: coefficients in x's dtype: [D] constant in time, or [B, T, D]. a_t = 0 forgets everything before that step.
        factor: f, real [D], not 0: multiplies x on its way into the state, at no pass over memory more. Its gradient is
            made from h less what `initial_state` left in it, so that it is only as exact as |f x| is beside that.
        initial_state: [B, D], what comes before the first step taken; real where x is, complex where x is.
        output_final_state: whether to return the state after the last step taken too. It continues the sequence as the
            `initial_state` of another call; gradients flow through both.
        reverse: whether to run from the last step to the first, or "both"; nothing is flipped in memory.
        lengths: int64 [B], the valid steps of each sequence; all T by default. What lies past them changes nothing.
        cu_seqlens: integers [N + 1], in place of `lengths`, with B = 1: where each of N documents begins that lie one
            behind the other in the T steps, and T. None hears of another; states have a row for each, [N, D], and that
            of an empty one passes unchanged.
        backend: "auto", "fused", "chunked" or "reference".

    Returns:
        h [B, T, D] in x's dtype, zero past `lengths`; with `output_final_state`, (h, final state [B, D]): h at the last
        step taken, at least float32 (complex64). Half precision is computed in float32. With reverse="both" two h, the
        forward one first, of one launch where the fused form runs.

    Raises:
        TypeError: x and a differ in dtype, the state is complex and x is not (or the reverse), or the factor is.
        ValueError: shapes that do not fit, a state with reverse="both", another `reverse`, or an unknown backend; on a
            CPU, lengths outside [0, T], cu_seqlens that do not rise from 0 to T, and a factor of 0.

    Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", equation 4; Smith et al.
    2023, "Simplified State Space Layers", section 2.2. With p_t = dL/dh_t, the gradients are
    p_t = w_t + conj(a_{t+1}) p_{t+1}, dx_t = f p_t, da_t = p_t conj(h_{t-1}), dh_0 = conj(a_1) p_1, and f df is the
    real part of sum_t w_t conj(h_t) - dh_0 conj(h_0).
    """
    _check(x, a, factor)
    documents = check_documents("diagonal_scan", cu_seqlens, lengths, *x.shape[:2])
    lengths = check_lengths("diagonal_scan", lengths, *x.shape[:2])
    if initial_state is not None:
        _check_state(initial_state, x, documents)
    if reverse not in (False, True, "both"):
        raise ValueError(f'diagonal_scan: reverse={reverse!r}; valid: False, True, "both"')
    fitting = fit(x, channels=CHANNELS, width=0)
    if reverse == "both":
        if initial_state is not None or output_final_state:
            raise ValueError("diagonal_scan: a state belongs to one direction; valid with it: reverse=False or True")
        return choose("diagonal_scan", backend, BOTH, fitting)(x, a, lengths, factor, documents)
    implementation = choose("diagonal_scan", backend, FORMS, fitting)
    h, final_state = implementation(x, a, initial_state, reverse, lengths, factor, documents)
    return (h, final_state) if output_final_state else h


def _check(x: Tensor, a: Tensor, factor: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"diagonal_scan: x must be [B, T, D] with T >= 1, got {list(x.shape)}")
    B, T, D = x.shape
    if a.dim() not in (1, 3) or a.shape != (x.shape if a.dim() == 3 else x.shape[2:]):
        raise ValueError(f"diagonal_scan: a must be [D] = [{D}] or [B, T, D] = [{B}, {T}, {D}], got {list(a.shape)}")
    if not (x.is_floating_point() or x.is_complex()) or a.dtype != x.dtype:
        raise TypeError(
            f"diagonal_scan: x and a must share one floating-point or complex dtype, got {x.dtype} and {a.dtype}"
        )
    if factor is not None and list(factor.shape) != [D]:
        raise ValueError(f"diagonal_scan: factor must be [D] = [{D}], got {list(factor.shape)}")
    if factor is not None and not factor.is_floating_point():
        raise TypeError(f"diagonal_scan: factor must be real and of floating point, got {factor.dtype}")


def _check_state(state: Tensor, x: Tensor, documents: Documents | None) -> None:
    rows, D = x.shape[0] if documents is None else documents.N, x.shape[-1]
    if list(state.shape) != [rows, D]:
        what = "[B, D]" if documents is None else "[N, D], a row for each document,"
        raise ValueError(f"diagonal_scan: initial_state must be {what} = [{rows}, {D}], got {list(state.shape)}")
    if state.is_complex() != x.is_complex():
        raise TypeError(
            "diagonal_scan: initial_state must be real where x is and complex where x is, "
            f"got {state.dtype} and {x.dtype}"
        )
