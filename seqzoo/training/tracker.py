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
from ..files import append, write_text
from ..messages import printable_lines
from ..records import read_text

STAGES = ("pretrain", "finetune")
Mode = Literal["online", "offline", "disabled"]


class Tracker:
    """Writes one JSON object a line, `{"stage", "step", "tokens", "train/loss", ...}`, and the same to W&B.

    Args:
        folder: the run's folder; its name is the W&B run's name.
        config: the whole configuration, as plain dictionaries.
        group: the W&B group, shared by the seeds of a cell.
        wandb: mode, project and entity.

    A failure of W&B is a warning, and the run goes on without it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, group: str, wandb: WandbConfig):
        self.path = folder / "metrics.jsonl"
        append(self.path, "")
        self.run: Any = None
        mode = wandb_mode(wandb.mode)
        if mode != "disabled":
            self._guard(lambda: self._start_wandb(folder, config, group, wandb, mode))

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the lines that a run continuing after `step` steps of `stage` will write again."""
        here = (STAGES.index(stage), step)
        kept = []
        for line in read_text(self.path).splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # the process died while writing it
                break
            if (STAGES.index(entry["stage"]), entry["step"]) <= here:
                kept.append(line)
        write_text(self.path, "".join(kept))

    def log(self, stage: str, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Appends what is known after `step` steps of `stage`."""
        entry = {"stage": stage, "step": step, "tokens": tokens, **metrics}
        append(self.path, json.dumps(entry) + "\n")
        if self.run is not None:
            named = {f"{stage}/{key}": value for key, value in entry.items() if key != "stage"}
            self._guard(lambda: self.run.log(named))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Closes the run; `result` becomes its W&B summary, and None marks it as failed."""
        if self.run is not None and result is not None:
            self._guard(lambda: self.run.summary.update(dict(result)))
        if self.run is not None:
            self._guard(lambda: self.run.finish(exit_code=0 if result is not None else 1))

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
