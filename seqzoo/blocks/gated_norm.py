"""RMS norms behind a gate (Dao and Gu 2024, "Transformers are SSMs", figure 6), and ahead of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype, steps_in_cache
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


class NormThenGate(nn.Module):
    """rms(y) ∘ weight ∘ gate(z), the mean square being that of a head; in single precision at least.

    Args:
        channels: of a head, E.
        gate: "silu" or "sigmoid".
        eps: added to the mean square.
        affine: have a `weight`.
    """

    def __init__(self, channels: int, gate: str, *, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.gate, self.eps = gate, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[B, T, H · E], of y [B, T, H, E] and z [B, T, H · E]."""
        return (_NormThenGate.apply if by_hand() else _normed_and_gated)(y, z, self.weight, self.gate, self.eps)


def _normed_and_gated(y: Tensor, z: Tensor, weight: Tensor | None, gate: str, eps: float) -> Tensor:
    dtype, wide = torch.promote_types(y.dtype, z.dtype), accumulation_dtype(y.dtype)
    normed = y.to(wide) * _inverse_rms(y.to(wide), eps)
    normed = normed if weight is None else normed * weight.to(wide)
    return (normed.flatten(-2) * GATES[gate](z.to(wide))).to(dtype)


class _NormThenGate(torch.autograd.Function):
    """Keeps its inputs alone, and goes through them while steps are cached."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor | None, gate: str, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.options = gate, eps
        out = z.new_empty(z.shape, dtype=torch.promote_types(y.dtype, z.dtype))
        for t in steps_in_cache(z):
            out[:, t] = _normed_and_gated(y[:, t], z[:, t], weight, gate, eps)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        gate, eps = ctx.options
        wide = accumulation_dtype(y.dtype)

        def form(y: Tensor, z: Tensor, weight: Tensor | None) -> tuple[Tensor]:
            return (_normed_and_gated(y, z, weight, gate, eps),)

        def written() -> tuple[Tensor | None, ...]:
            dy, dz, scale = y.new_empty(y.shape), z.new_empty(z.shape), None if weight is None else weight.to(wide)
            d_weight = None if weight is None else torch.zeros_like(weight, dtype=wide)
            for t in steps_in_cache(z):
                y_t, z_t, d_t = (x[:, t].to(wide) for x in (y, z, d))
                inverse, opened = _inverse_rms(y_t, eps), GATES[gate](z_t)
                normed = y_t * inverse
                d_normed = (d_t * opened).view_as(normed)
                if d_weight is not None and scale is not None:
                    d_weight += (d_normed * normed).sum((0, 1, 2))
                    d_normed.mul_(scale)
                dy[:, t] = (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True)).mul_(inverse)
                d_opened = (normed if scale is None else normed.mul_(scale)).flatten(-2).mul_(d_t)
                dz[:, t] = SLOPES[gate](d_opened, z_t, opened)
            return dy, dz, None if weight is None or d_weight is None else d_weight.to(weight.dtype)

        return *gradient(written, form, (y, z, weight), (d,)), None, None


GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
SLOPES: dict[str, Callable[..., Tensor]] = {  # of the gate's gradient, its inputs and what it gives
    "silu": lambda d, z, _: torch.ops.aten.silu_backward(d, z),
    "sigmoid": lambda d, _, y: torch.ops.aten.sigmoid_backward(d, y),
}


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
        for t in steps_in_cache(y):
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
            for t in steps_in_cache(y):
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
