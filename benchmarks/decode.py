"""What a causal block's next step takes, after how many: extend by one step, on this machine.

    python benchmarks/decode.py                     every block, one idle core: minutes
    python benchmarks/decode.py --only mamba2,gla --positions 64,4096

States of all positions take their step in turns, so that slow phases of the machine meet all of them, and the shortest
time counts. A state that grows, or of which a step reads more, shows as a size or a time that rises with the position.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from seqzoo import BLOCKS, build_block
from seqzoo.runs import provenance
from seqzoo.training.memory import keep_freed_memory

B, D_MODEL = 1, 256
PIECE = 1024  # steps at once on the way to a position


@torch.no_grad()
def measure(name: str, positions: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row a position: milliseconds of one step, shortest and median, and the numbers of the state before it."""
    torch.manual_seed(0)
    block = build_block(name, D_MODEL, causal=True).eval()
    states, state, taken = {}, None, 0
    for position in sorted(positions):
        while taken < position:
            steps = min(PIECE, position - taken)
            _, state = block.extend(torch.randn(B, steps, D_MODEL), state)
            taken += steps
        states[position] = state
    times: dict[int, list[float]] = {position: [] for position in states}
    x = torch.randn(B, 1, D_MODEL)
    for turn in range(repeats + 2):
        for position, begun in states.items():
            start = time.perf_counter()
            block.extend(x, begun)
            if turn >= 2:
                times[position].append(1e3 * (time.perf_counter() - start))
    return [
        {
            "name": name,
            "position": position,
            "min_ms": min(times[position]),
            "median_ms": statistics.median(times[position]),
            "numbers": sum(part.numel() for part in states[position]) // B - 1,
        }
        for position in states
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a step by its position, and how many numbers the state has at the last one."""
    positions = sorted({row["position"] for row in rows})
    lines = [
        f"| block | {' | '.join(f'after {position:,}' for position in positions)} | numbers in the state |",
        "|---|" + "---:|" * (len(positions) + 1),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = {row["position"]: row for row in rows if row["name"] == name}
        times = " | ".join(f"{mine[position]['min_ms']:.2f}" for position in positions)
        lines.append(f"| `{name}` | {times} | {mine[positions[-1]]['numbers']:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help="blocks by name; all by default")
    parser.add_argument("--positions", default="16,1024,4096,16384")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/decode"))
    options = parser.parse_args()
    names = list(BLOCKS) if options.only is None else options.only.split(",")
    positions = [int(position) for position in options.positions.split(",")]
    keep_freed_memory()

    rows: list[dict[str, Any]] = []
    for name in names:
        rows += measure(name, positions, options.repeats)
        print(table(rows[-len(positions) :]).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"batch": B, "d_model": D_MODEL, "dtype": "float32", "repeats": options.repeats, "unit": "ms"}
    record = {**provenance.of_benchmark(setting), "rows": rows}
    (options.out / "decode.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "decode.md").write_text(table(rows))


if __name__ == "__main__":
    main()
