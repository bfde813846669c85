"""Steps whose batches, and ranks, ask for different numbers of answers, some of them for none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tiny_runs import tiny_config
from torch import Tensor

from seqzoo.models import build_model
from seqzoo.objectives import build_objective
from seqzoo.runs.parts import build_fabric
from seqzoo.spec import IGNORED
from seqzoo.tasks import Split, Task, from_arrays
from seqzoo.training.loop import Stage

LENGTHS = (1, 17, 3, 1, 1, 2, 9, 1)
CASES = (
    *("class", "positions", "next", "masked", "causal", "masked pixels", "causal pixels", "masked values"),
    *("joint", "joint values", "joint twice"),
)
BLOCKS = {
    "softmax_attention": {"num_heads": 2},
    "vq_attention": {"num_heads": 2, "block_len": 4, "codebook_size": 8, "commitment": 1.0},
}


def uneven_task(case: str, lengths: tuple[int, ...] = LENGTHS) -> Task:
    """A training split of sequences with such lengths, again and again, for one of `CASES`."""
    generator = np.random.default_rng(0)
    kind = "pixels" if case.endswith(("pixels", "values")) else "tokens"
    rows = [lengths[i % len(lengths)] for i in range(64)]
    inputs = [generator.integers(0, 8, (n, 3) if kind == "pixels" else n) for n in rows]
    labels = [i % 2 for i in range(64)]
    others = (inputs[:24], labels[:24])
    task = from_arrays("uneven", kind=kind, inputs=inputs, labels=labels, val=others, test=others)
    if case not in ("positions", "next"):
        return task
    spec = replace(task.spec, answer=case, num_classes=task.spec.vocab_size)

    def asking(split: Split) -> Split:
        places = torch.arange(len(split.values)) - split.offsets[:-1].repeat_interleave(split.lengths)
        answers = torch.where(places % 4 == 1, split.values.long(), IGNORED)
        return replace(split, spec=spec, targets=answers if case == "positions" else None)

    return replace(task, spec=spec, **{name: asking(getattr(task, name)) for name in ("train", "val", "test")})


def uneven_stage(
    case: str, folder: Path, *, block: str = "softmax_attention", packing: bool = False, **changes: int
) -> Stage:
    """A stage on `uneven_task(case)`."""
    task = uneven_task(case)
    name = case.split()[0]
    objective = build_objective(
        name if name in ("masked", "causal", "joint") else "task",
        task.spec,
        pixel_loss="l1" if case.endswith("values") else "cross_entropy",
        passes=2 if case.endswith("twice") else 1,
    )
    config = tiny_config(folder, finetuning=changes, model={"block": {"name": block, **BLOCKS[block]}, "dropout": 0.0})
    torch.manual_seed(0)
    return Stage(
        build_model(config.model, task.spec, head=objective.head, causal=name in ("causal", "next")),
        objective,
        task.train,
        task.val,
        config.finetuning,
        name="finetune",
        seed=0,
        folder=folder,
        fabric=build_fabric(config),
        packing=packing,
    )


def first_step(case: str, folder: Path, **options: object) -> dict[str, Tensor]:
    """The loss, as "loss", and the gradients of a stage's first step. Batches hide the same positions, however cut."""

    def same_in_all_rows(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
        return (0.37 * torch.arange(shape[1]) % 1).expand(shape)

    stage = uneven_stage(case, folder, **options)  # type: ignore[arg-type]
    stage.model.train()
    with patch("seqzoo.objectives.uniform", same_in_all_rows):
        loss = stage.fabric.all_reduce(stage.differentiate(), reduce_op="mean")
    gradients = {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}
    return {"loss": loss, **gradients}
