"""Linear attention with a decay per channel in PyTorch: chunks of time, and blocks within them.

Pairs of two blocks are products of a query decayed from its block's start and of a key decayed to there; those of one
block, which no product of matrices has, are made one by one. Every decay is a sum of its own over the steps between, at
most 0: differences of running sums would lose small ones beside large ones and turn -inf into NaN, and what their
exponentials are leaves single precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import chunk_of, without_autocast, zero_padding
from ..derivatives import by_hand, gradient, pullback
from ..documents import Documents, count_of
from .carry import carry

BLOCK = 16  # steps
CHUNK = 64  # steps; as many as the state is wide at least, so that states take no more room than inputs


def secondary_chunks(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    g: Tensor,  # [B, T, H, Dk]
    first: Tensor | None,  # [R, H, Dk, Dv], of R sequences
    lengths: Tensor | None,  # [B]
    starts: Tensor | None,  # [R + 1], of documents
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """The outputs [B, T, H, Dv] and the last states [R, H, Dk, Dv], for PyTorch to differentiate."""
    if not causal:
        o, last = secondary_chunks(q, k, v, g, first, lengths, starts)
        return o + _of_later(q, k, v, g, lengths, starts), last
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    R = count_of(starts, B)
    C = 1 << (max(CHUNK, int(Dk), int(Dv)) - 1).bit_length()
    longest = chunk_of(T if starts is None else -(-T // R), C)
    while 2 * longest <= C:
        C //= 2
    b = min(BLOCK, C)
    pieces = None if starts is None else Documents(starts, T).pieces(C)

    def split(x: Tensor) -> Tensor:  # [B, T, H, D] -> [G, C / b, b, D], G = B H N chunks
        if pieces is not None:
            x = pieces.lay_out(x)
        else:
            x = zero_padding(x, lengths)
            x = F.pad(x, (0, 0, 0, 0, 0, -T % C)) if T % C else x  # F.pad by nothing would be one more copy
        return x.transpose(1, 2).reshape(-1, C // b, b, x.shape[-1])

    with without_autocast(q.device):
        if first is None:
            first = q.new_zeros(R, H, Dk, Dv)
        q, k, v, g = (split(x) for x in (q, k, v, g))
        updates, decays = (x.unflatten(0, (B, H, -1)) for x in _in_parts(_added, k, v, g))
        states, last = carry(updates, decays, first, pieces)
        (o,) = _in_parts(_outputs, q, k, v, g, states.flatten(0, 2))
        o = o.view(B, H, -1, Dv).transpose(1, 2)  # [B, N C, H, Dv]
        o = zero_padding(o[:, :T], lengths) if pieces is None else pieces.take_up(o)
    return o, last


def _of_later(q: Tensor, k: Tensor, v: Tensor, g: Tensor, lengths: Tensor | None, starts: Tensor | None) -> Tensor:
    """What steps hear from later ones: from the end, where a key counts from the next step on, decayed by its own."""
    q, k, v, g = (zero_padding(x, lengths) for x in (q, k, v, g))
    T, last = q.shape[1], None
    if starts is not None:
        of_steps = Documents(starts, T).of_steps()
        last = (of_steps[1:] != of_steps[:-1])[:, None, None]
        starts = T - starts.flip(0)

    def next_of(x: Tensor) -> Tensor:  # nothing behind the last step
        x = x[:, 1:] if last is None else torch.where(last, 0, x[:, 1:])
        return F.pad(x, (0, 0, 0, 0, 0, 1)).flip(1)

    o, _ = secondary_chunks(q.flip(1), next_of(k * g.exp()), next_of(v), next_of(g), None, None, starts)
    return o.flip(1)


def _in_parts(function: Callable[..., tuple[Tensor, ...]], *chunks: Tensor) -> tuple[Tensor, ...]:
    """function(*chunks), of a few chunks at a time: the pairs of a block take as much room as b times its queries.

    In graphs, whose compiler sees to that, in transforms of functions and on "meta" it is of all at once.
    """
    return _InParts.apply(function, *chunks) if by_hand() else function(*chunks)


class _InParts(torch.autograd.Function):
    """Keeps nothing but the chunks for the gradient, which is of a few at a time too."""

    @staticmethod
    def forward(ctx: Any, function: Any, *chunks: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*chunks)
        made = [function(*(x[part] for x in chunks)) for part in _parts(chunks)]
        return tuple(torch.cat(x) for x in zip(*made, strict=True))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        chunks = ctx.saved_tensors

        def written() -> list[Tensor]:
            found = [torch.empty_like(x) for x in chunks]
            for part in _parts(chunks):
                inputs, weights = ([x[part] for x in of] for of in (chunks, cotangents))
                for x, of_part in zip(found, pullback(ctx.function, inputs, weights), strict=True):
                    x[part] = 0 if of_part is None else of_part
            return found

        with without_autocast(chunks[0].device):  # whatever `backward` is called under
            return None, *gradient(written, ctx.function, chunks, cotangents)


def _parts(chunks: Sequence[Tensor]) -> list[slice]:
    G = len(chunks[0])
    at_once = max(1, G if chunks[0].is_meta else G // (2 * BLOCK))
    return [slice(start, start + at_once) for start in range(0, G, at_once)]


# Of G chunks of n blocks of b steps.


def _added(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """[G, n, b, D] -> what each chunk adds to the state, [G, Dk, Dv], and leaves of it, [G, Dk, 1]."""
    whole = g.sum(2)  # [G, n, Dk]
    to_end = _after(g) + _after(whole)[:, :, None]
    return (k * to_end.exp()).flatten(1, 2).mT @ v.flatten(1, 2), whole.sum(1).exp()[..., None]


def _outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor]:
    """[G, n, b, D], and the state ahead of each chunk -> [G, n b, Dv]."""
    _, n, b, _ = g.shape
    before = F.pad(g.sum(2), (0, 0, 1, 0))[:, :n]  # [G, n, Dk], of the block before
    from_start = g.cumsum(2)  # of the block; with those ahead, of the chunk
    state = (q * (from_start + before.cumsum(1)[:, :, None]).exp()).flatten(1, 2) @ S
    to_block = _after(g)[:, None] + _between(before, 1)[..., None, :]  # [G, n, n, b, Dk], from keys to a later block
    weights = (q * from_start.exp()) @ (k[:, None] * to_block.exp()).flatten(2, 3).mT  # [G, n, b, n b]
    pairs = _between(g).exp() * k[:, :, None]  # [G, n, b, b, Dk]
    own = (pairs @ q[..., None])[..., 0]  # [G, n, b, b]
    weights = weights.unflatten(3, (n, b)) + torch.diag_embed(own.permute(0, 2, 3, 1), dim1=1, dim2=3)
    return (state + weights.flatten(3, 4).flatten(1, 2) @ v.flatten(1, 2),)


def _between(g: Tensor, skipped: int = 0) -> Tensor:
    """The sum of g over (s + skipped, r] at [..., r, s, :], -inf where r is before: [..., n, D] -> [..., n, n, D]."""
    step = torch.arange(g.shape[-2], device=g.device)
    ahead = (step[:, None] - step - skipped)[..., None]
    sums = torch.where(ahead > 0, g[..., :, None, :], 0).cumsum(-3)
    return torch.where(ahead >= 0, sums, -torch.inf)


def _after(g: Tensor) -> Tensor:
    """The sum of g over all that is later than each, [..., n, D]."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
