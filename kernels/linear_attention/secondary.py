"""Causal linear attention with a decay per channel in PyTorch: chunks of time, and blocks within them.

Pairs of two blocks are products of a query decayed from its block's start and of a key decayed to there; those of one
block, which no product of matrices has, are made one by one. Every decay is a sum of its own over the steps between, at
most 0: differences of running sums would lose small ones beside large ones and turn -inf into NaN, and what their
exponentials are leaves single precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common import without_autocast, zero_padding
from ..derivatives import by_hand
from ..documents import Documents
from .carry import carry

BLOCK = 16  # steps
CHUNK = 64  # steps, a multiple of BLOCK; longer where the state is wider, so that states take no more room than inputs


def secondary_chunks(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    g: Tensor,  # [B, T, H, Dk]
    first: Tensor | None,  # [R, H, Dk, Dv], of R sequences
    lengths: Tensor | None,  # [B]
    starts: Tensor | None,  # [R + 1], of documents
) -> tuple[Tensor, Tensor]:
    """The outputs [B, T, H, Dv] and the last states [R, H, Dk, Dv], for PyTorch to differentiate."""
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    R = B if starts is None else len(starts) - 1
    longest = max(CHUNK, Dk, Dv)
    longest = min(longest, T if starts is None else -(-T // R))
    b = min(BLOCK, longest)
    C = -(-longest // b) * b
    pieces = None if starts is None else Documents(starts, T).pieces(C)

    def split(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, N, C / b, b, D]
        if pieces is None:
            x = F.pad(zero_padding(x, lengths), (0, 0, 0, 0, 0, -T % C))
        else:
            x = pieces.lay_out(x)
        return x.transpose(1, 2).unflatten(2, (-1, C // b, b))

    with without_autocast(q.device):
        if first is None:
            first = q.new_zeros(R, H, Dk, Dv)
        q, k, v, g = (split(x) for x in (q, k, v, g))
        whole, to_end = g.sum(-2), _after(g)  # [B, H, N, C / b, Dk] of each block, and [..., b, Dk] within it
        updates = (k * (to_end + _after(whole)[..., None, :]).exp()).flatten(3, 4).mT @ v.flatten(3, 4)
        states, last = carry(updates, whole.sum(-2).exp()[..., None], first, pieces)
        head = g.cumsum(-2) + _before(whole)[..., None, :]
        o = (q * head.exp()).flatten(3, 4) @ states + _within(q, k, v, g)
        o = o.flatten(2, 3).transpose(1, 2)  # [B, N C, H, Dv]
        o = zero_padding(o[:, :T], lengths) if pieces is None else pieces.take_up(o)
    return o, last


def _within(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What steps of each chunk [B, H, N, C / b, b, D] hear from their own: [B, H, N, C, Dv].

    A few chunks at a time, as pairs of a block take as much room as b times its queries.
    """
    shape, rows = q.shape[:3], [x.flatten(0, 2) for x in (q, k, v, g)]
    at_once = max(1, len(rows[0]) // BLOCK)
    parts = zip(*(x.split(at_once) for x in rows), strict=True)
    if torch.is_grad_enabled() and by_hand():  # pairs are made again for the gradient
        made = [checkpoint(_of_chunks, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        made = [_of_chunks(*part) for part in parts]
    return torch.cat(made).unflatten(0, shape)


def _of_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """[G, n, b, D], chunks of n blocks -> [G, n b, Dv]."""
    _, n, b, _ = g.shape
    whole = F.pad(g.sum(2), (0, 0, 1, 0))[:, :n]  # [G, n, Dk], of the block before
    to_start = _after(g)[:, None] + _between(whole, 1)[..., None, :]  # [G, n, n, b, Dk], from keys to a later block
    weights = (q * g.cumsum(2).exp()) @ (k[:, None] * to_start.exp()).flatten(2, 3).mT  # [G, n, b, n b]
    pairs = _between(g).exp() * k[:, :, None]  # [G, n, b, b, Dk]
    own = (pairs @ q[..., None])[..., 0]  # [G, n, b, b]
    weights = weights.unflatten(3, (n, b)) + torch.diag_embed(own.permute(0, 2, 3, 1), dim1=1, dim2=3)
    return weights.flatten(3, 4).flatten(1, 2) @ v.flatten(1, 2)


def _between(g: Tensor, skipped: int = 0) -> Tensor:
    """The sum of g over (s + skipped, r] at [..., r, s, :], -inf where r is before: [..., n, D] -> [..., n, n, D]."""
    step = torch.arange(g.shape[-2], device=g.device)
    ahead = (step[:, None] - step - skipped)[..., None]
    sums = torch.where(ahead > 0, g[..., :, None, :], 0).cumsum(-3)
    return torch.where(ahead >= 0, sums, -torch.inf)


def _after(g: Tensor) -> Tensor:
    """The sum of g over all that is later than each, [..., n, D]."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _before(g: Tensor) -> Tensor:
    """The sum of g over all that is earlier than each, [..., n, D]."""
    return F.pad(g[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
