from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from seqzoo import BLOCKS
from seqzoo.blocks import registry
from seqzoo.metrics import METRICS
from seqzoo.tasks import OWN, TASKS
from seqzoo.training.loggers import LOGGERS


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Within it blocks, tasks, metrics and loggers may be registered."""
    kept = [(known, dict(known)) for known in (BLOCKS, registry.OWN, TASKS, OWN, METRICS, LOGGERS)]
    try:
        yield
    finally:
        for known, before in kept:
            known.clear()
            known.update(before)
