"""Runs: a configuration in, a folder with its checkpoints, metrics and result out."""

from __future__ import annotations

from .errors import Interrupted, TrainingError
from .finished import evaluate_run, load
from .run import run

__all__ = ["Interrupted", "TrainingError", "evaluate_run", "load", "run"]
