"""What can be told of a machine without PyTorch: versions, and room to write."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..version import __version__
from .finding import BAD, OK, UNKNOWN, Finding

NEEDED = ("torch", "numpy", "numba", "einops", "hydra-core", "omegaconf", "lightning-fabric", "safetensors", "xxhash")
SHOWN = ("torch", "triton", "numpy", "numba", "lightning-fabric", "wandb")
LEAST_FREE = 1e9  # bytes, that a few runs and their data take


def versions() -> Iterator[Finding]:
    """Of Python and of the packages that shape the numbers."""
    found = {name: _version(name) for name in {*NEEDED, *SHOWN}}
    listed = [f"{name} {found[name]}" for name in SHOWN if found[name]]
    yield Finding(OK, "versions", ", ".join([f"seqzoo {__version__}", f"python {platform.python_version()}", *listed]))
    if missing := sorted(name for name in NEEDED if found[name] is None):
        yield Finding(BAD, "packages", f"not installed: {', '.join(missing)}; pip install seqzoo brings them")


def room(places: dict[str, Path]) -> Iterator[Finding]:
    """Whether files can be written in folders, which may not be there yet, and how much room they have."""
    for what, place in places.items():
        there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"seqzoo")
            free = shutil.disk_usage(there).free
        except OSError as error:
            yield Finding(BAD, what, f"{place} cannot be written: {error.strerror}")
            continue
        state = OK if free >= LEAST_FREE else BAD
        yield Finding(
            state, what, f"{place}: {free / 1e9:,.1f} GB free{'' if state == OK else ', 1 GB is little enough'}"
        )


def cores() -> Finding:
    """How many cores there are, and whether others are at work on them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except OSError:
        return Finding(UNKNOWN, "cores", f"{usable} cores; how busy they are is not known")
    busy = f", load {load:.1f}: other processes share them, and runs take longer" if load > usable else ""
    return Finding(OK, "cores", f"{usable} cores{busy}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
