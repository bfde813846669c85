"""Whether a pretraining has learnt more than how frequent each symbol is."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..objectives import Causal, Masked, Objective
from ..tasks import Split
from ..training.counting import counted
from ..training.errors import TrainingError
from ..training.evaluation import evaluate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MARGIN = {"lra_text": 0.4, "lra_image": 0.4}  # nats; of other tasks, three standard errors
PARTS = 20  # of validation, by which the standard error is told


def learnt(
    model: nn.Module, objective: Objective, train: Split, val: Split, *, loss: float, batch_size: int, fabric: Fabric
) -> dict[str, Any] | None:
    """What stands beside the validation `loss` of a model that self-pretraining made; None where pixels are regressed.

    - "loss": that loss, in nats as all here is.
    - "symbols", "neighbours": as `Counted` has them.
    - "margin": how far below "symbols" the loss has to be, at least.
    - "learnt": whether it is.
    """
    if not isinstance(objective, Masked | Causal) or objective.head == "regress":
        return None
    margin = MARGIN.get(train.spec.name)
    if margin is None:
        losses = []
        for index in torch.arange(len(val)).tensor_split(min(PARTS, len(val))):
            part = val.subset(index).to(fabric.device)
            with suppress(TrainingError):  # nothing is asked in it
                losses.append(evaluate(model, objective, part, batch_size=batch_size, fabric=fabric)["loss"])
        margin = 3 * torch.tensor(losses).std().item() / len(losses) ** 0.5 if len(losses) > 1 else 0.0
    found = counted(objective, train, val)
    return {"loss": loss, **found._asdict(), "margin": margin, "learnt": loss < found.symbols - margin}


def sentence(found: dict[str, Any]) -> str:
    """For a pretraining that has not."""
    return (
        f"this pretraining has learnt nothing beyond how frequent symbols are: {found['loss']:.2f} nats on validation, "
        f"where their frequency alone has {found['symbols']:.2f} and the two nearest that are shown have "
        f"{found['neighbours']:.2f}; more tokens or another learning rate may help"
    )
