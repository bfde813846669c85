"""The hand-over from self-pretraining to fine-tuning: the backbone moves, the heads do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..blocks import upgraded
from ..messages import misfits
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
    given = {name: tensor for name, tensor in weights.items() if name.startswith(BACKBONE)}
    wanted = {name: tensor for name, tensor in own.items() if name.startswith(BACKBONE)}
    if problems := misfits(given, wanted):
        raise TrainingError(
            f"the backbone in {checkpoint} does not fit: {problems}. Pretrain and fine-tune with the same model options"
        )
    model.load_state_dict(given, strict=False)
    return Transfer(
        tuple(sorted(given)), tuple(sorted(weights.keys() - given.keys())), tuple(sorted(own.keys() - wanted.keys()))
    )


def require_fit(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raises TrainingError where `weights` are not those of `model`, which may be on the meta device."""
    if problems := misfits(upgraded(model, weights), model.state_dict()):
        raise TrainingError(
            f"the weights in {checkpoint} do not fit the model that the run's config.yaml describes: {problems}; "
            "valid: the two as one run left them"
        )
