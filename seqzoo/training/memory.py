from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn

from ..valid import physical_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Lets the process keep what it frees, so that the tensors of one step lie where those of the last one did.

    By default glibc returns every large block to the system at once, and each step of training on a CPU has all its
    memory faulted in anew, page by page. The same as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the
    environment. Does nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def held_by(device: torch.device) -> int:
    """Bytes of memory that a device has in all, in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return physical_memory()


def needed_to_train(model: nn.Module) -> int:
    """Bytes of its parameters and buffers and, of what is trained, of the gradient and AdamW's two moments."""
    tensors = [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(tensor.nbytes for tensor in tensors) + 3 * sum(parameter.nbytes for parameter in trained)
