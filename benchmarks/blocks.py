"""Forward and backward of every block, and of its operation alone, beside what people install today, on this machine.

    python benchmarks/blocks.py                                  all lengths: leave it two idle cores
    python benchmarks/blocks.py --lengths 512,1024 --repeats 3   minutes
    python benchmarks/blocks.py --only linear_attention,linear-attention-transformer

Alternatives are timed in turns, so that slow phases of the machine meet all of them, and reported as the minimum and
the median: by the clock, or, with one thread (OMP_NUM_THREADS=1), in time of the processor. One that has taken more
than `--patience` seconds at a length is repeated there no more, and one that takes as long a time is left out at
greater lengths. Each length has a process of its own: what a large peer leaves in the
heap would fill the memory. Peers that cannot be imported are named and left out: performer-pytorch, FLASH-pytorch,
linear-attention-transformer, S4's standalone `s4d.py` on PYTHONPATH, and those of the extra `parity`. Layers of
`originals.py` are one of our blocks each, which then has the weights of the first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from originals import ORIGINALS, Original
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo import build_block, kernels
from seqzoo.runs import provenance
from seqzoo.training.memory import keep_freed_memory

B, D_MODEL, HEADS = 4, 256, 4
HEAD_DIM = D_MODEL // HEADS

COUNTERPARTS = {  # of ours, what stands beside it: others', or another of ours that does the like
    ("block", "softmax_attention"): ("SDPA",),
    ("block", "linear_attention"): ("linear-attention-transformer",),
    ("block", "performer"): ("performer-pytorch",),
    ("block", "gau"): ("FLASH-pytorch",),
    ("block", "vq_attention"): ("SDPA",),
    ("block", "lru"): ("s5-pytorch",),
    ("block", "s4d"): ("S4D standalone",),
    ("block", "mamba"): ("Mamba of transformers", "Mamba of mambapy"),
    ("block", "mamba2"): ("Mamba-2 of transformers",),
    ("block", "gated_delta_net"): ("Gated DeltaNet of transformers",),
    ("block", "kda"): ("KDA of transformers",),
    ("block", "rg_lru"): ("RG-LRU of transformers", "lru"),
    ("block", "mlstm"): ("mLSTM of xlstm",),
    ("block", "min_gru"): ("lru",),
    ("block", "s5"): ("s5-pytorch", "lru"),
    ("operation", "attention"): ("SDPA",),
    ("operation", "linear_attention"): ("linear-attention-transformer",),
    ("operation", "linear_attention (decay per channel)"): ("linear_attention (decay per step)",),
    ("operation", "favor_attention"): ("performer-pytorch",),
    ("operation", "gated_attention"): ("FLASH-pytorch",),
    ("operation", "vq_attention"): ("SDPA",),
    ("operation", "diagonal_scan (gated)"): ("diagonal_scan",),
}


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def clock_name() -> str:
    """Other work beside does not count where there is one thread."""
    return "processor" if torch.get_num_threads() == 1 else "wall"


class Pass(NamedTuple):
    """What is timed: a call, and its gradient with respect to tensors."""

    call: Callable[[], Tensor]
    wrt: list[Tensor]

    def seconds(self, gradient: Tensor) -> float:
        clock = CLOCKS[clock_name()]
        start = clock()
        torch.autograd.grad(self.call(), self.wrt, gradient, allow_unused=True)
        return clock() - start


class Candidate(NamedTuple):
    name: str
    kind: str  # "block" or "operation"
    ours: bool
    make: Callable[[int, bool], Pass]  # of T and causal


def block(name: str, **options: Any) -> Candidate:
    """One of ours, with the weights of its first original where there is one."""
    original = next((each for each in ORIGINALS if each.block == name and each.installed), None)

    def make(T: int, causal: bool) -> Pass:
        ours = build_block(name, D_MODEL, causal=causal, **options)
        if original is not None and causal:
            ours.load_state_dict(original.weights(original.build(D_MODEL)))
        return on_sequences(ours, T)

    return Candidate(name, "block", True, make)


def of_original(original: Original) -> Candidate:
    def make(T: int, causal: bool) -> Pass:
        if not causal:
            raise NotImplementedError
        return on_sequences(original.build(D_MODEL), T)

    return Candidate(original.name, "block", False, make)


def on_sequences(module: nn.Module, T: int) -> Pass:
    x = torch.randn(B, T, D_MODEL, requires_grad=True)
    return Pass(lambda: first(module(x)), [x, *(p for p in module.parameters() if p.requires_grad)])


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def operation(name: str, inputs: Callable[[int], list[Tensor]], *, how: str = "", **options: Any) -> Candidate:
    def make(T: int, causal: bool) -> Pass:
        tensors = inputs(T)
        # The scan has a direction instead.
        mode = {"reverse": not causal} if name == "diagonal_scan" else {"causal": causal}
        wrt = [tensor for tensor in tensors if tensor.requires_grad]
        return Pass(lambda: getattr(kernels, name)(*tensors, **mode, **options), wrt)

    return Candidate(name + how, "operation", True, make)


def heads(T: int, *, scale: float = 1.0) -> Tensor:
    return (scale * torch.rand(B, T, HEADS, HEAD_DIM)).requires_grad_()


def width(T: int, *D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, *D, dtype=dtype).requires_grad_()


def decayed(name: str, *channels: int) -> Candidate:
    """`linear_attention` with gates [B, T, H, *channels]."""

    def make(T: int, causal: bool) -> Pass:
        qkv, gates = [heads(T) for _ in range(3)], (-torch.rand(B, T, HEADS, *channels)).requires_grad_()
        return Pass(lambda: kernels.linear_attention(*qkv, log_decay=gates, causal=causal), [*qkv, gates])

    return Candidate(name, "operation", True, make)


def share(T: int, D: int) -> Tensor:
    return torch.rand(B, T, D).requires_grad_()


def on_heads(function: Callable[..., Tensor], T: int, **options: Any) -> Pass:
    """A peer's operation on [B, H, T, D], from and to [B, T, H, D] as ours are."""
    qkv = [width(T, HEADS, HEAD_DIM) for _ in range(3)]
    return Pass(lambda: function(*(x.transpose(1, 2) for x in qkv), **options).transpose(1, 2).contiguous(), qkv)


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


