"""A task and configurations small enough to train in a second, and waiting for them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.config import Config, StageConfig, WandbConfig
from seqzoo.models import ModelConfig
from seqzoo.tasks import Task, TaskConfig, from_arrays
from seqzoo.training import TrainingError
from seqzoo.training.loop import Stage


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For a conftest to import: sharing operations this small between threads takes longer than doing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def task() -> Task:
    """For a conftest to import."""
    return toy_task()


@contextmanager
def failing_at_the_last_validation() -> Iterator[None]:
    """Within it no stage comes to its end."""
    validate = Stage.validate

    def fail_at_last(stage: Stage) -> dict[str, float]:
        if stage.state.step == stage.total_steps:
            raise TrainingError("out of luck")
        return validate(stage)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stage, "validate", fail_at_last)
        yield


def toy_task(n: int = 120, seed: int = 0) -> Task:
    """Sequences of 5 to 16 ids out of 4; the class says whether id 3 is frequent."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    inputs = []
    for label in labels:
        length = generator.integers(5, 17)
        frequent = generator.random(length) < (0.8 if label else 0.2)
        inputs.append(np.where(frequent, 3, generator.integers(0, 3, length)))
    return from_arrays("toy", kind="tokens", inputs=inputs, labels=labels.tolist(), val_fraction=0.2, test_fraction=0.2)


def tiny_config(runs_dir: Any, **changes: Any) -> Config:
    """One layer of attention, width 16; `changes` are top-level keys, or `finetuning={...}` of a stage."""
    stages = {}
    for name in ("pretraining", "finetuning"):
        options: dict[str, Any] = {"batch_size": 8, "lr": 5e-3, "clip": 1.0, "evaluations": 3, **changes.pop(name, {})}
        if "epochs" not in options:
            options.setdefault("tokens", 2400)
        stages[name] = StageConfig(**options)
    model = {
        "name": "transformer",
        "d_model": 16,
        "num_layers": 1,
        "block": {"name": "softmax_attention", "num_heads": 2},
        "mlp_ratio": 1.0,
        "dropout": 0.1,
    }
    return Config(
        model=ModelConfig(**{**model, **changes.pop("model", {})}),  # type: ignore[arg-type]
        task=TaskConfig(name="lra_text", max_length=16, mask_ratio=0.15),
        recipe="tiny",
        runs_dir=str(runs_dir),
        device="cpu",
        wandb=WandbConfig(mode=changes.pop("wandb_mode", "disabled")),
        **stages,
        **changes,
    )


def wait_for_training(process: subprocess.Popen[Any], runs_dir: Path) -> None:
    """Returns once a run in `runs_dir` has logged something new, or `process` has ended."""

    def logged() -> int:
        return sum(len(path.read_text().splitlines()) for path in runs_dir.glob("*/metrics.jsonl"))

    before = logged()
    while process.poll() is None and logged() == before:
        time.sleep(0.01)
