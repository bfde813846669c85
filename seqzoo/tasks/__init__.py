"""Datasets as tasks: read or generated, tokenised, split, cached. They know nothing of models."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..names import check_free
from . import (
    acl_retrieval,
    char_lm,
    fsdd,
    lra_image,
    lra_listops,
    lra_pathfinder,
    lra_retrieval,
    lra_text,
    recall_tasks,
    scifar,
    smnist,
    speech_commands,
)
from .arrays import from_arrays
from .augmentation import AUGMENTATIONS
from .config import TaskConfig
from .data import Augmentation, Split, Task, epoch_order, nested, pack, stratified
from .identity import Fingerprint, fingerprint
from .store.cache import default_folder, reading
from .store.sources import DataError, MissingData

__all__ = [
    "AUGMENTATIONS",
    "TASKS",
    "Augmentation",
    "DataError",
    "Fingerprint",
    "MissingData",
    "Split",
    "Task",
    "TaskConfig",
    "build_task",
    "epoch_order",
    "fingerprint",
    "from_arrays",
    "nested",
    "origin_of",
    "pack",
    "register_task",
    "stratified",
]

TASKS: dict[str, Callable[..., Task]] = {
    "acl_retrieval": acl_retrieval.build,
    "associative_recall": recall_tasks.build,
    "char_lm": char_lm.build,
    "fsdd": fsdd.build,
    "induction_heads": recall_tasks.build,
    "lra_image": lra_image.build,
    "lra_listops": lra_listops.build,
    "lra_pathfinder": lra_pathfinder.build,
    "lra_pathx": lra_pathfinder.build,
    "lra_pathx256": lra_pathfinder.build,
    "lra_retrieval": lra_retrieval.build,
    "lra_text": lra_text.build,
    "scifar": scifar.build,
    "selective_copying": recall_tasks.build,
    "smnist": smnist.build,
    "speech_commands": speech_commands.build,
}

# Of tasks whose data may be one's own or come from more than one place: what tells them apart.
ORIGINS: dict[str, Callable[..., dict[str, Any]]] = {
    "acl_retrieval": acl_retrieval.origin,
    "char_lm": char_lm.origin,
    "fsdd": fsdd.origin,
    "lra_listops": lra_listops.origin,
    "lra_text": lra_text.origin,
    **dict.fromkeys(lra_pathfinder.SIZES, lra_pathfinder.origin),
}


OWN: dict[str, dict[str, Any]] = {}  # of tasks that were registered: their keys, as those of a file in configs/task
Build = TypeVar("Build", bound=Callable[..., Task])


def register_task(name: str, *, max_length: int, mask_ratio: float = 0.15, **keys: Any) -> Callable[[Build], Build]:
    """Decorates what builds a task of one's own: from then on `task=<name>` takes it, in train.py and everywhere.

    Args:
        name: of the task, which is also that of its `TaskSpec`: letters, digits and _.
        max_length, mask_ratio, keys: what `TaskConfig` has, as the command line may change it; `options` is a mapping
            for whatever else the task wants to know.

    It is called with the `TaskConfig`, and `data_dir` and `cache_dir` by name, and returns a `Task`, such as
    `from_arrays` makes.

    Raises:
        ValueError: the name is taken or none, or a key is out of its range.
        TypeError: there is no such key.
    """
    if not name.isidentifier() or (name in TASKS and name not in OWN):
        raise ValueError(f"register_task({name!r}): valid: letters, digits and _, and none of {', '.join(TASKS)}")
    given = {"name": name, "max_length": max_length, "mask_ratio": mask_ratio, **keys}
    TaskConfig(**given)

    def register(build: Build) -> Build:
        check_free("register_task", name, TASKS, build)
        TASKS[name], OWN[name] = build, given
        return build

    return register


def origin_of(config: TaskConfig, *, data_dir: Path | str | None, cache_dir: Path | str | None) -> dict[str, Any]:
    """What `build_task` would take the data from, as keys beside those of `config`, in JSON values.

    Empty where that is the task's default, as for all tasks that know no other. It says what is read, not where that
    lies, and reads little: an edit that leaves sizes alone shows in `fingerprint` only.

    Raises:
        DataError: as `build_task` does, of a text that is missing, or files that are incomplete or damaged.
    """
    if config.name not in ORIGINS:
        return {}
    return ORIGINS[config.name](config, **_places(data_dir, cache_dir))


def build_task(
    config: TaskConfig,
    *,
    data_dir: Path | str | None,
    cache_dir: Path | str | None,
    filled: Path | str | None = None,
) -> Task:
    """The task `config` names: from the cache, or built from data under `data_dir`, a download, or a generator.

    Args:
        data_dir: where the published folders or archives are, as their publishers lay them out; only read.
        cache_dir: where downloads and tokenised data are kept; None takes the user's cache folder.
        filled: another such folder that may hold them already; only read.

    Raises:
        ValueError: there is no such task, or a key of `config` does not suit it.
        DataError: the data are missing, incomplete or damaged; says what to do.
    """
    if config.name not in TASKS:
        raise ValueError(f"no task {config.name!r}; valid: {', '.join(TASKS)}")
    with reading(None if filled is None else _user_path(filled)):
        task = TASKS[config.name](config, **_places(data_dir, cache_dir))
    if not isinstance(task, Task):
        raise ValueError(f"what builds it returned a {type(task).__name__}; valid: a Task, such as from_arrays makes")
    if task.spec.name != config.name:
        raise ValueError(f"it built a task named {task.spec.name!r}; valid: a TaskSpec of the name {config.name!r}")
    task = replace(task, note=", ".join(filter(None, (task.note, config.unusual))))
    return task if config.permuted else replace(task, augmentation=AUGMENTATIONS.get(config.name, task.augmentation))


def _places(data_dir: Path | str | None, cache_dir: Path | str | None) -> dict[str, Any]:
    return {
        "data_dir": None if data_dir is None else _user_path(data_dir),
        "cache_dir": default_folder() if cache_dir is None else _user_path(cache_dir),
    }


def _user_path(path: Path | str) -> Path:
    return Path(os.path.expanduser(path))  # leaves a name that is nobody's as it is
