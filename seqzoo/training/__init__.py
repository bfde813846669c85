"""A stage of training: the loop, what it steps with, saves and measures, and what moves from one stage to the next."""

from __future__ import annotations

from .errors import Interrupted, TrainingError

__all__ = ["Interrupted", "TrainingError"]
