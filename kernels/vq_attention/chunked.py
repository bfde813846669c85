"""Blocks of `block_len` queries against their window of key blocks and the codes of all other blocks.

B sequences, H heads, N blocks of L positions each, W blocks in a window (2 causal, 3 bidirectional), S codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, without_autocast, zero_padding
from .outside import counts_outside, read_outside, read_outside_backward
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
) -> tuple[Tensor, VQState | None]:
    (B, T, H, _), L, out_dtype = q.shape, block_len, v.dtype
    q, v = (zero_padding(x, lengths).to(accumulation_dtype(x.dtype)) for x in (q, v))
    valid = torch.ones(B, T, dtype=torch.bool, device=q.device) if lengths is None else valid_positions(lengths, T)
    state, past = None, initial_state
    if output_final_state:
        S, Dv = codebook.shape[1], v.shape[-1]
        state = past or VQState.empty(B, H, S, Dv, L, device=q.device, dtype=v.dtype)
        state = state.advance(codes, v, lengths)

    first = 0 if past is None else L  # what a state remembers one by one becomes the block in front
    if past is not None:
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
    counts = counts_outside(_counts(codes_b, valid_b, codebook.shape[1]), causal)  # [B, H, N, S]
    past_sums = None
    if past is not None:
        counts, past_sums = counts + past.counts[:, :, None], past.sums.to(v.dtype)
    if bias is not None:
        bias = split(bias.to(q.dtype).expand(B, T, H, -1), first)
    # Autocast would keep the sums in half precision.
    with without_autocast(q.device):
        y = _Attention.apply(
            split(q, first),
            split(k.to(q.dtype), first),
            split(v),
            bias,
            past_sums,
            codebook.to(q.dtype),
            codes_b,
            valid_b,
            counts,
            causal,
        )
    y = y.flatten(2, 3)[:, :, first : first + T].transpose(1, 2)
    return zero_padding(y, lengths).to(out_dtype), state


def _counts(codes: Tensor, valid: Tensor, S: int) -> Tensor:
    """How many keys of each block have each code: int64 [B, H, N, S]."""
    counts = codes.new_zeros(*codes.shape[:3], S)
    return counts.scatter_add_(-1, codes, valid.expand_as(codes).to(codes.dtype))


# G = B H N, all the blocks there are. One batch axis keeps every product a single batched GEMM. Windows are views of
# the blocks as they lie in memory: at either end of a sequence they reach into the next one, where columns are hidden.


class _Attention(torch.autograd.Function):
    """Softmax attention to windows and, outside of them, to codes; k̂ is looked up by code, and k takes its gradient.

    The gradient is written out because on a CPU the operation is bound by memory: autograd would copy the windows, hold
    the scores at every stage, and the sums of values by code as each block sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B, H, N, L, D]
        k: Tensor,  # only to take a gradient
        v: Tensor,  # [B, H, N, L, Dv]
        bias: Tensor | None,  # [B, H, N, L, offsets]
        past_sums: Tensor | None,  # [B, H, S, Dv]
        codebook: Tensor,  # [H, S, D]
        codes: Tensor,  # [B, H, N, L]
        valid: Tensor,  # [B, 1, N, L]
        counts: Tensor,  # [B, H, N, S], outside the windows
        causal: bool,
    ) -> Tensor:  # [B, H, N, L, Dv]
        (B, H, N, L, D), S, Dv = q.shape, codebook.shape[1], v.shape[-1]
        G, W, behind = B * H * N, 2 if causal else 3, 0 if causal else 1
        q, codes = q.reshape(G, L, D), codes.reshape(B * H, N, L)
        heads = torch.arange(H, device=q.device)[:, None, None]
        keys = F.embedding(codes.view(B, H, N, L) + S * heads, codebook.flatten(0, 1)).view(G, L, D)
        keys = F.pad(keys, (0, 0, 0, 0, 1, behind))  # [G + W - 1, L, D]
        values = F.pad(v.reshape(G, L, Dv), (0, 0, 0, 0, 1, behind))

        near = torch.bmm(q, _windows(keys, W))
        far = torch.matmul(q.view(B, H, N * L, D), codebook.mT).view(G, L, S)
        scores = torch.cat([near, far], -1)  # [G, L, WL + S]
        never = torch.finfo(scores.dtype).min
        visible = F.pad(valid.flatten(2), (L, L * behind)).unfold(2, W * L, L)  # [B, 1, N, WL]
        hidden = scores.new_zeros(B, H, N, W * L).masked_fill_(~visible, never)
        log_counts = counts.to(scores.dtype).log().clamp_(min=never)
        scores += torch.cat([hidden, log_counts], -1).view(G, 1, -1)
        if causal:
            future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
            scores[..., L : 2 * L].masked_fill_(future, never)
        if bias is not None:
            _by_offset(scores, bias.shape[-1], W).add_(bias.reshape(G, L, -1))

        weights = scores.softmax(-1)
        near, far = weights.split([W * L, S], -1)
        share = counts.clamp(min=1).to(q.dtype).reciprocal_().view(G, 1, S)
        far = (far * share).view(B * H, N, L, S)  # of one key
        y = read_outside(far, values[1 : G + 1].view(B * H, N, L, Dv), codes, causal)
        y.view(G, L, Dv).baddbmm_(near, _windows(values, W).mT)
        if past_sums is not None:
            y.view(B * H, N * L, Dv).baddbmm_(far.flatten(1, 2), past_sums.flatten(0, 1))
        ctx.causal, ctx.offsets = causal, None if bias is None else bias.shape[-1]
        ctx.save_for_backward(q, keys, values, weights, share, codes, codebook, past_sums)
        return y.view(B, H, N, L, Dv)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, weights, share, codes, codebook, past_sums = ctx.saved_tensors
        (B, H, N, L, Dv), (S, D), causal = dy.shape, codebook.shape[1:], ctx.causal
        G, W = B * H * N, 2 if causal else 3
        with without_autocast(dy.device):
            dy = dy.reshape(G, L, Dv)
            dy_n = dy.view(B * H, N, L, Dv)
            near, far = weights.split([W * L, S], -1)
            far = (far * share).view(B * H, N, L, S)
            d_far, dv = read_outside_backward(dy_n, far, values[1 : G + 1].view(dy_n.shape), codes, causal)
            dv += _window_sums(near, dy, W).view(dv.shape)
            d_past_sums = None
            if past_sums is not None:
                d_far.flatten(1, 2).baddbmm_(dy_n.flatten(1, 2), past_sums.flatten(0, 1).mT)
                d_past_sums = torch.bmm(far.flatten(1, 2).mT, dy_n.flatten(1, 2)).view_as(past_sums)

            d_near, d_far = torch.bmm(dy, _windows(values, W)), d_far.view(G, L, S).mul_(share)
            d_weights = torch.cat([d_near, d_far], -1)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_near, d_far = d_scores.split([W * L, S], -1)
            dq = torch.bmm(d_near, _windows(keys, W).mT).view(B, H, N * L, D)
            dq += d_far.reshape(B, H, N * L, S) @ codebook
            dk = _window_sums(d_near, q, W)
            d_bias = None
            if ctx.offsets is not None:
                d_bias = _by_offset(d_scores, ctx.offsets, W).reshape(B, H, N, L, -1)
        shape = (B, H, N, L, -1)
        return dq.view(shape), dk.view(shape), dv.view(shape), d_bias, d_past_sums, None, None, None, None, None


def _windows(x: Tensor, W: int) -> Tensor:
    """Each W consecutive blocks, a view: [G + W - 1, L, D] -> [G, D, WL]."""
    L = x.shape[1]
    return x.flatten(0, 1).unfold(0, W * L, L)


def _window_sums(weights: Tensor, y: Tensor, W: int) -> Tensor:
    """For every key the sum of `y` [G, L, D] by its column of `weights` [G, L, WL]: [G, L, D]."""
    G, L, D = y.shape
    sums = y.new_zeros(G + W - 1, L, D)
    for w in range(W):
        sums[w : w + G].baddbmm_(weights[..., w * L : (w + 1) * L].mT, y)
    return sums[1 : G + 1]


def _by_offset(scores: Tensor, offsets: int, W: int) -> Tensor:
    """The scores [G, L, WL + .] that take a bias, as a view [G, L, offsets].

    Row r stands at column L + r, so that each row's begin one column after the row's above.
    """
    G, L, columns = scores.shape
    reach = offsets - 1 if W == 2 else offsets // 2
    return scores.as_strided((G, L, offsets), (L * columns, columns + 1, 1), L - reach)
