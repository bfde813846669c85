"""Sequence mixers behind one block interface, trained on Long Range Arena from scratch and after self-pretraining."""

from __future__ import annotations

from typing import Any

from .blocks import BLOCKS, Block, after_step, attach, auxiliary_loss, build_block
from .spec import Batch, TaskSpec
from .version import __version__ as __version__

__all__ = [
    "BLOCKS",
    "Batch",
    "Block",
    "TaskSpec",
    "after_step",
    "attach",
    "auxiliary_loss",
    "build_block",
    "load",
    "run",
]


def load(run_folder: Any) -> Any:
    """The trained model of a run folder, in evaluation mode. See `seqzoo.runs.load`."""
    from .runs import load as load_run

    return load_run(run_folder)


def run(config: Any, *, task: Any = None) -> dict[str, Any]:
    """Trains what a configuration asks for and returns its result. See `seqzoo.runs.run`."""
    from .runs import run as run_config

    return run_config(config, task=task)
