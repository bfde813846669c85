"""One run of the command line: every error that has a name is a line on stderr and an exit status."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError, compose, seconds
from ..failures import told
from ..messages import printable_lines
from ..plugins import KEY
from ..training import Interrupted
from .run import run

DONE, FAILED, MISUSED, UNFINISHED, INTERRUPTED = 0, 1, 2, 3, 130
STOPPED = "stopped; the same command continues from the last checkpoint, if there is one"


def attempt(overrides: Sequence[str], deadline: float | None = None) -> int:
    """Runs what `overrides` ask for, until a moment of `time.monotonic()` or their own `budget`; returns how it ended.

    0: done; 1: it failed; 2: the overrides ask for something that does not exist; 3: the time was up; 4: another
    process has it in hand; 130: interrupted.
    """
    try:
        others = [override for override in overrides if not override.startswith(KEY)]
        if len(others) > 1 and any(override.startswith("resume=") for override in others):
            raise ConfigError("resume= takes the run's own configuration and no other override but plugins=")
        config = compose(overrides)
        if deadline is None and config.budget is not None:
            deadline = time.monotonic() + seconds(config.budget)
        result = run(config, deadline=deadline)
        report(result)
    except Interrupted as stopped:
        if deadline is not None and time.monotonic() >= deadline:
            return fail(f"the time is up: {stopped}, and so does the same command", UNFINISHED)
        return fail(str(stopped), INTERRUPTED)
    except KeyboardInterrupt:
        return fail(STOPPED, INTERRUPTED)
    except Exception as error:
        if (failure := told(error)) is None:
            raise
        return fail(*failure)
    return DONE


def say(message: str) -> None:
    """Prints, on the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable_lines(message))


def fail(message: str, status: int) -> int:
    """Says what went wrong and returns `status`."""
    print(printable_lines(f"train.py: {message}"), file=sys.stderr)
    return status


def report(result: dict[str, Any]) -> None:
    """Prints the outcome of a run: its scores, folder, and what to do next."""
    test = result["test"]
    bits = f"{test['bits_per_character']:.4f} bits per character, " if "bits_per_character" in test else ""
    say(
        f"{result['model']} on {result['task']}: test {bits}accuracy {test['accuracy']:.4f} on {result['n_test']} "
        f"examples (majority class {result['majority']:.4f})"
    )
    if result["task_note"]:
        say(f"note: {result['task_note']}")
    say(f"run folder: {result['folder']}")
    say(f"compare: python eval_lra.py {shlex.quote(str(Path(result['folder']).parent))}")
