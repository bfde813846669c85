"""Where a run's numbers go: `metrics.jsonl`, which is complete, and Weights & Biases, which may fail."""

from __future__ import annotations

import json
import netrc
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from ..config import WandbConfig
from ..files import append, inside, write_text
from ..messages import printable_lines, say_once
from ..records import read_bytes, read_text
from ..study import is_line, parse_line
from .errors import TrainingError

STAGES = ("pretrain", "finetune")
EARLIER = "earlier"  # in W&B's folder in that of a run
Mode = Literal["online", "offline", "disabled"]


class Tracker:
    """Writes one JSON object a line, `{"stage", "step", "tokens", "train/loss", ...}`, and the same to W&B.

    Args:
        folder: the run's folder; its name is the W&B run's name.
        config: the whole configuration, as plain dictionaries.
        group: the W&B group, shared by the seeds of a cell.
        wandb: mode, project and entity.

    A failure of W&B is a warning, and the run goes on without it. Without network a process that continues a run begins
    a W&B folder of its own, and an earlier one, if it was killed, has not written all: so the newest gets every line
    again, and earlier ones are moved to `EARLIER`, where `wandb sync` does not look.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, group: str, wandb: WandbConfig):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.held: int | None = os.open(folder, os.O_RDONLY)  # while it is open no other folder is taken for this one
        append(self.path, "")
        self.run: Any = None
        self.sent = 0  # lines, from the first on, that the W&B run has
        self.mode = wandb_mode(wandb.mode)
        if self.mode != "disabled":
            self._guard(lambda: self._start_wandb(folder, config, group, wandb, self.mode))

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
        if self.run is not None:
            self._guard(lambda: self._catch_up(kept))
        if expected and not any(entry["stage"] == stage for entry in kept):
            say_once(f"{self.path} has lost its lines: the curve of {stage} begins after step {step}")

    def log(self, stage: str, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Appends what is known after `step` steps of `stage`.

        Raises:
            TrainingError: as `require_folder` does.
        """
        self.require_folder()
        entry = {"stage": stage, "step": step, "tokens": tokens, **metrics}
        append(self.path, json.dumps(entry) + "\n")
        if self.run is not None:
            self._guard(lambda: self._send(entry))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Closes the run; `result` becomes its W&B summary, and None marks it as failed."""
        if self.run is not None and result is not None:
            self._guard(lambda: self.run.summary.update(dict(result)))
        if self.run is not None:
            self._guard(lambda: self.run.finish(exit_code=0 if result is not None else 1))
        if self.held is not None:
            os.close(self.held)
            self.held = None

    def _send(self, entry: Mapping[str, Any]) -> None:
        self.run.log({f"{entry['stage']}/{key}": value for key, value in entry.items() if key != "stage"})
        self.sent += 1

    def _catch_up(self, entries: list[dict[str, Any]]) -> None:
        """Sends the W&B run the lines that it does not have; a server has them from the process before."""
        if self.mode != "offline":
            return
        for entry in entries[self.sent :]:
            self._send(entry)
        current = Path(self.run.dir).parent
        for earlier in current.parent.glob(f"offline-run-*-{self.run.id}"):
            if earlier != current:
                aside = inside(current.parent, EARLIER)
                aside.mkdir(exist_ok=True)
                earlier.rename(aside / earlier.name)

    def _start_wandb(self, folder: Path, config: Mapping[str, Any], group: str, wandb: WandbConfig, mode: Mode) -> None:
        import wandb as client

        identity = folder / "wandb_id"  # one W&B run per folder, however often it is resumed
        if identity.is_symlink() or not identity.exists():
            write_text(identity, uuid.uuid4().hex[:16])
        self.run = client.init(
            project=wandb.project,
            entity=wandb.entity,
            mode=mode,
            dir=folder,
            id=read_text(identity),
            resume="allow",
            name=folder.name,
            group=group,
            config=dict(config),
            settings=client.Settings(silent=True, console="off"),
        )
        for stage in STAGES:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self.run = None
            said = f"W&B failed and is switched off for this run; {self.path} goes on: {error}"
            warnings.warn(printable_lines(said), stacklevel=3)


def _known(entry: Any) -> bool:
    return is_line(entry) and entry["stage"] in STAGES


def _ahead(entry: Mapping[str, Any], stage: str, step: int, evaluated: int) -> bool:
    """Whether a line is of what lies before a run that continues there.

    A process may die between a validation's line and the checkpoint that knows of it.
    """
    validation = any(key.startswith("val/") for key in entry)
    here = STAGES.index(stage), evaluated if validation else step
    return (STAGES.index(entry["stage"]), entry["step"]) > here


def wandb_mode(configured: str | None) -> Mode:
    """`configured`, or $WANDB_MODE, or online where a key is at hand and offline otherwise. Never asks."""
    mode = configured or os.environ.get("WANDB_MODE")
    if mode in ("online", "offline", "disabled"):
        return cast(Mode, mode)
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        stored = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        stored = None
    return "online" if stored else "offline"
