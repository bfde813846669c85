"""What a CPU has instructions for."""

from __future__ import annotations

from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and, the last, of ARM


def multiplies_bfloat16() -> bool:
    """Whether it has some for products of such numbers: others are slower in them than in single precision."""
    return bool(BF16 & cpu_features())


def cpu_features() -> set[str]:
    """The extensions of this CPU's instruction set, by the names of PyTorch and of Linux."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 may not have it
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    listed = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return {name for name, there in known.items() if there is True}.union(*listed)


MULTIPLIES_BFLOAT16 = multiplies_bfloat16()  # a constant to graphs
