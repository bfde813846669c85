"""The packages of the extra `train`, which tasks, runs and reports need, and blocks and operations do without."""

from __future__ import annotations

import sys
from importlib.util import find_spec

TRAIN = (
    "PIL",
    "einops",
    "hydra",
    "jinja2",
    "lightning_fabric",
    "matplotlib",
    "omegaconf",
    "pooch",
    "rich",
    "safetensors",
    "scipy",
    "wandb",
    "xxhash",
    "yaml",
)


class MissingPackages(ImportError):
    """Packages of the extra are not installed; the message says how to."""


def require(what: str, *packages: str) -> None:
    """Raises MissingPackages where any of `packages` is not installed, and names all of the extra that are not."""
    if any(map(_absent, packages)):
        raise MissingPackages(f"{what} needs {', '.join(filter(_absent, TRAIN))}: pip install 'seqzoo[train]'")


def missing(error: BaseException) -> str | None:
    """What to say of an error that packages of the extra are not installed; None: it is another."""
    if isinstance(error, MissingPackages):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAIN:
        return f"needs {', '.join(filter(_absent, TRAIN)) or error.name}: pip install 'seqzoo[train]'"
    return None


def _absent(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is None
    return find_spec(package) is None
