"""Random numbers that a seed alone decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

AUGMENTED, WHOLE, PART = 1, 2, 3  # what the seeds of these have beside that of a batch's masks, each its own


def derive_seed(*numbers: int) -> int:
    """A seed that differs wherever one of `numbers`, none of them negative, does.

    Fewer than four are taken as if zeros followed: 7 and (7, 0) are one seed, and results by now depend on it. What is
    to differ from a seed that stands alone begins at 1.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def uniform(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """float32 from 0 up to 1, which is left out.

    They are drawn where they are needed: CPUs agree with each other, and GPUs do, but not one with the other.
    """
    generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator, device=generator.device).to(device)
