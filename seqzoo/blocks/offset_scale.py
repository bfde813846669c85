"""Several queries and keys of one vector: per-channel scales and offsets, then rotary positions (Hua et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.common import accumulation_dtype, in_cache
from ..kernels.derivatives import forward_mode, gradient
from .rotary import rotate


def offset_scale(z: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None) -> tuple[Tensor, ...]:
    """z ∘ γ_r + β_r for each row r, rotated if there are positions; in single precision at least until the end.

    Args:
        z: [B, T, S].
        gamma, beta: [rows, S].
        position: int64 [T], [1, T] or [B, T].

    Returns:
        As many tensors [B, T, S] as there are rows, in z's dtype.
    """
    wide = accumulation_dtype(z.dtype)
    gamma, beta = gamma.to(wide), beta.to(wide)
    by_hand = not (forward_mode() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    return (_OffsetScale.apply if by_hand else _plain)(z, gamma, beta, position)


class _OffsetScale(torch.autograd.Function):
    """Autograd would go through four times as much as z is, a dozen times; this does while a few steps are cached."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z, gamma, beta, position)
        rows = tuple(z.new_empty(z.shape) for _ in gamma)
        for t in _together(z, gamma):
            for row, part in zip(rows, _plain(z[:, t], gamma, beta, _at(position, t)), strict=True):
                row[:, t] = part
        return rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, beta, position = ctx.saved_tensors

        def written() -> tuple[Tensor | None, ...]:
            dz, d_gamma, d_beta = z.new_empty(z.shape), torch.zeros_like(gamma), torch.zeros_like(beta)
            for t in _together(z, gamma):
                d = torch.stack([row[:, t] for row in upstream], 2).to(gamma.dtype)  # [B, t, rows, S]
                if position is not None:
                    d = rotate(d, -_at(position, t))
                d_beta += d.sum((0, 1))
                d_gamma += (d * z[:, t, None]).sum((0, 1))
                dz[:, t] = (d * gamma).sum(2)
            return dz, d_gamma, d_beta

        def form(z: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
            return _plain(z, gamma, beta, position)

        return *gradient(written, form, (z, gamma, beta), upstream), None


def _plain(z: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None) -> tuple[Tensor, ...]:
    rows = torch.addcmul(beta, z[:, :, None].to(gamma.dtype), gamma)  # [B, T, rows, S]
    if position is not None:
        rows = rotate(rows, position)
    return rows.to(z.dtype).unbind(2)


def _together(z: Tensor, gamma: Tensor) -> list[slice]:
    return in_cache(z.shape[1], len(z) * gamma.numel(), z)


def _at(position: Tensor | None, t: slice) -> Any:
    return None if position is None else position[..., t]
