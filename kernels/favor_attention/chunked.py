"""FAVOR attention in PyTorch: only numbers up to 0 are exponentiated, and what underflows is below rounding.

With a and b the logarithms of the features of queries and keys, the weight of key j for query i is the sum over m of
exp(a_im + b_jm). R_im is the largest b_jm among the keys that query i sees; a_im is taken relative to the largest
a_im + R_im of its query, so that the weights of a query sum to 1 or more.

The product exp(a_im + r) exp(b_jm - r) is then safe for any reference r between b_jm and R_im. A smaller one could make
the second factor overflow; a larger one, such as a key of the future, the first, or make the second vanish where the
product does not. For every pair of a key up to some time and a query after it, R at that time is such a reference.
So time is cut into chunks with a state carried between them, and each chunk recursively into halves, of which the later
one's queries meet the earlier one's keys in a matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, without_autocast, zero_padding
from ..derivatives import forward_mode, gradient
from ..diagonal_scan import diagonal_scan
from ..linear_attention.reference import divide_by_normalizer
from .state import FavorState

MIN_CHUNK = 32  # a chunk is at least as long as values are wide, so that states take no more room than features


def favor_attention_chunked(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    projection: Tensor,  # [H, M, D]
    causal: bool,
    initial_state: FavorState | None,
    lengths: Tensor | None,  # [B]
) -> tuple[Tensor, FavorState | None]:
    (B, T, H, _), M, Dv = q.shape, projection.shape[1], v.shape[-1]
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)

    # Autocast would compute features in half precision and keep the sums in it.
    with without_autocast(q.device):
        q, k, v = (zero_padding(x, lengths).to(dtype).transpose(1, 2).contiguous() for x in (q, k, v))  # [B, H, T, .]
        directions = projection.to(dtype).mT  # [H, D, M]
        hidden = None if lengths is None else ~valid_positions(lengths, T)[:, None, :, None]
        if causal:
            state = initial_state or FavorState.empty(B, H, M, Dv, device=q.device, dtype=dtype)
            past = FavorState(state.sums.to(dtype), state.log_scale.detach().to(dtype))
            o, state = _causal(q @ directions, _log_features(k, directions, hidden), v, past)
        else:
            form = _bidirectional if forward_mode() else _Bidirectional.apply
            o, state = form(q, k, v, directions, hidden), None
        o = o.transpose(1, 2)  # [B, T, H, Dv]
    return zero_padding(o, lengths).to(out_dtype).contiguous(), state


def _log_features(k: Tensor, directions: Tensor, hidden: Tensor | None) -> Tensor:
    """b [B, H, T, M] of keys [B, H, T, D]. Those of queries lack -|q|²/2: it is common to all and cancels."""
    b = (k @ directions).sub_(k.square().sum(-1, keepdim=True) / 2)
    return b if hidden is None else b.masked_fill_(hidden, -torch.inf)


class _Bidirectional(torch.autograd.Function):
    """Every query sees every key, so each feature has one mean of the values, and each query mixes those means.

    o_i = sum_m softmax_m(a_i + L) μ_m and μ_m = sum_j softmax_j(b_m) v_j, L_m = log sum_j exp(b_jm).
    Written out because features are the widest tensors there are: autograd would hold three times as many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B, H, T, D]
        k: Tensor,  # [B, H, T, D]
        v: Tensor,  # [B, H, T, Dv]
        directions: Tensor,  # [H, D, M]
        hidden: Tensor | None,  # [B, 1, T, 1], keys that are padding
    ) -> Tensor:  # [B, H, T, Dv]
        M, given = directions.shape[-1], directions
        directions = _on_cache_lines(directions)
        b = _log_features(k, directions, hidden)
        R = _finite(b.amax(2, keepdim=True))
        b.sub_(R).exp_()
        sums = b.mT @ _with_ones(v)  # [B, H, M, Dv + 1]
        count = sums[..., -1:].clamp(min=1)  # the largest is exp(0), unless there is no key at all
        means = sums / count
        L = R + count.mT.log()  # [B, H, 1, M]
        L[..., M:] = -torch.inf
        a = (q @ directions).add_(L).softmax(-1)
        o = a @ means[..., :-1]
        ctx.save_for_backward(q, k, v, given, hidden, a, b, means, count, o)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, hidden, *kept = ctx.saved_tensors

        def written() -> tuple[Tensor | None, ...]:
            return _gradients(ctx.needs_input_grad[3], do, q, k, v, directions, *kept)

        def form(q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> tuple[Tensor]:
            return (_bidirectional(q, k, v, directions, hidden),)

        return *gradient(written, form, (q, k, v, directions), (do,)), None


def _gradients(
    learnt: bool,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    a: Tensor,
    b: Tensor,
    means: Tensor,
    count: Tensor,
    o: Tensor,
) -> tuple[Tensor | None, ...]:
    with without_autocast(do.device):  # whatever `backward` is called under
        M, directions = directions.shape[-1], _on_cache_lines(directions)
        do = torch.cat([do, (do * o).sum(-1, keepdim=True).neg_()], -1)  # [B, H, T, Dv + 1]
        d_means = (a.mT @ do) / count  # [B, H, M, Dv + 1]
        da = (do @ means.mT).mul_(a)
        dq = da @ directions.mT
        d_directions = q.mT @ da if learnt else None
        del da
        dv = b @ d_means[..., :-1]
        db = (_with_ones(v) @ d_means.mT).mul_(b)
        dk = (db @ directions.mT).sub_(k * db.sum(-1, keepdim=True))
        return dq, dk, dv, None if d_directions is None else (d_directions + k.mT @ db).sum(0)[..., :M]


def _on_cache_lines(directions: Tensor) -> Tensor:
    """[H, D, M] and some more: products are a quarter faster where rows of features start on a cache line.

    Features from M on are to have no weight.
    """
    return F.pad(directions, (0, -directions.shape[-1] % 16))


def _bidirectional(q: Tensor, k: Tensor, v: Tensor, directions: Tensor, hidden: Tensor | None) -> Tensor:
    """`_Bidirectional` for PyTorch to differentiate."""
    with without_autocast(q.device):
        b = k @ directions - k.square().sum(-1, keepdim=True) / 2
        b = b if hidden is None else b.masked_fill(hidden, -torch.inf)
        R = _finite(b.detach().amax(2, keepdim=True))
        sums = (b - R).exp().mT @ _with_ones(v)
        count = sums[..., -1:].clamp(min=1)
        a = (q @ directions + R + count.mT.log()).softmax(-1)
        return a @ (sums / count)[..., :-1]


def _with_ones(v: Tensor) -> Tensor:
    return F.pad(v, (0, 1), value=1.0)


def _causal(a: Tensor, b: Tensor, v: Tensor, first: FavorState) -> tuple[Tensor, FavorState]:
    """Outputs [B, H, T, Dv] from the keys up to each query and those of the state, and the state after them.

    From a, b [B, H, T, M] and v [B, H, T, Dv].
    """
    v = _with_ones(v)  # [B, H, T, V]
    (B, H, T, M), V = a.shape, v.shape[-1]
    C, enough = 1, min(T, max(MIN_CHUNK, V - 1))
    while enough > C:
        C *= 2
    N = -(-T // C)
    if N * C > T:
        rest = (0, 0, 0, N * C - T)
        a, b, v = F.pad(a, rest), F.pad(b, rest, value=-torch.inf), F.pad(v, rest)
    R = torch.maximum(b.detach().cummax(2).values, first.log_scale[:, :, None])
    a = a - _finite((a.detach() + R).amax(-1, keepdim=True))

    R_n = R.view(B, H, N, C, M)[..., -1, :]  # [B, H, N, M], at the end of each chunk
    R_0 = torch.cat([first.log_scale[:, :, None], R_n[:, :, :-1]], 2)  # before each chunk

    # G = B * H * N, all the chunks there are. One batch axis keeps every product a single batched GEMM.
    a, b, v, R = (x.reshape(B * H * N, C, -1) for x in (a, b, v, R))
    updates = torch.bmm((b - _finite(R_n).view(-1, 1, M)).exp_().mT, v)  # [G, M, V]
    decay = (R_0 - _finite(R_n)).exp_().view(B * H, N, M, 1).expand(-1, -1, -1, V)
    sums = diagonal_scan(
        updates.view(B * H, N, M * V), decay.reshape(B * H, N, M * V), initial_state=first.sums.reshape(B * H, M * V)
    ).view(B, H, N, M, V)
    sums_0 = torch.cat([first.sums[:, :, None], sums[:, :, :-1]], 2)
    o = torch.bmm((a + R_0.view(-1, 1, M)).exp_(), sums_0.view(-1, M, V)) + _within_chunks(a, b, v, R)
    return divide_by_normalizer(o.view(B, H, N * C, V)[:, :, :T]), FavorState(sums[:, :, -1], R_n[:, :, -1])


def _within_chunks(a: Tensor, b: Tensor, v: Tensor, R: Tensor) -> Tensor:
    """What each step sums over the keys of its own chunk, itself included: [G, C, V] from a, b, R [G, C, M]."""
    G, C, _ = a.shape
    o = (a + b).exp_().sum(-1, keepdim=True) * v
    L = 1
    while L < C:  # the later half of every 2L steps sees the earlier half
        a_s, b_s, v_s, R_s = (x.view(G * C // (2 * L), 2 * L, -1) for x in (a, b, v, R))
        r = R_s[:, L - 1 : L]
        scores = torch.bmm((a_s[:, L:] + r).exp_(), (b_s[:, :L] - _finite(r)).exp_().mT)  # [., L, L]
        o = o + F.pad(torch.bmm(scores, v_s[:, :L]), (0, 0, L, 0)).view_as(o)
        L *= 2
    return o


def _finite(maximum: Tensor) -> Tensor:
    """A maximum over no key at all, -inf, as 0: what it is subtracted from is -inf itself."""
    return maximum.masked_fill(maximum == -torch.inf, 0)
