"""Which of all cases are asked, and which on every change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def in_turns(models: Iterable[str], ways: Sequence[str], tasks: Collection[str]) -> list[tuple[str, str, str]]:
    """Each model on each task, in one of the ways: the next one on the next task and for the next model."""
    return [(m, ways[(i + j) % len(ways)], task) for i, m in enumerate(models) for j, task in enumerate(tasks)]


def others_slow(cases: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """For `parametrize`: all cases, single values or tuples of them; those that are not among `often` are slow."""
    return [
        case if case in often else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in cases
    ]
