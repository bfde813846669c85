"""Inputs for blocks, and gradients of what they make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import Block


def sequences(B: int, T: int, *, d_model: int = 16, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """[B, T, d_model] of N(0, 1), the same for the same arguments."""
    return torch.randn(B, T, d_model, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter_gradients(block: Block, y: Tensor, seed: int = 2) -> Sequence[Tensor | None]:
    """Of a sum of `y` with fixed random weights, by the parameters that are trained."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    parameters = [p for p in block.parameters() if p.requires_grad]
    return torch.autograd.grad((y * weight).sum(), parameters, allow_unused=True)
