"""Linear attention: attention without softmax, as a matrix-valued state carried through time."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from ..backends import Backend, Fit, Sequences, choose, fit
from ..common import check_lengths, check_log_decay, query_heads
from ..documents import check_documents
from ..nodes import as_one
from .chunked import linear_attention_chunked
from .node import linear_attention_node
from .reference import linear_attention_reference
from .shared import linear_attention_shared

__all__ = ["linear_attention"]

# Of a head in the fused form, which keeps its state in registers, and with a decay per step its pairs' decays too.
MAX_CHANNELS_PER_STEP = 128
MAX_CHANNELS = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 64}


def _fused(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    from .operator import linear_attention_fused  # imports Triton

    return linear_attention_fused(*arguments)


FORMS = {"chunked": linear_attention_chunked, "reference": linear_attention_reference, "fused": _fused}


class Options(Sequences, total=False):
    log_decay: Tensor | None
    causal: bool
    normalize: bool
    initial_state: Tensor | None


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: bool, **options: Unpack[Options]
) -> Any: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    causal: bool = False,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """Linear attention with an optional decay, per head or per channel of k, in time and memory linear in T.

    Causal, from the state S_0 = `initial_state` (zero by default), with g = `log_decay` (zero by default):

        S_t = exp(g_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t

    Bidirectional, every step sees every other, weighted by the decay between the two:

        o_i = sum_j exp(sum of g over (min(i, j), max(i, j)]) (q_i · k_j) v_j

    With a decay per channel, diag(exp(g_t)) takes the place of exp(g_t): each row of S, and each term of q_i · k_j, has
    its own.

    `normalize=True` divides o_t by n_t = q_t · z_t, where z_t is the same sum with 1 in place of v; where n_t is
    exactly 0 the output is 0. Nothing is added to n_t. Feature maps and scales are the caller's.

    Args:
        q: [B, T, H, Dk], after its feature map.
        k: [B, T, G, Dk], after its own; G divides H, and head h reads key/value head h // (H / G).
        v: [B, T, G, Dv]. Or q has G heads as k, and v has H, which share queries and keys likewise.
        log_decay: natural logarithm of the decay per step, at most 0: [H] constant in time, [B, T, H], or
            [B, T, H, Dk], one for each channel of k. -inf forgets everything before that step. Values are looked at on
            a CPU, outside compiled graphs; elsewhere they are trusted.
        causal: whether step t sees only steps up to t, itself included.
        normalize: whether to divide by the sum of weights.
        initial_state: S_0, causal only: [B, H, Dk, Dv], or [B, H, Dk, Dv + 1] with `normalize`, whose last column is z.
        output_final_state: whether to return the state after the last valid step too, causal only. It continues the
            sequence as the `initial_state` of another call; gradients flow through both.
        lengths: int64 [B], the valid steps of each sequence; all T by default. What lies past them changes nothing.
        cu_seqlens: int32 or int64 [N + 1], in place of `lengths`: where each of N documents begins that lie one behind
            the other in a batch of 1, and T. Each is a sequence of its own, and states have N rows in place of B.
        backend: "auto", "fused", "chunked" or "reference".

    Returns:
        o [B, T, H, Dv] in v's dtype, zero past `lengths`; with `output_final_state`, (o, final state), the state in
        the accumulation dtype: at least float32.

    Raises:
        ValueError: shapes that do not fit, a decay above 0, a state without `causal`, `cu_seqlens` that are no
            documents of one row, or an unknown backend.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", equations 8-12 and 18-20; the decay is that of Sun et
    al. 2023, "Retentive Network", equations 5 and 7 (per head), of Mamba-2 (per head and step), and of Yang et al.
    2023, "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv 2312.06635), equation 3 (per
    channel), whose section 4.3 has the chunks within chunks that it is computed in.
    """
    _check(q, k, v, log_decay)
    documents = check_documents("linear_attention", cu_seqlens, lengths, *q.shape[:2])
    lengths = check_lengths("linear_attention", lengths, *q.shape[:2])
    rows, H = q.shape[0] if documents is None else documents.N, max(q.shape[2], v.shape[2])
    check_log_decay("linear_attention", log_decay, lengths)
    _check_states([rows, H, q.shape[3], v.shape[3] + normalize], causal, normalize, initial_state, output_final_state)
    implementation = choose("linear_attention", backend, FORMS, _fit(q, k, v, log_decay, causal))
    chunked = implementation is linear_attention_chunked
    if q.shape[2] < H and chunked:
        implementation = linear_attention_shared
    else:
        q, k, v = (query_heads(x, H) for x in (q, k, v))
    if chunked and as_one():
        implementation = linear_attention_node
    o, final_state = implementation(
        q, k, v, log_decay, causal, normalize, initial_state, lengths, documents, output_final_state
    )
    return (o, final_state) if output_final_state else o


def _fit(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, causal: bool) -> Fit:
    most = MAX_CHANNELS
    if log_decay is not None and log_decay.dim() == 3:
        most = {dtype: min(channels, MAX_CHANNELS_PER_STEP) for dtype, channels in most.items()}
    decays = "no kernel decays in both directions" if not causal and log_decay is not None else None
    return fit(q, k, v, channels=most, also=decays)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    fits = q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[1] > 0
    if not fits or q.shape[3] != k.shape[3] or k.shape[2] != min(q.shape[2], v.shape[2]):
        raise ValueError(
            "linear_attention: expected q and k [B, T, H, Dk] and v [B, T, H, Dv] with T >= 1, q and k or else "
            f"k and v with G heads where G divides H, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    (B, T, G, Dk), H = k.shape, max(q.shape[2], v.shape[2])
    if G != H and (G == 0 or H % G):
        fewer, more = ("key/value", "query") if q.shape[2] == H else ("query/key", "value")
        raise ValueError(f"linear_attention: {G} {fewer} heads do not divide {H} {more} heads")
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"linear_attention: {name} must be a real floating-point tensor, got {x.dtype}")
    if log_decay is not None and list(log_decay.shape) not in ([H], [B, T, H], [B, T, H, Dk]):
        raise ValueError(
            f"linear_attention: log_decay must be [H] = [{H}], [B, T, H] = [{B}, {T}, {H}] or "
            f"[B, T, H, Dk] = [{B}, {T}, {H}, {Dk}], got {list(log_decay.shape)}"
        )


def _check_states(
    expected: list[int],
    causal: bool,
    normalize: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> None:
    if not causal and (initial_state is not None or output_final_state):
        raise ValueError(
            "linear_attention: initial_state and output_final_state need causal=True; "
            "with causal=False every step sees the whole sequence and there is no state to carry"
        )
    if initial_state is None:
        return
    if not initial_state.is_floating_point():
        raise ValueError(
            f"linear_attention: initial_state must be a real floating-point tensor, got {initial_state.dtype}"
        )
    if list(initial_state.shape) != expected:
        raise ValueError(
            f"linear_attention: initial_state must be {expected} "
            f"([B, H, Dk, {'Dv + 1] with' if normalize else 'Dv] without'} normalize; of documents N rows), "
            f"got {list(initial_state.shape)}"
        )
