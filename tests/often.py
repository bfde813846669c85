"""Cases that are asked on every change, and others with -m slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_slow(cases: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """For `parametrize`: all cases, single values or tuples of them; those that are not among `often` are slow."""
    return [
        case if case in often else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in cases
    ]
