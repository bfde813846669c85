"""The tables of searches for learning rates, from run folders: what each trial reached on validation.

    python train.py -m model=transformer,lru task=lra_text recipe=tiny pretrain=false,true lr=search search.share=1
    python benchmarks/rates.py runs --out results/rates

A row is a model on a task, a stage and whether it follows pretraining; a column is a rate. The best is bold. Trials
of pretraining are told by their loss in nats, those of the task in per cent.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from seqzoo.runs import provenance
from seqzoo.runs.folder import read_config


def found(runs: Path) -> list[dict[str, Any]]:
    """A row for each search in the run folders below `runs`."""
    rows = []
    for search in sorted(runs.glob("*/*/search")):
        folder, stage = search.parents[1], search.parent.name
        config = read_config(folder)
        trials = [json.loads(path.read_text()) for path in search.glob("lr-*/summary.json")]
        after = "" if stage == "pretrain" else "after pretraining" if config.pretrain else "from scratch"
        metric = next((key for trial in trials for key in trial if key != "lr"), None)
        if metric is None:
            continue
        scores = {trial["lr"]: trial[metric] for trial in sorted(trials, key=lambda trial: trial["lr"])}
        rows.append(
            {
                **{"model": config.model.name, "task": config.task.name, "recipe": config.recipe, "seed": config.seed},
                **{"stage": stage, "after": after, "share": config.search.share, "metric": metric, "scores": scores},
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, mean over seeds."""
    rates = sorted({rate for row in rows for rate in row["scores"]})
    cells: dict[tuple[str, ...], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for rate, score in row["scores"].items():
            if score is not None:
                cells[row["model"], row["task"], row["stage"], row["after"], row["metric"]][rate].append(score)
    lines = [["model", "task", "stage", *(f"{rate:g}" for rate in rates)], ["---"] * 3 + ["---:"] * len(rates)]
    for (model, task, stage, after, metric), scores in sorted(cells.items()):
        means = {rate: sum(values) / len(values) for rate, values in scores.items()}
        best = (max if metric == "accuracy" else min)(means, key=lambda rate: means[rate])
        shown = {rate: f"{100 * mean:.1f} %" if metric == "accuracy" else f"{mean:.3f}" for rate, mean in means.items()}
        shown[best] = f"**{shown[best]}**"
        lines.append([model, task, f"{stage} {after}".strip(), *(shown.get(rate, "") for rate in rates)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    rows = [row for runs in options.runs for row in found(runs)]
    text = table(rows)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {**provenance.of_benchmark({}), "rows": rows}
        (options.out / "rates.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.out / "rates.md").write_text(text)


if __name__ == "__main__":
    main()
