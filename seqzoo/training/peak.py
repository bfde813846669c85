"""How fast a device multiplies matrices, as a measure of how well a model uses it."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SIZES = {"cpu": 1024, "cuda": 8192}  # of square matrices, large enough to keep the device busy
PRODUCTS = 8
ENOUGH = 1.0  # seconds, which a processor takes for one product of numbers that it multiplies in software


@cache
def matmul_flops_per_second(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of a large square matrix product, the best of a few, measured once.

    Args:
        device: a CPU, with the threads that PyTorch has now, or a GPU.
        precision: "fp32", as `torch.backends.cuda.matmul` has it, or "bf16".
    """
    n = SIZES.get(device.type, SIZES["cuda"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    generator = torch.Generator(device).manual_seed(0)  # numbers that are all the same cost a GPU less power, and time
    a, b = (torch.randn(n, n, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds: list[float] = []
    while len(seconds) < PRODUCTS and sum(seconds) < ENOUGH:
        wait_for(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(fabric: Fabric) -> float:
    """Operations per second of matrix products on all devices, in the precision they train in."""
    with fabric.autocast():
        precision = "bf16" if torch.is_autocast_enabled(fabric.device.type) else "fp32"
    return fabric.world_size * matmul_flops_per_second(fabric.device, precision)
