"""The delta rule beside its chunks written plainly, which autograd differentiates, on this machine: some minutes.

    python benchmarks/delta_rule.py
    python benchmarks/delta_rule.py --out results/delta_rule     writes delta_rule.json there too

Forward and backward in single precision, of one thread: milliseconds of the processor, the least of some turns, plain
chunks of the length that is quickest for them. Then how time grows with the length of sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels import delta_rule
from seqzoo.runs import provenance
from seqzoo.training.memory import keep_freed_memory

B, T, H, D = 4, 1024, 4, 64
LENGTHS = (2048, 4096, 8192, 16384)  # of one sequence
CHUNKS = (16, 32, 64, 128)
DECAYS = ("none", "head", "channel")


def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, C: int) -> Tensor:
    """Yang et al. 2024: what chunks would write without states and how states change that, then states one by one."""
    q, k, v, beta = (x.transpose(1, 2).unflatten(2, (-1, C)) for x in (q, k, v, beta[..., None]))  # [B, H, N, C, D]
    g = v.new_zeros(*v.shape[:3], C) if g is None else g.transpose(1, 2).unflatten(2, (-1, C))
    between = g[..., None].expand(*g.shape, C).tril(-1).cumsum(-2)
    weights = between.masked_fill(torch.ones(C, C, dtype=torch.bool).triu(1), -torch.inf).exp()
    through, after = g.cumsum(-1).exp()[..., None], weights[..., -1, :, None]
    erased = (beta * k @ k.mT * weights).tril(-1)
    both = torch.cat([beta * v, beta * k * through], -1)
    w, r = torch.linalg.solve_triangular(erased, both, upper=False, unitriangular=True).split([v.shape[-1], D], -1)
    pairs, q, k = q @ k.mT * weights, q * through, k * after
    S, o = v.new_zeros(*v.shape[:2], D, v.shape[-1]), []
    for w_n, r_n, q_n, k_n, pairs_n, left in zip(*(x.unbind(2) for x in (w, r, q, k, pairs, through)), strict=True):
        u = w_n - r_n @ S
        o.append(q_n @ S + pairs_n @ u)
        S = left[:, :, -1:] * S + k_n.mT @ u
    return torch.stack(o, 2).flatten(2, 3).transpose(1, 2)


def draw(B: int, T: int, decay: str) -> list[Tensor]:
    q, k, v = torch.randn(B, T, H, D) / D**0.5, torch.randn(B, T, H, D), torch.randn(B, T, H, D)
    inputs = [q, k / k.norm(dim=-1, keepdim=True), v, torch.rand(B, T, H)]
    if decay != "none":
        inputs.append(-torch.rand(B, T, H, D if decay == "channel" else 1).squeeze(-1))
    return [x.requires_grad_() for x in inputs]


def ms(call: Callable[[], Tensor], inputs: list[Tensor], w: Tensor) -> float:
    start = time.process_time()
    torch.autograd.grad(call(), inputs, w)
    return 1e3 * (time.process_time() - start)


def least(calls: dict[str, Callable[[], Tensor]], inputs: list[Tensor], repeats: int) -> dict[str, float]:
    """Of each, in turns, after one that compiles and touches memory."""
    w = torch.randn_like(inputs[2])
    turns = [{name: ms(call, inputs, w) for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: min(turn[name] for turn in turns[1:]) for name in calls}


def compare(decay: str, repeats: int) -> dict[str, Any]:
    inputs = draw(B, T, decay)
    q, k, v, beta, g = *inputs[:4], inputs[4] if decay != "none" else None
    calls: dict[str, Callable[[], Tensor]] = {"seqzoo": lambda: delta_rule(q, k, v, beta, log_decay=g)}
    if decay != "channel":
        calls |= {str(C): lambda C=C: plain(q, k, v, beta, g, C) for C in CHUNKS}
        expected = calls["64"]()
        torch.testing.assert_close(calls["seqzoo"](), expected, rtol=1e-4, atol=1e-4)
    times = least(calls, inputs, repeats)
    row: dict[str, Any] = {"decay": decay, "ms": times.pop("seqzoo")}
    if times:
        C = min(times, key=lambda name: times[name])
        row |= {"plain": times[C], "chunk": int(C), "faster": times[C] / row["ms"]}
    return row


def growth(decay: str, repeats: int) -> dict[str, Any]:
    """The exponent that time goes with, between the shortest and the longest."""
    times = []
    for length in LENGTHS:
        inputs = draw(1, length, decay)
        g = inputs[4] if decay != "none" else None
        calls = {"seqzoo": lambda inputs=inputs, g=g: delta_rule(*inputs[:4], log_decay=g)}
        times.append(least(calls, inputs, repeats)["seqzoo"])
    slope = math.log(times[-1] / times[0]) / math.log(LENGTHS[-1] / LENGTHS[0])
    return {"decay": decay, "lengths": LENGTHS, "ms": times, "slope": slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    rows, grown = [], []
    for decay in DECAYS:
        rows.append(compare(decay, options.repeats))
        print({name: round(x, 2) if isinstance(x, float) else x for name, x in rows[-1].items()}, flush=True)
        grown.append(growth(decay, max(1, options.repeats // 3)))
        print(
            {**grown[-1], "ms": [round(x) for x in grown[-1]["ms"]], "slope": round(grown[-1]["slope"], 3)}, flush=True
        )
    if options.out is None:
        return
    measured = {"batch": B, "length": T, "heads": H, "channels": D, "repeats": options.repeats, "dtype": "float32"}
    record = {**provenance.of_benchmark(measured), "rows": rows, "growth": grown}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "delta_rule.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
