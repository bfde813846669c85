"""How far from float64 a right kernel may lie.

A rounding to p bits of significand moves a number by 2^-(p+1) of itself in the mean square, at most by twice that: 2^-9
for bfloat16, 2^-12 for float16 and TF32, 2^-25 for float32. Single precision on the matrix unit is three products of
TF32 (tf32x3), which leave out 2^-22; `ex2.approx`, the GPU's power of two, errs by 2^-22 too, and the error of its
argument, 2^-22 of its size in the same products, becomes a relative one of the weight. A sum of n terms in float32 is
rounded n times, by 2^-25 of what it has come to, and these walk at random: √n 2^-24, with the matrix unit's truncation.

What that does to a result is a property of the problem, its condition: how much relative error a relative error of 1 of
the numbers on the way would make. Three are measured, with no kernel in it:

* `linear`: in float64, values and the gradients that come in are moved at random. What is rounded to the dtype on the
  way (weights, means, states, the gradients of scores) goes into the same sums as they, and is amplified alike.
* `all`: in float64, everything that has the dtype is moved. The error of products and of exponents, with the size of
  their arguments, is amplified alike.
* `cancelled`, of rows alone: how many roundings of float32 PyTorch's form is away, at most, in rows of the same step.
  Where terms cancel by construction, as in the first step of a causal sequence, whose output no query can change, the
  inputs' errors cancel too, and those of the terms do not.

For the same reason a row is measured against the tensor's scale where it is smaller than that. Roundings are
independent, so that k of them make √k. With u of the dtype, e = √k 2^-22 + √n 2^-24, and twice of all, the error of a
right kernel is at most

    2 (√k u linear + e all)                                   over the whole tensor
    8 (√k u linear + e all + max(u, 2^-22) cancelled)         in a row, by its own condition or, if larger, the typical

for the worst of a million rows is expected at 4.9 times the typical one, and 4 of these are left beside its condition.
float16 has nothing below 2^-24: what is below 2^-14 moves by 2^-25 whatever its size, which counts beside the tensor's.
Triton's interpreter cuts off where a GPU rounds to bfloat16, which moves a number by twice as much.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels import backends

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25, torch.complex64: 2.0**-25}
if backends.INTERPRETED:
    UNIT[torch.bfloat16] *= 2
PRODUCT = 2.0**-22  # tf32x3, ex2.approx
SUM = 2.0**-24
LEAST = {torch.float16: 2.0**-25}
SAFETY = 2.0
ROWS = 4.0


class Errors(NamedTuple):
    """Relative, of the whole tensor as `seqzoo.kernels.agreement` has it, and of each row."""

    whole: float
    rows: Tensor  # [rows], float64

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor) -> Errors:
        """
        Raises:
            ValueError: the shapes differ.
        """
        if actual.shape != expected.shape:
            raise ValueError(f"shape {list(actual.shape)}; valid: {list(expected.shape)}")
        error = (actual.to(expected) - expected).abs().double()
        error = error.nan_to_num(math.inf, math.inf).square().reshape(-1, actual.shape[-1] if actual.dim() else 1)
        size = expected.abs().double().square().reshape(error.shape)
        scale = size.mean().sqrt().item()
        floor = scale if scale > 1e-9 else 1.0
        rows = error.mean(-1).sqrt() / size.mean(-1).sqrt().clamp(min=floor)
        return cls(error.mean().sqrt().item() / floor, rows)

    def over(self, unit: float) -> Errors:
        """As a condition; rows have at least the typical one."""
        rows = self.rows / unit
        return Errors(self.whole / unit, rows.clamp(min=rows.square().mean().sqrt()))


def of_same_step(rows: Tensor, shape: torch.Size) -> Tensor:
    """The largest of the rows of a tensor [B, T, ...] that have the same step, in place of each."""
    if len(shape) < 3:
        return rows
    by_step = rows.reshape(shape[0], shape[1], -1)
    return by_step.amax((0, 2), keepdim=True).expand_as(by_step).reshape(-1)


class Bound(NamedTuple):
    """Of one tensor.

    Args:
        dtype: of the inputs.
        roundings: to `dtype`, on the way.
        terms: of the longest sum.
        size: of the tensor, root mean square.
    """

    dtype: torch.dtype
    roundings: int
    terms: int
    size: float

    def whole(self, linear: float, all: float) -> float:
        rounded = math.sqrt(self.roundings) * UNIT[self.dtype] * max(linear, 1.0)
        return SAFETY * (rounded + self._computed() * max(all, 1.0) + self._least())

    def rows(self, linear: Tensor, all: Tensor, cancelled: Tensor) -> Tensor:
        rounded = math.sqrt(self.roundings) * UNIT[self.dtype] * linear.clamp(min=1.0)
        apart = max(UNIT[self.dtype], PRODUCT) * cancelled
        return ROWS * SAFETY * (rounded + self._computed() * all.clamp(min=1.0) + apart + self._least())

    def _computed(self) -> float:
        return math.sqrt(max(self.roundings, 1)) * PRODUCT + math.sqrt(self.terms) * SUM

    def _least(self) -> float:
        return LEAST.get(self.dtype, 0.0) / max(self.size, 1e-9)
