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
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from . import measured
from .common import dtype_name
from .derivatives import forward_mode

Backend = Literal["auto", "fused", "chunked", "reference"]
DEFAULT = os.environ.get("SEQZOO_BACKEND", "auto")
if DEFAULT not in get_args(Backend):
    raise ValueError(f"SEQZOO_BACKEND={DEFAULT!r}; valid: {', '.join(get_args(Backend))}")
OLDEST_ARCHITECTURE = 80  # sm_80, Ampere
# Heads of up to 32 channels with at most two warps: more of them are what reports of illegal accesses with Triton 3.6
# to 3.7.1 on Hopper have in common. 0 or 1; where only few warps passed their checks, they are taken anyway.
_FEW_WARPS = os.environ.get("SEQZOO_FEW_WARPS", "0")
if _FEW_WARPS not in ("0", "1"):
    raise ValueError(f"SEQZOO_FEW_WARPS={_FEW_WARPS!r}; valid: 0, 1")
FEW_WARPS = _FEW_WARPS == "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None and (torch.version.cuda is not None or INTERPRETED)


class Sequences(TypedDict, total=False):
    """What every operation takes beside what it computes with, for a type checker."""

    lengths: Tensor | None
    cu_seqlens: Tensor | None
    backend: Backend


class Fit(NamedTuple):
    """What of a call decides which form of an operation runs."""

    device: torch.device
    dtype: torch.dtype  # what is computed with
    width: int  # channels, in the class that `measured` knows; 0: of no matter
    refused: str | None  # what of the call the fused form cannot take


def choose(operation: str, backend: str, implementations: Mapping[str, Callable[..., Any]], fit: Fit) -> Any:
    """The implementation of `operation` that `backend` names; "auto" takes the fastest one known for such a call.

    What the fused form refuses is said once, and the chunked form runs.

    Raises:
        ValueError: `backend` is unknown, or the operation has no such form here.
    """
    forms = {name: form for name, form in implementations.items() if HAS_TRITON or name != "fused"}
    if backend == "auto" and DEFAULT in forms:
        backend = DEFAULT
    elif backend == "auto":
        backend = "fused" if "fused" in forms and _fused_is_faster(operation, fit) else "chunked"
    if backend not in forms:
        why = ""
        if backend == "fused" and backend in implementations:
            why = "; the fused form needs Triton and a build of PyTorch for CUDA, or TRITON_INTERPRET=1"
        raise ValueError(f"{operation} has no backend {backend!r}; valid: auto, {', '.join(forms)}{why}")
    refused = fit.refused
    if backend == "fused" and refused is None and forward_mode():
        refused = "no kernel has a derivative in forward mode"
    if backend == "fused" and refused is not None:
        if not torch.compiler.is_compiling():
            _say_once(f"{operation}: {refused}; the chunked form runs in place of the fused one")
        backend = "chunked"
    return forms[backend]


def _fused_is_faster(operation: str, fit: Fit) -> bool:
    if fit.device.type != "cuda":
        return False
    return measured.Key(architecture(fit.device), operation, dtype_name(fit.dtype), fit.width) in measured.FASTER


def fit(
    *tensors: Tensor, channels: Mapping[torch.dtype, int], also: str | None = None, width: int | None = None
) -> Fit:
    """How a call fits the kernels of its operation.

    Args:
        tensors: computed with in the dtype that they promote to, [..., channels].
        channels: the most that the fused form takes in each dtype.
        also: something else that it does not take.
        width: the class of widths, where it is not that of the widest tensor.
    """
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    widest = max(x.shape[-1] for x in tensors)
    refused: str | None
    if dtype not in channels:
        refused = f"no kernel computes in {dtype}"
    elif widest > channels[dtype]:
        refused = f"no kernel takes more than {channels[dtype]} channels in {dtype}"
    elif not all(x.numel() for x in tensors):
        refused = f"there is nothing in {[list(x.shape) for x in tensors]}"
    else:
        refused = also
    return Fit(tensors[0].device, dtype, measured.width_class(widest) if width is None else width, refused)


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
