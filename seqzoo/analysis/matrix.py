"""The matrix that maps values to outputs, of any block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..blocks import Block
from ..kernels.common import valid_positions, zero_padding

CHANNELS = 16  # of an input, tried at a time: what bounds memory


@torch.no_grad()
def mixing_matrix(block: Block, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """How much of each position's value every position's output holds, when `block` is given `x`.

    Between a block's projections stands an operation that is linear in the values v: y_t = Σ_s J[t, s] v_s, J[t, s] a
    matrix over the E channels of a head. It takes in all that acts over time and nothing else: queries, keys, codes,
    decays and normalisers are those of `x`; projections, gates, norms of the output and the skip D∘x are left out. The
    operation itself is run, as `block` runs it on `x`, on values of 1 at one position and 0 at the others.

    - Attention of every kind gives all channels of a head the same weight: J[t, s] = A[t, s] I, and A is returned.
      Signs are kept. Softmax, normalised linear, Performer and VQ attention: rows sum to one. GAU: the part inside a
      chunk and the linear part over all chunks together, before the gate u; the linear part can be negative.
    - Of blocks that convolve, v is the input x and J[t, s] no multiple of I: diagonal for S4D, Re(C diag(λ^(t-s)) γ B)
      for LRU. What is returned is the gain √(Σ_r ‖J[t, s] x_r‖² / Σ_r ‖x_r‖²) over all inputs x_r of the call: how long
      what reaches t is, relative to what left s, for inputs that point where these do. It is what |A| is where J is
      A I. Directions that inputs never take would hide the others: those of pixels are few. Both directions of time of
      a bidirectional block are in it, added where t = s.

    Args:
        block: of any kind, causal or not.
        x: [B, T, d_model], the block's input.
        lengths: int64 [B]; rows and columns past them are zero.

    Returns:
        [B, H, T, T] in x's dtype, output position before input position; H is 1 where a block has no heads.

    Raises:
        ValueError: `x` does not fit the block, or the block does not mix through `Block.over_time`.
    """
    if block.convolves:
        gain = _gain_by_lag(block, zero_padding(x, lengths))
        here = torch.arange(x.shape[1], device=x.device)
        weights = gain[here[:, None] - here + x.shape[1] - 1].expand(len(x), 1, -1, -1)
    else:
        weights = _observe(block, x, lengths, _on_unit_values)
    if lengths is None:
        return weights
    valid = valid_positions(lengths, x.shape[1])
    return torch.where(valid[:, None, :, None] & valid[:, None, None, :], weights, 0)


def _on_unit_values(operation: Callable[..., Any], values: Tensor, *gates: Tensor) -> Tensor:
    """The outputs for values that are 1 at position s in channel s, of all heads: [B, H, T, T]."""
    B, T, *heads, _ = values.shape
    basis = torch.eye(T, dtype=values.dtype, device=values.device).view(1, T, *[1] * len(heads), T)
    basis = basis.expand(B, T, *heads, T)
    y = operation(basis, *(torch.ones_like(basis) for _ in gates))
    return y.reshape(B, T, -1, T).transpose(1, 2)


def _gain_by_lag(block: Block, x: Tensor) -> Tensor:
    """The gain for inputs like `x` [B, T, D] by t - s, from 1 - T to T - 1: [2T - 1].

    Σ_r ‖J x_r‖² is a sum over the rows of any R with RᵀR = xᵀx, of which there are D and not B T; and what happens at
    every distance is in the responses to impulses at either end.
    """
    _, T, D = x.shape
    operation = _observe(block, x[:1, :1], None, lambda operation, values: operation)
    _, sigma, directions = torch.linalg.svd(x.flatten(0, 1), full_matrices=False)
    energy = x.new_zeros(2, T)
    for rows in (sigma[:, None] * directions).split(CHANNELS):
        impulses = x.new_zeros(2, len(rows), T, D)
        impulses[0, :, 0] = impulses[1, :, -1] = rows
        responses, *_ = operation(impulses.flatten(0, 1))
        energy += responses.unflatten(0, (2, -1)).square().sum((1, 3))
    first, last = (energy / sigma.square().sum()).sqrt()
    return torch.cat([last[:-1], first])


def _observe(block: Block, x: Tensor, lengths: Tensor | None, measure: Callable[..., Any]) -> Any:
    """What `measure` makes of the operation over time that `block` runs on `x`."""
    found: list[Any] = []
    with block.observed(lambda *given: found.append(measure(*given))):
        block(x, lengths=lengths)
    if len(found) != 1:
        raise ValueError(
            f"{type(block).__name__} calls over_time {len(found)} times; valid: once, for all that mixes over time"
        )
    return found[0]
