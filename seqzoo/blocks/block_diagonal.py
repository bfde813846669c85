from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WORTH = 32  # channels, a product of its own


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
        weight = joined(self.weight)
        y = torch.einsum("...hi,hio->...ho", x.unflatten(-1, weight.shape[:2]), weight).flatten(-2)
        return y if self.bias is None else y + self.bias

    @property
    def unhooked(self) -> bool:
        """Whether a call does what `forward` says and nothing else."""
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        return type(self) is BlockDiagonal and not any(hooks)


def joined(weight: Tensor) -> Tensor:
    """The same layer in blocks of about `WORTH` channels, which hold small ones: [H, D, D] -> [H / n, nD, nD].

    Products of blocks of 4 take three times as long.
    """
    H, size, _ = weight.shape
    n = math.gcd(H, max(1, WORTH // size))
    if n == 1:
        return weight
    own = torch.eye(n, dtype=weight.dtype, device=weight.device)[:, None, :, None]
    return (weight.view(H // n, n, size, 1, size) * own).reshape(H // n, n * size, n * size)
