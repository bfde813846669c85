"""What there is to say of a mixing matrix in one number, or one curve.

All take weights [..., T, T], output position before input position, of any size and sign: magnitudes are divided by
the sum of their row, |A[t, s]| / Σ_s |A[t, s]|, which is A itself for softmax. Only the effective rank is that of the
signed matrix. Rows without any weight, as padding has, are NaN: take means with `nanmean`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.common import accumulation_dtype, valid_positions


def shares(weights: Tensor) -> Tensor:
    """Each position's share of a row's magnitude, p[t, s] = |A[t, s]| / Σ_s |A[t, s]|: [..., T, T], rows sum to 1.

    In single precision at least, as all that is told here.
    """
    size = weights.abs().to(accumulation_dtype(weights.dtype))
    return size / size.sum(-1, keepdim=True)


def reachable(T: int, *, causal: bool, lengths: Tensor | None = None) -> Tensor:
    """How many positions each position may take values from: int64 [T], or with `lengths`
    (int64 [B]) [B, 1, T], to broadcast over heads, and 0 past them."""
    if lengths is None:
        return torch.arange(1, T + 1) if causal else torch.full((T,), T)
    each = torch.arange(1, T + 1, device=lengths.device) if causal else lengths[:, None]
    return torch.where(valid_positions(lengths, T), each, 0)[:, None]


def row_entropy(weights: Tensor) -> Tensor:
    """-Σ_s p log p of each row: [..., T], nats, from 0 (one position) to log of the number of reachable positions."""
    p = shares(weights)
    return torch.special.entr(p).sum(-1)


def normalized_entropy(weights: Tensor, reach: Tensor) -> Tensor:
    """Row entropy over its largest value, log(reach): [..., T], from 0 to 1, which is uniform.

    Args:
        reach: from `reachable`, broadcast with [..., T]. A row that reaches one position has no spread: NaN.
    """
    return row_entropy(weights) / torch.where(reach > 1, reach, torch.nan).log()


def effective_rank(weights: Tensor) -> Tensor:
    """exp of the entropy of the singular values, these divided by their sum: [...], from 1 to T. Cubic in T.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007).
    """
    sigma = torch.linalg.svdvals(weights.to(accumulation_dtype(weights.dtype)))
    return torch.special.entr(sigma / sigma.sum(-1, keepdim=True)).sum(-1).exp()


def distance_profile(weights: Tensor) -> Tensor:
    """The share of weight at each distance t - s, from 1 - T (later positions) to T - 1, mean over rows.

    Returns: [..., 2T - 1], sums to 1; index T - 1 is the position itself.
    """
    T = weights.shape[-1]
    p = shares(weights)
    has_weight = ~p[..., 0].isnan()  # [..., T]
    lags = (_lags(p) + T - 1).flatten().expand(*p.shape[:-2], -1)
    total = p.new_zeros(*p.shape[:-2], 2 * T - 1).scatter_add(-1, lags, p.nan_to_num(0).flatten(-2))
    return total / has_weight.sum(-1, keepdim=True)


def mean_distance(weights: Tensor) -> Tensor:
    """Σ_s p |t - s| of each row: [..., T], positions, from 0 to T - 1; T / 3 on average where weights are uniform."""
    return (shares(weights) * _lags(weights).abs()).sum(-1)


def window_share(weights: Tensor, width: int) -> Tensor:
    """The share of each row's weight at positions with |t - s| <= width: [..., T], from 0 to 1.

    Raises:
        ValueError: `width` is negative.
    """
    if width < 0:
        raise ValueError(f"window_share: width={width}; valid: 0 or more positions to either side")
    return (shares(weights) * (_lags(weights).abs() <= width)).sum(-1)


def _lags(weights: Tensor) -> Tensor:
    """t - s: int64 [T, T]."""
    here = torch.arange(weights.shape[-1], device=weights.device)
    return here[:, None] - here
