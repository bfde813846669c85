"""How much of a training step is spent inside the model, at the sizes of the Image task, on this machine.

    python benchmarks/step.py                      some ten minutes on two CPU cores: recipes tiny and paper, two models
    python benchmarks/step.py --recipes tiny       a minute
    python benchmarks/step.py --out results/step   writes step.json there too

Stages run as `train.py` runs them, on random images of 1,024 pixels: what a batch holds does not change what it costs.
A metrics line is written after every step, as often as in the shortest of runs. The model's time is its forward pass
and its backward pass, from the gradient of its output to the last gradient of a parameter; feeding data, loss,
clipping, checks and metrics are the rest. Recipe paper takes `--paper-batch` examples, so that all but the model weighs
more than in training. Where other work shares the cores, OMP_NUM_THREADS=1: threads that wait for each other count too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqzoo.config import Config, compose, to_dict
from seqzoo.models import build_model
from seqzoo.objectives import build_objective
from seqzoo.tasks import Task, from_arrays
from seqzoo.training import provenance
from seqzoo.training.loop import Stage
from seqzoo.training.memory import keep_freed_memory
from seqzoo.training.run import build_fabric
from seqzoo.training.tracker import Tracker

WARMUP = 3  # steps, in which kernels are compiled and memory is first touched


class TimedStage(Stage):
    """A stage that adds up the seconds of its steps after `WARMUP`, and of the model and the optimiser in them."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        super().__init__(model, *args, **kwargs)
        model.register_forward_pre_hook(lambda *_: self.begin())
        model.register_forward_hook(lambda _, __, output: self.end_forward(output))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: self.note_gradient())
        self.optimizer.optimizer.register_step_pre_hook(lambda *_: self.begin())
        self.optimizer.optimizer.register_step_post_hook(lambda *_: self.end("optimiser"))

    def begin(self) -> None:
        self.began = self.noted = time.perf_counter()

    def end(self, part: str) -> None:
        self.seconds[part] += time.perf_counter() - self.began

    def end_forward(self, output: Tensor) -> None:
        self.end("forward")
        if output.requires_grad:
            output.register_hook(lambda _: self.begin())

    def note_gradient(self) -> None:
        now = time.perf_counter()
        self.seconds["backward"] += now - self.noted
        self.noted = now

    def take_step(self) -> bool:
        if self.state.step == WARMUP:
            self.seconds.clear()
        start = time.perf_counter()
        interrupted = super().take_step()
        self.seconds["step"] += time.perf_counter() - start
        return interrupted

    def log_training(self) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().log_training()
        self.seconds["step"] += time.perf_counter() - start
        return metrics

    def validate(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, defaultdict(float)  # its forward passes are no part of a step
        metrics = super().validate()
        self.seconds = seconds
        return metrics


def measure(config: Config, task: Task, name: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step of stage `name` and of its parts, means over `steps` steps, and the model's share."""
    pretrain = name == "pretrain"
    objective_name = config.objective if pretrain else "task"
    objective = build_objective(objective_name, task.spec, pixel_loss=config.pixel_loss)
    stage = config.pretraining if pretrain else config.finetuning
    tokens = (WARMUP + steps) * stage.batch_size * task.spec.max_length
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedStage(
            build_model(config.model, task.spec, head=objective.head, causal=config.causal),
            objective,
            task.train,
            task.val,
            replace(stage, tokens=tokens, epochs=None, evaluations=1),
            name=name,
            seed=config.seed,
            folder=Path(folder),
            fabric=build_fabric(config),
            tracker=Tracker(Path(folder), to_dict(config), group="", wandb=config.wandb),
        )
        trainer.run()
    ms = {part: 1e3 * seconds / steps for part, seconds in trainer.seconds.items()}
    model = ms["forward"] + ms["backward"]
    return {**ms, "rest": ms["step"] - model - ms["optimiser"], "model_share": model / ms["step"]}


def random_images(n: int) -> Task:
    """What the Image task is to a model, 1,024 grey pixels and ten classes, drawn at random."""
    images, labels = list(np.random.default_rng(0).integers(0, 256, (n, 1024))), [i % 10 for i in range(n)]
    examples = (images[:10], labels[:10])
    return from_arrays(
        "image", kind="pixels", inputs=images, labels=labels, val=examples, test=examples, mask_ratio=0.5
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="lru,linear_transformer")
    parser.add_argument("--recipes", default="tiny,paper")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--paper-batch", type=int, default=8)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    keep_freed_memory()
    task = random_images(100)

    rows: list[dict[str, Any]] = []
    for recipe in options.recipes.split(","):
        for model in options.models.split(","):
            batch = [f"{stage}.batch_size={options.paper_batch}" for stage in ("pretraining", "finetuning")]
            config = compose(
                [f"model={model}", "task=lra_image", f"recipe={recipe}", "device=cpu", "wandb.mode=disabled"]
                + (batch if recipe == "paper" else [])
            )
            for stage in ("pretrain", "finetune"):
                ms = measure(config, task, stage, options.steps)
                batch_size = (config.pretraining if stage == "pretrain" else config.finetuning).batch_size
                rows.append({"recipe": recipe, "model": model, "stage": stage, "batch": batch_size, **ms})
                print(
                    f"{recipe:<6}{model:<20}{stage:<9} batch {batch_size:<3}{ms['step']:>9.1f} ms a step: forward "
                    f"{ms['forward']:.1f}, backward {ms['backward']:.1f}, optimiser {ms['optimiser']:.1f}, "
                    f"rest {ms['rest']:.1f}; model {ms['model_share']:.1%}",
                    flush=True,
                )
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"T": 1024, "dtype": "float32", "steps": options.steps, "unit": "ms, mean of a step"}
    record = {**provenance.of_benchmark(setting), "rows": rows}
    (options.out / "step.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
