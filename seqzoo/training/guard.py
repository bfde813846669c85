"""Weights that no failed step touches, with nothing read from the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Guard:
    """Holds an optimiser from the first step on whose loss or gradient is not finite.

    A step on such gradients destroys the weights, and to ask after every step whether it may be taken would leave a GPU
    idle. So the answer stays on the device, where the optimiser finds it, and later steps change nothing either: what
    failed can still be repeated and explained when somebody asks.

    Args:
        optimizer: one of PyTorch's fused ones.
        device: where its parameters are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.failed = torch.full((), math.inf, dtype=torch.float64, device=device)  # the first step that did

    def watch(self, step: int, finite: Tensor) -> None:
        """`finite`, a boolean scalar on the device, says whether the coming `step` may be taken."""
        failing = torch.full_like(self.failed, step).masked_fill(finite, math.inf)
        self.failed = torch.minimum(self.failed, failing)
        # What a scaler of gradients tells fused optimisers: they do not move where it is 1.
        self.optimizer.found_inf = self.failed.isfinite().float()  # type: ignore[attr-defined]

    @contextmanager
    def sparing(self, buffers: Iterable[Tensor]) -> Iterator[None]:
        """What is written into `buffers` within it is undone where a step has failed."""
        before = [(buffer, buffer.clone()) for buffer in buffers]
        yield
        for buffer, kept in before:
            buffer.copy_(torch.where(self.failed.isfinite(), kept, buffer))
