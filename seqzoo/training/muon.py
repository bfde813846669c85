"""Muon, whose updates of matrices are momenta with all their singular values near 1.

`torch.optim.Muon` iterates in bfloat16 on every device. Where a gradient has no part, as along the mean of what a norm
has centred, rounding then becomes as large a part of the update as any, and a CPU without instructions for bfloat16
takes tens of times as long as in single precision (findings/torch_muon_bf16_iteration.sh). This one iterates in the
precision of its parameters on a CPU, and in bfloat16, as published, on other devices.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale: Liu et al., "Muon is
Scalable for LLM Training" (2025), section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VERSION = 2  # of what it computes: the first one was PyTorch's
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of X, X Xᵀ X and (X Xᵀ)² X
ITERATIONS = 5
SMALLEST_NORM = 1e-7
SCALE = 0.2  # the root mean square of an update of AdamW, as is usual


class Muon(torch.optim.Optimizer):
    """Over parameters [rows, columns]; it keeps a momentum of each as `momentum_buffer`.

    An update is as large as AdamW's are, so that rates and decay keep their meaning.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-SCALE * math.sqrt(max(weight.shape)) * group["lr"])
        return loss


def orthogonal(x: Tensor) -> Tensor:
    """[m, n] -> [m, n] with the same singular vectors, and singular values of 0.7 to 1.2 where they are not below a
    thousandth of the norm, by Newton and Schulz's iteration."""
    y = x.to(torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else torch.bfloat16)
    y = y.mT if len(x) > x.shape[1] else y
    y = y / y.norm().clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if len(x) > x.shape[1] else y).to(x.dtype)
