"""How kernels are started, and how finely their work is cut."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import backends


def launch(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Starts `programs` of a Triton kernel on the device of the tensors it is given, whichever is current.

    Triton takes the current device and its stream, and PyTorch sets none for the body of a registered operator.
    """
    with on(next(x.device for x in arguments if isinstance(x, Tensor))):
        kernel[(programs,)](*arguments, **meta)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where `device` is the current one. The interpreter's CPU, and tensors without data, have none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cut_work(programs: int, most: int, device: torch.device, *, wanted: int) -> int:
    """How many pieces, `most` at most, to cut the work of each of so many programs into, such that the GPU has enough
    to do: `wanted` programs for each multiprocessor."""
    return max(1, min(wanted * backends.multiprocessors(device) // programs, most))


def cut_time(programs: int, T: int, steps: int, device: torch.device, *, least: int, wanted: int) -> int:
    """How long the pieces are that time is so cut into: all of T, or multiples of `steps`, about `least` or more."""
    segments = cut_work(programs, T // least, device, wanted=wanted)
    length = -(-T // segments)
    return T if segments == 1 else -(-length // steps) * steps
