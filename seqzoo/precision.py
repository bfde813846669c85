"""The precision that a machine has instructions for."""

from __future__ import annotations

from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and, the last, of ARM


def native_precision(device: str) -> str:
    """ "bf16" where products of such numbers are instructions of "cpu" or "cuda", or of what "auto" finds; else "fp32".

    It is told from what the processor is, never from a timing, so that a machine has one answer.
    """
    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if BF16 & cpu_features() else "fp32"


def cpu_features() -> set[str]:
    """The extensions of this CPU's instruction set, by the names of PyTorch and of Linux."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 may not have it
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    listed = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return {name for name, there in known.items() if there is True}.union(*listed)
