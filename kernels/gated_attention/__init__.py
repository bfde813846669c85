"""Mixed-chunk gated attention: squared-relu attention inside a chunk, linear attention beyond it."""

from __future__ import annotations

import math
from typing import Any, Literal, Required, Unpack, overload

import torch
from torch import Tensor

from ..backends import Backend, Fit, Sequences, choose, fit
from ..common import check_lengths
from ..documents import Documents, check_documents
from ..nodes import or_as_one
from .chunked import gated_attention_chunked
from .node import gated_attention_node
from .reference import gated_attention_reference
from .state import GatedAttentionState

__all__ = ["GatedAttentionState", "gated_attention"]

MAX_CHANNELS = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}  # of keys, in the fused form


def _fused(*arguments: Any, **options: Any) -> tuple[Tensor, GatedAttentionState | None]:
    from .fused import gated_attention_fused  # imports Triton

    return gated_attention_fused(*arguments, **options)


FORMS = {
    "chunked": or_as_one(gated_attention_chunked, gated_attention_node),
    "reference": gated_attention_reference,
    "fused": _fused,
}


class Options(Sequences, total=False):
    chunk_len: Required[int]
    bias: Tensor | None
    causal: bool
    scale: float | None
    initial_state: GatedAttentionState | None


@overload
def gated_attention(
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    *,
    output_final_state: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def gated_attention(
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    *,
    output_final_state: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, GatedAttentionState]: ...
@overload
def gated_attention(
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    *,
    output_final_state: bool,
    **options: Unpack[Options],
) -> Any: ...
def gated_attention(
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    *,
    chunk_len: int,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    initial_state: GatedAttentionState | None = None,
    output_final_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """FLASH's mixture of quadratic attention inside chunks and linear attention over all of them, gated by u.

    With c(i) = floor(i / chunk_len), the chunk of position i, and n the length of the sequence:

        o_i = u_i ∘ (sum_{j: c(j) = c(i)} relu²(scale q_quad_i · k_quad_j + b_{j-i}) v_j + L_i)
        L_i = sum_j (q_lin_i · k_lin_j) v_j / n                                        bidirectional
        L_i = sum_{j: c(j) < c(i)} (q_lin_i · k_lin_j) v_j / (c(i) chunk_len)          causal, 0 in the first chunk

    and, causal, j ≤ i in the first sum too. Time and memory are linear in T for a given `chunk_len`; causal, there is a
    state of [S, E] for every chunk, so chunks shorter than S E / (S + E) cost memory.

    L is a mean over the keys that it sums: n is a sequence's own length, so that padding changes nothing, and the
    causal sum is divided by the number of its terms (Su, post 8934). The paper's code divides the causal sum by
    `chunk_len` instead, which lets L grow with the position; multiply q_lin_i by c(i) for that.

    Args:
        u, v: [B, T, E], the gate and the values.
        q_quad, k_quad, q_lin, k_lin: [B, T, S], queries and keys of the two attentions.
        chunk_len: positions in a chunk, counted from the beginning of the sequence.
        bias: b, by the offset j - i of a key: from 1 - chunk_len to 0, [chunk_len], if causal, and on to chunk_len - 1,
            [2 chunk_len - 1], if not; zero by default.
        causal: hide what comes later.
        scale: inside relu². None is 1/√(chunk_len S), weights of relu²(q·k) / (chunk_len S) (Su, post 8934);
            the paper's is 1/chunk_len.
        initial_state: where an earlier call with the same `chunk_len` stopped (causal only).
        output_final_state: return the state after `lengths` (or T) positions too (causal only); gradients flow through
            both.
        lengths: int64 [B], the valid positions of each sequence in this call; all T by default.
        cu_seqlens: int32 or int64 [N + 1], in place of `lengths`, with B = 1: where each of N documents begins that lie
            one behind the other in the T positions, and T. Chunks are counted from the beginning of each, none hears of
            another, and states have N rows.
        backend: "auto", "fused" (but for a single step with a state), "chunked" or "reference".

    Returns:
        o [B, T, E] in v's dtype, zero past `lengths`, and the `GatedAttentionState`, float32 at least, if asked for.

    Raises:
        ValueError: shapes that do not fit together, a state asked of bidirectional attention or made for another
            `chunk_len`, cu_seqlens that do not rise from 0 to T, or an unknown backend.

    Source: Hua et al., "Transformer Quality in Linear Time" (2022), section 3.2.
    """
    _check(u, q_quad, k_quad, q_lin, k_lin, v, chunk_len, bias, causal, initial_state, output_final_state)
    documents = check_documents("gated_attention", cu_seqlens, lengths, *u.shape[:2])
    if initial_state is not None:
        _check_state(initial_state, u, q_quad, chunk_len, documents)
    lengths = check_lengths("gated_attention", lengths, *u.shape[:2])
    single = u.shape[1] == 1 and (initial_state is not None or output_final_state)
    run = choose("gated_attention", backend, FORMS, _fit(u, v, q_quad, k_quad, q_lin, k_lin, single=single))
    o, state = run(
        u,
        q_quad,
        k_quad,
        q_lin,
        k_lin,
        v,
        chunk_len=chunk_len,
        bias=bias,
        causal=causal,
        scale=1 / math.sqrt(chunk_len * q_quad.shape[-1]) if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        lengths=lengths,
        documents=documents,
    )
    return (o, state) if output_final_state else o


def _fit(u: Tensor, v: Tensor, *keys: Tensor, single: bool) -> Fit:
    also = "no kernel makes a single step with a state" if single else None
    return fit(u[..., :1], v[..., :1], *keys, channels=MAX_CHANNELS, also=also)  # u and v may be of any width


def _check(
    u: Tensor,
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    chunk_len: int,
    bias: Tensor | None,
    causal: bool,
    initial_state: GatedAttentionState | None,
    output_final_state: bool,
) -> None:
    keys = (q_quad, k_quad, q_lin, k_lin)
    fits = u.dim() == 3 and u.shape == v.shape and u.shape[1] > 0 and q_quad.dim() == 3
    if not fits or any(x.shape != q_quad.shape for x in keys) or q_quad.shape[:2] != u.shape[:2]:
        raise ValueError(
            "gated_attention: expected u and v [B, T, E] and q_quad, k_quad, q_lin and k_lin [B, T, S] with T >= 1, "
            f"got {list(u.shape)}, {list(v.shape)} and {', '.join(str(list(x.shape)) for x in keys)}"
        )
    if chunk_len < 1:
        raise ValueError(f"gated_attention: chunk_len must be 1 or more, got {chunk_len}")
    offsets = chunk_len if causal else 2 * chunk_len - 1
    if bias is not None and list(bias.shape) != [offsets]:
        raise ValueError(
            f"gated_attention: bias must be [{offsets}], one per offset inside a chunk of {chunk_len}, "
            f"with causal={causal}; got {list(bias.shape)}"
        )
    if not causal and (initial_state is not None or output_final_state):
        raise ValueError("gated_attention: only causal attention has a state; valid: causal=True")


def _check_state(
    state: GatedAttentionState, u: Tensor, q_quad: Tensor, chunk_len: int, documents: Documents | None
) -> None:
    rows = u.shape[0] if documents is None else documents.N
    S, E = q_quad.shape[-1], u.shape[-1]
    expected = [[rows, S, E], [rows, chunk_len, S], [rows, chunk_len, S], [rows, chunk_len, E], [rows]]
    given = [list(x.shape) for x in state]
    if given != expected:
        names = ", ".join(f"{n} {s}" for n, s in zip(GatedAttentionState._fields, expected, strict=True))
        each = "" if documents is None else ", a row for each document"
        raise ValueError(f"gated_attention: initial_state must be {names}{each}, got {given}")
