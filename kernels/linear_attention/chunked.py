"""Linear attention in PyTorch: quadratic inside chunks of time, a state carried between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, can_be_looked_at, without_autocast, zero_padding
from ..derivatives import by_hand, gradient, transformed
from ..documents import Documents, Pieces
from .carry import carried, carry
from .packed import causal_of_documents
from .per_channel import linear_attention_per_channel
from .reference import divide_by_normalizer

MIN_CHUNK = 64  # a chunk is at least as long as the state is wide, so that states take no more room than the inputs
SMALL = 32 * 33  # numbers of a head's state, the column of a normaliser included
MIN_PIECE = 16  # steps, where documents are shorter than a chunk


def linear_attention_chunked(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    log_decay: Tensor | None,  # [H], [B, T, H] or [B, T, H, Dk]
    causal: bool,
    normalize: bool,
    initial_state: Tensor | None,  # [B or N, H, Dk, Dv (+ 1)]
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    if T == 1 and initial_state is not None and documents is None:
        with without_autocast(q.device):
            o, final_state = _one_step(q, k, v, log_decay, normalize, initial_state, lengths)
        return o, final_state if output_final_state else None
    if log_decay is not None and log_decay.dim() < 4 and _by_step(q, v):
        log_decay = log_decay.expand(B, T, H)[..., None]
    if log_decay is not None and log_decay.dim() == 4:
        return linear_attention_per_channel(
            q, k, v, log_decay, causal, normalize, initial_state, lengths, documents, output_final_state
        )
    if documents is not None:
        if initial_state is not None or output_final_state:
            return _in_pieces(q, k, v, log_decay, normalize, initial_state, documents, output_final_state)
        if log_decay is None and not causal and can_be_looked_at(documents.starts) and documents.long:
            return _one_by_one(q, k, v, normalize, documents), None
        if log_decay is None:
            return (_between_resets if causal else _both_ways)(q, k, v, normalize, documents), None
        # What forgets everything where a document begins needs to know of no documents.
        log_decay = log_decay.expand(1, T, H).masked_fill((documents.positions() == 0)[:, None], -torch.inf)
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    N = -(-T // max(MIN_CHUNK, Dk, Dv)) if causal or log_decay is not None else 1
    C = -(-T // N)

    def split(x: Tensor, columns: int = 0) -> Tensor:  # [B, T, H, D] -> [B * H * N, C, D + columns]
        x = zero_padding(x, lengths).to(dtype).transpose(1, 2)
        if columns or N * C > T:  # F.pad by nothing would be one more copy
            x = F.pad(x, (0, columns, 0, N * C - T), value=float(columns))
        return x.reshape(B * H * N, C, x.shape[-1])

    # Autocast would keep the sums in half precision.
    with without_autocast(q.device):
        first = q.new_zeros(B, H, Dk, Dv + normalize, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        if log_decay is None:
            form = partial(_without_decay, causal) if transformed() else partial(_WithoutDecay.apply, causal)
            o, final_state = form(None, split(q), split(k), split(v), first)
        else:
            # Rows past T hold q = k = 0, so the ones that fill v there with its ones column count for nothing.
            q, k, v = split(q), split(k), split(v, columns=int(normalize))
            if output_final_state:  # padding must not decay the state
                log_decay = log_decay.expand(B, T, H)
            if log_decay.dim() == 1:
                g = log_decay.to(dtype)[:, None, None].expand(H, 1, C)
            else:
                g = split(log_decay[..., None]).view(B, H, N, C)
            o, final_state = _with_decay(q, k, v, g, causal, first)
            if normalize:
                o = divide_by_normalizer(o)
        o = o.view(B, H, N * C, Dv)[:, :, :T].transpose(1, 2)
    return zero_padding(o, lengths).to(out_dtype).contiguous(), final_state if output_final_state else None


def _one_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence itself."""
    dtype = accumulation_dtype(v.dtype)
    q_1, k_1, v_1 = (zero_padding(x, lengths)[:, 0].to(dtype) for x in (q, k, v))  # [B, H, D]
    if normalize:
        v_1 = F.pad(v_1, (0, 1), value=1.0)
    state = state.to(dtype)
    if log_decay is not None:
        g = log_decay if log_decay.dim() == 4 else log_decay.expand(q.shape[:3])[..., None]  # [B, 1, H, 1 or Dk]
        state = zero_padding(g.to(dtype), lengths)[:, 0].exp()[..., None] * state
    state = state + k_1[..., None] * v_1[..., None, :]
    o = (q_1[..., None, :] @ state)[..., 0, :]
    if normalize:
        o = divide_by_normalizer(o)
    return zero_padding(o[:, None], lengths).to(v.dtype), state


