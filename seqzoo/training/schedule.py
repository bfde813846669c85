"""The learning rate over the steps of a stage."""

from __future__ import annotations

import math


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """What the base learning rate is multiplied by in step `step` of `[0, total_steps)`.

    It rises linearly over `warmup_steps`, reaching 1 in the last of them, then stays ("constant") or falls along half
    a cosine ("cosine") that would reach 0 at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
