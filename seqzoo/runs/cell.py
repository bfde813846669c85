from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import Config, ConfigError
from .folder import finished_pretraining, finished_run


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a campaign."""

    overrides: tuple[str, ...]
    config: Config
    folder: Path
    key: str | None  # of the pretraining it needs, see `pretraining_key`; None: it needs none

    @property
    def finished(self) -> bool:
        """Whether it has a result that can be read; a run with a damaged one says so when it is started."""
        try:
            return finished_run(self.folder) is not None
        except ConfigError:
            return False

    @property
    def begun(self) -> bool:
        return (self.folder / "config.yaml").exists()

    @property
    def pretrained(self) -> bool:
        """Whether nothing is left of the pretraining it needs, be it its own or that of a run beside it."""
        return self.key is None or finished_pretraining(self.config, self.folder, self.key) is not None
