"""Forward and backward passes of operations on this machine, beside those of another checkout where one is named.

    python benchmarks/operations.py                                 every operation, both directions; minutes
    python benchmarks/operations.py --only favor_attention,vq_attention --directions causal --dtypes float32
    git clone -s . ../before && git -C ../before checkout <commit>
    python benchmarks/operations.py --against ../before --out results/operations.json

Each checkout has a process of its own, on the same inputs, and they take turns, so that a slow phase of the machine
meets both. Times are the processor's, of one thread, so that other work on the same cores counts for little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import seqzoo
from seqzoo import build_block, kernels

ROOT = Path(__file__).resolve().parents[1]
B, T, D_MODEL, HEADS = 4, 4096, 256, 4
KEEP_MEMORY = {f"MALLOC_{name}_THRESHOLD_": str(2**30) for name in ("MMAP", "TRIM")}  # glibc's; as training does


class Pass(NamedTuple):
    """What is timed: a call, and its gradient with respect to tensors."""

    call: Callable[[], Tensor]
    wrt: list[Tensor]

    def ms(self, gradient: Tensor) -> tuple[float, float]:
        start = time.process_time()
        output = self.call()
        between = time.process_time()
        torch.autograd.grad(output, self.wrt, gradient)
        return 1e3 * (between - start), 1e3 * (time.process_time() - between)


def draw(dtype: torch.dtype, *channels: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(B, T, *channels)).to(dtype).requires_grad_()


def favor_attention(causal: bool, dtype: torch.dtype, key_scale: float = 1.0) -> Pass:
    D = D_MODEL // HEADS
    q, k = draw(dtype, HEADS, D, scale=D**-0.25), draw(dtype, HEADS, D, scale=key_scale * D**-0.25)
    v = draw(dtype, HEADS, D)
    projection = build_block("performer", D_MODEL, num_heads=HEADS).projection
    return Pass(lambda: kernels.favor_attention(q, k, v, projection, causal=causal), [q, k, v])


def long_keys(causal: bool, dtype: torch.dtype) -> Pass:
    """Features rise steeply: by far more within a few steps than a factor can hold."""
    return favor_attention(causal, dtype, key_scale=8.0)


def gated_attention(causal: bool, dtype: torch.dtype) -> Pass:
    tensors = [draw(dtype, n) for n in (2 * D_MODEL, 128, 128, 128, 128, 2 * D_MODEL)]
    bias = torch.randn(256 if causal else 511).to(dtype).requires_grad_()
    return Pass(
        lambda: kernels.gated_attention(*tensors, chunk_len=256, bias=bias, causal=causal),
        [*tensors, bias],
    )


def vq_attention(causal: bool, dtype: torch.dtype) -> Pass:
    q, k = (draw(dtype, 1, D_MODEL, scale=D_MODEL**-0.25) for _ in range(2))
    v, bias = draw(dtype, 1, 2 * D_MODEL), draw(dtype, 1, 65 if causal else 129)
    codebook = D_MODEL**-0.25 * torch.randn(1, 128, D_MODEL)
    codes = kernels.nearest_code(k.detach().float(), codebook)
    return Pass(
        lambda: kernels.vq_attention(q, k, v, codebook, codes=codes, bias=bias, block_len=64, causal=causal),
        [q, k, v, bias],
    )


def s4d(causal: bool, dtype: torch.dtype) -> Pass:
    """The block without its gated linear unit: the convolution, and what it is made from."""
    block = build_block("s4d", D_MODEL, causal=causal).to(dtype)
    block.gate = nn.Identity()
    x = draw(dtype, D_MODEL)
    return Pass(lambda: block(x), [x, *block.parameters()])


OPERATIONS: dict[str, Callable[[bool, torch.dtype], Pass]] = {
    "favor_attention": favor_attention,
    "favor_attention_long_keys": long_keys,
    "gated_attention": gated_attention,
    "vq_attention": vq_attention,
    "s4d": s4d,
}


@lru_cache(maxsize=1)
def prepared(name: str, causal: bool, dtype: str) -> tuple[Pass, Tensor]:
    torch.manual_seed(0)
    one_pass = OPERATIONS[name](causal, getattr(torch, dtype))
    return one_pass, torch.randn_like(one_pass.call())


def work() -> None:
    """Says which package it has; then, line by line, is asked for an operation and answers with its times."""
    print(json.dumps(str(Path(seqzoo.__file__).parent)), flush=True)
    for line in sys.stdin:
        one_pass, gradient = prepared(*json.loads(line))
        print(json.dumps(one_pass.ms(gradient)), flush=True)


class Worker:
    """A process in which `seqzoo` is that of the checkout at `root`."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        imported = self.answer()
        if Path(imported) != root / "seqzoo":
            raise SystemExit(f"{root} is no checkout: seqzoo was imported from {imported}")
        self.commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True).strip()

    def ask(self, request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process has ended; its error stands above")
        return json.loads(line)


def measure(workers: dict[str, Worker], setting: tuple[str, bool, str], repeats: int) -> dict[str, dict[str, Any]]:
    """Of each checkout, the milliseconds of forward, backward and both, shortest and median."""
    for worker in workers.values():
        worker.ask(setting)  # sets up, compiles and touches memory
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    order = list(workers)
    for _ in range(repeats):
        for name in order:
            turns[name].append(workers[name].ask(setting))
        order.reverse()
    rows = {}
    for name, times in turns.items():
        forward, backward = zip(*times, strict=True)
        passes = {"forward": forward, "backward": backward, "both": [sum(pair) for pair in times]}
        rows[name] = {key: {"min": min(ms), "median": statistics.median(ms)} for key, ms in passes.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout")
    parser.add_argument("--only", default=",".join(OPERATIONS), metavar="NAME,...")
    parser.add_argument("--directions", default="causal,both")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    from seqzoo.runs import provenance  # which another checkout need not have

    workers = {"this": Worker(ROOT)}
    if options.against is not None:
        workers["against"] = Worker(options.against.resolve())
    rows = []
    for setting in itertools.product(*(x.split(",") for x in (options.only, options.directions, options.dtypes))):
        name, direction, dtype = setting
        times = measure(workers, (name, direction == "causal", dtype), options.repeats)
        row: dict[str, Any] = {"operation": name, "direction": direction, "dtype": dtype, **times}
        line = f"{name:<27}{direction:<8}{dtype:<10}" + ", ".join(
            f"{key} {times['this'][key]['min']:.0f}" for key in ("forward", "backward", "both")
        )
        if "against" in times:
            row["faster"] = {
                key: {of: ms[of] / times["this"][key][of] for of in ms} for key, ms in times["against"].items()
            }
            line += " ms, times as fast: " + ", ".join(f"{ratio['min']:.2f}" for ratio in row["faster"].values())
            line += f" (medians {row['faster']['both']['median']:.2f})"
        else:
            line += " ms"
        rows.append(row)
        print(line, flush=True)
    if options.out is None:
        return
    measured: dict[str, Any] = {"batch": B, "length": T, "d_model": D_MODEL, "heads": HEADS, "repeats": options.repeats}
    measured["unit"] = "ms, processor time"
    commits = {name: worker.commit for name, worker in workers.items()}
    record = {**provenance.of_benchmark(measured), "commits": commits, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
