"""The packages of the extra `train`, which tasks, runs and reports need, and blocks and operations do without."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec

from .messages import printable

TRAIN = (
    "PIL",
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
MISUSED = 2
P = ParamSpec("P")


class MissingPackages(ImportError):
    """Packages of the extra are not installed; the message says how to."""


def require(what: str, *packages: str) -> None:
    """Raises MissingPackages where any of `packages` is not installed, and names all of the extra that are not."""
    if any(map(_absent, packages)):
        raise MissingPackages(f"{what} needs {', '.join(filter(_absent, TRAIN))}: pip install 'seqzoo[train]'")


def saying_what_is_missing(command: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates the main function of `command`: a package that is not installed is a line on stderr and status 2."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*arguments: P.args, **options: P.kwargs) -> int:
            try:
                return main(*arguments, **options)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] not in TRAIN:
                    raise
                missing = ", ".join(filter(_absent, TRAIN)) or error.name
                said = f"{command}: needs {missing}: pip install 'seqzoo[train]'"
            except MissingPackages as error:
                said = f"{command}: {error}"
            print(printable(said), file=sys.stderr)
            return MISUSED

        return run

    return decorate


def _absent(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is None
    return find_spec(package) is None
