"""Runs: a configuration in, a folder with its checkpoints, metrics and result out; one, or many as a campaign."""

from __future__ import annotations

from .finished import evaluate_run, load
from .run import run

__all__ = ["evaluate_run", "load", "run"]
