"""The machine: what runs here, that one kernel does, and the most that any could reach."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from seqzoo.kernels import backends
from seqzoo.runs import provenance

from . import timing

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kernels/**/*.py", "kernels/**/*.csv", "seqzoo/**/*.py", "benchmarks/**/*.py")
PEERS = ("flash-attn", "flash-linear-attention", "fla-core", "accelerated-scan", "performer-pytorch", "einops")


def describe() -> dict[str, Any]:
    """What every row of a run was made with. A copy of the tree without its history has the sources' sum still."""
    run = provenance.made_with(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)
    run["sources"] = sources()
    if run["commit"] == "unknown":
        run["commit"] = f"sources {run['sources']}"
    run["versions"] |= {name: found for name in PEERS if (found := _version(name))}
    run["architecture"] = backends.architecture(torch.device(timing.DEVICE))
    if timing.SHAM:
        return {**run, "card": "none", "sham": True}
    properties = torch.cuda.get_device_properties(0)
    return {
        **run,
        "card": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "l2_mib": timing.cache_bytes() / 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"),
    }


def sources() -> str:
    """The first digits of the SHA-256 of all files that could change a number, by path."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"


@triton.jit
def _double_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def first_kernel() -> dict[str, Any]:
    x = torch.randn(1000, device=timing.DEVICE)
    y = torch.empty_like(x)
    _double_kernel[(4,)](x, y, 1000, BLOCK=256)
    return {"first_kernel": "passed" if torch.equal(y, 2 * x) else "wrong"}


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and flops a second of a matrix product."""
    n, m = (1 << 20, 64) if timing.SHAM else (1 << 30, 8192)
    x = torch.empty(n, device=timing.DEVICE, dtype=torch.uint8).random_()
    y = torch.empty_like(x)
    copy = timing.graphed([lambda: y.copy_(x)])
    a = torch.randn(m, m, device=timing.DEVICE, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        product = timing.graphed([lambda: a @ a])
    return {"copy_gbs": 2 * n / copy.median / 1e6, "product_tflops": 2 * m**3 / product.median / 1e9}
