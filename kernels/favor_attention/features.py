"""What the forms in PyTorch share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_features(k: Tensor, directions: Tensor, hidden: Tensor | None) -> Tensor:
    """b [B, H, T, M] of keys [B, H, T, D]. Those of queries lack -|q|²/2: it is common to all and cancels."""
    b = (k @ directions).sub_(k.square().sum(-1, keepdim=True) / 2)
    return b if hidden is None else b.masked_fill_(hidden, -torch.inf)


def on_cache_lines(directions: Tensor) -> Tensor:
    """[H, D, M] and some more: products are a quarter faster where rows of features start on a cache line.

    Features from M on are to have no weight.
    """
    return F.pad(directions, (0, -directions.shape[-1] % 16))


def with_ones(v: Tensor) -> Tensor:
    return F.pad(v, (0, 1), value=1.0)


def finite(maximum: Tensor) -> Tensor:
    """A maximum over no key at all, -inf, as 0: what it is subtracted from is -inf itself."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def exp_(x: Tensor) -> Tensor:
    """exp in place. On a CPU that of PyTorch takes many times as long where it underflows; exp2 does not."""
    return x.mul_(1 / math.log(2)).exp2_() if x.device.type == "cpu" else x.exp_()
