"""The Triton kernels on a GPU: are they right in every configuration, and how fast beside what people install today.

    python benchmarks/gpu.py --check    gradients of every configuration against float64, into results/gpu/check.json
    python benchmarks/gpu.py --bench    times, into results/gpu/bench.json and bench.md

Both take minutes. `--check` begins with a canary: the product of a transposed accumulator, which Triton 3.4 to 3.7.0
compiles wrongly for Hopper at some block sizes and which no kernel here contains. `--bench` gives no figure for an
operation whose chosen configuration fails its check. Times are medians by CUDA events; alternatives are measured in one
run, beside the bandwidth of a copy and the rate of a bfloat16 matrix product.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from seqzoo import kernels
from seqzoo.kernels import backends
from seqzoo.kernels.agreement import relative_error
from seqzoo.training import provenance

TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WORST_ROW = 30  # times as much
WIDE = {torch.complex64: torch.complex128}


@dataclass(frozen=True)
class Case:
    """A call with its inputs, made anew for each dtype; all of them get gradients."""

    label: str
    make: Callable[[torch.dtype], list[Tensor]]
    call: Callable[..., Any]  # of the inputs and `backend`


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    draw = dtype if dtype.is_complex else torch.float32
    return torch.randn(*shape, device="cuda", dtype=draw).to(dtype)


def attention_cases() -> Iterator[Case]:
    for D in (16, 32, 64, 128, 256):
        for causal in (True, False):

            def make(dtype: torch.dtype, D: int = D) -> list[Tensor]:
                return [randn(2, 300, heads, D, dtype=dtype) for heads in (4, 2, 2)]

            def call(q: Tensor, k: Tensor, v: Tensor, backend: str, causal: bool = causal) -> Tensor:
                return kernels.attention(q, k, v, causal=causal, lengths=lengths(q, 300, 211), backend=backend)

            yield Case(f"D={D} {'causal' if causal else 'both ways'}", make, call)


def linear_attention_cases() -> Iterator[Case]:
    for D in (16, 64, 128, 256):
        for decay, causal in (("none", True), ("none", False), ("head", True), ("step", True)):

            def make(dtype: torch.dtype, D: int = D, decay: str = decay) -> list[Tensor]:
                q, k, v = (randn(2, 300, 3, D, dtype=dtype) for _ in range(3))
                g = {"none": (), "head": (3,), "step": (2, 300, 3)}[decay]
                return [(q / D**0.5).sigmoid(), k.sigmoid(), v, *([-0.1 * torch.rand(g, device="cuda")] if g else [])]

            def call(q: Tensor, k: Tensor, v: Tensor, *g: Tensor, backend: str, causal: bool = causal) -> Tensor:
                options = {"causal": causal, "normalize": not g, "lengths": lengths(q, 300, 211)}
                return kernels.linear_attention(q, k, v, log_decay=g[0] if g else None, **options, backend=backend)

            yield Case(f"D={D} decay={decay} {'causal' if causal else 'both ways'}", make, call)


def gated_attention_cases() -> Iterator[Case]:
    for S, E in ((16, 40), (64, 128), (128, 512), (256, 320)):
        for causal in (True, False):

            def make(dtype: torch.dtype, S: int = S, E: int = E, causal: bool = causal) -> list[Tensor]:
                inputs = [randn(2, 700, width, dtype=dtype) for width in (E, S, S, S, S, E)]
                return [*inputs, randn(200 if causal else 399, dtype=dtype)]

            def call(*inputs: Tensor, backend: str, causal: bool = causal) -> Tensor:
                options = {"chunk_len": 200, "causal": causal, "lengths": lengths(inputs[0], 700, 411)}
                return kernels.gated_attention(*inputs[:6], bias=inputs[6], **options, backend=backend)

            yield Case(f"S={S} E={E} {'causal' if causal else 'both ways'}", make, call)
            if causal:
                yield Case(f"S={S} E={E} causal, in two calls", make, gated_attention_resumed)


def gated_attention_resumed(*inputs: Tensor, backend: str) -> Tensor:
    """The second call starts inside a chunk, from the state of the first."""
    first, second = ([x[:, part] for x in inputs[:6]] for part in (slice(300), slice(300, None)))
    options = {"chunk_len": 200, "bias": inputs[6], "causal": True, "backend": backend}
    o, state = kernels.gated_attention(*first, **options, output_final_state=True)
    rest = {"initial_state": state, "lengths": lengths(o, 400, 111)}
    return torch.cat([o, kernels.gated_attention(*second, **options, **rest)], 1)


def favor_attention_cases() -> Iterator[Case]:
    """Steep: keys so long that their features outgrow those of the keys before, whose pairs are made one by one."""
    for D, T, M in ((16, 1100, 24), (64, 300, 100), (128, 300, 100)):
        for label, causal, size in (("causal", True, 1), ("both ways", False, 1), ("causal, steep", True, 8)):

            def make(dtype: torch.dtype, D: int = D, T: int = T, size: int = size) -> list[Tensor]:
                q, k, v = (randn(2, T, 2, D, dtype=dtype) for _ in range(3))
                return [q * D**-0.25, k * size * D**-0.5, v]

            def call(
                q: Tensor, k: Tensor, v: Tensor, backend: str, causal: bool = causal, T: int = T, M: int = M
            ) -> Tensor:
                options = {"causal": causal, "lengths": lengths(q, T, T - 89)}
                return kernels.favor_attention(q, k, v, directions(2, M, q), **options, backend=backend)

            yield Case(f"D={D} M={M} {label}", make, call)


def directions(H: int, M: int, like: Tensor) -> Tensor:
    """The same in every call, and exact in every dtype."""
    drawn = torch.randn(H, M, like.shape[-1], generator=torch.Generator().manual_seed(1))
    return drawn.bfloat16().to(like)


def scan_cases() -> Iterator[Case]:
    for constant in (True, False):
        for reverse in (True, False, "both"):

            def make(dtype: torch.dtype, constant: bool = constant) -> list[Tensor]:
                a = randn(*((200,) if constant else (3, 700, 200)), dtype=dtype)
                return [randn(3, 700, 200, dtype=dtype), a / (1 + a.abs())]

            def call(x: Tensor, a: Tensor, backend: str, reverse: bool | str = reverse) -> Tensor:
                h = kernels.diagonal_scan(x, a, reverse=reverse, lengths=lengths(x, 700, 0, 411), backend=backend)
                return torch.stack(h) if reverse == "both" else h

            way = {False: "up", True: "down", "both": "both ways"}[reverse]
            yield Case(f"{'constant' if constant else 'varying'} {way}", make, call)


def vq_attention_cases() -> Iterator[Case]:
    draw = torch.Generator().manual_seed(0)
    for D, Dv, S, L in ((16, 32, 40, 33), (64, 64, 128, 64), (128, 256, 128, 64), (256, 512, 64, 128)):
        codebook = torch.randn(2, S, D, generator=draw).bfloat16()  # numbers that every dtype has
        codes = torch.randint(S, (2, 300, 2), generator=draw)
        for causal in (True, False):

            def make(
                dtype: torch.dtype, D: int = D, Dv: int = Dv, n: int = L + 1 if causal else 2 * L + 1
            ) -> list[Tensor]:
                q, k, v, bias = (randn(2, 300, 2, width, dtype=dtype) for width in (D, D, Dv, n))
                return [q / D**0.5, k, v, bias]

            def call(
                q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str, L: int = L, causal: bool = causal,
                codebook: Tensor = codebook, codes: Tensor = codes,
            ) -> Tensor:  # fmt: skip
                options = {"block_len": L, "bias": bias, "causal": causal, "lengths": lengths(q, 300, 211)}
                options["codes"] = codes.to(q.device)
                return kernels.vq_attention(q, k, v, codebook.to(q), **options, backend=backend)

            yield Case(f"D={D} Dv={Dv} S={S} L={L} {'causal' if causal else 'both ways'}", make, call)


def lengths(x: Tensor, *of: int) -> Tensor:
    return torch.tensor(of, device=x.device)


FORMS = (("seqzoo", "fused"), ("seqzoo chunked", "chunked"))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
OPERATIONS: dict[str, tuple[Callable[[], Iterator[Case]], tuple[torch.dtype, ...]]] = {
    "attention": (attention_cases, FLOATS),
    "linear_attention": (linear_attention_cases, FLOATS),
    "gated_attention": (gated_attention_cases, FLOATS),
    "diagonal_scan": (scan_cases, (torch.complex64, *FLOATS)),
    "vq_attention": (vq_attention_cases, FLOATS),
    "favor_attention": (favor_attention_cases, FLOATS),
}


@contextmanager
def configuration(operation: str, table: int) -> Iterator[None]:
    """Inside, the operation runs with the configurations of the table for that architecture."""
    module = importlib.import_module(f"seqzoo.kernels.{operation}.fused")
    with mock.patch.object(module, "CONFIGS", {backends.OLDEST_ARCHITECTURE: module.CONFIGS[table]}):
        yield


def tables(operation: str) -> list[int]:
    """The architectures whose configurations this device can run, its own last."""
    own = backends.architecture(torch.device("cuda"))
    return [known for known in importlib.import_module(f"seqzoo.kernels.{operation}.fused").CONFIGS if known <= own]


def gradients(case: Case, inputs: list[Tensor], w: Tensor, backend: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = case.call(*leaves, backend=backend)
    return [o, *torch.autograd.grad(o, leaves, w.to(o))]


def check(operation: str, only: int | None = None) -> list[dict[str, Any]]:
    """Outputs and gradients of every case, dtype and table (or of `only` one) against the float64 reference."""
    cases, dtypes = OPERATIONS[operation]
    rows = []
    for case in cases():
        for dtype in dtypes:
            torch.manual_seed(0)
            inputs = case.make(dtype)
            wide = [x.to("cpu", WIDE.get(x.dtype, torch.float64)) for x in inputs]
            w = torch.randn_like(case.call(*wide, backend="reference"))
            expected = gradients(case, wide, w, "reference")
            for table in tables(operation) if only is None else [only]:
                row: dict[str, Any] = {"operation": operation, "case": case.label, "dtype": str(dtype), "table": table}
                try:
                    with configuration(operation, table):
                        found = gradients(case, inputs, w, "fused")
                        again = gradients(case, inputs, w, "fused")
                    worst = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
                    row["whole"], row["worst_row"] = (max(column) for column in zip(*worst, strict=True))
                    row["same_bits"] = all(torch.equal(*pair) for pair in zip(found, again, strict=True))
                    bound = TOLERANCE[dtype]
                    row["passed"] = row["same_bits"] and row["whole"] <= bound and row["worst_row"] <= WORST_ROW * bound
                except Exception as error:  # a kernel that does not run is a finding, not the end of the others
                    row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:300]}
                rows.append(row)
                if not row["passed"]:
                    print("FAILED", row, flush=True)
    return rows


@triton.jit
def _canary_kernel(q, k, do, v, out, T: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """dk = (q kᵀ ∘ do vᵀ)ᵀ q, by transposing what the matrix unit made."""
    j, d = tl.arange(0, BLOCK), tl.arange(0, D)
    k_t = tl.load(k + j[:, None] * D + d[None, :])
    v_t = tl.load(v + j[:, None] * D + d[None, :])
    sums = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, T, BLOCK):
        q_t = tl.load(q + (start + j)[:, None] * D + d[None, :])
        do_t = tl.load(do + (start + j)[:, None] * D + d[None, :])
        ds = (tl.dot(q_t, tl.trans(k_t)) * tl.dot(do_t, tl.trans(v_t))).to(q_t.dtype)
        sums += tl.dot(tl.trans(ds), q_t)
    tl.store(out + j[:, None] * D + d[None, :], sums)


def canary() -> list[dict[str, Any]]:
    rows = []
    T, D = 256, 64
    for block in (32, 64, 128):
        for warps in (2, 4, 8):
            torch.manual_seed(0)
            q, do = (randn(T, D, dtype=torch.bfloat16) for _ in range(2))
            k, v = (randn(block, D, dtype=torch.bfloat16) for _ in range(2))
            out = torch.empty(block, D, device="cuda")
            _canary_kernel[(1,)](q, k, do, v, out, T, block, D, num_warps=warps)
            wide = [x.double() for x in (q, k, do, v)]
            expected = ((wide[0] @ wide[1].T) * (wide[2] @ wide[3].T)).T @ wide[0]
            rows.append({"block": block, "num_warps": warps, "whole": relative_error(out, expected)[0]})
            print(f"canary, block {block}, {warps} warps: relative error {rows[-1]['whole']:.1e}", flush=True)
    return rows


@dataclass(frozen=True)
class Alternative:
    """Ours, or a peer's, as a call on tensors that all get gradients."""

    name: str
    call: Callable[..., Tensor]


