"""Step sizes Δ of state space models, as they are drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .wide import default_dtype

SMALLEST = 1e-4


def log_steps(block: str, n: int, dt_min: float, dt_max: float) -> Tensor:
    """log Δ of `n` channels or heads, uniform between the logarithms of `dt_min` and `dt_max`: [n].

    Raises:
        ValueError: the two are no range of positive numbers.
    """
    if not 0 < dt_min < dt_max:
        raise ValueError(f"{block}: dt_min={dt_min}, dt_max={dt_max}; valid: 0 < dt_min < dt_max")
    return math.log(dt_min) + torch.rand(n, dtype=default_dtype()) * (math.log(dt_max) - math.log(dt_min))


def step_bias(block: str, n: int, dt_min: float, dt_max: float) -> Tensor:
    """What softplus makes Δ of, drawn as `log_steps` draws it, and `SMALLEST` at least: [n].

    Raises:
        ValueError: as there.

    Source: the initialisation of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.6).
    """
    step = log_steps(block, n, dt_min, dt_max).exp().clamp(min=SMALLEST)
    return step + step.neg().expm1().neg().log()
