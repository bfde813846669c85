from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype
from .wide import Wide, default_dtype


class Decay(Wide):
    """Steps Δ = softplus(x + b) and the logarithms of decays over them, -A Δ: a rate A for each head, a b for each
    decay.

    Args:
        rates: A at the start, [H], in `default_dtype()`.
        bias: b at the start, [H n], of n decays a head.
    """

    def __init__(self, rates: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.A_log = nn.Parameter(rates.log())
        self.dt_bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, each [B, T, H, n], of [B, T, H n]; in single precision at least."""
        wide = accumulation_dtype(x.dtype)
        steps = F.softplus(x.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (len(self.A_log), -1))
        return steps, -self.A_log.to(wide).exp()[:, None] * steps


def rates(H: int, low: float, high: float) -> Tensor:
    """A of each head, uniform between `low` and `high`: [H]."""
    return torch.empty(H, dtype=default_dtype()).uniform_(low, high)
