"""How well causal models give back what they have read: selective copying and multi-query associative recall.

    python benchmarks/recall.py
    python benchmarks/recall.py --models transformer,flash --tasks associative_recall --out recall

Hours on a core. What the folder holds already, of the same options, seed and budget, is not measured again, but where
it did not solve a task the rates it has not tried yet are.

Two layers of width 64 on sequences of 128 steps, never the same one twice. A model is trained until it solves a task,
99.5 % of the answers of 256 fresh sequences, or has used up its tokens, and scored on 1,024 others. All have the same
budget. Where the first learning rate did not solve the task the next is tried, and the best counts.
AdamW, weight decay 0.01, 100 steps of warmup, a cosine to zero over the budget, gradients clipped to norm 1.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as train.py does

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from seqzoo import TaskSpec, after_step, auxiliary_loss
from seqzoo.config import StageConfig, compose
from seqzoo.models import build_model
from seqzoo.runs import provenance
from seqzoo.spec import IGNORED
from seqzoo.tasks.recall import associative_recall, selective_copying
from seqzoo.training.memory import keep_freed_memory
from seqzoo.training.optimizer import build_optimizer, set_lr
from seqzoo.training.schedule import lr_factor

T, BATCH, STEPS = 128, 32, 2500
LEARNING_RATES = (3e-3, 1e-3)
SOLVED = 0.995
CHECK_EVERY = 100  # steps


class Recall(NamedTuple):
    draw: Callable[..., tuple[Tensor, Tensor]]
    vocab_size: int


TASKS = {
    "selective_copying": Recall(partial(selective_copying, num_tokens=16, num_symbols=14), 14 + 2),
    "associative_recall": Recall(partial(associative_recall, num_pairs=8, num_queries=64, num_symbols=16), 2 * 16 + 1),
}

SIZE = ("model.d_model=64", "model.num_layers=2")
# Blocks and chunks of 32 are a quarter of a sequence, so that most answers come from the compressed part. A head of 64
# channels has more of the rotations that tell neighbours apart. FLASH is given positions in the embedding too, without
# which it has nothing to count by. Transformer-VQ is scored over its codes at all times, but learns from exact keys at
# first: over codes from the start it does not find the look-up.
# Gated DeltaNet has one decay for all channels of a head, and starts with memories ten times as long as published.
MODELS: dict[str, tuple[str, ...]] = {
    "transformer": ("model.num_heads=1",),
    "linear_transformer": (),
    "performer": (),
    "vq_transformer": (
        "model.block.block_len=32",
        "model.block.codebook_start=kmeans",
        "model.block.restart=0.5",
        "model.block.exact_steps=1000",
    ),
    "flash": ("model.position=sinusoidal", "model.block.chunk_len=32", "model.block.key_dim=64"),
    "lru": (),
    "s4d": (),
    "conv": (),
    **dict.fromkeys(("retnet", "mamba2", "mamba3", "mamba", "gla", "hgrn2", "mlstm", "rg_lru", "min_gru", "s5"), ()),
    **dict.fromkeys(("delta_net", "kda", "rwkv7"), ()),
    "gated_delta_net": ("model.block.dt_max=0.01",),
}


def asked(model: str) -> list[str]:
    """The options that a model is built with."""
    return [*SIZE, *MODELS[model]]


def learn(
    model: str,
    task: str,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Trains a model of `MODELS` on a task of `TASKS`: the best run, with its "accuracy", and the rates `tried`."""
    runs: list[dict[str, Any]] = []
    for lr in learning_rates:
        runs.append(train(model, task, lr=lr, seed=seed, report=report))
        if runs[-1]["solved"]:
            break
    return {**max(runs, key=lambda run: run["accuracy"]), "tried": [run["lr"] for run in runs]}


