"""Whether a stage can be trained here at all: found in its numbers, before anything is allocated or written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..config import Config, ConfigError, StageConfig
from ..models import SequenceModel, build_model
from ..spec import TaskSpec
from ..tasks import Split
from ..tasks.data import BUCKETS
from ..training.memory import held_by, needed_to_train
from ..training.order import budget, room_for
from ..training.ranks import place_of, require_parts
from .parts import blaming

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def check_model(model: SequenceModel, device: torch.device) -> None:
    """Raises ConfigError where `device` does not hold the weights of `model`, which may be on the meta device."""
    memory, needed = held_by(device), sum(tensor.nbytes for tensor in model.state_dict().values())
    if needed > memory:
        raise ConfigError(
            f"{needed / 1e9:,.0f} GB of weights, of {memory / 1e9:,.0f} GB here; valid: a smaller model, such as "
            "model.d_model or model.num_layers"
        )


def check_answer(config: Config, spec: TaskSpec) -> None:
    """Raises ConfigError where a task asks for something else than the run would learn."""
    learns_inputs = config.pretrain or config.objective == "joint"
    if learns_inputs and config.pixel_loss != "cross_entropy" and spec.kind != "pixels":
        raise ConfigError(f"pixel_loss={config.pixel_loss}: {spec.name} has no pixels; valid: cross_entropy")
    if spec.answer != "next":
        return
    if not config.causal:
        raise ConfigError(f"causal=false: {spec.name} asks each position for the next one; valid: causal=true")
    if config.pretrain:
        raise ConfigError(
            f"pretrain={config.pretrain}: {spec.name} is itself what causal pretraining is; valid: pretrain=false"
        )


def check_parts(config: Config, spec: TaskSpec) -> None:
    """Raises ConfigError where `config.sequence_parallel` ranks cannot have parts of the time."""
    if config.sequence_parallel == 1:
        return
    asked, shortest = f"sequence_parallel={config.sequence_parallel}", math.ceil(BUCKETS[0] * spec.max_length)
    if config.sequence_parallel > shortest:
        raise ConfigError(f"{asked}: {spec.name} has batches of {shortest} steps; valid: up to as many ranks")
    with blaming(asked), torch.device("meta"):
        require_parts(build_model(config.model, spec, head="classify", causal=config.causal))


def check_stage(
    name: str,
    stage: StageConfig,
    model: SequenceModel,
    train: Split,
    fabric: Fabric,
    *,
    passes: int = 1,
    packing: bool = False,
) -> None:
    """Raises ConfigError where a stage cannot be trained.

    Memory is refused for what training cannot do without: weights, gradients and moments; and, at every position of a
    batch, what goes into the norm of each layer that is trained and what comes out.

    Args:
        name: of the stage's keys, "pretraining" or "finetuning".
        model: as it is to be trained; its tensors may be on the meta device.
        train: what it is trained on.
        passes: over a batch in a step.
        packing: batches have as many positions as their examples could, see `seqzoo.training.order`.
    """
    ranks = place_of(fabric).ranks
    if stage.batch_size % ranks:
        shared = "" if ranks == fabric.world_size else " that have examples of their own"
        raise ConfigError(f"{name}.batch_size={stage.batch_size}: valid: a multiple of the {ranks} processes{shared}")
    tokens = passes * int(train.lengths.sum())
    if budget(stage, len(train), tokens)[0] < 1:
        raise ConfigError(f"{name}.epochs={stage.epochs}: of {tokens:,} tokens none; valid: 1 token or more")
    memory, needed = held_by(fabric.device), needed_to_train(model)
    if needed > memory:
        raise ConfigError(
            f"{name}: {needed / 1e9:,.0f} GB of parameters, gradients and moments, of {memory / 1e9:,.0f} GB here; "
            "valid: a smaller model, such as model.d_model or model.num_layers"
        )
    layers = 1 if model.backbone.frozen else len(model.backbone.layers)
    per_place = room_for(train, passes) if packing else tokens / len(train)
    positions = stage.batch_size * per_place / fabric.world_size
    needed += round(2 * 4 * positions * model.backbone.norm.normalized_shape[0] * layers)
    if needed > memory:
        raise ConfigError(
            f"{name}.batch_size={stage.batch_size}: {needed / 1e9:,.0f} GB at least, of {memory / 1e9:,.0f} GB here; "
            f"valid: a smaller one, and {name}.accumulate to sum several into a step"
        )
