"""Where a run's numbers go: `metrics.jsonl`, which is complete, and a logger, which may fail."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..files import append, write_text
from ..messages import printable_lines, say_once
from ..records import read_bytes
from ..study import is_line, parse_line
from .errors import TrainingError
from .loggers import LOGGERS, STAGES, Logger

Callback = Callable[[str, int, Mapping[str, float], nn.Module], None]


class Tracker:
    """Writes one JSON object a line, `{"stage", "step", "tokens", "train/loss", ...}`, and gives the same to the logger
    that `config` names, and to callbacks.

    Args:
        folder: the run's folder.
        config: the whole configuration, as plain dictionaries.
        group: the name shared by the seeds of a cell.
        callbacks: called with the stage, the step, the line's numbers by name and the model; what they raise ends the
            run.

    A failure of the logger is a warning, and the run goes on without it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, group: str, callbacks: Sequence[Callback] = ()):
        self.folder, self.path, self.callbacks = folder, folder / "metrics.jsonl", callbacks
        self.held: int | None = os.open(folder, os.O_RDONLY)  # while it is open no other folder is taken for this one
        append(self.path, "")
        self.name = config.get("logger", "wandb")
        self.logger: Logger | None = None
        self._guard(lambda: LOGGERS[self.name](folder, config, group))

    def require_folder(self) -> None:
        """Raises TrainingError where the run's folder has been deleted or moved, instead of making another."""
        try:
            there = self.held is not None and os.path.samestat(os.fstat(self.held), os.stat(self.folder))
        except OSError:
            there = False
        if not there:
            raise TrainingError(
                f"{self.folder} was deleted or moved while it was trained, so nothing of it is saved any longer; the "
                "same command begins it anew"
            )

    def rewind(self, stage: str, step: int, evaluated: int, *, expected: bool = False) -> None:
        """Forgets the lines that a run will write again which continues after `step` steps of `stage`, and the
        validation after `evaluated`; `expected`: some of the stage should be left. Lines that were lost are said.

        Raises:
            TrainingError: as `require_folder` does.
        """
        self.require_folder()
        *lines, last = read_bytes(self.path).decode(errors="replace").split("\n")
        entries = [parse_line(line) for line in (*lines, last) if line]
        kept = [entry for entry in entries if _known(entry) and not _ahead(entry, stage, step, evaluated)]
        unreadable = sum(not _known(entry) for entry in entries[: len(entries) - bool(last)])
        if unreadable:  # beside the last, which a process that died did not write to its end
            say_once(f"{self.path}: {unreadable:,} lines cannot be read and are left out")
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._tell(lambda logger: logger.rewind(kept))
        if expected and not any(entry["stage"] == stage for entry in kept):
            say_once(f"{self.path} has lost its lines: the curve of {stage} begins after step {step}")

    def log(self, stage: str, step: int, tokens: int, metrics: Mapping[str, float], model: Any = None) -> None:
        """Appends what is known after `step` steps of `stage`, which have made `model`.

        Raises:
            TrainingError: as `require_folder` does.
        """
        self.require_folder()
        entry = {"stage": stage, "step": step, "tokens": tokens, **metrics}
        append(self.path, json.dumps(entry) + "\n")
        self._tell(lambda logger: logger.log(entry))
        for callback in self.callbacks:
            callback(stage, step, {"tokens": tokens, **metrics}, model)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Closes the run; None marks it as failed."""
        self._tell(lambda logger: logger.finish(result))
        if self.held is not None:
            os.close(self.held)
            self.held = None

    def _tell(self, what: Callable[[Logger], None]) -> None:
        if (logger := self.logger) is None:
            return

        def told() -> Logger:
            what(logger)
            return logger

        self._guard(told)

    def _guard(self, action: Callable[[], Logger | None]) -> None:
        """The logger becomes what `action` gives, or none, if it fails."""
        try:
            self.logger = action()
        except Exception as error:
            self.logger = None
            name = "W&B" if self.name == "wandb" else f"logger={self.name}"
            said = f"{name} failed and is switched off for this run; {self.path} goes on: {error}"
            warnings.warn(printable_lines(said), stacklevel=4)


def _known(entry: Any) -> bool:
    return is_line(entry) and entry["stage"] in STAGES


def _ahead(entry: Mapping[str, Any], stage: str, step: int, evaluated: int) -> bool:
    """Whether a line is of what lies before a run that continues there.

    A process may die between a validation's line and the checkpoint that knows of it.
    """
    validation = any(key.startswith("val/") for key in entry)
    here = STAGES.index(stage), evaluated if validation else step
    return (STAGES.index(entry["stage"]), entry["step"]) > here