def flash(package: Any, causal: bool) -> nn.Module:
    """The layer as FLASH-pytorch's own Transformer builds it."""
    rotary = importlib.import_module("rotary_embedding_torch").RotaryEmbedding(dim=32)
    return package.FLASH(dim=D_MODEL, causal=causal, rotary_pos_emb=rotary)


def flash_operation(package: Any, T: int, causal: bool) -> Pass:
    """What is left of the layer without projections, norm, scales, biases by distance and rotary positions."""
    layer = package.FLASH(dim=D_MODEL, causal=causal)
    vu, *qk = [width(T, n) for n in (4 * D_MODEL, 128, 128, 128, 128)]
    layer.norm = layer.to_out = nn.Identity()
    layer.to_hidden, layer.to_qk = Fixed(vu), Fixed(None)
    layer.qk_offset_scale, layer.rel_pos_bias = Fixed(qk), Fixed(0.0)
    x = torch.zeros(B, T, 1)  # the residual
    return Pass(lambda: layer(x), [vu, *qk])


class Fixed(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Any) -> Any:
        return self.value


def linear_operation(package: Any, T: int, causal: bool) -> Pass:
    functions = package.linear_attention_transformer
    if causal:  # buckets of one step, as its layer does by default: others hide what is near
        return on_heads(functions.causal_linear_attn, T, bucket_size=1)
    return on_heads(functions.linear_attn, T)


def peer(
    name: str,
    module: str,
    layer: Callable[[Any, bool], nn.Module],
    alone: Callable[[Any, int, bool], Pass] | None = None,
    *,
    both: bool = True,
) -> Iterator[Candidate]:
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return

    def make(T: int, causal: bool) -> Pass:
        if not both and not causal:
            raise NotImplementedError
        return on_sequences(layer(package, causal), T)

    yield Candidate(name, "block", False, make)
    if alone is not None:
        yield Candidate(name, "operation", False, lambda T, causal: alone(package, T, causal))


