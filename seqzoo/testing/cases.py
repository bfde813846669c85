"""Inputs for blocks, and gradients of what they make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..blocks import Block

Build = Callable[..., Block]


def prepared(make: Callable[[], Block], *, dtype: torch.dtype = torch.float64, train: bool = False) -> Block:
    """A block that `make` makes, the same each time; layers that begin with zeros, which would hide what stands behind
    them, begin otherwise."""
    torch.manual_seed(0)
    block = make()
    for layer in block.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.3)
    return block.to(dtype).train(train)


def sequences(B: int, T: int, *, d_model: int = 16, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """[B, T, d_model] of N(0, 1), the same for the same arguments."""
    return torch.randn(B, T, d_model, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs_of(block: Block, B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Inputs of the block's width."""
    return sequences(B, T, d_model=block.d_model, dtype=dtype, seed=seed)


def parameter_gradients(block: Block, y: Tensor, seed: int = 2) -> Sequence[Tensor | None]:
    """Of a sum of `y` with fixed random weights, by the parameters that are trained."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    parameters = [p for p in block.parameters() if p.requires_grad]
    return torch.autograd.grad((y * weight).sum(), parameters, allow_unused=True)
