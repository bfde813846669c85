"""Causal FAVOR attention whatever the keys, for PyTorch to differentiate: all chunks at once, each cut into halves.

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

from ..common import chunk_of, without_autocast
from ..diagonal_scan import diagonal_scan
from ..documents import Documents, Pieces
from ..linear_attention.reference import divide_by_normalizer
from .features import exp_, finite, log_features, with_ones
from .state import FavorState

MIN_CHUNK = 32  # a chunk is at least as long as values are wide, so that states take no more room than features


def causal_by_halves(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    directions: Tensor,  # [H, D, M]
    first: FavorState,
    hidden: Tensor | None,  # [B, 1, T, 1], keys that are padding
    documents: Documents | None = None,  # N, in a batch of 1, of which `first` has a row each
) -> tuple[Tensor, FavorState]:
    """Outputs [B, T, H, Dv] from the keys up to each query and those of the state, and the state after them."""
    T, pieces = q.shape[1], None
    C, enough = 1, chunk_of(T if documents is None else T // documents.N, max(MIN_CHUNK, v.shape[-1]))
    while enough > C:
        C *= 2
    with without_autocast(q.device):
        if documents is not None:
            pieces = documents.pieces(C)
            q, k, v = (pieces.lay_out(x) for x in (q, k, v))
            hidden = pieces.hidden().view(1, 1, -1, 1)
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        o, state = _over_chunks(q @ directions, log_features(k, directions, hidden), v, first, C, pieces)
        o = o.transpose(1, 2)
        return o if pieces is None else pieces.take_up(o), state


def _over_chunks(
    a: Tensor, b: Tensor, v: Tensor, first: FavorState, C: int, pieces: Pieces | None
) -> tuple[Tensor, FavorState]:
    """From a, b [B, H, T, M] and v [B, H, T, Dv]: outputs [B, H, T, Dv], and the state after them."""
    v = with_ones(v)  # [B, H, T, V]
    (B, H, T, M), V = a.shape, v.shape[-1]
    N = -(-T // C)
    if N * C > T:
        rest = (0, 0, 0, N * C - T)
        a, b, v = F.pad(a, rest), F.pad(b, rest, value=-torch.inf), F.pad(v, rest)
    if pieces is None:
        R = torch.maximum(b.detach().cummax(2).values, first.log_scale[:, :, None])
    else:
        R = _running_max(b.detach().view(H, N, C, M), first.log_scale, pieces).view(1, H, N * C, M)
    a = a - finite((a.detach() + R).amax(-1, keepdim=True))

    R_n = R.view(B, H, N, C, M)[..., -1, :]  # [B, H, N, M], at the end of each chunk
    R_0 = _before(first.log_scale, R_n, pieces)

    # G = B * H * N, all the chunks there are. One batch axis keeps every product a single batched GEMM.
    a, b, v, R = (x.reshape(B * H * N, C, -1) for x in (a, b, v, R))
    updates = torch.bmm(exp_(b - finite(R_n).view(-1, 1, M)).mT, v)  # [G, M, V]
    decay = exp_(R_0 - finite(R_n)).view(B * H, N, M, 1).expand(-1, -1, -1, V)
    initial: Tensor | None = first.sums
    if pieces is not None:  # a document's own state comes with its first piece
        begin = pieces.begin()[:, None, None]
        started = pieces.of_documents(first.sums).transpose(0, 1) * decay
        updates = updates + torch.where(begin, started, 0).flatten(0, 1)
        decay, initial = torch.where(begin, 0, decay), None
    sums = diagonal_scan(
        updates.view(B * H, N, M * V),
        decay.reshape(B * H, N, M * V),
        initial_state=None if initial is None else initial.reshape(B * H, M * V),
    ).view(B, H, N, M, V)
    sums_0 = _before(first.sums, sums, pieces)
    o = torch.bmm(exp_(a + R_0.reshape(-1, 1, M)), sums_0.reshape(-1, M, V)) + _within_chunks(a, b, v, R)
    o = divide_by_normalizer(o.view(B, H, N * C, V)[:, :, :T])
    if pieces is None:
        return o, FavorState(sums[:, :, -1], R_n[:, :, -1])
    ends = (pieces.last(x[0].transpose(0, 1), start) for x, start in zip((sums, R_n), first, strict=True))
    return o, FavorState(*ends)


def _before(first: Tensor, after: Tensor, pieces: Pieces | None) -> Tensor:
    """What there is before each chunk, [B, H, N, ...], of what there is after it and at first [B, H, ...]."""
    if pieces is None:
        return torch.cat([first[:, :, None], after[:, :, :-1]], 2)
    begin = pieces.begin().view(-1, *[1] * (first.dim() - 2))
    starts = pieces.of_documents(first).transpose(0, 1)
    return torch.where(begin, starts, after.roll(1, 2))


def _running_max(b: Tensor, first: Tensor, pieces: Pieces) -> Tensor:
    """Of all keys of a document up to each and its `first` [N, H, M]: [H, P, C, M]."""
    within = b.cummax(2).values
    before, _ = pieces.running_max(within[:, :, -1].transpose(0, 1), first)  # [P, H, M]
    return torch.maximum(within, before.transpose(0, 1)[:, :, None])


def _within_chunks(a: Tensor, b: Tensor, v: Tensor, R: Tensor) -> Tensor:
    """What each step sums over the keys of its own chunk, itself included: [G, C, V] from a, b, R [G, C, M]."""
    G, C, _ = a.shape
    o = exp_(a + b).sum(-1, keepdim=True) * v
    L = 1
    while L < C:  # the later half of every 2L steps sees the earlier half
        a_s, b_s, v_s, R_s = (x.view(G * C // (2 * L), 2 * L, -1) for x in (a, b, v, R))
        r = R_s[:, L - 1 : L]
        scores = torch.bmm(exp_(a_s[:, L:] + r), exp_(b_s[:, :L] - finite(r)).mT)  # [., L, L]
        o = o + F.pad(torch.bmm(scores, v_s[:, :L]), (0, 0, L, 0)).view_as(o)
        L *= 2
    return o
