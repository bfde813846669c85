"""Checkpoints that are either whole or not there: written beside the old one, then renamed over it.

A stage's folder holds

    best.safetensors    weights of the best validation
    last.safetensors    weights, optimiser state and counters to continue from

There is no generator state: every step seeds its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import TrainingError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on leaving without an error it becomes `path`, in one step.

    It has reached the disk before it is renamed, so that a power failure leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a state dict as safetensors; `metadata` is kept as strings in its header."""
    with replacing(path) as temporary:
        header = {key: str(value) for key, value in (metadata or {}).items()}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary, header)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, on the CPU.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    with _reading(path):
        return load_file(path)


def load_metadata(path: Path) -> dict[str, str]:
    """What `save_weights` kept beside the tensors.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    with _reading(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


class Checkpoint(NamedTuple):
    """All that continuing needs."""

    weights: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]  # what it keeps of each parameter, as in its state dict
    state: dict[str, Any]  # counters, as JSON has them


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Makes `checkpoint` the one at `path`."""
    tensors = {f"weights/{name}": tensor for name, tensor in checkpoint.weights.items()}
    for index, kept in checkpoint.optimizer.items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in kept.items()}
    save_weights(path, tensors, {"state": json.dumps(checkpoint.state)})


def load_checkpoint(path: Path) -> Checkpoint | None:
    """What `save_checkpoint` wrote, on the CPU, or None where there is no checkpoint yet.

    Raises:
        TrainingError: the file is damaged, or no checkpoint.
    """
    if not path.exists():
        return None
    with _reading(path):
        state = json.loads(load_metadata(path)["state"])
    weights: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_weights(path).items():
        part, name = key.split("/", 1)
        if part == "weights":
            weights[name] = tensor
        else:
            index, name = name.split("/")
            optimizer.setdefault(int(index), {})[name] = tensor.clone()  # the optimiser keeps it; the file goes
    return Checkpoint(weights, optimizer, state)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TrainingError(f"checkpoint {path} is missing; {_anew(path)}") from None
    except (SafetensorError, KeyError) as error:
        raise TrainingError(f"checkpoint {path} is damaged ({error}); {_anew(path)}") from None


def _anew(path: Path) -> str:
    """How to have a stage trained again whose checkpoint is at `path`."""
    stage, run = path.parent, path.parent.parent
    result = run / "result.json"
    also = f" and {result}, for the run is finished," if result.exists() else ""
    return f"delete {stage}{also} to start it from the beginning"
