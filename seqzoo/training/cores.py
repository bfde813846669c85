"""Whether a process has the cores to itself that it computes on."""

from __future__ import annotations

import os
from pathlib import Path

TASKS = Path("/proc/self/task")


class Cores:
    """How long the threads of this process have run, and how long they were ready while others ran in their place.

    The scheduler counts both (Linux's schedstat). Threads that sleep count in neither, as most do while one of them
    works alone, so that on a quiet machine next to all time is run time, whatever the model. Processor time over
    wall-clock time would be small there too for a model that leaves threads idle.
    """

    def __init__(self) -> None:
        self.before = _threads()

    def lap(self) -> tuple[float, float]:
        """Seconds run and waited, of all threads together, since the last lap; zeros where nobody counts."""
        now = _threads()
        ran, waited = (
            sum(max(0, times[i] - self.before.get(thread, (0, 0))[i]) for thread, times in now.items()) for i in (0, 1)
        )
        self.before = now
        return ran / 1e9, waited / 1e9


def cpu_share(ran: float, waited: float) -> float | None:
    """The part of the time that threads could have run in which they did; None: nobody counted it."""
    return ran / (ran + waited) if ran + waited > 0 else None


def _threads() -> dict[str, tuple[int, int]]:
    """Nanoseconds run and waited of each thread, by its id."""
    times = {}
    try:
        threads = os.listdir(TASKS)
    except OSError:
        return {}
    for thread in threads:
        try:
            ran, waited, _ = (TASKS / thread / "schedstat").read_text().split()
        except (OSError, ValueError):  # it has ended, or this kernel does not count
            continue
        times[thread] = int(ran), int(waited)
    return times
