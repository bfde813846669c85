from __future__ import annotations

from torch import Tensor, nn

from ..kernels.common import accumulation_dtype
from .wide import Wide


class GateBias(Wide):
    """What gates are where their projections give 0: a number each, which says how long a memory lasts at first.

    Args:
        start: [D], what they start at, in `default_dtype()`.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] and the bias, in single precision at least: half would round away what tells a decay from 1."""
        wide = accumulation_dtype(x.dtype)
        return x.to(wide) + self.bias.to(wide)
