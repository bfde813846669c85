"""What attention takes from outside the windows, by code: a loop over blocks, forward and backward.

The loop holds the values summed by code once, where a product over all blocks would hold a sum for each. It is a
registered operator, or a graph compiler would unroll it. A block's window ends with its neighbours, so that the first
block outside is two away. G = B H sequences, N blocks of L positions each, S codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sums_outside(blocks: Tensor, causal: bool) -> Tensor:
    """Sums over the blocks outside each block's window, of what each block has: [B, H, N, X]."""
    N = blocks.shape[2]
    edge = min(N, 2)
    outside = F.pad(blocks[:, :, : N - edge].cumsum(2), (0, 0, edge, 0))
    if not causal:
        outside = outside + F.pad(blocks[:, :, edge:].flip(2).cumsum(2).flip(2), (0, 0, 0, edge))
    return outside


@torch.library.custom_op("seqzoo::vq_read_outside", mutates_args=())
def read_outside(weights: Tensor, values: Tensor, codes: Tensor, causal: bool) -> Tensor:
    """Σ_j weights[codes_j] values_j over the keys j before a query's window and, if not causal, behind it.

    Args:
        weights: [G, N, L, S], for each query and code.
        values: [G, N, L, Dv], zero where there is no key.
        codes: int64 [G, N, L].

    Returns: [G, N, L, Dv].
    """
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    row = _rows(codes, weights.shape[-1])
    for order in _orders(weights, causal):
        sums = _sums(weights, values)
        for i, j in zip(order[2:], order, strict=False):
            _add_values(sums, row[:, j], values[:, j])
            out[:, i] += torch.bmm(weights[:, i], sums)
    return out


@torch.library.custom_op("seqzoo::vq_read_outside_backward", mutates_args=())
def read_outside_backward(
    dy: Tensor, weights: Tensor, values: Tensor, codes: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and values from `dy`, that of what was read."""
    d_weights, d_values = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (weights, values))
    row = _rows(codes, weights.shape[-1])
    for order in _orders(weights, causal):
        pairs = list(zip(order[2:], order, strict=False))
        sums = _sums(weights, values)
        for i, j in pairs:
            _add_values(sums, row[:, j], values[:, j])
            d_weights[:, i] += torch.bmm(dy[:, i], sums.mT)
        d_sums = sums.zero_()
        for i, j in reversed(pairs):
            d_sums.baddbmm_(weights[:, i].mT, dy[:, i])
            d_values[:, j] += F.embedding(row[:, j], d_sums.flatten(0, 1))
    return d_weights, d_values


@read_outside.register_fake
def _(weights: Tensor, values: Tensor, codes: Tensor, causal: bool) -> Tensor:
    return values.new_empty(values.shape)


@read_outside_backward.register_fake
def _(dy: Tensor, weights: Tensor, values: Tensor, codes: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), values.new_empty(values.shape)


def _orders(weights: Tensor, causal: bool) -> list[range]:
    """The orders in which to go through the blocks: each reads the sum of those two or more before it."""
    forward = range(weights.shape[1])
    return [forward] if causal else [forward, forward[::-1]]


def _rows(codes: Tensor, S: int) -> Tensor:
    """Where a key's code lies in sums [G S, Dv]: [G, N, L]."""
    return torch.arange(len(codes), device=codes.device)[:, None, None] * S + codes


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(len(weights), weights.shape[-1], values.shape[-1])  # [G, S, Dv]


def _add_values(sums: Tensor, row: Tensor, values: Tensor) -> None:
    sums.flatten(0, 1).index_add_(0, row.flatten(), values.flatten(0, 1))
