"""How far two tensors lie apart, the same measure in every test."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative RMS error over the whole tensor and over its worst row (last axis), against `expected` in double.

    A row far below the tensor's own scale is measured against a hundredth of that scale, so that rounding in a row
    of zeros does not count as an error of 100 %. A tensor that should be zero is measured absolutely.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    assert torch.isfinite(actual.abs()).all(), "not finite"
    if actual.numel() == 0:
        return 0.0, 0.0
    error, size = (actual - expected).abs().square(), expected.abs().square()
    scale = size.mean().sqrt()
    floor = scale.item() if scale > 1e-9 else 1.0
    whole = error.mean().sqrt().item() / floor
    if actual.dim() == 0:
        return whole, whole
    rows = error.mean(-1).sqrt() / size.mean(-1).sqrt().clamp(min=1e-2 * floor)
    return whole, rows.max().item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor", *, worst_row: float = 30.0):
    """Relative error of the whole tensor within `tolerance`, of its worst row within `worst_row` times that."""
    whole, row = relative_error(actual, expected)
    assert whole <= tolerance, f"{name}: relative error {whole:.2e} over {tolerance:.0e}"
    assert row <= worst_row * tolerance, (
        f"{name}: relative error of the worst row {row:.2e} over {worst_row * tolerance:.0e}"
    )
