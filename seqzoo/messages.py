from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

SHOWN = 80  # characters of what was given


def unknown(what: str, given: object, valid: Iterable[str]) -> str:
    """The message for a name that is not among the valid ones, with the nearest that is."""
    given, valid = shortened(str(given)), list(valid)
    near = difflib.get_close_matches(given, valid, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no {what} {given!r}{meant}; valid: {', '.join(valid)}"


def shortened(given: str) -> str:
    """What was given, without its end where that would fill the screen."""
    return given if len(given) <= SHOWN else f"{given[:SHOWN]}..."


def printable(text: str) -> str:
    """`text` in one line that a terminal shows as it is: what would not be printed is escaped."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def printable_lines(text: str) -> str:
    """`printable`, of every line of `text`."""
    return "\n".join(map(printable, text.split("\n")))


@cache
def say_once(message: str) -> None:
    """Prints to stderr what this process has not said yet, on the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable_lines(message), file=sys.stderr)


def misfits(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two state dicts differ in names or shapes; empty if nowhere."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - given.keys())]
    problems += [f"{name} is unexpected" for name in sorted(given.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {list(given[name].shape)}, the model wants {list(wanted[name].shape)}"
        for name in sorted(given.keys() & wanted.keys())
        if given[name].shape != wanted[name].shape
    ]
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
