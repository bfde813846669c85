"""Layers of PyTorch, written out in forward mode: its own tangents of these have a wrong gradient there, or none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.derivatives import forward_mode


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) over the last axis."""
    if not forward_mode():
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()


class LayerNorm(nn.LayerNorm):
    """Over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.eps) * self.weight + self.bias if forward_mode() else super().forward(x)


class GLU(nn.GLU):
    """a σ(b), of [..., 2D] = (a, b): [..., D]. (Dauphin et al. 2017, "Language modeling with gated convolutions")"""

    def forward(self, x: Tensor) -> Tensor:
        if not forward_mode():
            return super().forward(x)
        a, b = x.chunk(2, -1)
        return a * b.sigmoid()
