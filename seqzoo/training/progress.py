"""What a run says while it runs: a progress bar on a terminal, plain lines elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class ProgressBar:
    """Steps done, loss, accuracy, tokens per second and time left of one stage. Silent unless `visible`."""

    def __init__(self, stage: str, *, done: int, total: int, visible: bool):
        self.stage, self.done, self.total = stage, done, total
        self.visible = visible
        self.bar = None
        if visible and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[numbers]}")
            self.bar = Progress(
                *(TextColumn(column) if isinstance(column, str) else column for column in columns),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar_task = self.bar.add_task(stage, total=total, completed=done, numbers="")

    def __enter__(self) -> ProgressBar:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, done: int) -> None:
        """`done` steps are behind."""
        self.done = done
        if self.bar:
            self.bar.update(self.bar_task, completed=done)

    def train(self, metrics: dict[str, float]) -> None:
        """The means since the last call, "loss" among them, and "tokens_per_second"."""
        if self.bar:
            self.bar.update(self.bar_task, numbers=_line(metrics))

    def validation(self, metrics: dict[str, float], *, seconds_left: float | None) -> None:
        """One line: what a validation found. `seconds_left` is the time to the end of the stage."""
        left = "" if self.bar or seconds_left is None else f" · {duration(seconds_left)} left"
        self.say(f"{self.stage} {self.done}/{self.total} · validation {_line(metrics)}{left}")

    def say(self, message: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.bar:
            self.bar.console.print(message, highlight=False, markup=False)
        elif self.visible:
            print(message, file=sys.stderr, flush=True)


class Pace:
    """The time left to step `total`, from the steps seen so far without the first few, which compile and warm up."""

    def __init__(self, total: int, *, skipped: int = 5):
        self.total, self.skipped = total, skipped
        self.observed = 0
        self.seconds_left: float | None = None  # None: not known yet

    def observe(self, step: int) -> None:
        """Step `step` has just ended."""
        self.observed += 1
        if self.observed <= self.skipped:
            self.start = time.monotonic()
        else:
            seconds_per_step = (time.monotonic() - self.start) / (self.observed - self.skipped)
            self.seconds_left = seconds_per_step * (self.total - step)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _line(metrics: dict[str, float]) -> str:
    names = ("loss", "bits_per_character", "accuracy")
    shown = [f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in names if name in metrics]
    if "tokens_per_second" in metrics:
        shown.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return " · ".join(shown)
