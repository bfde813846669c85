"""Attention with random features for the exponential (FAVOR+), linear in time."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from ..backends import Backend, Sequences, choose, fit
from ..common import check_lengths, query_heads
from ..documents import check_documents
from ..nodes import or_as_one
from .chunked import favor_attention_chunked
from .node import favor_attention_node
from .reference import favor_attention_reference
from .state import FavorState

__all__ = ["FavorState", "favor_attention"]

MAX_CHANNELS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}  # of a head, in the fused form


def _fused(*arguments: Any) -> tuple[Tensor, FavorState | None]:
    from .fused import favor_attention_fused  # imports Triton

    return favor_attention_fused(*arguments)


FORMS = {
    "chunked": or_as_one(favor_attention_chunked, favor_attention_node),
    "reference": favor_attention_reference,
    "fused": _fused,
}


class Options(Sequences, total=False):
    causal: bool
    initial_state: FavorState | None


@overload
def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    output_final_state: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    output_final_state: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, FavorState]: ...
@overload
def favor_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, output_final_state: bool, **options: Unpack[Options]
) -> Any: ...
def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    causal: bool = False,
    initial_state: FavorState | None = None,
    output_final_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """Softmax attention with exp(q·k) estimated from M positive random features, in time and memory linear in T.

        φ(x) = exp(W x - |x|²/2) / √M        o_i = sum_j φ(q_i)·φ(k_j) v_j / sum_j φ(q_i)·φ(k_j)

    over all steps j or, if causal, over j ≤ i. If the rows of W are distributed as N(0, I), φ(q)·φ(k) is an unbiased
    estimate of exp(q·k), with variance exp(2 q·k) (exp(|q + k|²) - 1) / M where the rows are independent: keep |q| and
    |k| around 1.

    Nothing is added to the features or to the denominator. Instead each feature of the keys is kept relative to the
    largest seen, and each query's relative to its largest product with those, so that a denominator is 1 or more
    however large the inputs. An additive epsilon, as in other code, moves outputs by tens of per cent where features
    are small; a maximum over all keys, as there, would let a causal output depend on the future. All maxima cancel, and
    are constants for the gradient.

    Args:
        q: [B, T, H, D]. There is no hidden scale: multiply q and k by D^(-1/4) for softmax attention's usual one.
        k: [B, T, G, D]; G divides H, and head h reads key/value head h // (H / G).
        v: [B, T, G, Dv].
        projection: W, [H, M, D], or [M, D] for all heads.
        causal: whether step t sees only steps up to t, itself included.
        initial_state: where an earlier call with the same projection stopped (causal only).
        output_final_state: return the state after `lengths` (or T) steps too (causal only). Gradients flow through
            its sums; its log_scale is a constant.
        lengths: int64 [B], the valid steps of each sequence; all T by default. What lies past them changes nothing.
        cu_seqlens: int32 or int64 [N + 1], in place of `lengths`: where each of N documents begins that lie one behind
            the other in a batch of 1, and T. Each is a sequence of its own, and states have N rows in place of B.
        backend: "auto", "fused", "chunked" or "reference".

    Returns:
        o [B, T, H, Dv] in v's dtype, zero past `lengths`; with `output_final_state`, (o, `FavorState`), the state in
        the accumulation dtype: at least float32.

    Raises:
        ValueError: shapes that do not fit, a state without `causal`, `cu_seqlens` that are no documents of one row, or
            an unknown backend.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", lemma 1 and equations 4 and 5.
    """
    _check(q, k, v, projection)
    documents = check_documents("favor_attention", cu_seqlens, lengths, *q.shape[:2])
    lengths = check_lengths("favor_attention", lengths, *q.shape[:2])
    rows = q.shape[0] if documents is None else documents.N
    _check_states(rows, q, v, projection, causal, initial_state, output_final_state)
    H = q.shape[2]
    k, v, projection = query_heads(k, H), query_heads(v, H), projection.expand(H, -1, -1)
    refused = "no kernel has a gradient of the projection" if projection.requires_grad else None
    implementation = choose("favor_attention", backend, FORMS, fit(q, k, v, channels=MAX_CHANNELS, also=refused))
    o, final_state = implementation(q, k, v, projection, causal, initial_state, lengths, documents)
    return (o, final_state) if output_final_state else o


def _check(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> None:
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[1] > 0
    if not fits or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            "favor_attention: expected q and k [B, T, H, D] and v [B, T, H, Dv] with T >= 1, k and v with G heads "
            f"where G divides H, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    (_, _, H, D), G = q.shape, k.shape[2]
    if G != H and (G == 0 or H % G):
        raise ValueError(f"favor_attention: {G} key/value heads do not divide {H} query heads")
    M = projection.shape[-2] if projection.dim() in (2, 3) else 0
    if M == 0 or list(projection.shape) not in ([M, D], [H, M, D]):
        raise ValueError(
            f"favor_attention: projection must be [H, M, D] = [{H}, M, {D}] or [M, D] = [M, {D}] with M >= 1, "
            f"got {list(projection.shape)}"
        )
    for name, x in (("q", q), ("k", k), ("v", v), ("projection", projection)):
        if not x.is_floating_point():
            raise ValueError(f"favor_attention: {name} must be a real floating-point tensor, got {x.dtype}")


def _check_states(
    rows: int,
    q: Tensor,
    v: Tensor,
    projection: Tensor,
    causal: bool,
    initial_state: FavorState | None,
    output_final_state: bool,
) -> None:
    if not causal and (initial_state is not None or output_final_state):
        raise ValueError(
            "favor_attention: initial_state and output_final_state need causal=True; "
            "with causal=False every step sees the whole sequence and there is no state to carry"
        )
    if initial_state is None:
        return
    H, M = q.shape[2], projection.shape[-2]
    given, expected = [list(x.shape) for x in initial_state], [[rows, H, M, v.shape[-1] + 1], [rows, H, M]]
    if given != expected:
        raise ValueError(
            "favor_attention: initial_state must hold sums [B, H, M, Dv + 1] and log_scale [B, H, M], of documents N "
            f"rows, here {expected[0]} and {expected[1]}, got {given[0]} and {given[1]}"
        )
