"""Names under which users register blocks, tasks, metrics and loggers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_free(call: str, name: str, known: Mapping[str, Any], given: Any) -> None:
    """Raises ValueError where a name `is_taken`, in which `call` stands for what was called."""
    if is_taken(name, known, given):
        raise ValueError(f"{call}({name!r}): there is one; valid: another name")


def is_taken(name: str, known: Mapping[str, Any], given: Any) -> bool:
    """Whether something else than `given` is known by a name; not that of a module that was imported anew."""
    return name in known and any(
        getattr(known[name], key, known[name]) != getattr(given, key, given) for key in ("__module__", "__qualname__")
    )
