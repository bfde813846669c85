from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..valid import Count


class BlockDiagonal(nn.Module):
    """A linear layer without a bias, in which each block of channels sees itself alone: [..., D] -> [..., D].

    Args:
        d_model: channels, D.
        width: channels of a block.

    Raises:
        ValueError: blocks of `width` do not divide the channels.
    """

    def __init__(self, d_model: int, width: Count) -> None:
        super().__init__()
        if d_model % width:
            raise ValueError(f"blocks of {width} channels do not divide {d_model}; valid: a divisor of {d_model}")
        bound = 1 / math.sqrt(width)  # as of nn.Linear
        self.weight = nn.Parameter(torch.empty(d_model // width, width, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...ni,noi->...no", x.unflatten(-1, self.weight.shape[:2]), self.weight).flatten(-2)
