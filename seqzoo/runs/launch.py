"""The runs of a campaign as jobs, of a SLURM cluster or in processes of this machine, through submitit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError, LauncherConfig
from .attempt import FAILED, attempt, say
from .cell import Cell

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

POLL_SECONDS = 1.0
TIME_LIMITS = 1000  # that a job may meet; submitit's own 4 would end a long run on a partition of short jobs


class Run:
    """One run as a job: called in it; asked by submitit, before a time limit ends it, what is to be queued again."""

    def __call__(self, overrides: Sequence[str]) -> int:
        return attempt(overrides)

    def checkpoint(self, overrides: Sequence[str]) -> DelayedSubmission:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, overrides)


def launch(cells: Sequence[Cell], launcher: LauncherConfig, folder: Path) -> Iterator[tuple[Cell, int]]:
    """Runs `cells` as jobs, at most `launcher.parallel` at a time; yields each, when it has ended, with its status.

    A run that shares its pretraining with one that is under way waits for it. On Ctrl-C jobs of this machine stop too;
    those of a cluster go on.

    Args:
        cells: in order.
        launcher: cluster, jobs at a time, submitit's parameters.
        folder: for submitit's scripts and logs.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
        ConfigError: submitit is not installed, has no such parameter, or finds no SLURM here.
    """
    executor = _executor(launcher, folder)
    if launcher.cluster == "local":  # the jobs share the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launcher.parallel)))
    waiting = list(cells)
    running: dict[Cell, Job[int]] = {}
    try:
        while waiting or running:
            for cell in [cell for cell, job in running.items() if job.done()]:
                yield cell, _status(cell, running.pop(cell))
            ready = _next(waiting, running) if len(running) < launcher.parallel else None
            if ready is not None:
                waiting.remove(ready)
                running[ready] = executor.submit(Run(), ready.overrides)
                say(f"job {running[ready].job_id}: {' '.join(ready.overrides)}")
            else:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        if launcher.cluster == "local":
            for job in running.values():
                job.cancel()
        raise


def _next(waiting: Iterable[Cell], running: Iterable[Cell]) -> Cell | None:
    """The first that need not wait for a pretraining."""
    under_way = {cell.key for cell in running if not cell.pretrained}
    return next((cell for cell in waiting if cell.key is None or cell.key not in under_way), None)


def _executor(launcher: LauncherConfig, folder: Path) -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError("launcher: submitit is not installed; pip install 'seqzoo[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder, cluster=launcher.cluster, slurm_max_num_timeout=TIME_LIMITS)
        executor.update_parameters(name="seqzoo", **launcher.options)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"launcher: {str(error).splitlines()[0]}") from None
    return executor


def _status(cell: Cell, job: Job[int]) -> int:
    """How a job ended that is done."""
    error = job.exception()
    status = FAILED if error is not None else job.result()
    if status and not cell.finished:
        say(f"job {job.job_id} ended with status {status}: {' '.join(cell.overrides)}; see {job.paths.stderr}")
    return status
