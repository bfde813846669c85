"""The precision that a machine has instructions for."""

from __future__ import annotations

import torch

from .kernels.cpu import multiplies_bfloat16


def native_precision(device: str) -> str:
    """ "bf16" where products of such numbers are instructions of "cpu" or "cuda", or of what "auto" finds; else "fp32".

    It is told from what the processor is, never from a timing, so that a machine has one answer.
    """
    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if multiplies_bfloat16() else "fp32"
