"""What the tests of every fused operation share. On a machine without a GPU, Triton's interpreter runs the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDE = {torch.complex64: torch.complex128}  # of others, float64


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that nothing wrote to is full of NaN, and an operation that is not deterministic is an error."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(WIDE.get(x.dtype, torch.float64))


def awkward(gradient: Tensor) -> dict[str, Tensor]:
    """A gradient as autograd may hand it on, its values the same in all: of a sum, of a transpose, of a slice."""
    flat = gradient.flatten()[:1]
    padded = torch.full((*gradient.shape[:-1], gradient.shape[-1] + 3), float("nan"), dtype=gradient.dtype)
    padded = padded.to(gradient.device)
    padded[..., 1:-2] = gradient
    return {
        "expanded": flat.expand(gradient.shape),
        "transposed": gradient.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": padded[..., 1:-2],
    }
