from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class State:
    """How far a stage has come; with weights and optimiser, all that continuing needs."""

    step: int = 0  # optimiser steps taken
    evaluated: int = 0  # the step of the last validation
    tokens: int = 0  # seen, padding not counted
    seconds: float = 0.0
    training_seconds: float = 0.0  # without validations and checkpoints
    cpu_ran: float = 0.0  # seconds of all threads, see `Cores`
    cpu_waited: float = 0.0
    best: dict[str, float] = field(default_factory=dict)  # the best validation
    window: dict[str, float] = field(default_factory=dict)  # `Stage.window`, of all ranks
    reports: dict[str, float] = field(default_factory=dict)  # of the modules, `Stage.reports`


STATE = {f"{key}?": type(value) for key, value in asdict(State()).items()}  # as `check` reads it
