from __future__ import annotations

from torch import Tensor

from ..kernels.agreement import relative_error


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor", *, worst_row: float = 30.0):
    """Relative error of the whole tensor within `tolerance`, of its worst row within `worst_row` times that."""
    whole, row = relative_error(actual, expected)
    if whole > tolerance:
        raise AssertionError(f"{name}: relative error {whole:.2e} over {tolerance:.0e}")
    if row > worst_row * tolerance:
        raise AssertionError(f"{name}: relative error of the worst row {row:.2e} over {worst_row * tolerance:.0e}")


def expect(holds: object, otherwise: str) -> None:
    """Raises AssertionError, with what is said, where something does not hold."""
    if not holds:
        raise AssertionError(otherwise)
