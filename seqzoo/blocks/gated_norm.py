"""A gate, then an RMS norm (Dao and Gu 2024, "Transformers are SSMs", figure 6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype, in_cache
from ..kernels.derivatives import by_hand, gradient


class GatedRMSNorm(nn.Module):
    """rms(y ∘ SiLU(z)) ∘ scale, the mean square being that of each group of channels; in single precision at least.

    Args:
        channels: E.
        groups: that `channels` fall into, one behind the other.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, groups: int = 1, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[B, T, E], of two of that shape and the same dtype."""
        return (_GatedRMSNorm.apply if by_hand() else _plain)(y, z, self.scale, self.groups, self.eps)


def _plain(y: Tensor, z: Tensor, scale: Tensor, groups: int, eps: float) -> Tensor:
    dtype = accumulation_dtype(y.dtype)
    gated = (y.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (groups, -1))
    normed = gated * _inverse_rms(gated, eps)
    return (normed.flatten(-2) * scale.to(dtype)).to(y.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class _GatedRMSNorm(torch.autograd.Function):
    """Autograd would keep five tensors and go through all of each a dozen times; this does while steps are cached."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, scale: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, scale)
        ctx.options = groups, eps
        out = y.new_empty(y.shape)
        for t in _together(y):
            out[:, t] = _plain(y[:, t], z[:, t], scale, groups, eps)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        y, z, scale = ctx.saved_tensors
        groups, eps = ctx.options
        dtype = accumulation_dtype(y.dtype)

        def form(y: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor]:
            return (_plain(y, z, scale, groups, eps),)

        def written() -> tuple[Tensor, ...]:
            dy, dz, d_scale = y.new_empty(y.shape), z.new_empty(z.shape), torch.zeros_like(scale, dtype=dtype)
            for t in _together(y):
                y_t, z_t, d_t = (x[:, t].to(dtype) for x in (y, z, d))
                gate = F.silu(z_t)
                gated = (y_t * gate).unflatten(-1, (groups, -1))
                inverse = _inverse_rms(gated, eps)
                normed = gated.mul_(inverse)
                d_scale += (d_t * normed.flatten(-2)).sum((0, 1))
                d_normed = (d_t * scale.to(dtype)).view_as(normed)
                d_gated = d_normed.sub_(normed * (d_normed * normed).mean(-1, keepdim=True)).mul_(inverse).flatten(-2)
                dy[:, t] = d_gated * gate
                dz[:, t] = torch.ops.aten.silu_backward(d_gated.mul_(y_t), z_t)
            return dy, dz, d_scale.to(scale.dtype)

        return *gradient(written, form, (y, z, scale), (d,)), None, None


def _together(x: Tensor) -> list[slice]:
    return in_cache(x.shape[1], 4 * len(x) * x.shape[2], x)
