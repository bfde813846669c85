from __future__ import annotations

from torch import Tensor

from seqzoo.kernels.agreement import relative_error


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor", *, worst_row: float = 30.0):
    """Relative error of the whole tensor within `tolerance`, of its worst row within `worst_row` times that."""
    whole, row = relative_error(actual, expected)
    assert whole <= tolerance, f"{name}: relative error {whole:.2e} over {tolerance:.0e}"
    assert row <= worst_row * tolerance, (
        f"{name}: relative error of the worst row {row:.2e} over {worst_row * tolerance:.0e}"
    )
