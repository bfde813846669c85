"""What every operation shares: padding, and the dtype sums are kept in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def valid_positions(lengths: Tensor, T: int) -> Tensor:
    """True where a position lies within its sequence: [B] lengths -> [B, T]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`x` [B, T, ...] with zeros past each length, in value and gradient, whatever stood there (NaN included)."""
    if lengths is None:
        return x
    valid = valid_positions(lengths, x.shape[1])
    return torch.where(valid.reshape(valid.shape + (1,) * (x.dim() - 2)), x, 0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and carried state for inputs of `dtype`: at least single precision, double stays double."""
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where sums must not be kept in half precision. Tensors without data ("meta") know no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def check_lengths(operation: str, lengths: Tensor | None, B: int) -> None:
    """Raises ValueError unless `lengths` is None or int64 [B]. Values are not read: that would synchronise a GPU."""
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != (B,)):
        raise ValueError(f"{operation}: lengths must be int64 [{B}], got {lengths.dtype} {list(lengths.shape)}")


def pad_channels(x: Tensor) -> Tensor:
    """x with channels of 0 behind its own, as many as loads of 16 bytes want: a multiple of 16."""
    missing = -x.shape[-1] % 16
    return F.pad(x, (0, missing)) if missing else x  # padding by nothing would copy
