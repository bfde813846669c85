"""Which form of an operation runs: Triton, or PyTorch, or Numba on a CPU.

`SEQZOO_BACKEND` names what "auto" takes in its place. With `TRITON_INTERPRET=1`, set before Triton is imported, its
interpreter runs the fused forms on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from .derivatives import forward_mode

DEFAULT = os.environ.get("SEQZOO_BACKEND", "auto")
if DEFAULT not in ("auto", "fused", "chunked", "reference"):
    raise ValueError(f"SEQZOO_BACKEND={DEFAULT!r}; valid: auto, fused, chunked, reference")
OLDEST_ARCHITECTURE = 80  # sm_80, Ampere
# Whether "auto" takes Triton on a GPU. Compilers have been wrong about gradients before: not until
# `benchmarks/gpu.py --check` has passed on one.
FUSED_ON_GPU = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None and (torch.version.cuda is not None or INTERPRETED)


def choose(
    operation: str,
    backend: str,
    implementations: Mapping[str, Callable[..., Any]],
    device: torch.device,
    refused: str | None = None,
) -> Callable[..., Any]:
    """The implementation of `operation` that `backend` names; "auto" takes the fastest one there is on `device`.

    Args:
        refused: what of this call the fused form cannot take. It is said once, and the chunked form runs.

    Raises:
        ValueError: `backend` is unknown, or the operation has no such form here.
    """
    forms = {name: form for name, form in implementations.items() if HAS_TRITON or name != "fused"}
    if backend == "auto" and DEFAULT in forms:
        backend = DEFAULT
    elif backend == "auto":
        on_gpu = FUSED_ON_GPU and device.type == "cuda" and architecture(device) >= OLDEST_ARCHITECTURE
        backend = "fused" if on_gpu and "fused" in forms else "chunked"
    if backend not in forms:
        why = ""
        if backend == "fused" and backend in implementations:
            why = "; the fused form needs Triton and a build of PyTorch for CUDA, or TRITON_INTERPRET=1"
        raise ValueError(f"{operation} has no backend {backend!r}; valid: auto, {', '.join(forms)}{why}")
    if backend == "fused" and refused is None and forward_mode():
        refused = "no kernel has a derivative in forward mode"
    if backend == "fused" and refused is not None:
        if not torch.compiler.is_compiling():
            _say_once(f"{operation}: {refused}; the chunked form runs in place of the fused one")
        backend = "chunked"
    return forms[backend]


def refusal(*tensors: Tensor, channels: Mapping[torch.dtype, int], also: str | None = None) -> str | None:
    """What of its inputs the fused form of an operation cannot take, None if there is nothing.

    Args:
        tensors: computed with in the dtype that they promote to, [..., channels].
        channels: the most it takes in each dtype.
        also: something else that it does not take.
    """
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    if dtype not in channels:
        return f"no kernel computes in {dtype}"
    if max(x.shape[-1] for x in tensors) > channels[dtype]:
        return f"no kernel takes more than {channels[dtype]} channels in {dtype}"
    if not all(x.numel() for x in tensors):
        return f"there is nothing in {[list(x.shape) for x in tensors]}"
    return also


@cache
def _say_once(sentence: str) -> None:
    logging.getLogger(__name__).warning(sentence)


@cache
def architecture(device: torch.device) -> int:
    """The compute capability of a GPU, 90 for sm_90; the oldest supported one for the interpreter's CPU."""
    if device.type != "cuda":
        return OLDEST_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors a GPU has, and thus programs that can run at a time; 1 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def newest(table: Mapping[int, Any], device: torch.device) -> Any:
    """The entry of a table by architecture for the newest one that `device` is not older than."""
    return table[max(known for known in table if known <= architecture(device))]
