"""What a block costs."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..blocks import Block


def flops(block: Block, T: int) -> int:
    """Floating-point operations of a forward pass over one sequence of T steps.

    Counts matrix products and attention, 2 for a multiplication and an addition, as `torch.utils.flop_counter` does;
    products of complex numbers, as S4D has, count like real ones, and scans, and the delta rule where it is a loop,
    nothing. Nothing is computed: a copy without memory is run.

    Raises:
        ValueError: T is less than 1.
    """
    if T < 1:
        raise ValueError(f"flops: T={T}; valid: 1 step and more")
    shape = copy.deepcopy(block).to("meta").float().eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shape(torch.zeros(1, T, block.d_model, device="meta"))
    return counter.get_total_flops()
