from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from ..config import SearchConfig, StageConfig
from ..files import inside, write_json
from ..objectives import Objective
from ..records import NUMBER
from ..tasks import Split
from ..training import Interrupted, TrainingError
from ..training.loop import Stage
from ..training.order import budget
from .folder import read_json


def search_lr(
    model: nn.Module,
    objective: Objective,
    train: Split,
    val: Split,
    stage: StageConfig,
    search: SearchConfig,
    *,
    folder: Path,
    **options: Any,
) -> float:
    """The rate of `search.rates` whose short training does best on validation; the same effort for every model.

    Finished trials are kept in `folder` and not repeated. A rate at which training fails is out.

    Args:
        options: of `Stage`: name, seed and fabric.

    Raises:
        TrainingError: training fails at every rate.
    """
    tokens = max(1, round(search.share * budget(stage, len(train), objective.passes * int(train.lengths.sum()))[0]))
    scores = {}
    for lr in search.rates:
        trial = inside(folder, f"lr-{lr:g}")
        summary = read_json(
            trial / "summary.json",
            {objective.monitor: (*NUMBER, NoneType)},
            f"delete {trial} to try that rate once more",
        )
        if summary is None:
            short = replace(
                stage,
                lr=lr,
                tokens=tokens,
                epochs=None,
                evaluations=1,
                warmup_steps=math.ceil(search.share * stage.warmup_steps),
            )
            attempt = Stage(copy.deepcopy(model), objective, train, val, short, folder=trial, **options)
            try:
                state = attempt.run()
                summary = {"lr": lr, objective.monitor: state.best[objective.monitor], "seconds": state.seconds}
            except Interrupted:
                raise Interrupted(folder.parents[1]) from None  # the run, of which a trial's folder is a part
            except TrainingError as failure:
                print(f"lr {lr:g}: {failure}", file=sys.stderr)
                summary = {"lr": lr, objective.monitor: None, "seconds": None}
            if options["fabric"].is_global_zero:
                write_json(trial / "summary.json", summary)
        if summary[objective.monitor] is not None:
            scores[lr] = summary[objective.monitor]
            if options["fabric"].is_global_zero:
                print(f"lr {lr:g}: validation {objective.monitor} {scores[lr]:.4f}", file=sys.stderr)
    if not scores:
        raise TrainingError(f"training fails at every rate of {', '.join(f'{lr:g}' for lr in search.rates)}")
    return (max if objective.maximise else min)(scores, key=lambda lr: scores[lr])
