"""A training step on this machine: its time, tokens a second, model-flops utilisation, and the model's share of it.

    python benchmarks/step.py                      on a GPU: all models at recipe short, in every form; many minutes
                                                   on a CPU: recipes tiny and paper, two models; some ten minutes
    python benchmarks/step.py --recipes tiny       a minute on a CPU
    python benchmarks/step.py --out results/step   writes step.json there too
    python benchmarks/step.py --against ../other --out results/step
                                                   also what another checkout does in fp32, in turns, cell by cell, and
                                                   against.json and against.md; leave it two idle cores, some two hours

Stages run as `train.py` runs them, on random sequences of full length: what a batch holds does not change what it
costs. A form is a precision and how the model runs: eager, compiled as `compile=true` does it, or compiled in one of
`torch.compile`'s modes. A form that fails is a line that says so.

The model's time is its forward pass and its backward pass, from the gradient of its output to the last gradient of a
parameter, by the device's own clock; feeding data, loss, clipping, checks and metrics are the rest. On a CPU a metrics
line is written after every step, as often as in the shortest of runs. There, recipe paper takes `--paper-batch`
examples, so that all but the model weighs more than in training. Where other work shares the cores, OMP_NUM_THREADS=1:
threads that wait for each other count too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqzoo.config import Config, available, compose, to_dict
from seqzoo.models import build_model
from seqzoo.models.size import flops_per_token
from seqzoo.objectives import Measure, Objective, build_objective
from seqzoo.runs import provenance
from seqzoo.runs.parts import build_fabric
from seqzoo.spec import Batch
from seqzoo.tasks import Task, from_arrays
from seqzoo.training.compilation import compile_model
from seqzoo.training.loop import READ_EVERY, Stage
from seqzoo.training.memory import keep_freed_memory
from seqzoo.training.tracker import Tracker

WARMUP = 3  # steps, in which kernels are compiled and memory is first touched
IDS = {"lra_listops": 16, "lra_text": 200, "lra_retrieval": 200}  # tasks of tokens; the others are of pixels
MODES = ("reduce-overhead", "max-autotune-no-cudagraphs")
FORMS = {"cpu": "fp32-eager", "cuda": "fp32-eager,fp32-compiled,bf16-eager,bf16-compiled,bf16-reduce-overhead"}
DEFAULTS = {
    "cpu": {"models": "lru,linear_transformer", "tasks": "lra_image", "recipes": "tiny,paper"},
    "cuda": {"models": ",".join(available("model")), "tasks": "lra_image,lra_text", "recipes": "short"},
}


class Stopwatch:
    """Adds up seconds by part, on a GPU those between events in its queue, which nobody has to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, part: str, start: Any) -> None:
        self.spans[part].append((start, self.now()))

    def seconds(self, part: str) -> float:
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in self.spans[part]) / 1e3
        return sum(end - start for start, end in self.spans[part])


class TimedObjective(Objective):
    """An objective that notes when its model begins and ends, and when the gradient of its output is there."""

    def __init__(self, objective: Objective, watch: Stopwatch) -> None:
        self.objective, self.watch = objective, watch
        self.head, self.monitor, self.maximise = objective.head, objective.monitor, objective.maximise
        self.nothing, self.asked = objective.nothing, objective.asked

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        def timed(*inputs: Tensor) -> Tensor:
            start = self.watch.now()
            output = model(*inputs)
            if output.requires_grad:
                self.watch.add("forward", start)
                output.register_hook(lambda _: self.begin_backward())
            return output

        return self.objective(timed, batch, seed=seed)  # type: ignore[arg-type]

    def begin_backward(self) -> None:
        self.began = self.watch.now()


