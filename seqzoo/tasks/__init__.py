"""Datasets as tasks: read or generated, tokenised, split, cached. They know nothing of models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
from .cache import default_folder
from .config import TaskConfig
from .data import Split, Task, epoch_order, nested, stratified
from .sources import DataError, MissingData

__all__ = [
    "TASKS",
    "DataError",
    "MissingData",
    "Split",
    "Task",
    "TaskConfig",
    "build_task",
    "epoch_order",
    "from_arrays",
    "nested",
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


def build_task(config: TaskConfig, *, data_dir: Path | str | None, cache_dir: Path | str | None) -> Task:
    """The task `config` names: from the cache, or built from data under `data_dir`, a download, or a generator.

    Args:
        data_dir: where the published folders or archives are, as their publishers lay them out; only read.
        cache_dir: where downloads and tokenised data are kept; None takes the user's cache folder.

    Raises:
        ValueError: there is no such task, or a key of `config` does not suit it.
        DataError: the data are missing, incomplete or damaged; says what to do.
    """
    if config.name not in TASKS:
        raise ValueError(f"no task {config.name!r}; valid: {', '.join(TASKS)}")
    return TASKS[config.name](
        config,
        data_dir=None if data_dir is None else Path(os.path.expanduser(data_dir)),
        cache_dir=default_folder() if cache_dir is None else Path(os.path.expanduser(cache_dir)),
    )