def candidates() -> Iterator[Candidate]:
    yield block("softmax_attention", num_heads=HEADS)
    yield block("linear_attention", num_heads=HEADS)
    yield block("performer", num_heads=HEADS)
    yield block("vq_attention")
    yield block("gau")
    yield block("lru")
    yield block("s4d")
    for name in ("retnet", "mamba2", "mamba3", "mamba", "gla", "hgrn2", "mlstm", "rg_lru", "min_gru", "s5"):
        yield block(name)
    for name in ("delta_net", "gated_delta_net", "kda", "rwkv7"):
        yield block(name)
    yield operation("attention", lambda T: [heads(T) for _ in range(3)])
    yield operation("linear_attention", lambda T: [heads(T) for _ in range(3)], normalize=True)
    yield decayed("linear_attention (decay per step)")
    yield decayed("linear_attention (decay per channel)", HEAD_DIM)
    projection = torch.randn(HEADS, int(HEAD_DIM * math.log(HEAD_DIM)), HEAD_DIM)
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
    coefficients = torch.polar(torch.full((D_MODEL,), 0.99), torch.rand(D_MODEL)).requires_grad_()
    yield operation("diagonal_scan", lambda T: [width(T, D_MODEL, dtype=torch.complex64), coefficients])
    yield operation("diagonal_scan", lambda T: [width(T, D_MODEL), share(T, D_MODEL)], how=" (gated)")
    yield from peer(
        "SDPA",
        "torch",
        lambda _, causal: SDPA(causal),
        lambda _, T, causal: on_heads(F.scaled_dot_product_attention, T, is_causal=causal),
    )
    yield from peer(
        "performer-pytorch",
        "performer_pytorch",
        lambda p, causal: p.SelfAttention(D_MODEL, causal=causal, heads=HEADS, dim_head=HEAD_DIM),
        lambda p, T, causal: on_heads(p.FastAttention(HEAD_DIM, causal=causal), T),
    )
    yield from peer("FLASH-pytorch", "flash_pytorch", flash, flash_operation)
    yield from peer(
        "linear-attention-transformer",
        "linear_attention_transformer",
        lambda p, causal: p.linear_attention_transformer.SelfAttention(D_MODEL, HEADS, causal=causal),
        linear_operation,
    )
    yield from peer("s5-pytorch", "s5", lambda p, causal: p.S5(D_MODEL, D_MODEL), both=False)
    for original in ORIGINALS:
        if original.installed:
            yield of_original(original)
        else:
            print(f"{original.name} is left out: it is not installed", file=sys.stderr)
    yield from peer("S4D standalone", "s4d", lambda p, causal: p.S4D(D_MODEL, transposed=False), both=False)


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