def sdpa(backend: str, causal: bool) -> Alternative:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return Alternative(f"SDPA {backend.lower()}", call)


def imported(name: str, module: str, wrap: Callable[[Any], Callable[..., Tensor]]) -> Iterator[Alternative]:
    """A peer, where it can be imported."""
    try:
        yield Alternative(name, wrap(importlib.import_module(module)))
    except ImportError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)


# Of each shape: its label, inputs, alternatives (ours first), and the flops and bytes of forward alone.
Benchmarks = Iterator[tuple[str, list[Tensor], list[Alternative], float, float]]


def scan_benchmarks() -> Benchmarks:
    for B, T, D in ((32, 1024, 512), (8, 4096, 1024), (8, 16384, 1024), (1, 65536, 1024)):
        x, a = randn(B, T, D, dtype=torch.complex64), randn(D, dtype=torch.complex64)
        a = a / (1 + a.abs())
        ours = [Alternative(name, lambda x, a, b=b: kernels.diagonal_scan(x, a, backend=b)) for name, b in FORMS]
        ours += imported("accelerated-scan", "accelerated_scan.complex", accelerated)
        yield f"B={B} T={T} D={D} complex", [x, a], ours, 8.0 * B * T * D, 16.0 * B * T * D


def gated_benchmarks() -> Benchmarks:
    S, C = 128, 256
    for B, T, E in ((32, 1024, 256), (8, 4096, 1024), (2, 16384, 1024), (1, 65536, 1024), (2, 16384, 2048)):
        for causal in (True, False):
            inputs = [randn(B, T, width, dtype=torch.bfloat16) for width in (E, S, S, S, S, E)]
            inputs.append(randn(C if causal else 2 * C - 1, dtype=torch.float32))
            options = {"chunk_len": C, "causal": causal}
            ours = [
                Alternative(
                    name,
                    lambda *x, o=options, b=b: kernels.gated_attention(*x[:6], bias=x[6], **o, backend=b),
                )
                for name, b in FORMS
            ]
            flops = B * T * ((1.0 if causal else 2.0) * C * (S + E) + 4.0 * S * E)
            moved = 2.0 * B * T * (4 * S + 3 * E)
            yield f"B={B} T={T} S={S} E={E} {'causal' if causal else 'both ways'}", inputs, ours, flops, moved


