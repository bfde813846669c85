"""What a result was computed with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

PACKAGES = ("triton", "numpy", "numba", "lightning-fabric")


def hardware(device: torch.device, world_size: int) -> str:
    """The device that trained, as its maker calls it."""
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    return f"{_cpu_name()}, {torch.get_num_threads() * world_size} threads"


def versions() -> dict[str, str]:
    """Of Python and of the packages that shape the numbers."""
    # The metadata of PyTorch's wheels does not always say which CUDA they are for, or that they are for none.
    found = {"python": platform.python_version(), "seqzoo": __version__, "torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with "+dirty" where files differ from it, or "unknown" for an installed package."""
    source = Path(__file__).resolve()
    try:
        _git("ls-files", "--error-unmatch", source.name, cwd=source.parent)
        revision = _git("rev-parse", "HEAD", cwd=source.parent)
        return revision + ("+dirty" if _git("status", "--porcelain", cwd=source.parent) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def made_with(device: torch.device, world_size: int) -> dict[str, Any]:
    """Hardware, commit and versions, as every result has them."""
    return {"hardware": hardware(device, world_size), "commit": commit(), "versions": versions()}


def of_benchmark(setting: dict[str, Any]) -> dict[str, Any]:
    """What stands above the rows of a benchmark on the CPU: its command, its setting and what it was made with."""
    return {"command": " ".join(["python", *sys.argv]), "setting": setting, **made_with(torch.device("cpu"), 1)}


def _git(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = subprocess.run(["git", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return command.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
