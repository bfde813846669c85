"""Metrics of a user's own, measured in validations and tests beside the loss and the accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .names import check_free

TAKEN = ("loss", "accuracy", "correct", "count", "bits_per_character", "step")


class Metric(NamedTuple):
    measure: Callable[[Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor], float] | None


METRICS: dict[str, Metric] = {}
Measure = TypeVar("Measure", bound=Callable[[Tensor, Tensor], Tensor])


def register_metric(name: str, *, reduce: Callable[[Tensor], float] | None = None) -> Callable[[Measure], Measure]:
    """Decorates a metric: from then on it is measured in every validation and test of a task that asks for classes, of
    sequences or at positions, and stands in metrics.jsonl and result.json under its name.

    It is called with scores, float32 [n, classes], and the right classes, int64 [n], of a batch. It returns values [n],
    whose mean over all answers is the metric; or, with `reduce`, what is added up over batches (counts, a confusion
    matrix), of which `reduce` makes the metric.

    Raises:
        ValueError: the name is taken or none.
    """
    if not name.isidentifier() or name in TAKEN:
        raise ValueError(f"register_metric({name!r}): valid: letters, digits and _, and none of {', '.join(TAKEN)}")

    def register(measure: Measure) -> Measure:
        check_free("register_metric", name, {known: metric.measure for known, metric in METRICS.items()}, measure)
        METRICS[name] = Metric(measure, reduce)
        return measure

    return register


def sums_of(scores: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """What each metric adds up over a batch, of scores [n, classes] and answers [n]: float64.

    Raises:
        ValueError: a metric gives something else.
    """
    sums = {}
    for name, metric in METRICS.items():
        found = metric.measure(scores, answers)
        if not isinstance(found, Tensor) or (metric.reduce is None and found.shape != answers.shape):
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"metric {name!r} gave {given} for {len(answers)} answers; valid: a value for each, or reduce= of what "
                "is added up"
            )
        sums[name] = (found if metric.reduce else found.sum()).double()
    return sums


def reduced(sums: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sums that are to be means, and the metrics that `reduce` makes of the others."""
    reducing = {name: metric.reduce for name, metric in METRICS.items() if metric.reduce and name in sums}
    with torch.no_grad():
        found = {name: float(reduce(sums[name])) for name, reduce in reducing.items()}
    return {name: total for name, total in sums.items() if name not in reducing}, found
