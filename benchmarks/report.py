"""How much processor time and memory a report of many runs takes, from run folders and from a study.

    python benchmarks/report.py                                     2,000 runs, made from those in results/
    python benchmarks/report.py --out results/report.json           writes the figures there too

The runs are those of the given studies again and again, with other names and seeds, every five times on another task,
and with seeded noise on their scores and curves. A study has fewer lines of training than a run writes, so folders have
each of them `--lines` times. A report is `eval_lra.py` in a process of its own: its tables and the figure beside them,
or all of that and the page.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from seqzoo.files import write_json, write_text
from seqzoo.runs.provenance import of_benchmark
from seqzoo.study import pack, read, read_metrics, read_study

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 5  # that a task has of every run
TASKS = ("lra_text", "lra_image", "lra_listops", "lra_retrieval", "lra_pathfinder")
NOISE = 0.01  # relative, of metrics; absolute, of test accuracies
PROGRAM = r"""
import re, sys, time
from seqzoo.report.cli import main
status = main()
with open("/proc/self/status") as file:
    print(time.process_time(), re.search(r"VmHWM:\s*(\d+) kB", file.read())[1], file=sys.stderr)
sys.exit(status)
"""


def varied(runs: list[Path], number: int, lines: int) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(name, result, metrics) of `number` runs like `runs`."""
    noise = random.Random(0)
    for turn in count():
        for run in runs[: max(0, number - turn * len(runs))]:
            result = read(run / "result.json")
            result["seed"] += 10 * (turn % SEEDS)
            result["task"] = TASKS[(TASKS.index(result["task"]) + turn // SEEDS) % len(TASKS)]
            accuracy = result["test"]["accuracy"] + noise.gauss(0, NOISE)
            result["test"]["accuracy"] = min(1.0, max(0.0, accuracy))
            metrics = []
            for line in read_metrics(run):
                for _ in range(1 if "val/loss" in line else lines):
                    scale = 1 + noise.gauss(0, NOISE)
                    metrics.append({key: scale * value if "/" in key else value for key, value in line.items()})
            yield f"{run.name}-{turn}", result, metrics
        if number <= (turn + 1) * len(runs):
            return


def measured(given: Path, folder: Path, *options: str) -> dict[str, float]:
    """Seconds of the processor and megabytes at most of one report."""
    command = [sys.executable, "-c", PROGRAM, str(given), "--out", str(folder), *options]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    seconds, kilobytes = done.stderr.split()[-2:]
    return {"cpu_seconds": float(seconds), "peak_mb": int(kilobytes) / 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--studies", nargs="+", type=Path, default=[ROOT / "results" / f"{name}.jsonl" for name in ("small", "tiny")]
    )
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--lines", type=int, default=4, help="of training in a folder for each in the study")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = [study / name for study in options.studies for name in read_study(study).runs]
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder, study = Path(made) / "runs", Path(made) / "study.jsonl"
        for name, result, metrics in varied(runs, options.runs, options.lines):
            write_text(folder / name / "config.yaml", f"seed: {result['seed']}\n")
            write_json(folder / name / "result.json", result)
            write_text(folder / name / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
        pack(sorted(folder.iterdir()), study)
        out = Path(made) / "out"
        for what, more in (("tables", []), ("page", ["--report", str(out / "report.html")])):
            for form, given in (("folders", folder), ("study", study)):
                times = [measured(given, out, *more) for _ in range(options.repeats)]
                rows.append({"report": what, "of": form, **min(times, key=lambda one: one["cpu_seconds"])})
                print("{report:<7} {of:<8} {cpu_seconds:6.2f} s {peak_mb:6.0f} MB".format(**rows[-1]), flush=True)
    if options.out:
        setting = {"runs": options.runs, "lines": options.lines, "repeats": options.repeats}
        write_json(options.out, {**of_benchmark(setting), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
