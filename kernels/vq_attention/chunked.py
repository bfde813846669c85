"""Blocks of `block_len` queries against their window of key blocks and the codes of all other blocks.

B sequences, H heads, N blocks of L positions each, W blocks in a window (2 causal, 3 bidirectional), S codes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import (
    accumulation_dtype,
    future,
    in_cache,
    product_dtype,
    valid_positions,
    without_autocast,
    zero_padding,
)
from ..derivatives import Outline, gradient, transformed
from ..documents import Documents
from .outside import read_outside, read_outside_backward, sums_outside
from .packed import PackedBlocks, of_blocks, windows
from .state import VQState


def vq_attention_chunked(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    codebook: Tensor,  # [H, S, D]
    codes: Tensor,  # [B, T, H]
    *,
    block_len: int,
    bias: Tensor | None,
    causal: bool,
    initial_state: VQState | None,
    output_final_state: bool,
    lengths: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, VQState | None]:
    (B, T, H, _), L, out_dtype = q.shape, block_len, v.dtype
    stateful = initial_state is not None or output_final_state  # a state is not to be rounded
    dtype = accumulation_dtype(v.dtype) if stateful else product_dtype(q, v)
    q, v = (zero_padding(x, lengths).to(dtype) for x in (q, v))
    valid = torch.ones(B, T, dtype=torch.bool, device=q.device) if lengths is None else valid_positions(lengths, T)
    state, past = None, initial_state
    if output_final_state:
        S, Dv = codebook.shape[1], v.shape[-1]
        sequences = B if documents is None else documents.N
        state = past or VQState.empty(sequences, H, S, Dv, L, device=q.device, dtype=v.dtype)
        state = state.advance(codes, v, lengths) if documents is None else state.advance_documents(codes, v, documents)

    first = 0 if past is None else L  # what a state remembers one by one becomes the block in front
    starts = packed = None
    if documents is not None:
        packed = PackedBlocks(documents, L, None if past is None else past.position.clamp(max=L))
        valid, starts, first = packed.valid(), packed.starts, 0
        q, k = packed.row(q), packed.row(k)
        if past is None:
            codes, v = packed.row(codes), packed.row(v)
        else:
            codes, v = packed.row(codes, past.codes), packed.row(v, past.values.to(v.dtype))
            v = torch.where(valid[..., None, None], v, 0)
        bias = bias if bias is None or bias.dim() == 2 else packed.row(bias)
    elif past is not None:
        remembered = torch.arange(-L, 0, device=q.device) >= -past.position[:, None]
        valid = torch.cat([remembered, valid], 1)
        codes = torch.cat([past.codes, codes], 1)
        v = torch.cat([torch.where(remembered[..., None, None], past.values.to(v.dtype), 0), v], 1)

    def split(x: Tensor, before: int = 0) -> Tensor:  # [B, T, H, D] -> [B, H, N, L, D]
        after = -(before + x.shape[1]) % L
        if before or after:  # F.pad by nothing would be one more copy
            x = F.pad(x, (0, 0, 0, 0, before, after))
        return x.transpose(1, 2).unflatten(2, (-1, L))

    valid_b, codes_b = split(valid[..., None, None])[..., 0], split(codes[..., None])[..., 0]  # [B, 1 or H, N, L]
    counts = sums_outside(_counts(codes_b, valid_b, codebook.shape[1]), causal, starts)  # [B, H, N, S]
    visible = seen_in_window(valid_b, 2 if causal else 3, starts)
    past_sums = None
    if packed is not None and past is not None:  # what each block sees
        counts, past_sums = (
            counts + of_blocks(past.counts, packed.starts, counts.shape[2]),
            of_blocks(past.sums.to(v.dtype), packed.starts, counts.shape[2]),
        )
    elif past is not None:
        counts, past_sums = counts + past.counts[:, :, None], past.sums.to(v.dtype)
    if bias is not None:
        bias = zero_padding(bias, lengths) if bias.dim() == 4 else bias
        bias = split(bias.expand(B, q.shape[1], H, -1), first)
    # Autocast would keep the sums in half precision.
    with without_autocast(q.device):
        q, k, v = split(q, first), split(k, first), split(v)
        form = plain_attention if transformed() else _attend
        y = form(
            q, k, v, bias, past_sums, codebook.to(q.dtype), codes_b, visible, counts, causal, starts
        )  # fmt: skip
    if packed is not None:
        return packed.pieces.take_up(y.flatten(2, 3).transpose(1, 2)).to(out_dtype), state
    y = y.flatten(2, 3)[:, :, first : first + T].transpose(1, 2)
    return zero_padding(y, lengths).to(out_dtype), state


def _counts(codes: Tensor, valid: Tensor, S: int) -> Tensor:
    """How many keys of each block have each code: int64 [B, H, N, S]."""
    counts = codes.new_zeros(*codes.shape[:3], S)
    return counts.scatter_add_(-1, codes, valid.expand_as(codes).to(codes.dtype))


# G = B H N, all the blocks there are. One batch axis keeps every product a single batched GEMM. Windows are views of
# the blocks as they lie in memory: at either end of a sequence they reach into the next one, where columns are hidden.
# Those of documents in one row are copies: nothing of the next one comes near, be it NaN.


def _attend(
    q: Tensor,  # [B, H, N, L, D]
    k: Tensor,
    v: Tensor,  # [B, H, N, L, Dv]
    bias: Tensor | None,  # [B, H, N, L, offsets]
    *others: Any,
) -> Tensor:  # [B, H, N, L, Dv]
    values = (None if x is None else x.detach() for x in (v, bias))
    outlines = (None if x is None else Outline.apply(x) for x in (k, v, bias))
    return _Attention.apply(q.reshape(-1, *q.shape[-2:]), *values, *outlines, *others)


class _Attention(torch.autograd.Function):
    """Softmax attention to windows and, outside of them, to codes; k̂ is looked up by code, and k takes its gradient.

    The gradient is written out because on a CPU the operation is bound by memory: autograd would copy the windows, hold
    the scores at every stage, and the sums of values by code as each block sees them. Scores are computed with while
    those of a few blocks are in the cache, in single precision at least.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [G, L, D]
        v: Tensor,  # [B, H, N, L, Dv]
        bias: Tensor | None,  # [B, H, N, L, offsets]
        k_outline: Tensor,  # [B, H, N, L, D]
        v_outline: Tensor,
        bias_outline: Tensor | None,
        past_sums: Tensor | None,  # [B, H, S, Dv]
        codebook: Tensor,  # [H, S, D]
        codes: Tensor,  # [B, H, N, L]
        visible: Tensor,  # [B, 1, N, W L]
        counts: Tensor,  # [B, H, N, S], outside the windows
        causal: bool,
        starts: Tensor | None,  # the first block of each document in a row, and N
    ) -> Tensor:  # [B, H, N, L, Dv]
        (B, H, N, L, Dv), (S, D) = v.shape, codebook.shape[1:]
        G, W, behind = B * H * N, 2 if causal else 3, 0 if causal else 1
        keys = F.pad(_keys(codebook, codes), (0, 0, 0, 0, 1, behind))  # [G + W - 1, L, D]
        values = F.pad(v.reshape(G, L, Dv), (0, 0, 0, 0, 1, behind))
        codes = codes.reshape(B * H, N, L)

        wide = accumulation_dtype(q.dtype)
        prior, number = _prior(visible, counts, wide), _number(counts, wide)
        around = _around(starts, H, N, W)
        near = q.new_empty(G, L, W * L)
        far = torch.matmul(q.view(B, H, N * L, D), codebook.mT).view(G, L, S)
        terms = None if bias is None else bias.reshape(G, L, -1)
        parts = in_cache(G, L * (W * L + S), q)
        for n in parts:
            scores = torch.empty_like(prior[n].expand(-1, L, -1), memory_format=torch.contiguous_format)
            scores[..., : W * L], scores[..., W * L :] = torch.bmm(q[n], _windows(keys, W, n, around).mT), far[n]
            scores += prior[n]
            if causal:
                scores[..., L : 2 * L].masked_fill_(future(L, q.device), torch.finfo(wide).min)
            if terms is not None:
                _by_offset(scores, terms.shape[-1], W).add_(terms[n])
            near[n], by_code = scores.softmax(-1).split([W * L, S], -1)
            far[n] = by_code / number[n]  # of one key
        y = read_outside(far.view(B * H, N, L, S), values[1 : G + 1].view(B * H, N, L, Dv), codes, causal, starts)
        for n in parts:
            y.view(G, L, Dv)[n].baddbmm_(near[n], _windows(values, W, n, around))
        if past_sums is not None:
            past = past_sums.flatten(0, -3)  # of each sequence, or of each block
            y.view(len(past), -1, Dv).baddbmm_(far.view(len(past), -1, S), past)
        ctx.causal = causal
        outlines = (k_outline, v_outline, bias_outline)
        ctx.save_for_backward(q, keys, values, near, far, number, codes, codebook, past_sums, starts, *outlines)
        return y.view(B, H, N, L, Dv)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, k, v, bias = ctx.saved_tensors
        q, _, values, near, far, number, codes, codebook, past_sums, starts = kept
        written = partial(_gradients, ctx.causal, bias, dy, *kept)

        def form(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, past_sums: Tensor | None) -> tuple[Tensor]:
            v = values[1 : len(q) + 1].view_as(v) + v - v.detach()
            others = (past_sums, codebook, codes.view(k.shape[:-1]), number, ctx.causal, starts)
            return (_plain(q, k, v, bias, *others, weights=torch.cat([near, far * number], -1)),)

        dq, dk, dv, d_bias, d_past_sums = gradient(written, form, (q, k, v, bias, past_sums), (dy,))
        return dq, None, None, dk, dv, d_bias, d_past_sums, *(None,) * 6


