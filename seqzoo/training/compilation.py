"""A compiled model: forward and backward, once for each shape that a batch has."""

from __future__ import annotations

import torch
from torch import nn

# A stage has some five padded lengths, each with up to three sizes of a batch, trained and evaluated; a sweep has many
# stages. Past the limits PyTorch would go on without compilation, and say so once.
SHAPES = 256
SHAPES_OF_ALL_STAGES = 1 << 14


def compile_model(model: nn.Module) -> None:
    """Compiles `model` in place, when it is first called.

    CUDA graphs and searches for the fastest kernel are left out: graphs would have to be captured again for each shape,
    searches take minutes for each, and a stage may last no longer. `benchmarks/step.py` measures them.
    """
    torch._dynamo.config.recompile_limit = SHAPES
    torch._dynamo.config.accumulated_recompile_limit = SHAPES_OF_ALL_STAGES
    model.compile(dynamic=False)
