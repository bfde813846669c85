"""Compiles every configuration of every Triton kernel, on a machine without a GPU, and shows what the compiler made.

    python benchmarks/compile.py                       all of them, into results/compile.md and compile.json
    python benchmarks/compile.py --only diagonal_scan  one operation
    python benchmarks/compile.py --cover               a third of them, in which every setting still occurs

The operations run on tensors without data while launches are noted down in place of being made: what is compiled is
what a GPU would be given, with the same alignment. Each is then compiled for the architectures of `ARCHITECTURES`. A
spill, more shared memory than there is, or a matrix product without the matrix unit is an error: status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from seqzoo.kernels import backends
from seqzoo.training import provenance

ARCHITECTURES = {80: 166_912, 90: 232_448, 100: 232_448}  # and the bytes of shared memory a program may have
MULTIPROCESSORS = 132
MATRIX_UNIT = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
WORDS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that shapes its code."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, Any], ...]


@dataclass
class Compiled:
    operation: str
    kernel: str
    configuration: str
    architecture: int
    registers: int
    spilled: int  # bytes of stack
    shared: int  # bytes
    matrix_unit: str


def note(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
    """What Triton would specialise the kernel for."""
    given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **keywords}
    types, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and fixed):
            types.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            types.append((parameter.name, f"*{WORDS[value.dtype]}"))
            divisible.append(index)
        elif isinstance(value, float):
            types.append((parameter.name, "fp32"))
        else:
            types.append((parameter.name, "i32" if abs(value) < 2**31 else "i64"))
            if fixed and value % 16 == 0:
                divisible.append(index)
    return Launch(kernel, tuple(types), tuple(constants), tuple(divisible), tuple(sorted(given.items())))


@contextmanager
def noting(architecture: int) -> Iterator[list[Launch]]:
    """Launches inside are put on the list, each kind once, and none is made."""
    launches: dict[Launch, None] = {}

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches[note(self, arguments, keywords)] = None

    found: list[Launch] = []
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(backends, "architecture", return_value=architecture),
        mock.patch.object(backends, "multiprocessors", return_value=MULTIPROCESSORS),
    ):
        yield found
    found += launches


def covering(launches: list[Launch]) -> list[Launch]:
    """Some of them, in which each kernel still has every type of argument, constant and option that it has in all."""

    def settings(launch: Launch) -> set[tuple[Any, ...]]:
        return {(launch.kernel, *setting) for setting in (*launch.types, *launch.constants, *launch.options)}

    wanted = set().union(*map(settings, launches))
    chosen = []
    while wanted:
        chosen.append(max(launches, key=lambda launch: len(settings(launch) & wanted)))
        wanted -= settings(chosen[-1])
    return chosen


# What there is to compile: an operation, a launch of it, an architecture. Processes inherit it: kernels do not travel.
WORK: list[tuple[str, Launch, int]] = []


def compiled(index: int) -> Compiled:
    operation, launch, architecture = WORK[index]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.types),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    registers, spilled = resources(kernel.asm["cubin"])
    found = MATRIX_UNIT.search(kernel.asm["ptx"])
    pointers = "".join(f" {name}={kind[1:]}" for name, kind in launch.types if kind.startswith("*") and "i" not in kind)
    settings = " ".join(f"{name}={value}" for name, value in (*launch.constants, *launch.options))
    return Compiled(
        operation,
        launch.kernel.__name__,
        f"{pointers.strip()} {settings}",
        architecture,
        registers,
        spilled,
        kernel.metadata.shared,
        found.group(1) if found else "",
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def scans() -> Iterator[Callable[[], Any]]:
    """Both passes of the diagonal scan, few rows and many, wide and narrow."""
    from seqzoo.kernels.diagonal_scan import fused

    def both(B: int, T: int, D: int, dtype: torch.dtype, constant: bool, reverse: bool, padded: bool) -> None:
        x, a, state = meta(B, T, D, dtype=dtype), meta(*((D,) if constant else (B, T, D)), dtype=dtype), None
        lengths = meta(B, dtype=torch.int64) if padded else None
        if padded:
            state = meta(B, D, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        for factor in (None, meta(D, dtype=torch.float32)):
            h, final = fused.scan(x, a, state, reverse, lengths, factor)
            fused.scan_backward(h, final, h, a, state, reverse, lengths, factor)

    def two_ways(B: int, T: int, D: int, dtype: torch.dtype) -> None:
        x, a = meta(B, T, D, dtype=dtype), meta(D, dtype=dtype)
        for factor in (None, meta(D, dtype=torch.float32)):
            h = fused._both_scans._init_fn(x, a, None, factor)
            fused._both_scans_backward._init_fn(h, h, a, None, factor)

    yield lambda: two_ways(64, 1024, 1024, torch.complex64)
    yield lambda: two_ways(2, 16384, 256, torch.float32)
    for dtype, constant in ((torch.complex64, True), (torch.complex64, False), (torch.float32, False)):
        yield lambda d=dtype, c=constant: both(64, 1024, 1024, d, c, False, False)
        yield lambda d=dtype, c=constant: both(2, 16384, 256, d, c, True, True)
    yield lambda: both(2, 16384, 256, torch.bfloat16, True, True, True)
    yield lambda: both(3, 100, 24, torch.complex64, True, False, True)
    yield lambda: both(3, 100, 5, torch.float32, False, True, False)


def attentions() -> Iterator[Callable[[], Any]]:
    """Both passes of softmax attention, narrow heads and wide, with and without each option."""
    from seqzoo.kernels.attention import fused

    def both(D: int, dtype: torch.dtype, causal: bool, options: bool) -> None:
        B, T, H, G = 8, 1024, 8, 2 if options else 8
        q, k, v = meta(B, T, H, D, dtype=dtype), meta(B, T, G, D, dtype=dtype), meta(B, T, G, D, dtype=dtype)
        scales = meta(B, T) if options else None
        lengths = meta(B, dtype=torch.int64) if options else None
        arguments = (scales, 1.0, lengths, lengths)
        o, log_sum = fused._attention._init_fn(q, k, v, *arguments, causal)
        fused._attention_backward._init_fn(o, q, k, v, *arguments, o, log_sum, causal)

    for D in (32, 64, 128, 256):
        yield lambda D=D: both(D, torch.bfloat16, True, False)
    yield lambda: both(64, torch.float32, True, False)
    yield lambda: both(64, torch.bfloat16, False, False)
    yield lambda: both(16, torch.float16, False, True)
    yield lambda: both(112, torch.float16, True, True)


def linear_attentions() -> Iterator[Callable[[], Any]]:
    """Both passes of linear attention, few heads and many, narrow and wide, with each kind of decay."""
    from seqzoo.kernels.linear_attention import fused

    def both(
        B: int, T: int, H: int, D: int, dtype: torch.dtype, decay: str, causal: bool, normalize: bool, state: bool
    ) -> None:
        q, k, v = (meta(B, T, H, D, dtype=dtype) for _ in range(3))
        g = {"none": None, "head": meta(H), "step": meta(B, T, H)}[decay]
        initial = meta(B, H, D, D + normalize) if state else None
        options = (causal, normalize, state)
        o, last, inverse = fused._linear_attention._init_fn(q, k, v, g, initial, None, *options)
        fused._linear_attention_backward._init_fn(
            o, last, q, k, v, g, initial, None, o, last, inverse, *options, g is not None
        )

    for dtype in (torch.bfloat16, torch.float32):
        yield lambda d=dtype: both(64, 1024, 8, 64, d, "none", True, True, False)
        yield lambda d=dtype: both(2, 16384, 4, 64, d, "step", True, False, True)
        yield lambda d=dtype: both(64, 1024, 8, 64, d, "none", False, True, False)
    yield lambda: both(64, 1024, 8, 128, torch.bfloat16, "step", True, False, False)
    yield lambda: both(64, 1024, 8, 128, torch.float16, "head", True, False, False)
    yield lambda: both(64, 1024, 8, 32, torch.float16, "none", True, True, True)
    yield lambda: both(64, 1024, 2, 256, torch.bfloat16, "none", True, False, False)
    yield lambda: both(64, 1024, 2, 100, torch.bfloat16, "none", False, False, False)


def favor_attentions() -> Iterator[Callable[[], Any]]:
    """Both passes of FAVOR attention, causal from a state and not, with time in one segment and in several."""
    from seqzoo.kernels.favor_attention import fused

    def both(B: int, T: int, H: int, D: int, M: int, dtype: torch.dtype, causal: bool, options: bool) -> None:
        q, k, v, projection = *(meta(B, T, H, D, dtype=dtype) for _ in range(3)), meta(H, M, D, dtype=dtype)
        sums, norm = (meta(B, H, M, D), meta(B, H, M)) if options and causal else (None, None)
        arguments = (q, k, v, projection, sums, norm, norm, meta(B, dtype=torch.int64) if options else None)
        o, log_sum, *last = fused._favor_attention._init_fn(*arguments, causal)
        fused._favor_attention_backward._init_fn(o, *last[:2], *arguments, o, log_sum, *last, causal)

    for dtype in (torch.bfloat16, torch.float32):
        for causal in (False, True):
            yield lambda d=dtype, c=causal: both(32, 1024, 8, 64, 266, d, c, False)
    yield lambda: both(1, 16384, 4, 32, 110, torch.bfloat16, False, True)
    for dtype in (torch.bfloat16, torch.float16):
        yield lambda d=dtype: both(2, 4096, 4, 128, 256, d, True, True)
    yield lambda: both(2, 4096, 4, 32, 110, torch.float16, True, False)
    yield lambda: both(2, 4096, 4, 112, 300, torch.float16, False, False)


def vq_attentions() -> Iterator[Callable[[], Any]]:
    """Codes, and both passes of VQ attention, narrow and wide, with and without each option."""
    from seqzoo.kernels.vq_attention import fused, nearest

    def both(D: int, Dv: int, dtype: torch.dtype, causal: bool, options: bool, S: int = 128, L: int = 64) -> None:
        B, T, H = 8, 1024, 1
        q, k, v = (meta(B, T, H, n, dtype=dtype) for n in (D, D, Dv))
        codebook, codes = meta(H, S, D, dtype=dtype), meta(B, T, H, dtype=torch.int64)
        bias = meta(B, T, H, L + 1 if causal else 2 * L + 1) if options else None
        first = last = meta(B, dtype=torch.int64) if options else None
        resumed = options and causal
        past = (meta(B, H, S, Dv), meta(B, H, S, dtype=torch.int64)) if resumed else (None, None)
        outputs = fused._attention._init_fn(q, k, v, codebook, codes, bias, *past, first, last, L, causal)
        fused._attention_backward._init_fn(
            outputs[0], q, k, v, codebook, codes, bias, past[0], first, last, *outputs, L, causal, options, resumed
        )

    for dtype, D in ((torch.float32, 64), (torch.float32, 256), (torch.bfloat16, 128)):
        yield lambda d=dtype, D=D: nearest.nearest_code_fused._init_fn(
            meta(32, 1024, 1, D, dtype=d), meta(1, 512, D, dtype=d), meta(32, 1024, dtype=torch.bool)
        )
    for dtype in (torch.bfloat16, torch.float32):
        yield lambda d=dtype: both(128, 256, d, True, True)
        yield lambda d=dtype: both(128, 256, d, False, True)
        yield lambda d=dtype: both(64, 64, d, True, False)
    yield lambda: both(256, 512, torch.float16, True, True, 512, 512)
    yield lambda: both(16, 16, torch.float16, False, False, 16, 16)


def gated_attentions() -> Iterator[Callable[[], Any]]:
    """Both passes of gated attention, few sequences and many, narrow and wide, with and without each option."""
    from seqzoo.kernels.gated_attention import fused

    def both(
        B: int, T: int, S: int, E: int, C: int, dtype: torch.dtype, causal: bool, options: bool, state: bool = False
    ) -> None:
        u, v = (meta(B, T, E, dtype=dtype) for _ in range(2))
        q_quad, k_quad, q_lin, k_lin = (meta(B, T, S, dtype=dtype) for _ in range(4))
        bias = meta(C if causal else 2 * C - 1) if options else None
        initial, earlier = (meta(B, S, E), meta(B, dtype=torch.int64)) if state else (None, None)
        lengths = meta(B, dtype=torch.int64) if options else None
        inputs, where = (u, q_quad, k_quad, q_lin, k_lin, v, bias), (earlier, lengths)
        o, memory = fused._gated_attention._init_fn(*inputs, initial, *where, C, causal, 0.5)
        fused._gated_attention_backward._init_fn(o, *inputs, initial, *where, memory, C, causal, 0.5, options, state)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield lambda d=dtype: both(64, 1024, 128, 256, 256, d, True, True)
        yield lambda d=dtype: both(64, 1024, 64, 512, 200, d, False, True)
        yield lambda d=dtype: both(64, 1024, 128, 256, 256, d, True, True, True)
    yield lambda: both(2, 16384, 128, 1536, 256, torch.bfloat16, True, False)
    yield lambda: both(64, 200, 128, 256, 256, torch.bfloat16, True, True)
    yield lambda: both(2, 16384, 256, 512, 256, torch.bfloat16, True, True)
    yield lambda: both(2, 16384, 256, 512, 256, torch.bfloat16, True, True, True)
    yield lambda: both(4, 4096, 32, 64, 64, torch.bfloat16, True, False)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


CALLS = {
    "attention": attentions,
    "diagonal_scan": scans,
    "favor_attention": favor_attentions,
    "gated_attention": gated_attentions,
    "linear_attention": linear_attentions,
    "vq_attention": vq_attentions,
}
# Kernels that multiply no matrices: all others are nothing without the matrix unit.
WITHOUT_PRODUCTS = {"_scan_kernel", "_carry_kernel", "_outside_kernel"}


def wrong(row: Compiled) -> str:
    """What is the matter with it, nothing if empty."""
    if row.spilled:
        return f"spills {row.spilled} bytes"
    if row.shared > ARCHITECTURES[row.architecture]:
        return f"wants {row.shared} bytes of shared memory of {ARCHITECTURES[row.architecture]}"
    if row.kernel not in WITHOUT_PRODUCTS and not row.matrix_unit:
        return "multiplies matrices without the matrix unit"
    return ""


def table(rows: list[Compiled]) -> str:
    lines = [
        "| kernel | configuration | sm | registers | spilled | shared | matrix unit |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = (r.kernel, r.configuration, r.architecture, r.registers, r.spilled, r.shared, r.matrix_unit)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CALLS))
    parser.add_argument("--cover", action="store_true", help="compile a few in which every setting occurs")
    parser.add_argument("--out", type=Path, help="folder for compile.md and compile.json", default=Path("results"))
    options = parser.parse_args()

    for operation, calls in CALLS.items():
        if options.only in (None, operation):
            for architecture in ARCHITECTURES:
                with noting(architecture) as launches:
                    for call in calls():
                        call()
                chosen = covering(launches) if options.cover else launches
                WORK.extend((operation, launch, architecture) for launch in chosen)
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        rows = list(pool.map(compiled, range(len(WORK))))
    faults = [f"{r.kernel} on sm_{r.architecture} {wrong(r)}: {r.configuration}" for r in rows if wrong(r)]
    print(*faults, sep="\n", file=sys.stderr)
    print(f"{len(rows)} compilations, {len(faults)} faults")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {**provenance.of_benchmark({"triton": triton.__version__}), "rows": [asdict(row) for row in rows]}
    (options.out / "compile.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "compile.md").write_text(table(rows))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
