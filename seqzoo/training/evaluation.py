"""The metrics of a model on a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..metrics import reduced
from ..objectives import Objective
from ..tasks import Split
from .errors import TrainingError
from .ranks import place_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LOOK_AT = 8  # examples at a time, to see whether anything is asked
ON_A_GPU = 4  # times the batch that training takes: evaluation keeps nothing for a backward pass


def evaluate(
    model: nn.Module,
    objective: Objective,
    split: Split,
    *,
    batch_size: int,
    fabric: Fabric,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean metrics of `model` in eval mode over all examples of `split`, which lies on the model's device.

    Examples are taken in order of length, so that little is padded, and each counts once; batches hold at most
    `batch_size`, or `ON_A_GPU` times as many there, and are shared by the ranks. Random masks are the same in every
    evaluation. `before_batch` may raise.

    Raises:
        TrainingError: nothing is asked in `split`.
    """
    if fabric.device.type == "cuda":
        batch_size *= ON_A_GPU
    model.eval()
    place = place_of(fabric)
    order = split.lengths.reshape(len(split), -1).amax(1).argsort(stable=True)
    batches = order.tensor_split(max(math.ceil(len(split) / batch_size), place.ranks))
    sums: dict[str, Tensor] = {}
    # Ranks that have shards of a model call it together: one that is through looks at a batch once more.
    most = -(-len(batches) // place.ranks) * place.ranks if place.sharded else len(batches)
    for number in range(place.rank, most, place.ranks):
        before_batch()
        batch = split.batch(batches[min(number, len(batches) - 1)])
        batch = batch._replace(part=place.part(batch.inputs.shape[split.spec.num_inputs]))
        with torch.no_grad(), fabric.autocast():
            measure = objective(model, batch, seed=number)
        if number >= len(batches):
            continue
        for key, total in measure.totals.items():
            sums[key] = sums.get(key, 0) + total
    sums, own = reduced({key: cast(Tensor, fabric.all_reduce(total, reduce_op="sum")) for key, total in sums.items()})
    metrics = means(sums)
    if not metrics:
        raise TrainingError(f"{split.spec.name}: {objective.nothing}")
    return {**metrics, **own}


def require_questions(objective: Objective, splits: Mapping[str, Split]) -> None:
    """Raises ValueError where `objective` asks nothing of any example of one of `splits`, given by name."""
    for name, split in splits.items():
        batches = map(split.batch, torch.arange(len(split)).split(LOOK_AT))
        if not any(objective.asked(batch, seed=0).any() for batch in batches):
            raise ValueError(f"{name} split of {split.spec.name}: {objective.nothing}")


def means(sums: dict[str, Any]) -> dict[str, float]:
    """Sums over "count" examples or positions as means, of which there are none where nothing was asked; "correct"
    becomes "accuracy". Those of "masked/..." are over "masked/count" likewise."""
    values = {key: float(total) for key, total in sums.items()}
    metrics = {}
    for key, value in values.items():
        group, slash, name = key.rpartition("/")
        count = values[f"{group}{slash}count"]
        if count and name != "count":
            metrics[f"{group}{slash}{'accuracy' if name == 'correct' else name}"] = value / count
    return metrics


def module_metrics(model: nn.Module) -> dict[str, float]:
    """What the modules report of themselves, as `<module path>/<name>`."""
    return {
        f"{path}/{name}": value
        for path, module in model.named_modules()
        if callable(report := getattr(module, "metrics", None))
        for name, value in report().items()
    }
