"""Gated attention in PyTorch: one product of all chunks at once, and a state that enters each.

N chunks of C rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, in_cache, product_dtype, without_autocast, zero_padding
from ..derivatives import Outline, gradient, transformed
from ..diagonal_scan import diagonal_scan
from ..documents import Documents
from .packed import over_documents
from .resume import Resumed
from .state import GatedAttentionState


def gated_attention_chunked(
    u: Tensor,  # [B, T, E]
    q_quad: Tensor,  # [B, T, S]
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,  # [B, T, E]
    *,
    chunk_len: int,
    bias: Tensor | None,  # [C] or [2 C - 1]
    causal: bool,
    scale: float,
    initial_state: GatedAttentionState | None,
    output_final_state: bool,
    lengths: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, GatedAttentionState | None]:
    (B, _, S), E = q_quad.shape, v.shape[-1]
    rows = (u, q_quad, k_quad, q_lin, k_lin, v)
    stateful = initial_state is not None or output_final_state  # a state is not to be rounded
    out_dtype, device = v.dtype, v.device
    dtype = accumulation_dtype(v.dtype) if stateful else product_dtype(*rows)
    u, q_quad, k_quad, q_lin, k_lin, v = (zero_padding(x, lengths).to(dtype) for x in rows)
    # Autocast would keep the sums in half precision.
    with without_autocast(device):
        bias = None if bias is None else by_offset(bias.to(accumulation_dtype(dtype)), chunk_len, causal)
        past = initial_state
        if past is None and output_final_state:
            sequences = B if documents is None else documents.N
            past = GatedAttentionState.empty(sequences, S, E, chunk_len, device=device, dtype=dtype)
        if documents is not None:

            def attend(rows: list[Tensor], seen: Tensor | None, terms: Tensor, _: Tensor) -> Tensor:
                q_quad, k_quad, q_lin, k_lin, v = rows
                y = in_one_chunk(q_quad, k_quad, q_lin, v, bias, causal, scale, seen, terms)
                # Where no chunk sees another, the gradients of q_lin and k_lin are zeros rather than none.
                return y if seen is not None else y.add_(q_lin[:0].sum() + k_lin[:0].sum())

            o, state = over_documents(attend, (q_quad, k_quad, q_lin, k_lin, v), documents, chunk_len, causal, past)
        elif not causal:
            o, state = _bidirectional(q_quad, k_quad, q_lin, k_lin, v, bias, chunk_len, scale, lengths), None
        elif past is None:
            o, state = in_chunks(q_quad, k_quad, q_lin, k_lin, v, bias, chunk_len, scale), None
        else:
            o, state = _resume(q_quad, k_quad, q_lin, k_lin, v, bias, scale, past, lengths)
        o = u * o
    return zero_padding(o, lengths).to(out_dtype), state


def _chunks(x: Tensor, C: int) -> Tensor:  # [B, T, D] -> [B, N, C, D]
    rest = -x.shape[1] % C
    return (F.pad(x, (0, 0, 0, rest)) if rest else x).unflatten(1, (-1, C))  # padding by nothing would copy


def by_offset(bias: Tensor, C: int, causal: bool) -> Tensor:
    """Biases laid out for the queries and keys of a chunk, bias[j - i + C - 1] at [i, j]: [C, C]."""
    if causal:
        bias = F.pad(bias, (0, C - 1))
    return bias.unfold(0, C, 1).flip(0)


def in_chunks(
    q_quad: Tensor,  # [B, T, S]
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,  # [B, T, E]
    bias: Tensor | None,  # [chunk_len, chunk_len]
    chunk_len: int,
    scale: float,
    earlier: Tensor | None = None,  # int64 [B], positions before the first chunk; none by default
    memory: Tensor | None = None,  # [B, S, E], the sum over these
) -> Tensor:  # [B, T, E]
    """Causal attention without its gate, of positions that begin with a chunk."""
    T = v.shape[1]
    C = min(chunk_len, T)
    bias = None if bias is None else bias[:C, :C]
    q_quad, k_quad, q_lin, k_lin, v = (_chunks(x, C) for x in (q_quad, k_quad, q_lin, k_lin, v))
    start = torch.arange(0, T, C, device=v.device)
    start = start if earlier is None else earlier[:, None] + start
    o, _ = _causal(q_quad, k_quad, q_lin, k_lin, v, bias, scale, start, memory)
    return o.flatten(1, 2)[:, :T]


def _bidirectional(
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    bias: Tensor | None,
    chunk_len: int,
    scale: float,
    lengths: Tensor | None,
) -> Tensor:  # [B, T, E]
    T = v.shape[1]
    n = T if lengths is None else lengths.clamp(min=1)[:, None, None]
    lin = q_lin @ (k_lin.mT @ v / n)
    C = min(chunk_len, T)
    q, k, v = (_chunks(x, C) for x in (q_quad, k_quad, v))
    bias = None if bias is None else bias[:C, :C]
    return lin.add_(_relu_squared(q, k, v, bias, scale, False).flatten(1, 2)[:, :T])


def in_one_chunk(
    q_quad: Tensor,  # [P, C, S]
    k_quad: Tensor,
    q_lin: Tensor,
    v: Tensor,  # [P, C, E]
    bias: Tensor | None,  # [chunk_len, chunk_len]
    causal: bool,
    scale: float,
    seen: Tensor | None,  # [P, S, E], the sum that each chunk sees
    terms: Tensor,  # [P], how many positions it is over
) -> Tensor:  # [P, C, E]
    """Attention without its gate, of chunks each by itself."""
    C = v.shape[1]
    bias = None if bias is None else bias[:C, :C]
    quad = _relu_squared(q_quad[None], k_quad[None], v[None], bias, scale, causal)
    if seen is None:
        return quad[0]
    return ((q_lin / terms.clamp(min=1)[:, None, None]) @ seen.to(q_lin.dtype)).add_(quad[0])


def _causal(
    q_quad: Tensor,  # [B, N, C, S], or a single row of the only chunk, behind all of its keys: [B, 1, 1, S]
    k_quad: Tensor,  # [B, N, C, S]
    q_lin: Tensor,  # as q_quad
    k_lin: Tensor,  # [B, N, C, S]
    v: Tensor,  # [B, N, C, E]
    bias: Tensor | None,  # [C, C], or the row's [B, 1, 1, C]
    scale: float,
    start: Tensor,  # [N] or [B, N], positions before each chunk
    memory: Tensor | None = None,  # [B, S, E], the sum over chunks before the first; zero by default
) -> tuple[Tensor, Tensor]:  # o as q_quad, and what each chunk adds to the memory [B, N, S, E]
    updates = k_lin.mT @ v
    first = torch.zeros_like(updates[:, 0]) if memory is None else memory
    before = torch.cat([first[:, None], updates[:, :-1]], 1).flatten(2)  # [B, N, S E]
    before = diagonal_scan(before, before.new_ones(before.shape[-1])).view_as(updates)
    mean = before / start.clamp(min=1)[..., None, None]
    quad = _relu_squared(q_quad, k_quad, v, bias, scale, q_quad.shape[2] > 1)
    return (q_lin @ mean).add_(quad), updates


class _ReluSquared(torch.autograd.Function):
    """relu²(scale q kᵀ + bias) v, lower triangular if causal. Autograd would hold the weights four times, this does
    once, and computes with those of a few chunks while they are in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B, N, R, S]
        k: Tensor,  # [B, N, C, S]
        v: Tensor,  # [B, N, C, E]
        bias: Tensor | None,  # [R, C], or one for each sequence [B, 1, R, C]
        outline: Tensor | None,  # of the bias
        scale: float,
        causal: bool,
    ) -> Tensor:  # [B, N, R, E]
        ctx.scale = scale
        root, o = q.new_empty(*q.shape[:3], k.shape[2]), q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, outline, root)
        q, k, v, root, out = (x.flatten(0, 1) for x in (q, k, v, root, o))
        for n in _together(root):
            scores = root[n]
            if bias is not None:
                scores.copy_(bias if bias.dim() == 2 else bias.flatten(0, 1)[n])
            scores.baddbmm_(q[n], k[n].mT, beta=0 if bias is None else 1, alpha=scale)
            weights = (scores.tril_() if causal else scores).relu_().square()
            out[n].baddbmm_(weights, v[n], beta=0)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, root = ctx.saved_tensors

        def written() -> tuple[Tensor | None, ...]:
            with without_autocast(do.device):  # whatever `backward` is called under
                return _gradients(do, q, k, v, None if bias is None else bias.shape, root, ctx.scale)

        def form(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor]:
            with without_autocast(do.device):
                scores = _scores(q, k, bias, ctx.scale)
                return ((root + scores - scores.detach()).relu().square() @ v,)

        dq, dk, dv, d_bias = gradient(written, form, (q, k, v, bias), (do,))
        return dq, dk, dv, None, d_bias, None, None


