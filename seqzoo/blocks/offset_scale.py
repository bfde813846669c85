"""Several queries and keys of one vector: per-channel scales and offsets, then rotary positions (Hua et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.common import accumulation_dtype, in_cache
from ..kernels.derivatives import by_hand, gradient
from .rotary import turned, turns


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
    turn = None if position is None else turns(position, z.shape[-1], wide)
    return (_OffsetScale.apply if by_hand() else _plain)(z, gamma.to(wide), beta.to(wide), turn)


class _OffsetScale(torch.autograd.Function):
    """Autograd would go through four times as much as z is, a dozen times; this does while a few steps are cached."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z, gamma, beta, turn)
        rows = tuple(z.new_empty(z.shape) for _ in gamma)
        for t in _together(z, gamma):
            for row, part in zip(rows, _plain(z[:, t], gamma, beta, _at(turn, t)), strict=True):
                row[:, t] = part
        return rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, beta, turn = ctx.saved_tensors

        def written() -> tuple[Tensor | None, ...]:
            dz, d_gamma, d_beta = z.new_empty(z.shape), torch.zeros_like(gamma), torch.zeros_like(beta)
            back = None if turn is None else turn.conj_physical()
            for t in _together(z, gamma):
                d = torch.stack([row[:, t] for row in upstream], 2).to(gamma.dtype)  # [B, t, rows, S]
                if back is not None:
                    d = turned(d, back[..., t, :, :])
                d_beta += d.sum((0, 1))
                d_gamma += (d * z[:, t, None]).sum((0, 1))
                dz[:, t] = (d * gamma).sum(2)
            return dz, d_gamma, d_beta

        def form(z: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
            return _plain(z, gamma, beta, turn)

        return *gradient(written, form, (z, gamma, beta), upstream), None


def _plain(z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor | None) -> tuple[Tensor, ...]:
    rows = torch.addcmul(beta, z[:, :, None].to(gamma.dtype), gamma)  # [B, T, rows, S]
    return (rows if turn is None else turned(rows, turn)).to(z.dtype).unbind(2)


def _together(z: Tensor, gamma: Tensor) -> list[slice]:
    return in_cache(z.shape[1], len(z) * gamma.numel(), z)


def _at(turn: Tensor | None, t: slice) -> Tensor | None:
    return None if turn is None else turn[..., t, :, :]
