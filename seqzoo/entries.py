"""The entries of the configuration's groups: files of `configs/`, and what was registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .blocks.registry import OWN as OWN_BLOCKS
from .tasks import OWN as OWN_TASKS

CONFIGS = Path(__file__).resolve().parent / "configs"
GROUPS = ("model", "task", "recipe", "launcher")


def available(group: str) -> list[str]:
    """The entries of a configuration group, e.g. `available("model")`; last those that were registered."""
    return [*sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")), *registered(group)]


def registered(group: str) -> dict[str, dict[str, Any]]:
    """What was registered, as entries of a group."""
    if group == "task":
        return OWN_TASKS
    if group != "model":
        return {}
    shared = {"d_model": 128, "num_layers": 4, "mlp_ratio": 0, "position": "none"}
    return {
        name: {"name": name, **shared, **keys, "block": {"name": name, **keys.get("block", {})}}
        for name, keys in OWN_BLOCKS.items()
    }