class TimedStage(Stage):
    """A stage that measures its steps after `WARMUP`, and the model and the optimiser in them."""

    def __init__(self, model: nn.Module, objective: Objective, *args: Any, fabric: Any, **kwargs: Any) -> None:
        self.watch = Stopwatch(fabric.device)
        self.timed_objective = TimedObjective(objective, self.watch)
        super().__init__(model, self.timed_objective, *args, fabric=fabric, **kwargs)
        self.log_every = READ_EVERY if self.watch.on_gpu else 1
        self.saves.due = lambda: False
        self.optimizer.optimizer.register_step_pre_hook(lambda *_: self.begin_optimiser())
        self.optimizer.optimizer.register_step_post_hook(lambda *_: self.watch.add("optimiser", self.optimising))

    def begin_optimiser(self) -> None:
        self.optimising = self.watch.now()

    def differentiate(self) -> Tensor:
        loss = super().differentiate()
        self.watch.add("backward", self.timed_objective.began)
        return loss

    def take_step(self) -> None:
        if self.state.step == WARMUP:
            self.wait()
            self.watch.spans.clear()
            self.began = time.perf_counter()
        super().take_step()

    def validate(self) -> dict[str, float]:
        self.wait()
        self.wall = time.perf_counter() - self.began
        return super().validate()


def measure(config: Config, task: Task, name: str, form: str, steps: int) -> dict[str, float | None]:
    """Milliseconds of a step of stage `name` and of its parts, means over `steps` steps; the model's share, tokens a
    second, and the utilisation that they come to."""
    pretrain = name == "pretrain"
    objective = build_objective(config.objective if pretrain else "task", task.spec, pixel_loss=config.pixel_loss)
    stage = config.pretraining if pretrain else config.finetuning
    tokens_per_step = stage.batch_size * stage.accumulate * task.spec.max_length * task.spec.num_inputs
    torch.manual_seed(config.seed)
    model = build_model(config.model, task.spec, head=objective.head, causal=config.causal)
    if form != "eager":
        compile_model(model)
    if form in MODES:
        model.compile(dynamic=False, mode=form)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedStage(
            model,
            objective,
            task.train,
            task.val,
            replace(stage, tokens=(WARMUP + steps) * tokens_per_step, epochs=None, evaluations=1),
            name=name,
            seed=config.seed,
            folder=Path(folder),
            fabric=build_fabric(config),
            tracker=Tracker(Path(folder), to_dict(config), group=""),
            flops_per_token=flops_per_token(config.model, task.spec, causal=config.causal, head=objective.head),
        )
        trainer.run()
    ms = {part: 1e3 * trainer.watch.seconds(part) / steps for part in ("forward", "backward", "optimiser")}
    step = 1e3 * trainer.wall / steps
    busy = ms["forward"] + ms["backward"]
    speed = 1e3 * tokens_per_step / step
    return {
        "step": step,
        **ms,
        "rest": step - busy - ms["optimiser"],
        "model_share": busy / step,
        "tokens_per_second": speed,
        "mfu": trainer.utilisation(speed),
    }


def random_task(config: Config, n: int) -> Task:
    """What the configuration's task is to a model, drawn at random: ids or grey pixels, ten classes, full length."""
    name, T = config.task.name, config.task.max_length
    num_inputs = 2 if name == "lra_retrieval" else 1
    drawn = np.random.default_rng(0).integers(0, IDS.get(name, 256), (n, *((2,) if num_inputs == 2 else ()), T))
    inputs, labels = list(drawn), [i % 10 for i in range(n)]
    return from_arrays(
        name,
        kind="tokens" if name in IDS else "pixels",
        inputs=inputs,
        labels=labels,
        val=(inputs[:10], labels[:10]),
        test=(inputs[:10], labels[:10]),
        num_inputs=num_inputs,
        mask_ratio=config.task.mask_ratio,
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in DEFAULTS[device].items():
        parser.add_argument(f"--{option}", default=default)
    parser.add_argument("--forms", default=FORMS[device])
    parser.add_argument("--steps", type=int, default=10 if device == "cpu" else 48)
    parser.add_argument("--paper-batch", type=int, default=8)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=3, help="with --against")
    options = parser.parse_args()
    if options.against:
        against(options)
        return
    keep_freed_memory()

    rows: list[dict[str, Any]] = []
    choices = (options.recipes, options.tasks, options.models, options.forms, "pretrain,finetune")
    for recipe, task_name, model, form, name in itertools.product(*(choice.split(",") for choice in choices)):
        precision, _, way = form.partition("-")
        changes = ["wandb.mode=disabled", f"precision={precision}", *options.set]
        if recipe == "paper" and device == "cpu":
            changes += [f"{stage}.batch_size={options.paper_batch}" for stage in ("pretraining", "finetuning")]
        config = compose([f"model={model}", f"task={task_name}", f"recipe={recipe}", *changes])
        batch_size = (config.pretraining if name == "pretrain" else config.finetuning).batch_size
        setting = {"recipe": recipe, "task": task_name, "model": model, "form": form, "stage": name}
        row: dict[str, Any] = {**setting, "batch": batch_size}
        try:
            row |= measure(config, random_task(config, 100), name, way, options.steps)
        except Exception as error:  # such as memory that is not enough: the other forms still count
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        rows.append(row)
        print(line(row), flush=True)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    measured = {"steps": options.steps, "unit": "ms, mean of a step"}
    record = {**provenance.of_benchmark(measured), **provenance.made_with(torch.device(device), 1), "rows": rows}
    (options.out / "step.json").write_text(json.dumps(record, indent=1) + "\n")