def _gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: torch.Size | None, root: Tensor, scale: float
) -> tuple[Tensor | None, ...]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_bias = None if bias is None else q.new_zeros(bias, dtype=accumulation_dtype(q.dtype))
    q, k, v, do, root = (x.flatten(0, 1) for x in (q, k, v, do, root))
    into_q, into_k, into_v = (x.flatten(0, 1) for x in (dq, dk, dv))
    for n in _together(root):
        weights = root[n].square()
        into_v[n].baddbmm_(weights.mT, do[n], beta=0)
        half = torch.bmm(do[n], v[n].mT).mul_(root[n])  # of the gradient of scores
        into_q[n].baddbmm_(half, k[n], beta=0, alpha=2 * scale)
        into_k[n].baddbmm_(half.mT, q[n], beta=0, alpha=2 * scale)
        if d_bias is not None and d_bias.dim() == 2:
            d_bias += half.sum(0, dtype=d_bias.dtype)
        elif d_bias is not None:
            d_bias.flatten(0, 1)[n] = half
    return dq, dk, dv, None if d_bias is None else 2 * d_bias


def _together(root: Tensor) -> list[slice]:
    return in_cache(len(root), root.shape[1] * root.shape[2], root)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * (q @ k.mT)
    return scores if bias is None else scores + bias.to(scores.dtype)