def train(model: str, task: str, *, lr: float, seed: int, report: Callable[[str], object]) -> dict[str, Any]:
    """One run: its model, task, options, parameters, lr, seed, steps, tokens, accuracy, seconds and if it `solved`."""
    recall = TASKS[task]
    spec = TaskSpec(name=task, kind="tokens", vocab_size=recall.vocab_size, max_length=T, num_classes=2)
    torch.manual_seed(seed)
    network = build_model(compose([f"model={model}", *asked(model)]).model, spec, head="per_position", causal=True)
    optimizer = build_optimizer(network, StageConfig(lr=lr, weight_decay=0.01))
    fresh, checks, final = (Generator().manual_seed(3 * seed + stream) for stream in range(3))
    start, step, solved = time.perf_counter(), 0, False
    while step < STEPS and not solved:
        network.train()
        set_lr(optimizer, lr_factor(step, total_steps=STEPS, warmup_steps=100, schedule="cosine"))
        tokens, targets = recall.draw(BATCH, length=T, generator=fresh)
        scores = network(tokens, torch.full((BATCH,), T))  # [B, T, vocabulary]
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        (loss + auxiliary_loss(network)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step(network)
        step += 1
        if step % CHECK_EVERY == 0:
            checked = accuracy(network, recall, 256, checks)
            solved = checked >= SOLVED
            report(f"{model:<20}{task:<20}lr {lr:g}  step {step:>5}  loss {loss.item():.3f}  accuracy {checked:.3f}")
    return {
        "model": model,
        "task": task,
        "options": asked(model),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "lr": lr,
        "seed": seed,
        "steps": step,
        "tokens": step * BATCH * T,
        "accuracy": accuracy(network, recall, 1024, final),
        "solved": solved,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def accuracy(network: nn.Module, recall: Recall, n: int, generator: Generator) -> float:
    """The share of right answers on `n` new sequences."""
    network.eval()
    right = asked = 0
    for _ in range(n // BATCH):
        tokens, targets = recall.draw(BATCH, length=T, generator=generator)
        answers = network(tokens, torch.full((BATCH,), T)).argmax(-1)
        right += int((answers == targets).sum())
        asked += int((targets != IGNORED).sum())
    return right / asked


def table(rows: list[dict[str, Any]]) -> str:
    """A line a model and its options, its accuracy and what it took for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [f"| model | parameters | {' | '.join(tasks)} |", "|---|---" + "|---" * len(tasks) + "|"]
    models: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((row["model"], *row["options"]), []).append(row)
    for (model, *chosen), mine in models.items():
        cells = [
            "; ".join(
                f"{100 * row['accuracy']:.1f} % after {row['tokens'] / 1e6:.1f} M tokens, lr {row['lr']:g}"
                for row in mine
                if row["task"] == task
            )
            for task in tasks
        ]
        name = " ".join([model, *(option for option in chosen if option not in SIZE)])
        lines.append(f"| {name} | {mine[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--learning-rates", default=",".join(map(str, LEARNING_RATES)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/recall"))
    options = parser.parse_args()
    chosen = {"models": options.models.split(","), "tasks": options.tasks.split(",")}
    for name, valid in (("models", MODELS), ("tasks", TASKS)):
        if unknown := [given for given in chosen[name] if given not in valid]:
            parser.error(f"--{name}: {', '.join(unknown)} unknown; valid: {', '.join(valid)}")
    rates = [float(rate) for rate in options.learning_rates.split(",")]
    keep_freed_memory()

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "recall.json"
    made = provenance.of_benchmark({"T": T, "batch": BATCH, "steps": STEPS})
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in rows if row["made"]["setting"] == made["setting"]]
    for model in chosen["models"]:
        for task in chosen["tasks"]:
            cell = (model, asked(model), task, options.seed)
            known = [row for row in rows if (row["model"], row["options"], row["task"], row["seed"]) == cell]
            tried = [rate for row in known for rate in row["tried"]]
            left = [rate for rate in rates if rate not in tried and not any(row["solved"] for row in known)]
            if left:
                found = learn(model, task, learning_rates=left, seed=options.seed, report=partial(print, flush=True))
                best = max([{**found, "made": made}, *known], key=lambda row: row["accuracy"])
                rows = [row for row in rows if row not in known] + [{**best, "tried": tried + found["tried"]}]
            rows.sort(key=lambda row: (list(MODELS).index(row["model"]), list(TASKS).index(row["task"]), row["seed"]))
            file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (options.out / "table.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