def against(options: argparse.Namespace) -> None:
    """Measures this checkout in all forms and the other in fp32, in turns: a process each, `rounds` times a cell."""
    here, other = Path(__file__).resolve().parents[1], options.against.resolve()
    forms = options.forms.split(",")
    rows = []
    for recipe, task, model in itertools.product(
        *(x.split(",") for x in (options.recipes, options.tasks, options.models))
    ):
        cell = ["--recipes", recipe, "--tasks", task, "--models", model, "--steps", str(options.steps)]
        speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))  # by stage and form
        for _ in range(options.rounds):
            for row in measured_by(other, [*cell, "--forms", "fp32-eager"]):
                speeds[row["stage"]]["other"].append(row["tokens_per_second"])
            for form in forms:
                for row in measured_by(here, [*cell, "--forms", form, "--set", *options.set]):
                    speeds[row["stage"]][form].append(row["tokens_per_second"])
        for stage, found in speeds.items():
            ratios = {
                form: statistics.median(a / b for a, b in zip(found[form], found["other"], strict=True))
                for form in forms
            }
            row = {"recipe": recipe, "task": task, "model": model, "stage": stage}
            rows.append({**row, "tokens_per_second": dict(found), "ratio": ratios})
            print(json.dumps({**row, "ratio": ratios}), flush=True)
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=other, capture_output=True, text=True, check=True)
    setting = {"steps": options.steps, "rounds": options.rounds, "set": options.set, "other": revision.stdout.strip()}
    table = against_table(rows, forms, setting["other"])
    print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {**provenance.of_benchmark(setting), "rows": rows}
        (options.out / "against.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.out / "against.md").write_text(table)


def measured_by(checkout: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows that a checkout's own benchmark measures.

    Raises:
        SystemExit: a form failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "benchmarks/step.py", *arguments, "--out", folder]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads((Path(folder) / "step.json").read_text())["rows"]
    failed = [line(row) for row in rows if "error" in row]
    if failed:
        sys.exit("\n".join([f"in {checkout}:", *failed]))
    return rows


def against_table(rows: list[dict[str, Any]], forms: list[str], other: str) -> str:
    """Thousand positions a second of both, and how many times as many, with the geometric mean over all rows."""
    head = ["model", "task", "stage", f"{other[:7]}, fp32", *forms]
    lines = [head, ["---"] * 3 + ["---:"] * (len(forms) + 1)]
    for row in rows:
        best = {form: max(speeds) / 1e3 for form, speeds in row["tokens_per_second"].items()}
        cells = [f"{best[form]:.1f} ({row['ratio'][form]:.2f} x)" for form in forms]
        lines.append([row["model"], row["task"], row["stage"], f"{best['other']:.1f}", *cells])
    means = [f"{statistics.geometric_mean(row['ratio'][form] for row in rows):.2f} x" for form in forms]
    lines.append(["geometric mean", "", "", "", *means])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def line(row: dict[str, Any]) -> str:
    head = f"{row['recipe']:<6}{row['task']:<16}{row['model']:<20}{row['form']:<21}{row['stage']:<9}"
    head += f"batch {row['batch']:<3}"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head}{row['step']:>9.1f} ms a step: forward {row['forward']:.1f}, backward {row['backward']:.1f}, optimiser "
        f"{row['optimiser']:.1f}, rest {row['rest']:.1f}; model {row['model_share']:.1%}; "
        f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}"
    )


if __name__ == "__main__":
    main()
