"""Products of the queries and keys of a chunk, with what decays between the two, and their gradients.

Each step has two queries, what it reads and what it erases with, side by side in [M, 2C, Dk] for M chunks of C steps.
Every factor is the decay over an interval, at most 1, and none is a quotient of two: one of 0 is like any other, and
leaves exactly nothing of what lies before it, in values and in gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import future


class PerHead(NamedTuple):
    """A decay per head and step, or none."""

    weights: Tensor  # [M, C, C] or [1, C, C], from a key to a query, 0 where the key is ahead
    through: Any  # [M, C, 1], from before the chunk to each step; None: no decay
    after: Any  # [M, C, 1], from each step to the end of the chunk

    @classmethod
    def of(cls, g: Tensor) -> PerHead:
        """Of log decays [M, C, 1]."""
        C = g.shape[1]
        # Each is a sum of its own: differences would lose small ones beside large ones and turn -inf into NaN.
        sums = g.expand(-1, -1, C).tril(-1).cumsum(1)
        weights = sums.masked_fill(future(C, g.device), -torch.inf).exp()
        return cls(weights, g.cumsum(1).exp(), weights[:, -1, :, None])

    @classmethod
    def none(cls, k: Tensor) -> PerHead:
        """For keys [M, C, Dk]."""
        return cls(k.new_ones(1, k.shape[1], k.shape[1]).tril(), None, None)

    def pairs(self, x: Tensor, k: Tensor) -> Tensor:
        """x [M, 2C, Dk] with k [M, C, Dk]: [M, C, 2, C], 0 where the key is ahead."""
        return torch.bmm(x, k.mT).unflatten(1, (-1, 2)) * self.weights[:, :, None]

    def pairs_gradient(self, d_pairs: Tensor, pairs: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The gradients of x, of k, and, for `log_gradient`, of what decays in between."""
        inner = None if self.through is None else (d_pairs * pairs).sum(2)  # [M, C, C]
        d_products = d_pairs.mul_(self.weights[:, :, None]).flatten(1, 2)
        return torch.bmm(d_products, k), torch.bmm(d_products.mT, x), inner

    def log_gradient(self, inner: Any, through: Tensor, after: Tensor, total: Tensor) -> Tensor:
        """[M, C, 1], of each log decay, given by channels the gradients of the logarithms of `through`, of `after`, and
        of the last `through`, what a state goes through in the whole chunk [M, 1, Dk]."""
        # A step's decay is in all pairs of a key before it and a query that is not.
        crossing = inner.cumsum(-1).tril_(-1).sum(1)[:, :-1, None]
        through, after, total = (x.sum(-1, keepdim=True) for x in (through, after, total))
        dg = through.flip(1).cumsum(1).flip(1) + total
        dg[:, 1:] += crossing + after.cumsum(1)[:, :-1]
        return dg


class PerChannel(NamedTuple):
    """A decay per channel of k too: the two halves of a chunk meet in a product of queries of the later one, decayed
    since its beginning, and keys of the earlier one, decayed up to its end; then the same within each, down to steps.
    """

    levels: list[tuple[Tensor, Tensor]]  # [M, C / 2h, h, Dk], `through` the later of two halves, `after` the earlier
    through: Tensor  # [M, C, Dk]
    after: Tensor  # [M, C, Dk]

    @classmethod
    def of(cls, g: Tensor) -> PerChannel:
        """Of log decays [M, C, Dk], C a power of two."""
        levels = []
        through = g.exp()[:, :, None]  # [M, C / h, h, Dk], from the beginning of each h steps
        after = torch.ones_like(through)
        while through.shape[1] > 1:
            (first, second), (ahead, behind) = (x.unflatten(1, (-1, 2)).unbind(2) for x in (through, after))
            levels.append((second, ahead))
            through = torch.cat([first, second * first[:, :, -1:]], 2)
            after = torch.cat([ahead * second[:, :, -1:], behind], 2)
        return cls(levels, through[:, 0], after[:, 0])

    def pairs(self, x: Tensor, k: Tensor) -> Tensor:
        pairs = (x.unflatten(1, (-1, 2)) * k[:, :, None]).sum(-1)[:, :, None, :, None]  # [M, C / h, h, 2, h]
        for through, after in self.levels:
            queries, keys = _meeting(x, k, through, after)
            block = torch.bmm(queries, keys.mT).view(*through.shape[:3], 2, through.shape[2])
            first, second = pairs.unflatten(1, (-1, 2)).unbind(2)
            above = torch.cat([first, torch.zeros_like(first)], -1)
            pairs = torch.cat([above, torch.cat([block, second], -1)], 2)
        return pairs[:, 0]

    def pairs_gradient(self, d_pairs: Tensor, pairs: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Any]:
        C, inner = k.shape[1], []
        d_self = d_pairs.diagonal(dim1=1, dim2=3).mT[..., None]  # [M, C, 2, 1]
        dx, dk = (d_self * k[:, :, None]).flatten(1, 2), (d_self * x.unflatten(1, (C, 2))).sum(2)
        d_pairs = d_pairs[:, None]  # [M, C / 2h, 2h, 2, 2h]
        for through, after in reversed(self.levels):
            h = through.shape[2]
            queries, keys = _meeting(x, k, through, after)
            d_block = d_pairs[:, :, h:, :, :h].flatten(0, 1).flatten(1, 2)
            d_queries, d_keys = torch.bmm(d_block, keys), torch.bmm(d_block.mT, queries)
            later, earlier = _halves(dx, 2 * h)[:, :, 1].unflatten(2, (h, 2)), _halves(dk, h)[:, :, 0]
            inner.append((queries.mul_(d_queries).view(later.shape).sum(3), keys.mul_(d_keys)))
            later.addcmul_(d_queries.view(later.shape), through[:, :, :, None])
            earlier.addcmul_(d_keys.view(after.shape), after)
            d_pairs = torch.stack([d_pairs[:, :, :h, :, :h], d_pairs[:, :, h:, :, h:]], 2).flatten(1, 2)
        return dx, dk, inner

    def log_gradient(self, inner: Any, through: Tensor, after: Tensor, total: Tensor) -> Tensor:
        """[M, C, Dk], as of `PerHead`: how `of` makes factors of factors, backwards, in logarithms."""
        through[:, -1:] += total
        for of_queries, of_keys in inner:
            h = of_queries.shape[2]
            (first, second), (ahead, _) = (_halves(d, h).unbind(2) for d in (through, after))
            first[:, :, -1] += second.sum(2)
            second[:, :, -1] += ahead.sum(2)
            second += of_queries
            ahead += of_keys.view(ahead.shape)
        return through


def _halves(x: Tensor, h: int) -> Tensor:
    """[M, C, D] -> [M, C / 2h, 2, h, D], a view."""
    return x.unflatten(1, (-1, 2, h))


def _meeting(x: Tensor, k: Tensor, through: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The queries [·, 2h, Dk] of later halves and the keys [·, h, Dk] of earlier ones, as they meet between the two."""
    h = through.shape[2]
    queries = _halves(x, 2 * h)[:, :, 1].unflatten(2, (h, 2)) * through[:, :, :, None]
    keys = _halves(k, h)[:, :, 0] * after
    return queries.flatten(0, 1).flatten(1, 2), keys.flatten(0, 1)