def _gradients(
    causal: bool,
    bias: Tensor | None,  # an outline
    dy: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    near: Tensor,
    far: Tensor,
    number: Tensor,
    codes: Tensor,
    codebook: Tensor,
    past_sums: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    (B, H, N, L, Dv), (S, D) = dy.shape, codebook.shape[1:]
    G, W, around = B * H * N, 2 if causal else 3, _around(starts, H, N, 2 if causal else 3)
    with without_autocast(dy.device):
        dy = dy.reshape(B * H, N, L, Dv).contiguous()
        d_far, dv_outside = read_outside_backward(
            dy, far.view(B * H, N, L, S), values[1 : G + 1].view(dy.shape), codes, causal, starts
        )
        d_past_sums = None
        if past_sums is not None:
            past = past_sums.flatten(0, -3)
            dy_of = dy.view(len(past), -1, Dv)
            d_far.view(len(past), -1, S).baddbmm_(dy_of, past.mT)
            d_past_sums = torch.bmm(far.view(len(past), -1, S).mT, dy_of).view_as(past_sums)

        dy, d_far = dy.view(G, L, Dv), d_far.view(G, L, S)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        dv[1 : G + 1] = dv_outside.view(G, L, Dv)
        d_bias = None if bias is None else bias.new_empty(G, L, bias.shape[-1])
        for n in in_cache(G, L * (W * L + S), q):
            _add_to_windows(dv, W, n, near[n], dy[n], around)
            d_near = torch.bmm(dy[n], _windows(values, W, n, around).mT)
            d_weights = torch.cat([d_near, d_far[n] / number[n]], -1)
            weights = torch.cat([near[n], far[n] * number[n]], -1)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if d_bias is not None:
                d_bias[n] = _by_offset(d_scores, d_bias.shape[-1], W)
            d_near, d_far[n] = d_scores[..., : W * L].to(q.dtype), d_scores[..., W * L :]
            dq[n] = torch.bmm(d_near, _windows(keys, W, n, around))
            _add_to_windows(dk, W, n, d_near, q[n], around)
        dq.view(B, H, N * L, D).add_(d_far.view(B, H, N * L, S) @ codebook)
    shape = (B, H, N, L, -1)
    dk, dv = (x[1 : G + 1].view(shape) for x in (dk, dv))
    return dq, dk, dv, None if d_bias is None else d_bias.view(shape), d_past_sums


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    past_sums: Tensor | None,
    codebook: Tensor,
    codes: Tensor,
    visible: Tensor,
    counts: Tensor,
    causal: bool,
    starts: Tensor | None = None,
) -> Tensor:
    """As `_attend`, for PyTorch to differentiate."""
    q = q.reshape(-1, *q.shape[-2:])
    prior, number = _prior(visible, counts, q.dtype), _number(counts, q.dtype)
    return _plain(q, k, v, bias, past_sums, codebook, codes, number, causal, starts, prior=prior)


