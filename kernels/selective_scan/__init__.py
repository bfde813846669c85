"""The selective scan: diagonal recurrences of N states a channel, made and read inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import Backend, choose, fit
from ..common import check_lengths
from ..documents import check_documents
from ..nodes import or_as_one
from .chunked import selective_scan_chunked
from .node import selective_scan_node
from .reference import selective_scan_reference

__all__ = ["selective_scan"]


FORMS = {"chunked": or_as_one(selective_scan_chunked, selective_scan_node), "reference": selective_scan_reference}


def selective_scan(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """N states in each of D channels, that decay, are written and read as the step says,

        h_t = exp(dt_t A) ∘ h_{t-1} + v_t write_tᵀ,    y_t = h_t read_t

    with h_t [D, N], whose decays are e^(dt_td A_dn), and h_0 = `initial_state`; with `reverse`, the same from the last
    valid step of each sequence down to the first. The T · D · N decays, inputs and states are never in memory together:
    they are made piece by piece of time, forward and backward.

    Args:
        v: [B, T, D], floating point.
        dt: [B, T, D], not negative.
        A: [D, N], not positive.
        write: [B, T, N], B of Mamba.
        read: [B, T, N], C of Mamba.
        initial_state: [B, D, N], what comes before the first step taken; None is zero.
        output_final_state: whether to return the state after the last step taken too.
        reverse: whether to run from the last step to the first.
        lengths: int64 [B], the valid steps of each sequence; all T by default. What lies past them changes nothing.
        cu_seqlens: integers [R + 1], in place of `lengths`, with B = 1: where each of R documents begins in the row,
            and T. None hears of another; states have a row for each, [R, D, N], and that of an empty one passes
            unchanged.
        backend: "auto", "chunked" or "reference".

    Returns:
        y [B, T, D] in v's dtype, zero past `lengths`; with `output_final_state`, (y, final state [B, D, N]), at least
        float32. Half precision is computed in float32.

    Raises:
        TypeError: something is not of real floating point.
        ValueError: shapes that do not fit, or an unknown backend; on a CPU, lengths outside [0, T], or cu_seqlens that
            do not rise from 0 to T.

    Source: Gu and Dao 2023, "Mamba", arXiv 2312.00752, algorithm 2, where v is Δ x. With p_t = dL/dh_t, gradients are
    p_t = dy_t read_tᵀ + exp(dt_{t+1} A) ∘ p_{t+1}, dv_t = p_t write_t, dwrite_t = p_tᵀ v_t, dread_t = h_tᵀ dy_t, and of
    the exponents dt_t A, p_t ∘ exp(dt_t A) ∘ h_{t-1}.
    """
    B, T, D = _check(v, dt, A, write, read)
    documents = check_documents("selective_scan", cu_seqlens, lengths, B, T)
    lengths = check_lengths("selective_scan", lengths, B, T)
    rows = B if documents is None else documents.N
    if initial_state is not None and list(initial_state.shape) != [rows, D, A.shape[1]]:
        what = "[B, D, N]" if documents is None else "[documents, D, N]"
        raise ValueError(
            f"selective_scan: initial_state must be {what} = {[rows, D, A.shape[1]]}, got {list(initial_state.shape)}"
        )
    implementation = choose("selective_scan", backend, FORMS, fit(v, channels={}, width=0))
    y, state = implementation(v, dt, A, write, read, initial_state, reverse, lengths, documents)
    return (y, state) if output_final_state else y


def _check(v: Tensor, dt: Tensor, A: Tensor, write: Tensor, read: Tensor) -> tuple[int, int, int]:
    if v.dim() != 3 or v.shape[1] == 0:
        raise ValueError(f"selective_scan: v must be [B, T, D] with T >= 1, got {list(v.shape)}")
    B, T, D = v.shape
    if A.dim() != 2 or A.shape[0] != D:
        raise ValueError(f"selective_scan: A must be [D, N] with D = {D}, got {list(A.shape)}")
    N = A.shape[1]
    for name, x, size in (("dt", dt, D), ("write", write, N), ("read", read, N)):
        if list(x.shape) != [B, T, size]:
            raise ValueError(f"selective_scan: {name} must be {[B, T, size]}, got {list(x.shape)}")
    for x in (v, dt, A, write, read):
        if not x.is_floating_point():
            raise TypeError(f"selective_scan: takes real numbers of floating point, got {x.dtype}")
    return B, T, D
