"""The delta rule: linear attention whose state forgets what it says of a key before it writes there."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from ..backends import Backend, Sequences, choose, fit
from ..common import check_lengths, check_log_decay
from ..documents import check_documents
from ..nodes import or_as_one
from .chunked import delta_rule_chunked
from .node import delta_rule_node
from .reference import delta_rule_reference

__all__ = ["delta_rule"]

# Of a head in the fused form, which keeps its state in registers.
MAX_CHANNELS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}


def _fused(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    from .operator import delta_rule_fused  # imports Triton

    return delta_rule_fused(*arguments)


FORMS = {"chunked": or_as_one(delta_rule_chunked, delta_rule_node), "reference": delta_rule_reference, "fused": _fused}


class Options(Sequences, total=False):
    log_decay: Tensor | None
    erase: Tensor | None
    initial_state: Tensor | None


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    output_final_state: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, output_final_state: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, output_final_state: bool, **options: Unpack[Options]
) -> Any: ...
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """The delta rule with an optional decay, per head or per channel of k, in time and memory linear in T. Causal.

    From the state S_0 = `initial_state` (zero by default), with g = `log_decay` (zero by default) and r = `erase`
    (beta k by default), a step decays, reads, and writes what was missing; outputs see their own step:

        S' = exp(g_t) S_{t-1}        S_t = S' + k_t (beta_t v_t - S'ᵀ r_t)ᵀ        o_t = S_tᵀ q_t

    With a decay per channel, diag(exp(g_t)) takes the place of exp(g_t). By default S_t is (1 - beta k kᵀ) S' +
    beta k vᵀ: of what S' says of k, a share of beta makes room for v. Scales and normalisations are the caller's.

    Keys are taken to have length 1. Then no eigenvalue of 1 - beta k kᵀ lies outside [-1, 1] for beta of 0 to 2, and
    the triangular systems of a chunk have inverses of numbers up to beta. Other lengths are computed as the equations
    say, but where beta |k|² is above 2 states grow from step to step, within a chunk already: keys of length 4 that
    resemble each other make numbers of 1e17 there, and outputs are lost in rounding. With `erase`, r·k takes the place
    of beta |k|².

    Args:
        q: [B, T, G, Dk].
        k: [B, T, G, Dk]; G divides H, and head h reads query/key head h // (H / G).
        v: [B, T, H, Dv].
        beta: [B, T, H], how much of v is written, and by default how much is erased: from 0 to 2.
        log_decay: natural logarithm of the decay per step, at most 0: [B, T, H], or [B, T, H, Dk], one for each channel
            of k. -inf forgets everything before that step. Values are looked at on a CPU, outside of graphs.
        erase: r [B, T, H, Dk], what is read from the state and taken away at k.
        initial_state: S_0 [B, H, Dk, Dv].
        output_final_state: whether to return the state after the last valid step too. It continues the sequence as the
            `initial_state` of another call; gradients flow through both.
        lengths: int64 [B], the valid steps of each sequence; all T by default. What lies past them changes nothing.
        cu_seqlens: int32 or int64 [N + 1], in place of `lengths`: where each of N documents begins that lie one behind
            the other in a batch of 1, and T. Each is a sequence of its own, and states have N rows in place of B.
        backend: "auto", "fused", "chunked" or "reference".

    Returns:
        o [B, T, H, Dv] in v's dtype, zero past `lengths`; with `output_final_state`, (o, final state), the state in
        the accumulation dtype: at least float32.

    Raises:
        ValueError: shapes that do not fit, a decay above 0, `cu_seqlens` that are no documents of one row, or an
            unknown backend.

    Source: Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers" (arXiv 2102.11174); in
    chunks, by the inverse of a triangle, Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over
    Sequence Length" (arXiv 2406.06484); with a decay per head and step Yang et al. 2024, "Gated Delta Networks" (arXiv
    2412.06464), and per channel Kimi Team 2025, "Kimi Linear" (arXiv 2510.26692).
    """
    _check(q, k, v, beta, log_decay, erase)
    documents = check_documents("delta_rule", cu_seqlens, lengths, *q.shape[:2])
    lengths = check_lengths("delta_rule", lengths, *q.shape[:2])
    check_log_decay("delta_rule", log_decay, lengths)
    _check_state(q.shape[0] if documents is None else documents.N, q, v, initial_state)
    given = (q, k, v) if erase is None else (q, k, v, erase)
    implementation = choose("delta_rule", backend, FORMS, fit(*given, channels=MAX_CHANNELS))
    o, final_state = implementation(
        q, k, v, beta, log_decay, erase, initial_state, lengths, documents, output_final_state
    )
    return (o, final_state) if output_final_state else o


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, erase: Tensor | None) -> None:
    if not (q.dim() == v.dim() == 4 and q.shape == k.shape and q.shape[:2] == v.shape[:2]) or q.shape[1] == 0:
        raise ValueError(
            "delta_rule: expected q and k [B, T, G, Dk] and v [B, T, H, Dv] with T >= 1, where G divides H, got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    B, T, G, Dk = q.shape
    H = v.shape[2]
    if G != H and (G == 0 or H % G):
        raise ValueError(f"delta_rule: {G} query/key heads do not divide {H} value heads; v has one or more for each")
    given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "erase": erase}
    for name, x in given.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"delta_rule: {name} must be a real floating-point tensor, got {x.dtype}")
    per_head, per_channel = [B, T, H], [B, T, H, Dk]
    if list(beta.shape) != per_head:
        raise ValueError(
            f"delta_rule: beta must be [B, T, H] = {per_head}, a number per value head, got {list(beta.shape)}"
        )
    if log_decay is not None and list(log_decay.shape) not in (per_head, per_channel):
        raise ValueError(
            f"delta_rule: log_decay must be [B, T, H] = {per_head} or [B, T, H, Dk] = {per_channel}, got "
            f"{list(log_decay.shape)}; expand what is constant in time, or the same for all heads"
        )
    if erase is not None and list(erase.shape) != per_channel:
        raise ValueError(
            f"delta_rule: erase must be [B, T, H, Dk] = {per_channel}, a vector per value head, got {list(erase.shape)}"
        )


def _check_state(rows: int, q: Tensor, v: Tensor, initial_state: Tensor | None) -> None:
    if initial_state is None:
        return
    if not initial_state.is_floating_point():
        raise ValueError(f"delta_rule: initial_state must be a real floating-point tensor, got {initial_state.dtype}")
    expected = [rows, v.shape[2], q.shape[3], v.shape[3]]
    if list(initial_state.shape) != expected:
        raise ValueError(
            f"delta_rule: initial_state must be {expected} ([B, H, Dk, Dv]; of documents N rows), got "
            f"{list(initial_state.shape)}"
        )
