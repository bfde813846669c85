"""Modules of a user's own, which register blocks, tasks, metrics and loggers when they are imported.

Only the command line has any imported, and only what it names: no configuration that is read, and no package for being
installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points

from .failures import MISUSED, Said

KEY = "plugins="
ENTRY_POINTS = "seqzoo.plugins"


class PluginError(Said):
    """There is no plug-in of a name."""

    status = MISUSED


def import_plugins(arguments: Iterable[str]) -> list[str]:
    """Imports what `plugins=[a,b]` or `plugins=a` among `arguments` names; returns the other arguments.

    A name is that of an entry point in the group `seqzoo.plugins`, or else of a module, on Python's path or in the
    present folder.

    Raises:
        PluginError: there is neither.
    """
    others = []
    for argument in arguments:
        if argument.startswith(KEY):
            names = (name.strip(" '\"") for name in argument.removeprefix(KEY).strip("[]").split(","))
            for name in filter(None, names):
                _import(name)
        else:
            others.append(argument)
    return others


def _import(name: str) -> None:
    for found in entry_points(group=ENTRY_POINTS, name=name):
        found.load()
        return
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        import_module(name)
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and not f"{name}.".startswith(f"{missing}."):
            raise  # of what the plug-in imports
        if not isinstance(error, ModuleNotFoundError) and name.replace(".", "").isidentifier():
            raise
        raise PluginError(
            f"plugins={name}: no module of that name on Python's path or in this folder, and no entry point "
            f"{ENTRY_POINTS} of an installed package; valid: plugins=[my_module]"
        ) from None
