"""How fast every task's data are made, opened and fed, beside how fast training takes them, on this machine.

    python benchmarks/data.py data_dir=data                              all tasks whose data are there, some minutes
    python benchmarks/data.py data_dir=data char_lm.text=my.txt          with a key of one task
    python benchmarks/data.py --only lra_listops --out results/data      writes data.json and data.md there too

Each task is made in a new cache folder by a process of its own, compiling included, and opened and fed by another. Of
generated tasks, a split has at most `--positions` positions, which cuts those of large pictures only. A batch is what
recipe tiny fine-tunes with; a step is one of that recipe with `--model` on the same task, warm, on the CPU. Memory is
what the process has of its own: that of files it maps is the system's to take back.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as train.py does

import seqzoo
from seqzoo.config import Config, compose
from seqzoo.runs import provenance
from seqzoo.tasks import TASKS, MissingData, Task, build_task, epoch_order
from seqzoo.tasks.config import COUNTS
from seqzoo.tasks.store.cache import origin

OPENINGS = 5
FEEDING_SECONDS = 2.0
COLUMNS = {
    "task": "{task}",
    "examples": "{examples:,}",
    "MB": "{megabytes:,.1f}",
    "made in s": "{build_seconds:.1f}",
    "examples/s": "{built_per_second:,.0f}",
    "peak MB": "{build_peak_mb:,.0f}",
    "opened in ms": "{open_ms:.1f}",
    "batch": "{batch_size}",
    "batches/s": "{batches_per_second:,.0f}",
    "steps/s": "{steps_per_second:.2f}",
    "times": "{times_enough:,.0f}",
    "memory MB": "{memory_mb:,.1f}",
}


def configured(name: str, options: argparse.Namespace, cache_dir: str) -> Config:
    """Recipe tiny on the whole task, cut where it is generated and larger than was asked for."""
    own = [f"task.{key.removeprefix(name + '.')}" for key in options.overrides if key.startswith(f"{name}.")]
    common = [key for key in options.overrides if key.startswith("data_dir=")]
    names = [f"task={name}", f"model={options.model}", "recipe=tiny", "device=cpu", "wandb.mode=disabled"]
    config = compose([*names, *common, *own])
    config.task = compose([f"task={name}", *own]).task
    most = max(1, options.positions // config.task.max_length)
    for key in COUNTS.values():
        if (given := getattr(config.task, key)) is not None:
            setattr(config.task, key, min(given, most))
    config.cache_dir = cache_dir
    return config


def make(config: Config) -> dict[str, Any]:
    """Seconds to make a task from nothing, its size, and the most memory that took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    task = build_task(config.task, data_dir=config.data_dir, cache_dir=config.cache_dir)
    seconds = time.perf_counter() - start
    examples = sum(map(len, (task.train, task.val, task.test)))
    source, size = origin(task.folder)
    return {
        "source": source,
        "note": task.note,
        "examples": examples,
        "megabytes": size / 1e6,
        "build_seconds": seconds,
        "built_per_second": examples / seconds,
        "build_peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def feed(config: Config) -> dict[str, Any]:
    """Milliseconds to open a task that is there, batches a second it gives, steps a second that take them, memory."""
    before = own_memory()
    openings = []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        task = build_task(config.task, data_dir=config.data_dir, cache_dir=config.cache_dir)
        openings.append(1e3 * (time.perf_counter() - start))
    batch_size = min(config.finetuning.batch_size, len(task.train))
    order = epoch_order(len(task.train), seed=0, epoch=0)
    fed, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < FEEDING_SECONDS:
        at = fed * batch_size % (len(order) - batch_size + 1)
        task.train.batch(order[at : at + batch_size])
        fed += 1
    memory = own_memory() - before
    steps_per_second = train(config, task, batch_size)
    return {
        "open_ms": statistics.median(openings),
        "batch_size": batch_size,
        "batches_per_second": fed / spent,
        "steps_per_second": steps_per_second,
        "times_enough": fed / spent / steps_per_second,
        "memory_mb": memory,
    }


def train(config: Config, task: Task, batch_size: int, steps: int = 8) -> float:
    """Steps a second of fine-tuning, in the second of two short runs: the first compiles."""
    step = batch_size * task.train.mean_length * task.spec.num_inputs
    config.finetuning.batch_size = batch_size
    config.finetuning.tokens, config.finetuning.epochs = int(steps * step), None
    config.finetuning.evaluations = 1
    config.n_val = config.n_test = min(batch_size, len(task.val), len(task.test))
    tokens_per_second = 0.0
    for seed in range(2):
        with tempfile.TemporaryDirectory() as runs:
            config.runs_dir, config.seed = runs, seed
            tokens_per_second = seqzoo.run(config, task=task)["tokens_per_second"]["finetune"]
    return tokens_per_second / step


def own_memory() -> float:
    """Megabytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def apart(call: Callable[[Config], dict[str, Any]], config: Config) -> dict[str, Any]:
    """What `call` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(call, config).result()


def to_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [tuple(COLUMNS), ("---", *["---:"] * (len(COLUMNS) - 1))]
    lines += [tuple(cell.format(**row) for cell in COLUMNS.values()) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data_dir=..., or <task>.<key>=...")
    parser.add_argument("--only", help="tasks, with commas between; all unless given")
    parser.add_argument("--model", default="lru")
    parser.add_argument("--positions", type=int, default=200_000_000, help="of a generated split, at most")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_intermixed_args()

    rows: list[dict[str, Any]] = []
    for name in options.only.split(",") if options.only else TASKS:
        with tempfile.TemporaryDirectory() as cache_dir:
            try:
                config = configured(name, options, cache_dir)
                row = {"task": name, **apart(make, config), **apart(feed, config)}
            except (MissingData, ValueError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
        rows.append(row)
        print(", ".join(f"{column} {cell.format(**row)}" for column, cell in COLUMNS.items()), flush=True)
    print("\n" + to_markdown(rows), end="")
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"model": options.model, "positions": options.positions, "openings": OPENINGS}
    record = {**provenance.of_benchmark(setting), "rows": rows}
    (options.out / "data.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "data.md").write_text(to_markdown(rows))


if __name__ == "__main__":
    main()
