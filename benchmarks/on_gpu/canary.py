"""What Triton makes of the product of a transposed accumulator, at each size: see `seqzoo.doctor.canary`."""

from __future__ import annotations

from typing import Any

import torch

from seqzoo.doctor import canary

from . import timing


def plan(rehearse: bool) -> list[dict[str, Any]]:
    blocks, warps = ((32,), (2,)) if rehearse else ((32, 64, 128), (2, 4, 8))
    return [{"block": block, "num_warps": number} for block in blocks for number in warps]


def sing(block: int, num_warps: int, rehearse: bool) -> dict[str, Any]:
    """How wrong it is. On a CPU in float16, which its interpreter multiplies rightly."""
    dtype = torch.float16 if rehearse else torch.bfloat16
    return {"whole": canary.sing(block, num_warps, timing.DEVICE, dtype)}
