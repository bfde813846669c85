"""Which settings of a run shape what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where it reads, writes and computes, which is not what it computes.
WITHOUT_EFFECT = (
    *("runs_dir", "data_dir", "cache_dir", "wandb", "device", "resume", "task.workers"),
    *("budget", "launcher", "logger", "plugins", "strategy", "sequence_parallel"),
)
OF_PRETRAINING = ("objective", "pixel_loss", "pretraining")
OF_FINE_TUNING = (
    *("finetuning", "tuning", "lora", "ladder", "pretrain", "recipe", "n_test"),
    *("model.pooling", "model.head"),
)


def unused(configuration: Mapping[str, Any]) -> list[str]:
    """The settings that a run's others leave without effect.

    Args:
        configuration: of a run, as its config.yaml has it; an older one may lack settings.
    """
    names = [name for name in ("lora", "ladder") if name != configuration.get("tuning")]
    names += [] if configuration.get("lr") == "search" else ["search"]
    if configuration.get("objective") == "joint":
        return [*names, "pretraining"]
    return [*names, "joint", *(() if configuration.get("pretrain") is True else OF_PRETRAINING)]
