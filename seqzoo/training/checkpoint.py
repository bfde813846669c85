"""Checkpoints that are either whole or not there: written beside the old one, then renamed over it.

A stage's folder holds

    best.safetensors    weights of the best validation
    last.safetensors    weights, optimiser state and counters to continue from
    last-<step>.<rank>of<ranks>.safetensors    of a model in shards, a rank's rows of these: see `save_checkpoint`

There is no generator state: every step seeds its own. A checksum in a file's metadata is of all that the file holds,
names, types, shapes, tensors and the rest of the metadata; whatever is read is held against it. It is XXH3, which costs
a twentieth of writing the file: against failing disks and memory, not against forgery.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..extras import require
from ..files import replacing_by_name
from ..messages import say_once
from .errors import TrainingError
from .shards import own_rows

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHECKSUM = "xxh3_128"  # its key in the metadata


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a state dict as safetensors; `metadata` is kept as strings in its header."""
    require("a file of weights", "safetensors", "xxhash")
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    header = {key: str(value) for key, value in (metadata or {}).items()}
    header[CHECKSUM] = _checksum(tensors, header)
    with replacing_by_name(path) as temporary, _as_the_system_says(path):
        save_file(tensors, temporary, header)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, on the CPU.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    return _load(path)[0]


class Checkpoint(NamedTuple):
    """All that continuing needs."""

    weights: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]  # what it keeps of each parameter, as in its state dict
    state: dict[str, Any]  # counters, as JSON has them


def save_checkpoint(path: Path, checkpoint: Checkpoint, fabric: Fabric | None = None) -> None:
    """Makes `checkpoint` the one at `path`.

    With `fabric`, tensors lie in shards on its ranks, all of which call it. Each writes its rows into a file that has
    the step in its name; once all have, the first rank replaces the file at `path`, which names them, and removes those
    of before. So it is either the one checkpoint or the other here, too, and any number of ranks can load it.
    """
    tensors = {f"weights/{name}": tensor for name, tensor in checkpoint.weights.items()}
    for index, kept in checkpoint.optimizer.items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in kept.items()}
    metadata, names = {"state": json.dumps(checkpoint.state)}, []
    if fabric is not None:
        rows, tensors = own_rows(tensors)
        ranks, step = fabric.world_size, checkpoint.state["step"]
        names = [f"{path.stem}-{step}.{rank}of{ranks}.safetensors" for rank in range(ranks)]
        save_weights(path.with_name(names[fabric.global_rank]), rows)
        metadata["shards"] = json.dumps(names)
        fabric.barrier()
    if fabric is None or fabric.is_global_zero:
        save_weights(path, tensors, metadata)
        for old in path.parent.glob(f"{path.stem}-*of*.safetensors*"):  # half-written ones are folders
            if old.name not in names:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    if fabric is not None:
        fabric.barrier()


def load_checkpoint(path: Path) -> Checkpoint | None:
    """What `save_checkpoint` wrote, on the CPU, or None where there is no checkpoint yet.

    Raises:
        TrainingError: the file is damaged, or no checkpoint.
    """
    if not path.exists():
        return None
    tensors, metadata = _load(path)
    with reading(path):
        shards = [path.with_name(Path(name).name) for name in json.loads(metadata.get("shards", "[]"))]
    rows = [_load(shard)[0] for shard in shards]
    with reading(path):
        tensors |= {name: torch.cat([of_rank[name] for of_rank in rows]) for name in (rows[0] if rows else ())}
    weights: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    with reading(path):
        state = json.loads(metadata["state"])
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            if part == "weights":
                weights[name] = tensor
            else:
                index, name = name.split("/")
                optimizer.setdefault(int(index), {})[name] = tensor.clone()  # the optimiser keeps it; the file goes
    return Checkpoint(weights, optimizer, state)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, of one and the same should another take its place meanwhile.

    A file without a checksum, of an earlier version, is taken at its word, and that is said once.
    """
    require("a file of weights", "safetensors", "xxhash")
    from safetensors import safe_open

    with reading(path), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        metadata = file.metadata() or {}
        expected = metadata.pop(CHECKSUM, None)
        if expected is None:
            say_once(f"{path} has no checksum, being of an earlier version: it is taken as it is")
        elif expected != _checksum(tensors, metadata):
            raise ValueError("its checksum is not that of its contents")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    from xxhash import xxh3_128

    named = sorted(tensors.items())
    described = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in named]
    digest = xxh3_128(json.dumps([sorted(metadata.items()), described]).encode())
    for _, tensor in named:
        try:
            digest.update(tensor.numpy().data)
        except TypeError:  # a type that NumPy does not have, such as bfloat16
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever does not go within it is damage of the checkpoint at `path`: a TrainingError that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise TrainingError(f"checkpoint {path} is missing; {_anew(path)}") from None
    except KeyError as error:
        raise TrainingError(f"checkpoint {path} is damaged (it has no {error}); {_anew(path)}") from None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TrainingError(f"checkpoint {path} is damaged ({error}); {_anew(path)}") from None


@contextmanager
def _as_the_system_says(path: Path) -> Iterator[None]:
    """What the operating system refuses to safetensors, as the OSError that it would be in Python."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def _anew(path: Path) -> str:
    """How to have a stage trained again whose checkpoint is at `path`."""
    stage, run = path.parent, path.parent.parent
    result = run / "result.json"
    also = f" and {result}, for the run is finished," if result.exists() else ""
    return f"delete {stage}{also} to start it from the beginning"
