"""Sequence mixers behind one block interface, trained on Long Range Arena from scratch and after self-pretraining.

What it lists is imported when it is asked for: a report needs no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import blocks as blocks
    from . import kernels as kernels
    from .blocks import (
        BLOCKS,
        GAU,
        GLA,
        HGRN2,
        KDA,
        LRU,
        MLSTM,
        RGLRU,
        RWKV7,
        S4D,
        S5,
        AsSelfAttention,
        Block,
        Conv,
        DeltaNet,
        GatedDeltaNet,
        LinearAttention,
        Mamba,
        Mamba2,
        Mamba3,
        MinGRU,
        Performer,
        RetNet,
        SoftmaxAttention,
        VQAttention,
        after_step,
        attach,
        auxiliary_loss,
        build_block,
        register_block,
    )
    from .spec import Batch, TaskSpec

__all__ = [
    "BLOCKS",
    "GAU",
    "GLA",
    "HGRN2",
    "KDA",
    "LRU",
    "MLSTM",
    "RGLRU",
    "RWKV7",
    "S4D",
    "S5",
    "AsSelfAttention",
    "Batch",
    "Block",
    "Conv",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MinGRU",
    "Performer",
    "RetNet",
    "SoftmaxAttention",
    "TaskSpec",
    "VQAttention",
    "after_step",
    "attach",
    "auxiliary_loss",
    "build_block",
    "load",
    "register_block",
    "run",
]
PACKAGES = ("blocks", "kernels", "spec")  # that importing this one makes its attributes


def load(run_folder: Any) -> Any:
    """The trained model of a run folder, in evaluation mode. See `seqzoo.runs.load`."""
    from .runs import load as load_run

    return load_run(run_folder)


def run(config: Any, *, task: Any = None) -> dict[str, Any]:
    """Trains what a configuration asks for and returns its result. See `seqzoo.runs.run`."""
    from .runs import run as run_config

    return run_config(config, task=task)


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(".spec" if name in ("Batch", "TaskSpec") else ".blocks", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *PACKAGES})