def attention_benchmarks(operation: str) -> Benchmarks:
    """Of softmax, FAVOR and linear attention."""
    for B, T, H, D in ((32, 1024, 8, 64), (8, 4096, 8, 64), (2, 16384, 8, 64), (1, 65536, 8, 64), (32, 1024, 8, 32)):
        for causal in (True, False):
            q, k, v = (randn(B, T, H, D, dtype=torch.bfloat16) for _ in range(3))
            moved = 2.0 * 4 * B * T * H * D
            if operation == "attention":
                flops = 4.0 * B * H * T * T * D / (2 if causal else 1)
                ours = [Alternative("seqzoo", lambda *x, c=causal: kernels.attention(*x, causal=c, backend="fused"))]
                ours += [sdpa(name, causal) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")]
                ours += imported("flash-attn", "flash_attn", flash_attn(causal))
            elif operation == "favor_attention":
                M = int(D * math.log(D))
                flops = 8.0 * B * T * H * D * M
                q, k, W = q * D**-0.25, k * D**-0.25, directions(H, M, q)
                ours = [Alternative(name, favor(W, causal, form)) for name, form in FORMS]
                if not causal:  # its causal form needs a CUDA extension that does not come with it
                    ours += imported("performer-pytorch", "performer_pytorch", performer(W))
            else:
                flops = 4.0 * B * T * H * D * (D + (64 if causal else 0))
                q, k = q.sigmoid(), k.sigmoid()
                ours = [
                    Alternative(name, lambda *x, c=causal, b=b: kernels.linear_attention(*x, causal=c, backend=b))
                    for name, b in FORMS
                ]
                if causal:
                    ours += imported("fla", "fla.ops.linear_attn", fla)
            yield f"B={B} T={T} H={H} D={D} {'causal' if causal else 'both ways'}", [q, k, v], ours, flops, moved


def vq_benchmarks() -> Benchmarks:
    """At the sizes of Long Range Arena and at the paper's, beside attention over all keys."""
    D = 128
    for B, T, S, L in ((32, 1024, 128, 64), (8, 4096, 128, 64), (4, 16384, 512, 512), (1, 65536, 512, 512)):
        codebook = randn(1, S, D, dtype=torch.bfloat16)
        codes = torch.randint(S, (B, T, 1), device="cuda")
        for causal in (True, False):
            q, k, v = (randn(B, T, 1, D, dtype=torch.bfloat16) for _ in range(3))
            ours = [
                Alternative(
                    name,
                    lambda q, k, v, c=causal, b=backend, book=codebook, codes=codes, L=L: kernels.vq_attention(
                        q / D**0.5, k, v, book, block_len=L, codes=codes, causal=c, backend=b
                    ),
                )
                for name, backend in FORMS
            ]
            ours += [sdpa(name, causal) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION")]
            flops = 4.0 * B * T * D * (S + (1.5 if causal else 3) * L)
            label = f"B={B} T={T} H=1 D={D} S={S} L={L} {'causal' if causal else 'both ways'}"
            yield label, [q, k, v], ours, flops, 2.0 * 4 * B * T * D


def accelerated(module: Any) -> Callable[..., Tensor]:
    """Its layout is [B, D, T], its coefficients one for each step."""

    def call(x: Tensor, a: Tensor) -> Tensor:
        x = x.transpose(1, 2).contiguous()
        return module.scan(a[:, None].expand_as(x).contiguous(), x).transpose(1, 2)

    return call


def flash_attn(causal: bool) -> Callable[[Any], Callable[..., Tensor]]:
    return lambda module: lambda *qkv: module.flash_attn_func(*qkv, causal=causal)


def fla(module: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: module.chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def favor(W: Tensor, causal: bool, backend: str) -> Callable[..., Tensor]:
    return lambda *qkv: kernels.favor_attention(*qkv, W, causal=causal, backend=backend)


def performer(W: Tensor) -> Callable[[Any], Callable[..., Tensor]]:
    """It draws one set of directions for all heads."""

    def wrap(module: Any) -> Callable[..., Tensor]:
        attend = module.FastAttention(W.shape[2], W.shape[1]).to(W)
        return lambda *qkv: attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    return wrap


BENCHMARKS: dict[str, Callable[[], Benchmarks]] = {
    "attention": partial(attention_benchmarks, "attention"),
    "linear_attention": partial(attention_benchmarks, "linear_attention"),
    "favor_attention": partial(attention_benchmarks, "favor_attention"),
    "gated_attention": gated_benchmarks,
    "diagonal_scan": scan_benchmarks,
    "vq_attention": vq_benchmarks,
}


def bench(operation: str) -> list[dict[str, Any]]:
    rows = []
    for label, inputs, alternatives, flops, moved in BENCHMARKS[operation]():
        inputs = [x.detach().requires_grad_() for x in inputs]
        for alternative in alternatives:
            row: dict[str, Any] = {"operation": operation, "shape": label, "name": alternative.name}
            try:
                w = torch.randn_like(alternative.call(*inputs))
                with torch.no_grad():
                    forward = do_bench(lambda a=alternative, x=inputs: a.call(*x), return_mode="median")

                def both(a: Alternative = alternative, x: list[Tensor] = inputs, w: Tensor = w) -> None:
                    torch.autograd.grad(a.call(*x), x, w)

                total = do_bench(both, return_mode="median")
                row |= {"forward_ms": forward, "both_ms": total}
                row |= {"forward_tflops": flops / forward / 1e9, "forward_gbs": moved / forward / 1e6}
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
            print(row, flush=True)
            torch.cuda.empty_cache()
    return rows


def ceilings() -> dict[str, float]:
    x = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    copy = 2 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median") / 1e6
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192**3 / do_bench(lambda: a @ a, return_mode="median") / 1e9
    return {"copy_gbs": copy, "product_tflops": product}


def table(rows: list[dict[str, Any]], most: dict[str, float]) -> str:
    """A line for each shape and alternative, and how many times as fast ours is as the best of the others."""
    lines = [
        f"copy {most['copy_gbs']:,.0f} GB/s, bfloat16 product {most['product_tflops']:,.0f} TFLOP/s\n",
        "| operation | shape | | forward ms | forward + backward ms | TFLOP/s | GB/s | against the best other |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "both_ms" not in row:
            lines.append(f"| {row['operation']} | {row['shape']} | {row['name']} | {row.get('error', '')} | | | | |")
            continue
        others = [
            r["both_ms"]
            for r in rows
            if (r["operation"], r["shape"]) == (row["operation"], row["shape"])
            and "both_ms" in r
            and not r["name"].startswith("seqzoo")
        ]
        ratio = f"{min(others) / row['both_ms']:.2f}" if others and row["name"] == "seqzoo" else ""
        lines.append(
            f"| {row['operation']} | {row['shape']} | {row['name']} | {row['forward_ms']:.3f} | {row['both_ms']:.3f} "
            f"| {row['forward_tflops']:.0f} | {row['forward_gbs']:.0f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--only", choices=sorted(OPERATIONS))
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    options = parser.parse_args()
    if not (options.check or options.bench):
        parser.error("choose --check, --bench or both")
    if not torch.cuda.is_available():
        print("no CUDA device: the kernels are tested on a CPU by pytest, and compiled by benchmarks/compile.py")
        return 1

    chosen = [options.only] if options.only else list(OPERATIONS)
    options.out.mkdir(parents=True, exist_ok=True)
    record = provenance.of_benchmark({"triton": triton.__version__, "unit": "ms, median"})
    record["hardware"] = provenance.hardware(torch.device("cuda"), 1)
    failed = False
    if options.check:
        found = {"canary": canary(), "rows": [row for name in chosen for row in check(name)]}
        failed = not all(row["passed"] for row in found["rows"])
        print(f"{sum(row['passed'] for row in found['rows'])} of {len(found['rows'])} checks passed")
        (options.out / "check.json").write_text(json.dumps({**record, **found}, indent=1) + "\n")
    if options.bench:
        most, rows = ceilings(), []
        for name in chosen:
            if all(row["passed"] for row in check(name, tables(name)[-1])):
                rows += bench(name)
            else:
                print(f"{name}: no figures, its check failed")
        (options.out / "bench.json").write_text(json.dumps({**record, "ceilings": most, "rows": rows}, indent=1) + "\n")
        (options.out / "bench.md").write_text(table(rows, most))
        print(table(rows, most))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
