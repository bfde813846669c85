"""The diagonal scan beside a copy of as many bytes, on this machine: leave it two idle cores, it takes a minute.

    python benchmarks/scan.py
    python benchmarks/scan.py --out results/scan   writes scan.json there too

Forward reads one tensor and writes one, as `clone` does; backward reads two and writes one. Both make their outputs,
and scan and copy are timed in turns. The share of the copy's bandwidth is that of the minima, and that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as train.py does

import torch

from seqzoo.kernels import diagonal_scan
from seqzoo.kernels.common import dtype_name
from seqzoo.runs import provenance
from seqzoo.training.memory import keep_freed_memory

SHAPES = ((8, 1024, 256), (4, 4096, 256), (4, 16384, 256))  # B, T, D


def measure(shape: tuple[int, int, int], dtype: torch.dtype, reverse: bool, repeats: int) -> dict[str, Any]:
    """Milliseconds, shortest and median, of the scan's passes and of the copies beside them."""
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    a = torch.full(shape[-1:], 0.9, dtype=dtype)
    if dtype.is_complex:
        a = a * torch.polar(torch.ones(shape[-1]), torch.rand(shape[-1]))
    a.requires_grad_()
    h = diagonal_scan(x, a, reverse=reverse)
    dh = torch.randn_like(h)
    three_halves = torch.randn(3 * x.numel() // 2, dtype=dtype)

    @torch.no_grad()
    def forward() -> Any:
        return diagonal_scan(x, a, reverse=reverse)

    passes: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "forward_copy": x.detach().clone,
        "backward": lambda: torch.autograd.grad(h, (x, a), dh, retain_graph=True),
        "backward_copy": three_halves.clone,
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 2):
        for name, call in passes.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    row: dict[str, Any] = {"shape": shape, "dtype": dtype_name(dtype), "reverse": reverse}
    for name, ms in times.items():
        row[name] = {"min": min(ms), "median": statistics.median(ms)}
    for name in ("forward", "backward"):
        row[f"{name}_share"] = {of: row[f"{name}_copy"][of] / row[name][of] for of in ("min", "median")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    keep_freed_memory()

    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.complex64):
            for reverse in (False, True):
                rows.append(row := measure(shape, dtype, reverse, options.repeats))
                shares = ", ".join(
                    f"{name} {row[name]['min']:.2f} ms, {row[f'{name}_share']['min']:.2f} of a copy "
                    f"(medians {row[f'{name}_share']['median']:.2f})"
                    for name in ("forward", "backward")
                )
                print(f"{shape!s:<16}{row['dtype']:<11}{'reverse' if reverse else '':<8} {shares}", flush=True)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    record = {**provenance.of_benchmark({"repeats": options.repeats, "unit": "ms"}), "rows": rows}
    (options.out / "scan.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