def _by_step(q: Tensor, v: Tensor) -> bool:
    """Whether one decay of all channels is best taken to a CPU's loop: products of narrow heads are too small."""
    return q.device.type == "cpu" and by_hand() and q.shape[3] * v.shape[3] <= SMALL


def _between_resets(q: Tensor, k: Tensor, v: Tensor, normalize: bool, documents: Documents) -> Tensor:
    """Causal, without a decay or states: chunks as of one sequence."""
    (_, T, H, Dk), Dv = q.shape, v.shape[-1]
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    N = -(-T // max(MIN_CHUNK, Dk, Dv))
    C = -(-T // N)

    def split(x: Tensor) -> Tensor:  # [1, T, H, D] -> [H * N, C, D]
        x = x.to(dtype).transpose(1, 2)
        return (F.pad(x, (0, 0, 0, N * C - T)) if N * C > T else x).reshape(H * N, C, x.shape[-1])

    with without_autocast(q.device):
        of = F.pad(documents.of_steps(), (0, N * C - T), value=documents.N).view(N, C)
        o = causal_of_documents(split(q), split(k), split(v), of, normalize)
        o = o.view(1, H, N * C, Dv)[:, :, :T].transpose(1, 2)
    return o.to(out_dtype).contiguous()


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, normalize: bool, documents: Documents) -> Tensor:
    """Both ways without a decay, where lengths can be looked at."""
    return torch.cat(
        [
            linear_attention_chunked(q_n, k_n, v_n, None, False, normalize, None, None, None, False)[0]
            for q_n, k_n, v_n in documents.split(q, k, v)
            if q_n.shape[1]
        ],
        1,
    )


def _both_ways(q: Tensor, k: Tensor, v: Tensor, normalize: bool, documents: Documents) -> Tensor:
    """Without a decay: a sum over each document, of sums over its pieces."""
    (_, T, H, Dk), Dv = q.shape, v.shape[-1]
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    C = max(MIN_PIECE, min(MIN_CHUNK, T // documents.N))
    pieces = documents.pieces(C)

    def split(x: Tensor) -> Tensor:  # [1, T, H, D] -> [P * H, C, D]
        return pieces.lay_out(x.to(dtype)).unflatten(1, (-1, C)).transpose(2, 3).reshape(-1, C, x.shape[-1])

    with without_autocast(q.device):
        nothing = q.new_zeros(1, H, Dk, Dv + normalize, dtype=dtype)
        form = partial(_without_decay, False) if transformed() else partial(_WithoutDecay.apply, False)
        o, _ = form(pieces, split(q), split(k), split(v), nothing)
        o = pieces.take_up(o.view(1, -1, H, C, Dv).transpose(2, 3).flatten(1, 2))
    return o.to(out_dtype).contiguous()


def _in_pieces(
    q: Tensor,  # [1, T, H, Dk]
    k: Tensor,  # [1, T, H, Dk]
    v: Tensor,  # [1, T, H, Dv]
    log_decay: Tensor | None,  # [H] or [1, T, H]
    normalize: bool,
    initial_state: Tensor | None,  # [N, H, Dk, Dv (+ 1)]
    documents: Documents,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Causal, with states: a chunk is a piece of one document, from whose own state the first one starts."""
    (_, T, H, Dk), Dv = q.shape, v.shape[-1]
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    pieces = documents.pieces(min(max(MIN_CHUNK, Dk, Dv), -(-T // documents.N)))
    C = pieces.length

    def split(x: Tensor, columns: int = 0) -> Tensor:  # [1, T, H, D] -> [H * P, C, D + columns]
        x = pieces.lay_out(x.to(dtype)).transpose(1, 2)
        if columns:  # where no step stands there is q = k = 0, and what v has counts for nothing
            x = F.pad(x, (0, columns), value=1.0)
        return x.reshape(-1, C, x.shape[-1])

    with without_autocast(q.device):
        rows = (documents.N, H, Dk, Dv + normalize)
        first = q.new_zeros(rows, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        q, k, v = split(q), split(k), split(v, columns=int(normalize))
        if log_decay is None:
            g = q.new_zeros(H, 1, C)
        elif log_decay.dim() == 1 and not output_final_state:
            g = log_decay.to(dtype)[:, None, None].expand(H, 1, C)
        else:
            g = split(log_decay.expand(1, T, H)[..., None]).view(1, H, -1, C)
        o, final_state = _with_decay(q, k, v, g, True, first, pieces)
        if normalize:
            o = divide_by_normalizer(o)
        o = pieces.take_up(o.view(1, H, -1, Dv).transpose(1, 2))
    return o.to(out_dtype).contiguous(), final_state if output_final_state else None


# G = B * H * N, all the chunks there are. One batch axis keeps every product, and its gradient, a single batched GEMM.


class _WithoutDecay(torch.autograd.Function):
    """Linear attention over chunks, normalised if the state has a column for the normaliser.

    The gradient is written out because on a CPU the operation is bound by memory: autograd would hold and pass over
    twice as much. With n the normaliser, w = q·k, and p = do / n, it has dw_ij = p_i·v_j - p_i·o_i for every pair.
    """

    @staticmethod
    def forward(
        ctx: Any,
        causal: bool,
        pieces: Pieces | None,  # where chunks are these, first all heads of one; not causal
        q: Tensor,  # [G, C, Dk]
        k: Tensor,  # [G, C, Dk]
        v: Tensor,  # [G, C, Dv]
        first: Tensor,  # [B, H, Dk, Dv (+ 1)], the state before the first chunk
    ) -> tuple[Tensor, Tensor]:  # [G, C, Dv], and the state after the last chunk
        Dv = v.shape[-1]
        S, z = first[..., :Dv].flatten(0, 1), first[..., Dv:].flatten(0, 1)
        memory = _of_all(torch.bmm(k.mT, v), pieces)  # [G, Dk, Dv], of each chunk by itself
        if causal:
            S = _accumulate(S, memory)  # and leaves in `memory` what reaches each chunk
            weights = torch.bmm(q, k.mT).tril_()
        o = torch.bmm(q, memory)
        if causal:
            o.baddbmm_(weights, v)
        total = n = None
        if first.shape[-1] > Dv:
            total = _of_all(k.sum(1)[..., None], pieces)  # [G, Dk, 1], as `memory`
            if causal:
                z = _accumulate(z, total)
            n = torch.bmm(q, total)  # [G, C, 1]
            if causal:
                n.add_(weights.sum(-1, keepdim=True))
            n = torch.where(n == 0, torch.inf, n)
            o.div_(n)
        ctx.causal, ctx.pieces = causal, pieces
        ctx.save_for_backward(q, k, v, first, memory, total, o, n)
        return o, torch.cat([S, z], -1).view_as(first)

    @staticmethod
    def backward(ctx: Any, do: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint makes them anew for each look
        inputs, written = saved[:4], partial(_gradients, ctx.causal, ctx.pieces, do, d_final, *saved)
        form = partial(_without_decay, ctx.causal, ctx.pieces)
        return None, None, *gradient(written, form, inputs, (do, d_final))


def _gradients(
    causal: bool,
    pieces: Pieces | None,
    do: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    memory: Tensor,
    total: Tensor | None,
    o: Tensor,
    n: Tensor | None,
) -> tuple[Tensor, ...]:
    with without_autocast(do.device):  # whatever `backward` is called under
        Dv = v.shape[-1]
        p = do if n is None else do / n
        dn = None if n is None else (p * o).sum(-1, keepdim=True).neg_()  # [G, C, 1]
        dS, dz = d_final[..., :Dv].flatten(0, 1), d_final[..., Dv:].flatten(0, 1)
        d_memory = _of_all(torch.bmm(q.mT, p), pieces)
        if causal:
            dS = _accumulate(dS, d_memory, reverse=True)
        dq, dk, dv = torch.bmm(p, memory.mT), torch.bmm(v, d_memory.mT), torch.bmm(k, d_memory)
        if dn is not None:
            assert total is not None
            d_total = _of_all(torch.bmm(q.mT, dn), pieces)
            if causal:
                dz = _accumulate(dz, d_total, reverse=True)
            dq.baddbmm_(dn, total.mT)
            dk.add_(d_total.mT)
        if causal:
            dw = torch.bmm(p, v.mT)
            dw = (dw if dn is None else dw.add_(dn)).tril_()
            dq.baddbmm_(dw, k)
            dk.baddbmm_(dw.mT, q)
            dv.baddbmm_(torch.bmm(q, k.mT).tril_().mT, p)
        return dq, dk, dv, torch.cat([dS, dz], -1).view_as(first)


def _of_all(x: Tensor, pieces: Pieces | None) -> Tensor:
    """The sum over all pieces of a document, of each [P * H, ...]; of no pieces, x."""
    if pieces is None:
        return x
    return pieces.shared_sum(x.unflatten(0, (len(pieces.document), -1))).flatten(0, 1)


def _without_decay(
    causal: bool, pieces: Pieces | None, q: Tensor, k: Tensor, v: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """`_WithoutDecay` for PyTorch to differentiate: with a decay that takes nothing."""
    with without_autocast(q.device):
        normalize = first.shape[-1] > v.shape[-1]
        v = F.pad(v, (0, int(normalize)), value=1.0)
        if pieces is not None:
            o = torch.bmm(q, _of_all(torch.bmm(k.mT, v), pieces))
            return divide_by_normalizer(o) if normalize else o, first
        o, final_state = _with_decay(q, k, v, q.new_zeros(first.shape[1], 1, q.shape[1]), causal, first)
        return divide_by_normalizer(o) if normalize else o, final_state if causal else first


def _accumulate(state: Tensor, updates: Tensor, reverse: bool = False) -> Tensor:
    """Puts the state that reaches each chunk in the place of what the chunk adds, and returns the one after all.

    State [B * H, ...] and updates [B * H * N, ...]; with `reverse`, the last chunk is the first that is reached.
    """
    chunks = updates.view(len(state), len(updates) // max(1, len(state)), *state.shape[1:])
    if torch.compiler.is_compiling():
        reached, state = carried(chunks, None, state, 1, reverse)
        chunks.copy_(reached)
        return state
    steps = chunks.unbind(1)
    for update in reversed(steps) if reverse else steps:
        state, _ = state + update, update.copy_(state)
    return state


def _with_decay(
    q: Tensor,  # [G, C, Dk]
    k: Tensor,  # [G, C, Dk]
    v: Tensor,  # [G, C, Dv]
    g: Tensor,  # [H, 1, C] or [B, H, N, C]
    causal: bool,
    first: Tensor,  # [B, H, Dk, Dv], of pieces a state a document
    pieces: Pieces | None = None,  # where chunks are these
) -> tuple[Tensor, Tensor]:
    C = q.shape[1]
    B, H, Dk, Dv = first.shape
    if pieces is not None:
        B = 1
    between = segment_sums(g)  # [..., C, C]
    head = g.cumsum(-1).exp()[..., None]  # [..., C, 1], from the chunk's start to each step
    tail = between[..., -1, :].exp()[..., None]  # from each step to the chunk's end
    total = head[..., -1:, :]

    def scaled(x: Tensor, decay: Tensor) -> Tensor:  # [G, rows, columns]
        return (x.view(B, H, -1, *x.shape[1:]) * decay).view(x.shape)

    if causal:
        future = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
        weights = between.masked_fill(future, float("-inf")).exp()
    else:
        weights = (between + between.mT).exp()
    o = torch.bmm(scaled(torch.bmm(q, k.mT), weights), v)

    updates = torch.bmm(scaled(k, tail).mT, v).view(B, H, -1, Dk, Dv)
    states, final_state = carry(updates, total, first, pieces)  # what earlier chunks pass on
    o = torch.baddbmm(o, scaled(q, head), states.view(-1, Dk, Dv))
    if not causal:
        updates = torch.bmm(scaled(k, head).mT, v).view(B, H, -1, Dk, Dv)
        states, _ = carry(updates, total, first, reverse=True)  # what later chunks send back
        o = torch.baddbmm(o, scaled(q, tail), states.view(-1, Dk, Dv))
    return o, final_state


def segment_sums(g: Tensor) -> Tensor:
    """The sum of g over (s, r] at [..., r, s], zero where r <= s: [..., C] -> [..., C, C].

    Each is a sum of its own, not a difference of two: the difference would lose small decays beside large ones and
    turn -inf into NaN.
    """
    return g[..., :, None].expand(*g.shape, g.shape[-1]).tril(-1).cumsum(-2)
