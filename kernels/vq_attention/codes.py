from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..backends import Backend, choose, fit
from ..common import accumulation_dtype, check_lengths, valid_positions, without_autocast, zero_padding

CHANNELS = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), sys.maxsize)  # of the fused forms: any number


@torch.no_grad()
def nearest_code(k: Tensor, codebook: Tensor, *, lengths: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """The index of the code nearest to each key, argmin_s |k - c_s|², in single precision at least.

    Args:
        k: [B, T, H, D].
        codebook: [H, S, D].
        lengths: int64 [B]; past them the codes mean nothing, but are valid indices.
        backend: "auto", "fused" or "chunked".

    Returns:
        int64 [B, T, H].
    """
    lengths = check_lengths("nearest_code", lengths, *k.shape[:2])
    forms = {"chunked": _chunked, "fused": _fused}
    return choose("nearest_code", backend, forms, fit(k, codebook, channels=CHANNELS))(k, codebook, lengths)


def _chunked(k: Tensor, codebook: Tensor, lengths: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(torch.promote_types(k.dtype, codebook.dtype))
    k, codebook = zero_padding(k, lengths).to(dtype), codebook.to(dtype)
    with without_autocast(k.device):
        offset = codebook.square().sum(-1)[:, None] / -2  # [H, 1, S]
        closeness = torch.baddbmm(offset, k.flatten(0, 1).transpose(0, 1), codebook.mT)  # [H, BT, S]
        return closeness.max(-1).indices.T.view(k.shape[:-1])


def _fused(k: Tensor, codebook: Tensor, lengths: Tensor | None) -> Tensor:
    from .nearest import nearest_code_fused  # imports Triton

    return nearest_code_fused(k, codebook, None if lengths is None else valid_positions(lengths, k.shape[1]))


def straight_through(k: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """The code of each key in value, the key itself in gradient: [B, T, H, D]."""
    heads = torch.arange(codebook.shape[0], device=codes.device)
    return codebook[heads, codes].to(k.dtype) + (k - k.detach())
