"""What may end a run early."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..failures import Said


class TrainingError(Said, RuntimeError):
    """A run that cannot go on; the message says where it stopped, why, and what to do."""


class Interrupted(KeyboardInterrupt):
    """A run stopped by Ctrl-C or SIGTERM after its state was saved; `folder` is what `resume=` takes."""

    def __init__(self, folder: Path):
        super().__init__(f"stopped and saved; {shlex.quote(f'resume={folder}')} continues")
        self.folder = folder
