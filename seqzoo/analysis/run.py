"""The mixing of a finished run's model: as its seed made it, after pretraining, after fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from ..config import ConfigError
from ..models import SequenceModel
from ..runs import load
from ..runs.folder import checked_task, read_config, read_spec, require_weights
from ..spec import Batch
from ..tasks import Task, build_task, stratified
from .mixing import WINDOW, LayerMixing, mixing_report

SCHEMA = 1
LONGEST = 4096  # positions; a matrix of more is too much for an ordinary machine
EXAMPLES_SEED = 0


@dataclass(frozen=True, kw_only=True)
class RunMixing:
    """What `analyse_run` finds."""

    run: str  # the folder's name
    model: str
    task: str
    causal: bool
    seed: int
    examples: list[int]  # indices in the test set
    lengths: list[int]  # of their sequences, in positions
    stages: dict[str, list[LayerMixing]]  # "initial", "pretrain" unless trained from scratch, "finetune"; a layer each

    def to_json(self) -> dict[str, Any]:
        """All of it but the pictures, NaN as null."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        stages = {stage: [_plain(layer) for layer in layers] for stage, layers in self.stages.items()}
        return {"schema": SCHEMA, **found, "window": WINDOW, "stages": stages}


def analyse_run(
    run_folder: str | Path,
    *,
    n: int = 8,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    task: Task | None = None,
) -> RunMixing:
    """`mixing_report` of a run's model after each of its stages, on the same `n` examples of the test set.

    Args:
        run_folder: a finished run's folder.
        n: examples; each class as frequent as in the whole test set.
        data_dir: where the data are now, if not where the run found them.
        cache_dir: where prepared data are kept; None takes the user's cache folder. The run's own is only read.
        task: the data, for a run on a task of the user's own.

    Raises:
        ConfigError: `run_folder` is no folder of a finished run, or needs `task`, or got another one; there are fewer
            than `n` test examples; or one has more than 4,096 positions.
        DataError: the data are missing or damaged.
        TrainingError: the run's weights are missing or damaged.
    """
    folder = Path(run_folder)
    require_weights(folder)
    config, spec = read_config(folder), read_spec(folder)
    if not (folder / "result.json").exists():
        raise ConfigError(
            f"{folder} is unfinished: it has no result.json; python train.py resume={folder} continues it"
        )

    def build() -> Task:
        where = data_dir or config.data_dir
        return build_task(config.task, data_dir=where, cache_dir=cache_dir, filled=config.cache_dir)

    task = checked_task(folder, config, task, build)
    if not 1 <= n <= len(task.test):
        raise ConfigError(f"n={n}: valid: 1 to {len(task.test)}, the test examples of {spec.name}")
    index = stratified(task.test.labels, n, EXAMPLES_SEED)
    batch = task.test.batch(index)
    lengths = batch.lengths.flatten().tolist()
    if max(lengths) > LONGEST:
        raise ConfigError(f"{spec.name} has examples of {max(lengths)} positions; valid: tasks of up to {LONGEST}")
    stages = ["initial", *(["pretrain"] if config.pretrain else []), "finetune"]
    return RunMixing(
        run=folder.resolve().name,
        model=config.model.name,
        task=spec.name,
        causal=config.causal,
        seed=config.seed,
        examples=index.tolist(),
        lengths=lengths,
        stages={stage: _report(folder, stage, batch) for stage in stages},
    )


def _report(folder: Path, stage: str, batch: Batch) -> list[LayerMixing]:
    return mixing_report(cast(SequenceModel, load(folder, stage)), batch)


def _plain(layer: LayerMixing) -> dict[str, Any]:
    values = {field.name: getattr(layer, field.name) for field in fields(layer) if field.name != "picture"}
    return {
        name: [None if math.isnan(x) else float(f"{x:.6g}") for x in value] if isinstance(value, list) else value
        for name, value in values.items()
    }
