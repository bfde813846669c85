"""How far a result lies from its float64 reference: the one measure of tests and benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative RMS error over the whole tensor and over its worst row (last axis), against `expected` in double.

    A row far below the tensor's own scale is measured against a hundredth of that scale, so that rounding in a row
    of zeros does not count as an error of 100 %. A tensor that should be zero is measured absolutely. What is not
    finite, on either side, is infinitely wrong.

    Args:
        actual: on any device, in any precision.
        expected: of the same shape; sets the device.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {list(actual.shape)}; valid: {list(expected.shape)}")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected = expected.detach().to(wide)
    actual = actual.detach().to(expected)
    if not (torch.isfinite(actual.abs()).all() and torch.isfinite(expected.abs()).all()):
        return math.inf, math.inf
    if actual.numel() == 0:
        return 0.0, 0.0
    error, size = (actual - expected).abs().square(), expected.abs().square()
    scale = size.mean().sqrt().item()
    floor = scale if scale > 1e-9 else 1.0
    whole = error.mean().sqrt().item() / floor
    if actual.dim() == 0:
        return whole, whole
    rows = error.mean(-1).sqrt() / size.mean(-1).sqrt().clamp(min=1e-2 * floor)
    return whole, rows.max().item()
