"""The hand-over from self-pretraining to fine-tuning: the backbone moves, the heads do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..blocks import upgraded
from .checkpoint import load_weights
from .errors import TrainingError

BACKBONE = "backbone."


@dataclass(frozen=True)
class Transfer:
    """Names of the tensors that were loaded, of those of the checkpoint left behind, and of those that start anew."""

    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    created: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} backbone tensors loaded; dropped: {', '.join(self.dropped) or 'none'}; "
            f"new: {', '.join(self.created) or 'none'}"
        )


def transfer_backbone(model: nn.Module, checkpoint: Path) -> Transfer:
    """Loads every `backbone.*` tensor of a pretraining checkpoint into `model` and says what became of the others.

    Raises:
        TrainingError: a backbone tensor of either side has no partner on the other, or one of another shape. Nothing
            has been loaded then.
    """
    weights, own = upgraded(model, load_weights(checkpoint)), model.state_dict()
    given = {name for name in weights if name.startswith(BACKBONE)}
    wanted = {name for name in own if name.startswith(BACKBONE)}
    problems = [f"{name} is missing" for name in sorted(wanted - given)]
    problems += [f"{name} is unexpected" for name in sorted(given - wanted)]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, the model wants {list(own[name].shape)}"
        for name in sorted(given & wanted)
        if weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise TrainingError(
            f"the backbone in {checkpoint} does not fit: {shown}. Pretrain and fine-tune with the same model options"
        )
    model.load_state_dict({name: weights[name] for name in given}, strict=False)
    return Transfer(tuple(sorted(given)), tuple(sorted(weights.keys() - given)), tuple(sorted(own.keys() - wanted)))
