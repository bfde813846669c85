"""Sequence mixers behind one block interface, trained on Long Range Arena from scratch and after self-pretraining.

What it lists is imported when it is asked for: a report needs no PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .failures import leave_while_importing
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import blocks as blocks
    from . import hf as hf
    from . import kernels as kernels
    from .analysis.cost import flops
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
    from .interop.hub import from_pretrained, push_to_hub, save_pretrained
    from .interop.replace import replace
    from .interop.vit import timm_attention
    from .metrics import register_metric
    from .spec import Batch, TaskSpec
    from .tasks import register_task
    from .training.loggers import register_logger

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
    "flops",
    "from_pretrained",
    "load",
    "push_to_hub",
    "register_block",
    "register_logger",
    "register_metric",
    "register_task",
    "replace",
    "run",
    "save_pretrained",
    "timm_attention",
]
if sys.argv[:1] == ["-m"] and any(
    flag.endswith("m") and name.split(".")[0] == __name__ for flag, name in pairwise(sys.orig_argv)
):
    leave_while_importing()  # Python is on its way to a command of this package

PACKAGES = ("blocks", "hf", "kernels", "spec")  # that importing this one makes its attributes
LIES_IN = {  # what else is listed lies in `blocks`
    "Batch": ".spec",
    "TaskSpec": ".spec",
    "flops": ".analysis.cost",
    "from_pretrained": ".interop.hub",
    "push_to_hub": ".interop.hub",
    "register_logger": ".training.loggers",
    "register_metric": ".metrics",
    "register_task": ".tasks",
    "replace": ".interop.replace",
    "save_pretrained": ".interop.hub",
    "timm_attention": ".interop.vit",
}


def load(run_folder: Any) -> Any:
    """The trained model of a run folder, in evaluation mode. See `seqzoo.runs.load`."""
    from .runs import load as load_run

    return load_run(run_folder)


def run(config: Any, *, task: Any = None, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains what a configuration asks for and returns its result. See `seqzoo.runs.run`."""
    from .runs import run as run_config

    return run_config(config, task=task, callbacks=callbacks)


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(LIES_IN.get(name, ".blocks"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *PACKAGES})
