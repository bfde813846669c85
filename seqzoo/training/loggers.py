"""Where a run's numbers go beside `metrics.jsonl`: Weights & Biases, TensorBoard, nowhere, or a logger of one's own."""

from __future__ import annotations

import json
import netrc
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..config import ConfigError, WandbConfig
from ..files import inside, write_text
from ..messages import unknown
from ..names import check_free
from ..records import read_text

STAGES = ("pretrain", "finetune")
EARLIER = "earlier"  # in W&B's folder in that of a run
Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {  # and what W&B called them before, or calls sharing a run
    **{"online": "online", "offline": "offline", "disabled": "disabled"},
    **{"dryrun": "offline", "run": "online", "shared": "online"},
}


class Logger:
    """What a logger does. A failure in it is a warning, and the run goes on without it."""

    def log(self, entry: Mapping[str, Any]) -> None:
        """A new line of metrics.jsonl: "stage", "step", "tokens", and numbers by name."""
        raise NotImplementedError

    def rewind(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """The run goes on, in this process or another, after these lines; later ones come again."""

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The run has ended, with a result, or, if that is None, without."""


class WandbLogger(Logger):
    """Weights & Biases: one run for a folder, however often it is resumed.

    Without network a process that continues a run begins a W&B folder of its own, and an earlier one, if it was killed,
    has not written all: so the newest gets every line again, and earlier ones are moved to `EARLIER`, where `wandb
    sync` does not look.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], group: str, wandb: WandbConfig, mode: Mode) -> None:
        import wandb as client

        identity = folder / "wandb_id"
        if identity.is_symlink() or not identity.exists():
            write_text(identity, uuid.uuid4().hex[:16])
        self.mode, self.sent = mode, 0  # lines, from the first on, that the W&B run has
        self.run: Any = client.init(
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

    def log(self, entry: Mapping[str, Any]) -> None:
        self.run.log({f"{entry['stage']}/{key}": value for key, value in entry.items() if key != "stage"})
        self.sent += 1

    def rewind(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Sends the W&B run the lines that it does not have; a server has them from the process before."""
        if self.mode != "offline":
            return
        for entry in entries[self.sent :]:
            self.log(entry)
        current = Path(self.run.dir).parent
        for earlier in current.parent.glob(f"offline-run-*-{self.run.id}"):
            if earlier != current:
                aside = inside(current.parent, EARLIER)
                aside.mkdir(exist_ok=True)
                earlier.rename(aside / earlier.name)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self.run.summary.update(dict(result))
        self.run.finish(exit_code=0 if result is not None else 1)


class TensorBoardLogger(Logger):
    """Event files in the run folder's `tensorboard`; a run that goes on writes them anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = inside(folder, "tensorboard")
        self._begin()

    def _begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder))

    def log(self, entry: Mapping[str, Any]) -> None:
        for key, value in entry.items():
            if key not in ("stage", "step"):
                self.writer.add_scalar(f"{entry['stage']}/{key}", value, entry["step"])

    def rewind(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self.writer.close()
        shutil.rmtree(self.folder)
        self._begin()
        for entry in entries:
            self.log(entry)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self.writer.add_text("result", f"```\n{json.dumps(result, indent=1)}\n```")
        self.writer.close()


Make = Callable[[Path, Mapping[str, Any], str], Logger | None]
MakeT = TypeVar("MakeT", bound=Make)


def _wandb(folder: Path, config: Mapping[str, Any], group: str) -> Logger | None:
    wandb = WandbConfig(**config.get("wandb", {}))
    mode = wandb_mode(wandb.mode)
    return None if mode == "disabled" else WandbLogger(folder, config, group, wandb, mode)


LOGGERS: dict[str, Make] = {
    "wandb": _wandb,
    "tensorboard": lambda folder, config, group: TensorBoardLogger(folder),
    "none": lambda folder, config, group: None,
}


def register_logger(name: str) -> Callable[[MakeT], MakeT]:
    """Decorates what makes a `Logger`, a class or a function: from then on `logger=<name>` takes it.

    It is called with the run's folder, its configuration as plain dictionaries, and the name that the seeds of an
    experiment share, when a run begins or goes on.

    Raises:
        ValueError: the name is taken.
    """

    def register(make: MakeT) -> MakeT:
        check_free("register_logger", name, LOGGERS, make)
        LOGGERS[name] = make
        return make

    return register


def check_logger(name: str) -> None:
    """Raises ConfigError where there is no such logger, or TensorBoard is not installed."""
    if name not in LOGGERS:
        raise ConfigError(f"logger={name}: {unknown('logger', name, LOGGERS)}")
    if name == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError("logger=tensorboard: it is not installed; pip install tensorboard")


def wandb_mode(configured: str | None) -> Mode:
    """`configured`, or $WANDB_MODE, or online where a key is at hand and offline otherwise. Never asks.

    Under a name that W&B does not have nothing is sent.
    """
    mode = configured or os.environ.get("WANDB_MODE")
    if mode:
        return MODES.get(mode, "offline")
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        stored = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        stored = None
    return "online" if stored else "offline"
