"""Positions a second of training, padding not counted: packed, padded, and padded with rows of similar length.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --data-dir <unpacked data> --out results/packing

Stages run as `train.py` runs them, at recipe=small, in batches of `--rows` rows or of as many positions as those could
have, on examples of real lengths. Packed is `packing=true`. Padded is without. Sorted is what packing has to beat: the
rows of `POOL` batches that follow each other, sorted by length and cut into batches again, so that those of a batch are
about equally long. The three take their steps in turns; of each, the median of `--rounds` rounds of `--steps` steps
counts. Rows are padded to the smallest of five shares of the longest that holds them, see `seqzoo.tasks.data`. All
of it takes about half an hour on a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.config import Config, compose
from seqzoo.draws import uniform
from seqzoo.files import write_text
from seqzoo.models import build_model
from seqzoo.objectives import build_objective
from seqzoo.runs import provenance
from seqzoo.runs.parts import build_fabric
from seqzoo.tasks import Task, build_task
from seqzoo.training.loop import Stage
from seqzoo.training.memory import keep_freed_memory
from seqzoo.training.order import Order

MODELS = "linear_transformer,lru,vq_transformer"
TASKS = "lra_text:4096,lra_text:1024,lra_listops:2048"  # and the longest that a sequence may be
WAYS = ("packed", "padded", "sorted")
POOL = 32  # batches
GENERATED = ("task.num_train=4000", "task.num_val=100", "task.num_test=100")  # of ListOps


class Sorted(Order):
    """Batches of rows of similar length: of every `POOL` batches the rows are sorted, and the new ones shuffled."""

    def __init__(self, lengths: Tensor, *, seed: int, rows: int) -> None:
        super().__init__(lengths, seed=seed)
        self.rows = rows

    def examples(self, start: int, count: int) -> Tensor:
        pool, batch = divmod(start // self.rows, POOL)
        among = super().examples(pool * POOL * self.rows, POOL * self.rows)
        among = among[self.lengths[among].argsort(stable=True)].view(POOL, self.rows)
        shuffled = uniform((POOL,), self.seed + pool, among.device).argsort()
        return among[shuffled[batch]]


def stage_of(config: Config, task: Task, objective: str, way: str, folder: Path) -> Stage:
    """A stage that takes its steps in one of `WAYS`."""
    goal = build_objective(objective, task.spec)
    torch.manual_seed(0)
    stage = Stage(
        build_model(config.model, task.spec, head=goal.head, causal=False),
        goal,
        task.train,
        task.val,
        config.finetuning,
        name="finetune",
        seed=0,
        folder=folder / way,
        fabric=build_fabric(config),
        packing=way == "packed",
    )
    if way == "sorted":
        stage.order = Sorted(stage.lengths, seed=0, rows=config.finetuning.batch_size)
    return stage


def measure(config: Config, task: Task, objective: str, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Of each way: real positions a second, the share of all that they are, and positions of a step."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    real, all_of_them = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0)
    with tempfile.TemporaryDirectory() as folder:
        stages = {way: stage_of(config, task, objective, way, Path(folder)) for way in WAYS}
        for stage in stages.values():
            stage.take_step()  # compiles, and finds memory
        for _, (way, stage) in itertools.product(range(rounds), stages.items()):
            before, started = stage.state.tokens, time.perf_counter()
            for _ in range(steps):
                stage.take_step()
            rates[way].append((stage.state.tokens - before) / (time.perf_counter() - started))
        for way, stage in stages.items():
            for step in range(1, 1 + rounds * steps):
                stage.state.step = step
                batch = stage.micro_batches()[0].batch
                real[way] += int(batch.lengths.sum())
                all_of_them[way] += batch.inputs[..., 0].numel() if task.spec.kind == "pixels" else batch.inputs.numel()
    return {
        way: {
            "positions_per_second": statistics.median(rates[way]),
            "best": max(rates[way]),
            "real_share": real[way] / all_of_them[way],
            "positions_per_step": real[way] / (rounds * steps),
        }
        for way in WAYS
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Thousand real positions a second, and how many times as many as padded; the share of positions that are real."""
    head = ["model", "task", "longest", "objective", *WAYS, "packed over padded", "over sorted"]
    lines = [head, ["---", "---", "---:", "---", *["---:"] * 5]]
    for row in rows:
        rate = {way: row[way]["positions_per_second"] for way in WAYS}
        cells = [f"{rate[way] / 1e3:.1f} ({row[way]['real_share']:.0%})" for way in WAYS]
        times = [f"{rate['packed'] / rate[way]:.2f} x" for way in ("padded", "sorted")]
        lines.append([row["model"], row["task"], f"{row['longest']:,}", row["objective"], *cells, *times])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.5 + 1.1 * len(rows), 4.5), layout="constrained")
    for number, way in enumerate(WAYS):
        heights = [row[way]["positions_per_second"] / 1e3 for row in rows]
        axes.bar([place + 0.27 * (number - 1) for place in range(len(rows))], heights, 0.25, label=way)
    names = [
        f"{row['model']}\n{row['task'].removeprefix('lra_')} {row['longest']:,}\n{row['objective']}" for row in rows
    ]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_ylabel("thousand real positions a second")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--tasks", default=TASKS, metavar="TASK:LONGEST,...")
    parser.add_argument("--objectives", default="task,masked")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--data-dir", metavar="FOLDER")
    parser.add_argument("--cache-dir", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for asked in options.tasks.split(","):
        name, _, longest = asked.partition(":")
        for model in options.models.split(","):
            changes = [f"model={model}", f"task={name}", "recipe=small", f"task.max_length={longest}"]
            changes += [f"finetuning.batch_size={options.rows}", "finetuning.tokens=1000000000", "wandb.mode=disabled"]
            config = compose([*changes, *(GENERATED if name == "lra_listops" else ())])
            task = build_task(config.task, data_dir=options.data_dir, cache_dir=options.cache_dir)
            for objective in options.objectives.split(","):
                found = measure(config, task, objective, options.rounds, options.steps)
                rows.append({"model": model, "task": name, "longest": int(longest), "objective": objective, **found})
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"recipe": "small", "rows": options.rows, "rounds": options.rounds, "steps": options.steps, "pool": POOL}
    record = {**provenance.of_benchmark(setting), "rows": rows}
    write_text(options.out / "packing.json", json.dumps(record, indent=1) + "\n")
    plot(rows, options.out / "packing.png")


if __name__ == "__main__":
    main()
