"""The groups of a run's configuration that are nobody else's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from .valid import BelowOne, Count, Epochs, Fraction, NotNegative, Number, Positive, Range, Text, Tokens, Width


@dataclass(kw_only=True)
class StageConfig:
    """How long and how fast one stage, pretraining or fine-tuning, learns."""

    tokens: Tokens | None = None  # budget in tokens, padding not counted; this or `epochs`
    epochs: Epochs | None = None
    batch_size: Width = 32
    accumulate: Count = 1  # batches summed into one optimiser step
    optimizer: str = "adamw"  # or muon, for the matrices of layers; see `seqzoo.training.optimizer`
    lr: Positive = 1e-3
    recurrence_lr_factor: NotNegative = 0.5  # learning rate of recurrence parameters (decay rates, phases), times lr
    weight_decay: NotNegative = 0.0
    warmup_steps: Number = 0
    schedule: str = "cosine"  # after the warmup: cosine to zero, or constant
    clip: Positive | None = None  # largest global gradient norm
    evaluations: Count = 10  # validations in the stage; the best one's weights are kept


@dataclass(kw_only=True)
class SearchConfig:
    """Of `lr=search`; see `seqzoo.runs.search`. By default the rates that Amos, Berant and Gupta (2024) report in
    tables 4 to 6, less the few in between."""

    rates: list[float] = field(default_factory=lambda: [1e-4, 5e-4, 1e-3, 5e-3])
    share: Fraction = 0.1  # of the stage's budget, for each trial

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"search.rates={self.rates}: valid: one number above 0, and more")


@dataclass(kw_only=True)
class JointConfig:
    """Of `objective=joint`; see `seqzoo.objectives.Joint`."""

    weight: Positive = 1.0  # of the masked loss beside the task's
    passes: Annotated[int, Range(1, 2)] = 1  # over a batch: over its inputs with positions hidden; and as they are
    whole: BelowOne = 0.0  # the probability that a sequence stays as it is; 0 in two passes, of which one reads all so

    def __post_init__(self) -> None:
        if self.passes == 2:
            self.whole = 0.0


@dataclass(kw_only=True)
class LoraConfig:
    """Of `tuning=lora`; see `seqzoo.training.lora`."""

    rank: Width = 8
    alpha: Count = 16  # the product of the low-rank factors counts alpha / rank times
    lr_ratio: Positive = 16.0  # learning rate of the second factor, which starts at zero, over that of the first


@dataclass(kw_only=True)
class LadderConfig:
    """Of `tuning=ladder`; see `seqzoo.models.ladder`."""

    reduction: Width = 8  # d_model over the width of the side network


@dataclass(kw_only=True)
class WandbConfig:
    mode: str | None = None  # null: online when a key is set, else offline
    project: Text = "seqzoo"
    entity: Text | None = None


@dataclass(kw_only=True)
class LauncherConfig:
    """Where the runs of a sweep are computed."""

    cluster: str | None = None  # null: this process, one run after another; local or slurm: submitit's, a job a run
    parallel: Annotated[int, Range(1, 10_000)] = 1  # jobs at a time
    options: dict[str, Any] = field(default_factory=dict)  # of submitit's AutoExecutor.update_parameters
