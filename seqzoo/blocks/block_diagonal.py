from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class BlockDiagonal(nn.Module):
    """A linear layer in which each of `num_blocks` parts of the channels sees itself alone.

    Args:
        channels: in and out, D; a multiple of `num_blocks`.
        num_blocks: parts, H.
        bias: add a number, 0 at first, to each channel.
    """

    def __init__(self, channels: int, num_blocks: int, *, bias: bool) -> None:
        super().__init__()
        size = channels // num_blocks
        self.weight = nn.Parameter(torch.randn(num_blocks, size, size) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y = torch.einsum("...hi,hio->...ho", x.unflatten(-1, self.weight.shape[:2]), self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias
