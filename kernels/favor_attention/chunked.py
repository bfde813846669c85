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

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, without_autocast, zero_padding
from ..diagonal_scan import diagonal_scan
from ..linear_attention.reference import divide_by_normalizer
from .reference import log_features
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
        q, k, v = (zero_padding(x, lengths).to(dtype) for x in (q, k, v))
        projection = projection.to(dtype)
        a = torch.einsum("bthd,hmd->bhtm", q, projection)  # |q|²/2 is common to all features and cancels
        b = log_features(k, projection)
        if lengths is not None:
            b = b.masked_fill(~valid_positions(lengths, T)[:, None, :, None], -torch.inf)
        v = F.pad(v, (0, 1), value=1.0).transpose(1, 2)  # [B, H, T, Dv + 1]
        if causal:
            state = initial_state or FavorState.empty(B, H, M, Dv, device=q.device, dtype=dtype)
            o, state = _causal(a, b, v, FavorState(state.sums.to(dtype), state.log_scale.detach().to(dtype)))
        else:
            o, state = _bidirectional(a, b, v), None
        o = divide_by_normalizer(o.transpose(1, 2))  # [B, T, H, Dv]
    return zero_padding(o, lengths).to(out_dtype).contiguous(), state


def _bidirectional(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Sums and their normaliser [B, H, T, Dv + 1] from a, b [B, H, T, M] and v [B, H, T, Dv + 1]."""
    R = _finite(b.detach().amax(2, keepdim=True))  # [B, H, 1, M]
    a = a + R
    a = a - a.detach().amax(-1, keepdim=True)
    return a.exp() @ ((b - R).exp().mT @ v)


def _causal(a: Tensor, b: Tensor, v: Tensor, first: FavorState) -> tuple[Tensor, FavorState]:
    """As `_bidirectional`, over the keys up to each query and those of the state."""
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
    updates = torch.bmm((b - _finite(R_n).view(-1, 1, M)).exp().mT, v)  # [G, M, V]
    decay = (R_0 - _finite(R_n)).exp().view(B * H, N, M, 1).expand(-1, -1, -1, V)
    sums = diagonal_scan(
        updates.view(B * H, N, M * V), decay.reshape(B * H, N, M * V), initial_state=first.sums.reshape(B * H, M * V)
    ).view(B, H, N, M, V)
    sums_0 = torch.cat([first.sums[:, :, None], sums[:, :, :-1]], 2)
    o = torch.bmm((a + R_0.view(-1, 1, M)).exp(), sums_0.view(-1, M, V)) + _within_chunks(a, b, v, R)
    return o.view(B, H, N * C, V)[:, :, :T], FavorState(sums[:, :, -1], R_n[:, :, -1])


def _within_chunks(a: Tensor, b: Tensor, v: Tensor, R: Tensor) -> Tensor:
    """What each step sums over the keys of its own chunk, itself included: [G, C, V] from a, b, R [G, C, M]."""
    G, C, _ = a.shape
    o = (a + b).exp().sum(-1, keepdim=True) * v
    L = 1
    while L < C:  # the later half of every 2L steps sees the earlier half
        a_s, b_s, v_s, R_s = (x.view(G * C // (2 * L), 2 * L, -1) for x in (a, b, v, R))
        r = R_s[:, L - 1 : L]
        scores = torch.bmm((a_s[:, L:] + r).exp(), (b_s[:, :L] - _finite(r)).exp().mT)  # [., L, L]
        o = o + F.pad(torch.bmm(scores, v_s[:, :L]), (0, 0, L, 0)).view_as(o)
        L *= 2
    return o


def _finite(maximum: Tensor) -> Tensor:
    """A maximum over no key at all, -inf, as 0: what it is subtracted from is -inf itself."""
    return maximum.masked_fill(maximum == -torch.inf, 0)
