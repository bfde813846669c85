"""When a checkpoint is due."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 600.0  # between checkpoints, at most
SHARE = 0.01  # of the time, for all that is saved, as far as validations do not ask for more
FIRST_SECONDS = 1.0  # till the first, which tells how long one takes


class Saves:
    """What saving takes of a stage's time, what validations save counted in, and when more of it is due."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """The stage begins, or goes on."""
        self.started = self.last = time.monotonic()
        self.spent = 0.0  # seconds
        self.wanted = FIRST_SECONDS  # since the last

    def due(self) -> bool:
        """Whether another checkpoint leaves the share as it should be."""
        return time.monotonic() - self.last > self.wanted

    @contextmanager
    def one(self) -> Iterator[None]:
        """Something is saved within it."""
        before = time.monotonic()
        yield
        self.last = time.monotonic()
        took = self.last - before
        self.spent += took
        self.wanted = min(max(0.0, (self.spent + took) / SHARE - (self.last - self.started)), SECONDS)