def measure(T: int, causal: bool, names: set[tuple[str, str]], repeats: int, patience: float) -> list[dict[str, Any]]:
    """The candidates of these names and kinds at one length, in turns."""
    keep_freed_memory()
    torch.manual_seed(0)
    passes, gradients, seconds, memory = {}, {}, {}, {}
    for candidate in candidates():
        if (candidate.name, candidate.kind) not in names:
            continue
        try:
            passes[candidate] = candidate.make(T, causal)
        except NotImplementedError:
            continue
        gradients[candidate] = torch.randn_like(passes[candidate].call())
        with PeakMemory() as memory[candidate]:
            seconds[candidate] = [passes[candidate].seconds(gradients[candidate])]
    for _ in range(repeats):
        for candidate, one_pass in passes.items():
            if sum(seconds[candidate]) < patience or len(seconds[candidate]) == 1:
                seconds[candidate].append(one_pass.seconds(gradients[candidate]))
    rows = []
    for candidate in passes:
        timed = seconds[candidate][1:]  # the first compiles and warms up
        rows.append(
            {
                "name": candidate.name,
                "kind": candidate.kind,
                "ours": candidate.ours,
                "causal": causal,
                "T": T,
                "min_ms": 1e3 * min(timed),
                "median_ms": 1e3 * statistics.median(timed),
                "n": len(timed),
                "peak_mib": memory[candidate].peak / 2**20,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--only", metavar="NAME,...", help="candidates by name; all by default")
    parser.add_argument("--causal", action="store_true", help="one direction alone")
    parser.add_argument("--out", type=Path, default=Path("results/blocks"))
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    found = list(candidates())
    only = [name.strip() for name in options.only.split(",")] if options.only else [c.name for c in found]
    if unknown := set(only) - {c.name for c in found}:
        parser.error(
            f"--only: {', '.join(sorted(unknown))} unknown or left out; valid: {', '.join(c.name for c in found)}"
        )
    chosen = {(c.name, c.kind) for c in found if c.name in only}
    for causal in (True,) if options.causal else (True, False):
        left = set(chosen)
        for T in map(int, options.lengths.split(",")):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                at_length = process.submit(measure, T, causal, left, options.repeats, options.patience).result()
            rows += at_length
            for row in at_length:
                print(
                    f"{'causal' if causal else 'both':<7}{T:>6}  {row['kind']:<10}{row['name']:<38}"
                    f"{row['min_ms']:>10.1f} ms min {row['median_ms']:>10.1f} ms median {row['peak_mib']:>9.0f} MiB",
                    flush=True,
                )
            left -= {(row["name"], row["kind"]) for row in at_length if row["min_ms"] > 1e3 * options.patience}

    options.out.mkdir(parents=True, exist_ok=True)
    setting: dict[str, Any] = {
        "batch": B,
        "d_model": D_MODEL,
        "heads": HEADS,
        "dtype": "float32",
        "pass": "forward + backward",
    } | {"clock": clock_name()}
    record = {**provenance.of_benchmark(setting), "rows": rows}
    (options.out / "blocks.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "blocks.md").write_text(table(rows))
    plot(rows, options.out)


def table(rows: list[dict[str, Any]]) -> str:
    """Minimum times in ms, peak memory in MiB, growth from T = 2,048 on, and how much faster than the counterparts."""
    cells = {(r["kind"], r["name"], r["causal"], r["T"]): r for r in rows}
    lengths = [T for T in (1024, 4096, 16384) if any(r["T"] == T for r in rows)]
    titles = ["", *(f"T = {T:,}" for T in lengths), "MiB at 4,096", "slope of time, memory", "beside, at 4,096"]
    lines = []
    for kind in ("block", "operation"):
        for causal in (True, False):
            lines += [f"| {kind}, {'causal' if causal else 'bidirectional'} " + " | ".join(titles) + " |"]
            lines += ["|---|" + "---:|" * (len(titles) - 2) + "---|"]
            for name, ours in dict.fromkeys((r["name"], r["ours"]) for r in rows if r["kind"] == kind):
                of = {T: cells[kind, name, causal, T] for k, n, c, T in cells if (k, n, c) == (kind, name, causal)}
                if not of:
                    continue
                times = [f"{of[T]['min_ms']:,.0f}" if T in of else "-" for T in lengths]
                memory = f"{of[4096]['peak_mib']:,.0f}" if 4096 in of else "-"
                growth = f"{slope(of, 'min_ms')}, {slope(of, 'peak_mib')}"
                others = COUNTERPARTS.get((kind, name), ()) if ours else ()
                against = (beside(of, {T: cells.get((kind, other, causal, T)) for T in of}) for other in others)
                faster = ", ".join(filter(None, against))
                lines.append(
                    f"| {name if ours else f'*{name}*'} | " + " | ".join((*times, memory, growth, faster)) + " |"
                )
            lines.append("")
    return "\n".join(lines)


def beside(of: dict[int, dict[str, Any]], other: dict[int, dict[str, Any] | None]) -> str:
    """How many times as fast, and in what part of the memory, at 4,096 steps or the most up to there that both did."""
    both = [(T, row) for T, row in other.items() if row is not None and T <= 4096]
    if not both:
        return ""
    T, theirs = max(both, key=lambda pair: pair[0])
    speed, memory = theirs["min_ms"] / of[T]["min_ms"], of[T]["peak_mib"] / theirs["peak_mib"]
    return f"{speed:.2f} x {theirs['name']}, {memory:.2f} of its memory" + (f" (T = {T:,})" if T != 4096 else "")


def slope(of: dict[int, dict[str, Any]], key: str) -> str:
    """Of the logarithm over that of T, by least squares over the lengths from 2,048 on."""
    points = [(math.log(T), math.log(row[key])) for T, row in of.items() if T >= 2048]
    return f"{statistics.linear_regression(*zip(*points, strict=True)).slope:.2f}" if len(points) > 1 else "-"


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """Time and memory over T, a curve a candidate: blocks.png and operations.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for kind in ("block", "operation"):
        figure, axes = plt.subplots(2, 2, figsize=(14, 10), sharex=True)
        chosen = [row for row in rows if row["kind"] == kind]
        names = list(dict.fromkeys((row["name"], row["ours"]) for row in chosen))
        for column, causal in enumerate((True, False)):
            for row_number, (key, label) in enumerate((("min_ms", "ms, forward + backward"), ("peak_mib", "peak MiB"))):
                axis = axes[row_number][column]
                for index, (name, ours) in enumerate(names):
                    points = [(r["T"], r[key]) for r in chosen if (r["name"], r["causal"]) == (name, causal)]
                    if points:
                        style = {"linestyle": "-" if ours else "--", "color": plt.get_cmap("tab20")(index % 20)}
                        axis.plot(*zip(*points, strict=True), marker=".x"[index // 20 % 2], label=name, **style)
                axis.set(xscale="log", yscale="log", ylabel=label, title="causal" if causal else "bidirectional")
                lengths = sorted({row["T"] for row in rows})
                axis.set_xticks(lengths, labels=[f"{T:,}" for T in lengths])
                axis.minorticks_off()
                axis.grid(alpha=0.3)
        axes[1][0].set_xlabel("T")
        axes[1][1].set_xlabel("T")
        figure.suptitle(f"{kind}s: ours solid, others dashed")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", fontsize=8)
        figure.tight_layout(rect=(0, 0, 0.85, 1))
        figure.savefig(folder / f"{kind}s.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
