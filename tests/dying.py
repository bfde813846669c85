"""Runs in child processes that die at a moment that is named, and what is left of them.

A child is forked after the imports, so that a death costs no start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import safetensors.torch as written
import torch

from seqzoo import files
from seqzoo.training import loop, saves, tracker
from seqzoo.training.checkpoint import load_checkpoint

MEASURED = ("tokens_per_second", "mfu", "seconds", "cpu_share", "hardware", "commit", "versions")  # not computed


class Moment(NamedTuple):
    """The n-th time, from 1, that something happens."""

    what: str
    number: int = 1


def in_child(work: Callable[[], Any]) -> int:
    """The exit status of `work` in a process of its own, negative for the signal that ended it; it prints nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                if "SHOW" not in os.environ:
                    os.dup2(nowhere.fileno(), 2)
            sys.stdout = sys.stderr = open(os.devnull, "w") if "SHOW" not in os.environ else sys.__stderr__  # noqa: SIM115
            status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def dying_at(
    moment: Moment | None, noted: Counter[str] | None = None, signals: Sequence[int] = (signal.SIGKILL,)
) -> Iterator[None]:
    """Within it the process gets `signals` at `moment`; what happens is counted in `noted`.

    - "validation", "validated": before and after one.
    - "checkpoint", "half checkpoint", "saved": before safetensors writes one, when half is there, after it.
    - "rename", "renamed": before and after a file takes the place of the old.
    - "line", "half line", "logged": of metrics.jsonl.
    """
    noted = Counter() if noted is None else noted

    def happens(what: str) -> bool:
        noted[what] += 1
        return moment == (what, noted[what])

    def die() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    def around(function: Any, before: str, after: str, half: Callable[..., None] | None = None) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if happens(before):
                die()
            if half is not None and happens(f"half {before}"):
                half(*arguments)
                die()
            result = function(*arguments, **options)
            if happens(after):
                die()
            return result

        return wrapped

    def half_a_checkpoint(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)

    save_file, append = written.save_file, tracker.append
    with ExitStack() as patches:
        for owner, name, function in (
            (loop.Stage, "validate", around(loop.Stage.validate, "validation", "validated")),
            (written, "save_file", around(save_file, "checkpoint", "saved", half_a_checkpoint)),
            (files.os, "replace", around(os.replace, "rename", "renamed")),
            (
                tracker,
                "append",
                around(append, "line", "logged", lambda path, text: append(path, text[: len(text) // 2])),
            ),
            (saves.Saves, "due", lambda _: True),  # a checkpoint after every step
        ):
            patches.enter_context(patch.object(owner, name, function))
        yield


def what_is_left(folder: Path) -> dict[str, Any]:
    """All that a run computes, to be compared bit by bit: weights, moments, counters, metrics, result."""
    left: dict[str, Any] = {"result": _computed(json.loads((folder / "result.json").read_text()))}
    left["metrics"] = [_computed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for path in sorted(folder.glob("*/last.safetensors")):
        kept = load_checkpoint(path)
        assert kept is not None
        tensors = dict(kept.weights)
        tensors |= {f"{index}/{key}": tensor for index, held in kept.optimizer.items() for key, tensor in held.items()}
        left[path.parent.name] = tensors
        left[f"{path.parent.name} state"] = {
            key: value for key, value in kept.state.items() if "seconds" not in key and not key.startswith("cpu")
        }
    return left


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict) and all(isinstance(part, torch.Tensor) for part in value.values()):
            assert found[key].keys() == value.keys()
            assert [name for name in value if not torch.equal(found[key][name], value[name])] == [], key
        else:
            assert found[key] == value, key


def _computed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not any(name in key for name in MEASURED)}
