"""How kernels are started."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Starts `programs` of a Triton kernel on the device of the tensors it is given, whichever is current.

    Triton takes the current device and its stream, and PyTorch sets none for the body of a registered operator.
    """
    with on(next(x.device for x in arguments if isinstance(x, Tensor))):
        kernel[(programs,)](*arguments, **meta)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where `device` is the current one. The interpreter's CPU, and tensors without data, have none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
