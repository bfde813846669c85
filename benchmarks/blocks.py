"""Forward and backward of every block, and of its operation alone, beside what people install today, on this machine.

    python benchmarks/blocks.py                                  about an hour on two CPU cores
    python benchmarks/blocks.py --lengths 512,1024 --repeats 3   minutes

Alternatives are timed in turns, so that slow phases of the machine meet all of them, and reported as the minimum and
the median. One that takes more than `--patience` seconds at a length is left out at greater ones. Peers that cannot be
imported are named and left out: performer-pytorch, FLASH-pytorch, linear-attention-transformer, s5-pytorch, and S4's
standalone `s4d.py` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo import build_block, kernels
from seqzoo.training import provenance
from seqzoo.training.memory import keep_freed_memory

B, D_MODEL, HEADS = 4, 256, 4
HEAD_DIM = D_MODEL // HEADS


class Candidate(NamedTuple):
    name: str
    kind: str  # "block", "operation" or "peer"
    make: Callable[[int, bool], Callable[[], Tensor]]  # (T, causal) -> a call that gives a scalar to differentiate


def block(name: str, **options: Any) -> Candidate:
    def make(T: int, causal: bool) -> Callable[[], Tensor]:
        return on_sequences(build_block(name, D_MODEL, causal=causal, **options), T)

    return Candidate(name, "block", make)


def on_sequences(module: nn.Module, T: int) -> Callable[[], Tensor]:
    x = torch.randn(B, T, D_MODEL, requires_grad=True)
    return lambda: first(module(x)).square().mean()


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def operation(name: str, inputs: Callable[[int], list[Tensor]], **options: Any) -> Candidate:
    def make(T: int, causal: bool) -> Callable[[], Tensor]:
        tensors = inputs(T)
        # The scan has a direction instead.
        mode = {"reverse": not causal} if name == "diagonal_scan" else {"causal": causal}
        return lambda: getattr(kernels, name)(*tensors, **mode, **options).abs().square().mean()

    return Candidate(name, "operation", make)


def heads(T: int, *, scale: float = 1.0) -> Tensor:
    return (scale * torch.rand(B, T, HEADS, HEAD_DIM)).requires_grad_()


def width(T: int, *D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, *D, dtype=dtype).requires_grad_()


class SDPA(nn.Module):
    """Softmax attention as PyTorch gives it, with the two projections around it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False)
        self.out = nn.Linear(D_MODEL, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def peer(name: str, module: str, make: Callable[[Any, bool], nn.Module], *, both: bool = True) -> Candidate | None:
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return None

    def prepare(T: int, causal: bool) -> Callable[[], Tensor]:
        if not both and not causal:
            raise NotImplementedError
        return on_sequences(make(package, causal), T)

    return Candidate(name, "peer", prepare)


def candidates() -> Iterator[Candidate]:
    yield Candidate("SDPA", "peer", lambda T, causal: on_sequences(SDPA(causal), T))
    yield block("softmax_attention", num_heads=HEADS)
    yield block("linear_attention", num_heads=HEADS)
    yield block("performer", num_heads=HEADS)
    yield block("vq_attention")
    yield block("gau")
    yield block("lru")
    yield block("s4d")
    yield operation("attention", lambda T: [heads(T) for _ in range(3)])
    yield operation("linear_attention", lambda T: [heads(T) for _ in range(3)], normalize=True)
    projection = torch.randn(HEADS, int(HEAD_DIM * 4.16), HEAD_DIM)  # D ln D features
    yield operation("favor_attention", lambda T: [heads(T, scale=0.3), heads(T, scale=0.3), heads(T), projection])
    codebook = F.normalize(torch.randn(1, 128, D_MODEL), dim=-1)
    yield operation(
        "vq_attention",
        lambda T: [*(width(T, 1, n) for n in (D_MODEL, D_MODEL, 2 * D_MODEL)), codebook],
        block_len=64,
    )
    yield operation(
        "gated_attention",
        lambda T: [width(T, n) for n in (2 * D_MODEL, 128, 128, 128, 128, 2 * D_MODEL)],
        chunk_len=256,
    )
    coefficients = torch.polar(torch.full((D_MODEL,), 0.99), torch.rand(D_MODEL))
    yield operation("diagonal_scan", lambda T: [width(T, D_MODEL, dtype=torch.complex64), coefficients])
    peers = (
        peer(
            "performer-pytorch",
            "performer_pytorch",
            lambda p, causal: p.SelfAttention(D_MODEL, causal=causal, heads=HEADS, dim_head=HEAD_DIM),
        ),
        peer("FLASH-pytorch", "flash_pytorch", lambda p, causal: p.FLASH(dim=D_MODEL, causal=causal)),
        peer(
            "linear-attention-transformer",
            "linear_attention_transformer",
            lambda p, causal: p.linear_attention_transformer.SelfAttention(D_MODEL, HEADS, causal=causal),
        ),
        peer("s5-pytorch", "s5", lambda p, causal: p.S5(D_MODEL, D_MODEL), both=False),
        peer("S4D standalone", "s4d", lambda p, causal: p.S4D(D_MODEL, transposed=False), both=False),
    )
    yield from (found for found in peers if found is not None)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def measure(T: int, causal: bool, chosen: list[Candidate], repeats: int) -> list[dict[str, Any]]:
    """Every candidate at one length, in turns."""
    calls = {}
    for candidate in chosen:
        try:
            calls[candidate] = candidate.make(T, causal)
        except NotImplementedError:
            continue
    seconds: dict[Candidate, list[float]] = {candidate: [] for candidate in calls}
    for repeat in range(repeats + 1):
        for candidate, call in calls.items():
            start = time.perf_counter()
            call().backward()
            if repeat:  # the first compiles and warms up
                seconds[candidate].append(time.perf_counter() - start)
    rows = []
    for candidate, call in calls.items():
        with PeakMemory() as memory:
            call().backward()
        rows.append(
            {
                "name": candidate.name,
                "kind": candidate.kind,
                "causal": causal,
                "T": T,
                "min_ms": 1e3 * min(seconds[candidate]),
                "median_ms": 1e3 * statistics.median(seconds[candidate]),
                "n": repeats,
                "peak_mib": memory.peak / 2**20,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path("results/blocks"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)

    rows: list[dict[str, Any]] = []
    for causal in (True, False):
        left = list(candidates())
        for T in map(int, options.lengths.split(",")):
            found = measure(T, causal, left, options.repeats)
            rows += found
            for row in found:
                print(
                    f"{'causal' if causal else 'both':<7}{T:>6}  {row['kind']:<10}{row['name']:<30}"
                    f"{row['min_ms']:>10.1f} ms min {row['median_ms']:>10.1f} ms median {row['peak_mib']:>9.0f} MiB",
                    flush=True,
                )
            slow = {(row["name"], row["kind"]) for row in found if row["min_ms"] > 1e3 * options.patience}
            left = [candidate for candidate in left if (candidate.name, candidate.kind) not in slow]

    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "setting": {"batch": B, "d_model": D_MODEL, "heads": HEADS, "dtype": "float32", "pass": "forward + backward"},
        "hardware": provenance.hardware(torch.device("cpu"), 1),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "rows": rows,
    }
    (options.out / "blocks.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, options.out / "blocks.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over T, a curve a candidate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(14, 10), sharex=True)
    for column, causal in enumerate((True, False)):
        for row_number, (key, label) in enumerate((("min_ms", "ms, forward + backward"), ("peak_mib", "peak MiB"))):
            axis = axes[row_number][column]
            names = dict.fromkeys((r["name"], r["kind"]) for r in rows if r["causal"] == causal)
            for name, kind in names:
                points = [(r["T"], r[key]) for r in rows if (r["name"], r["kind"], r["causal"]) == (name, kind, causal)]
                style = {"block": "-", "operation": ":", "peer": "--"}[kind]
                axis.plot(*zip(*points, strict=True), style, marker=".", label=f"{name} ({kind})")
            axis.set(xscale="log", yscale="log", ylabel=label, title="causal" if causal else "bidirectional")
            axis.set_xticks(sorted({r["T"] for r in rows}), labels=[f"{T:,}" for T in sorted({r["T"] for r in rows})])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[1][0].set_xlabel("T")
    axes[1][1].set_xlabel("T")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.82, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
