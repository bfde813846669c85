"""How long a stage will take, told before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config import StageConfig
from ..objectives import Objective
from ..tasks import Split, epoch_order
from .loop import Stage
from .order import budget, room_for
from .peak import peak_flops, wait_for
from .progress import duration

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TIMED_SECONDS = 0.3  # that steps are timed for, or a step
TIMED_SHARE = 0.02  # of the stage's steps, at most
STEP_SECONDS = 0.25  # that a step may be expected to take
USUAL_SHARE = 0.2  # of the device's peak that steps reach, or more
SHORTEST = 64  # positions that an example is cut to, for shorter steps
DRAWN = 16  # batches, of which steps are taken
HOPELESS_SECONDS = 24 * 3600.0  # worth a word of advice


def training_rate(
    model: nn.Module,
    objective: Objective,
    train: Split,
    stage: StageConfig,
    *,
    flops: float,
    flops_at: Callable[[int], float],
    name: str,
    seed: int,
    folder: Path,
    fabric: Fabric,
    packing: bool = False,
) -> float:
    """Tokens a second of a stage, validations aside: a few of its steps are timed.

    A first one is not. Where a step would take too long it has fewer examples, and then shorter ones, whose operations
    tell what whole ones would take. Nothing is moved but `model`: nothing else that is random draws other numbers for
    it.

    Args:
        model: one of its own, which is used up.
        flops: operations per token.
        flops_at: the same in sequences of a length; asked where they are shortened.
        name, seed, fabric, packing: as of `Stage`.
        folder: where nothing lies; nor does anything afterwards.
    """
    positions, whole, ranks = objective.passes * int(train.lengths.sum()), train.spec.max_length, fabric.world_size
    room = room_for(train, objective.passes) if packing else None
    per_example = positions / len(train) if room is None else room
    fitting = fabric.broadcast(STEP_SECONDS * USUAL_SHARE * peak_flops(fabric) / (3 * flops))  # tokens
    longest = whole
    if fitting < ranks * per_example:
        longest = min(whole, max(SHORTEST, int(fitting / ranks / train.spec.num_inputs)))
    examples = min(stage.batch_size, ranks * max(1, int(fitting / per_example / ranks)))
    drawn = epoch_order(len(train), seed=seed, epoch=0)[: DRAWN * examples]
    part = train.subset(drawn, longest=longest)
    part = replace(part, spec=replace(part.spec, max_length=longest))
    with torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []):
        steps = Stage(
            model,
            objective,
            part,
            part,
            replace(stage, batch_size=examples, accumulate=1, schedule="constant"),
            name=name,
            seed=seed,
            folder=folder,
            fabric=fabric,
            packing=packing,
        )
        most = max(1, int(TIMED_SHARE * budget(stage, len(train), positions, room)[1]))
        _step(steps)  # finds memory, and has loops and kernels compiled
        tokens, seconds = 0, 0.0
        while steps.state.step <= most and seconds < TIMED_SECONDS:
            more, took = _step(steps)
            tokens, seconds = tokens + more, seconds + took
    return tokens / seconds * (flops_at(longest) / flops if longest < whole else 1.0)


def _step(stage: Stage) -> tuple[int, float]:
    """Takes a step; its tokens and its seconds, on which all ranks agree."""
    before, started = stage.state.tokens, time.perf_counter()
    stage.take_step()
    wait_for(stage.fabric.device)
    return stage.state.tokens - before, stage.fabric.broadcast(time.perf_counter() - started)


def forecast(
    name: str,
    stage: StageConfig,
    train: Split,
    val: Split,
    rate: float,
    *,
    passes: int = 1,
    seen: int = 0,
    trials: float = 0.0,
    advice: str,
) -> str:
    """What to say of a stage that trains `rate` tokens a second.

    Args:
        passes: over each batch, in which its positions count.
        seen: tokens that are behind.
        trials: of learning rates, before it, as a share of its budget.
        advice: what to say if it would take more than a day.
    """
    tokens, _ = budget(stage, len(train), passes * int(train.lengths.sum()))
    left = max(0, tokens - seen)
    validations = stage.evaluations * int(val.lengths.sum()) * left / tokens
    seconds = (left + trials * tokens + validations / 3) / rate  # a forward pass is a third of a step
    what = f"{left:,} of {tokens:,} tokens left" if seen else f"{tokens:,} tokens"
    hopeless = f"; {advice}" if seconds > HOPELESS_SECONDS else ""
    return f"{name}: {what}, about {duration(max(1.0, seconds))} at {float(f'{rate:.2g}'):,.0f} tokens/s{hopeless}"