def _plain(
    q: Tensor,  # [G, L, D]
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    past_sums: Tensor | None,
    codebook: Tensor,
    codes: Tensor,
    number: Tensor,  # [G, 1, S]
    causal: bool,
    starts: Tensor | None,
    *,
    prior: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`_Attention` for PyTorch to differentiate. With the weights that came out, k and bias may be outlines."""
    (B, H, N, L, Dv), S = v.shape, codebook.shape[1]
    G, W, behind = B * H * N, 2 if causal else 3, 0 if causal else 1
    with without_autocast(q.device):
        keys = _keys(codebook, codes) + (k - k.detach()).reshape(G, L, -1).to(codebook.dtype)
        ends, all_blocks, around = (0, 0, 0, 0, 1, behind), slice(0, G), _around(starts, H, N, W)
        near = torch.bmm(q, _windows(F.pad(keys, ends), W, all_blocks, around).mT)
        far = torch.matmul(q.view(B, H, N * L, -1), codebook.mT).view(G, L, S)
        scores = torch.cat([near, far], -1)
        if bias is not None:
            scores = scores + _shifted(bias.reshape(G, L, -1), scores.shape[-1], W)
        if weights is None:
            assert prior is not None
            scores = scores + prior
            if causal:
                never = torch.finfo(scores.dtype).min
                scores = scores.masked_fill(F.pad(future(L, q.device), (L, S)), never)
        else:
            scores = weights.log() + (scores - scores.detach())
        near, far = scores.softmax(-1).split([W * L, S], -1)
        far = far / number
        member = codes[..., None] == torch.arange(S, device=codes.device)
        by_code = member.to(v.dtype).mT @ v  # [B, H, N, S, Dv]
        sums = sums_outside(by_code.flatten(3), causal, starts).reshape(G, S, Dv)
        if past_sums is not None:
            past = past_sums if past_sums.dim() == 5 else past_sums[:, :, None]
            sums = sums + past.expand(B, H, N, S, Dv).reshape(G, S, Dv)
        values = _windows(F.pad(v.reshape(G, L, Dv), ends), W, all_blocks, around)
        y = torch.bmm(near, values) + torch.bmm(far, sums)
        return y.view(B, H, N, L, Dv)


def _keys(codebook: Tensor, codes: Tensor) -> Tensor:
    """The code that stands for each key, [G, L, D]."""
    (H, S, D), L = codebook.shape, codes.shape[-1]
    first = S * torch.arange(H, device=codes.device)[:, None, None]
    return F.embedding(codes + first, codebook.flatten(0, 1)).reshape(-1, L, D)


def seen_in_window(valid: Tensor, W: int, starts: Tensor | None) -> Tensor:
    """Which columns of a block's window there are, of valid positions [B, 1, N, L]: [B, 1, N, WL]."""
    N, L = valid.shape[2:]
    if starts is not None:
        return F.pad(valid[0, 0], (0, 0, 1, 0))[windows(starts, N, W)].flatten(1)[None, None]
    return F.pad(valid.flatten(2), (L, L * (W - 2))).unfold(2, W * L, L)


def _prior(visible: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a block's queries, but for the future: [G, 1, WL + S]."""
    H, never = counts.shape[1], torch.finfo(dtype).min
    hidden = torch.where(visible, counts.new_zeros((), dtype=dtype), never).expand(-1, H, -1, -1)
    log_counts = counts.to(dtype).log().clamp(min=never)
    return torch.cat([hidden, log_counts], -1).flatten(0, 2)[:, None]


def _number(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """How many keys share the weight of a code, [G, 1, S]; 1 where there is none."""
    return counts.clamp(min=1).to(dtype).view(-1, 1, counts.shape[-1])


def _around(starts: Tensor | None, H: int, N: int, W: int) -> Tensor | None:
    """The blocks in the windows of documents in one row, counted from 1, 0 for none: [G, W]."""
    if starts is None:
        return None
    of_head = windows(starts, N, W)
    others = N * torch.arange(H, device=starts.device)[:, None, None]
    return torch.where(of_head > 0, of_head + others, 0).flatten(0, 1)


def _windows(x: Tensor, W: int, n: slice, around: Tensor | None) -> Tensor:
    """The windows of blocks `n`, each W consecutive ones of x [G + W - 1, L, D], or those `around`: [., WL, D]."""
    L = x.shape[1]
    if around is not None:
        return x[around[n]].flatten(1, 2)
    return _dense(x[n.start : n.stop + W - 1].flatten(0, 1).unfold(0, W * L, L).mT)


def _add_to_windows(sums: Tensor, W: int, n: slice, weights: Tensor, y: Tensor, around: Tensor | None) -> None:
    """Adds to every key in the windows of blocks `n` the sum of `y` [., L, D] by its column of `weights` [., L, WL]."""
    for w, part in enumerate(weights.split(y.shape[1], -1)):
        if around is not None:
            sums.index_add_(0, around[n, w], torch.bmm(part.mT, y))
        else:
            sums[n.start + w :][: len(y)].baddbmm_(_dense(part).mT, y)


def _dense(x: Tensor) -> Tensor:
    """A view is enough for products in single precision; those in half would copy it, and transpose it meanwhile."""
    return x.contiguous() if x.dtype == torch.bfloat16 else x


def _by_offset(scores: Tensor, offsets: int, W: int) -> Tensor:
    """The scores [G, L, WL + .] that take a bias, as a view [G, L, offsets].

    Row r stands at column L + r, so that each row's begin one column after the row's above.
    """
    G, L, columns = scores.shape
    reach = offsets - 1 if W == 2 else offsets // 2
    return scores.as_strided((G, L, offsets), (L * columns, columns + 1, 1), L - reach)


def _shifted(bias: Tensor, columns: int, W: int) -> Tensor:
    """The biases [G, L, offsets] where `_by_offset` has them, among zeros: [G, L, columns]."""
    G, L, offsets = bias.shape
    reach = offsets - 1 if W == 2 else offsets // 2
    rows = F.pad(bias, (0, columns + 1 - offsets)).flatten(1)
    return F.pad(rows, (L - reach, 0))[:, : L * columns].view(G, L, columns)
