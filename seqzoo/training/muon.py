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
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

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
            # Matrices of one shape are orthogonalised together: small ones cost less than the calls for each would.
            of_shape: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    of_shape[weight.shape, weight.dtype].append(weight)
            for (shape, _), weights in of_shape.items():
                updates = orthogonal(torch.stack([self._moved(weight) for weight in weights]))
                for weight, update in zip(weights, updates.unbind(), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-SCALE * math.sqrt(max(shape)) * group["lr"])
        return loss

    def _moved(self, weight: nn.Parameter) -> Tensor:
        """Nesterov's momentum of a gradient."""
        gradient, state = cast(Tensor, weight.grad), self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM), MOMENTUM)


def orthogonal(x: Tensor) -> Tensor:
    """[k, m, n] -> [k, m, n], k matrices with the same singular vectors, and singular values of 0.7 to 1.2 where they
    are not below a thousandth of their matrix's norm, by Newton and Schulz's iteration."""
    y = x.to(torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    y = y.mT if tall else y
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)
