"""Checkpoints that are either whole or not there: written beside the old one, then renamed over it.

A stage's folder holds

    best.safetensors            weights of the best validation
    last/weights-<step>.safetensors
    last/state.pt               optimiser state, step and counters

`state.pt` is replaced last and names the step, hence the weights it belongs to: until that rename the previous
checkpoint is the valid one, after it the new one is. There is no generator state: every step seeds its own.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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


def save_last(folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Makes `weights` and `state`, which has a "step", the checkpoint of `folder`."""
    current = folder / f"weights-{state['step']}.safetensors"
    save_weights(current, weights)
    with replacing(folder / "state.pt") as temporary:
        torch.save(dict(state), temporary)
    for old in folder.glob("weights-*.safetensors"):
        if old != current:
            old.unlink()


def load_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and state that `save_last` wrote, on the CPU, or None where there is no checkpoint yet.

    Raises:
        TrainingError: a file is missing or damaged; names it.
    """
    path = folder / "state.pt"
    if not path.exists():
        return None
    with _reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
    return load_weights(folder / f"weights-{state['step']}.safetensors"), state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TrainingError(f"checkpoint {path} is missing; delete {path.parent} to start from the beginning") from None
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"checkpoint {path} is damaged ({reason}); delete {path.parent} to start from the beginning"
        ) from None