def _relu_squared(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    if transformed():
        scores = _scores(q, k, bias, scale)
        return (scores.tril() if causal else scores).relu().square() @ v
    values, outline = (None, None) if bias is None else (bias.detach(), Outline.apply(bias))
    return _ReluSquared.apply(q, k, v, values, outline, scale, causal)


def _resume(
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    bias: Tensor | None,  # [C, C]
    scale: float,
    past: GatedAttentionState,
    lengths: Tensor | None,
) -> tuple[Tensor, GatedAttentionState]:  # [B, T, E]
    T = v.shape[1]
    resumed = Resumed(past, T, lengths)
    C = resumed.C
    rows = [
        resumed.rows(new, old) for new, old in ((k_quad, past.k_quad), (k_lin, past.k_lin), (v, past.v))
    ]  # [B, N C, S or E]
    k_quad, k_lin, v = (_chunks(x, C) for x in rows)
    if T == 1:
        q_quad, q_lin = q_quad[:, None], q_lin[:, None]
        bias = None if bias is None else bias[resumed.held][:, None, None]
    else:
        q_quad, q_lin = (_chunks(resumed.rows(q), C) for q in (q_quad, q_lin))
    chunk = torch.arange(resumed.N, device=v.device)
    start = resumed.earlier()[:, None] + chunk * C  # [B, N]
    o, updates = _causal(q_quad, k_quad, q_lin, k_lin, v, bias, scale, start, past.memory.to(v.dtype))
    o = o.flatten(1, 2)
    full = (chunk < resumed.full[:, None]).to(v.dtype)  # [B, N]
    added = torch.einsum("bn,bnse->bse", full, updates)
    return o if T == 1 else resumed.of_steps(o), resumed.state(added, *rows)
