"""Compiles every configuration of every Triton kernel, on a machine without a GPU, and shows what the compiler made.

    python benchmarks/compile.py                       all of them, into results/compile.md and compile.json
    python benchmarks/compile.py --only diagonal_scan  one operation
    python benchmarks/compile.py --cover               some of them, in which every setting still occurs
    python benchmarks/compile.py --widest              fewer yet, which is what tests compile on every change

The launches of `launches.py` are compiled for the architectures of `ARCHITECTURES`. Status 1, if one of them wants more
shared memory than there is, multiplies matrices without the matrix unit, or has threads that do not wait for each other
where they must (`generated/races.py`), or if it spills, with the version of Triton that block sizes were chosen with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import launches
import triton
from generated import ptx, races
from launches import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqzoo.runs import provenance

# And the bytes of shared memory that a program may have. What runs on sm_80 runs on sm_86 and sm_89 too, from the same
# rows of the tables, so that its programs have to do with as little as there is on those.
ARCHITECTURES = {80: 101_376, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
COVERED = (80, 90, 100, 120)
GATED = (80, 90, 100)  # on every change
CHOSEN_WITH = "3.7.1"  # the version of Triton for block sizes; what another one spills is told, and no fault
MATRIX_UNIT = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")


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
    code: str  # its digest: rows with the same one are the same program
    shared_by_threads: list[races.Shared]


# What there is to compile: an operation, a launch of it, an architecture. Processes inherit it: kernels do not travel.
WORK: list[tuple[str, Launch, int]] = []


def compiled(index: int) -> Compiled:
    operation, launch, architecture = WORK[index]
    kernel = compile_launch(launch, architecture)
    registers, spilled = resources(kernel.asm["cubin"])
    found = MATRIX_UNIT.search(kernel.asm["ptx"])
    return Compiled(
        operation,
        launch.kernel.__name__,
        str(launch),
        architecture,
        registers,
        spilled,
        kernel.metadata.shared,
        found.group(1) if found else "",
        ptx.digest(kernel.asm["ptx"]),
        races.of_kernel(launch.arguments, kernel.asm, kernel.metadata.num_warps),
    )


def compile_launch(launch: Launch, architecture: int) -> Any:
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.types),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


# Kernels that multiply no matrices: all others are nothing without the matrix unit.
WITHOUT_PRODUCTS = {"_scan_kernel", "_carry_kernel", "_decay_kernel", "_outside_kernel"}


def least_spilled(row: Compiled) -> int:
    """Bytes that it spills with the best of blocks: 8 of linear attention with a decay a step, in float32 on sm_120."""
    never_fits = {"PER_STEP=True", "PRECISION=tf32x3"} <= set(row.configuration.split())
    return 8 if (row.kernel, row.architecture) == ("_linear_kernel", 120) and never_fits else 0


def wrong(row: Compiled) -> str:
    """What is the matter with it, nothing if empty."""
    if row.spilled > least_spilled(row) and triton.__version__ == CHOSEN_WITH:
        return f"spills {row.spilled} bytes"
    if row.shared > ARCHITECTURES[row.architecture]:
        return f"wants {row.shared} bytes of shared memory of {ARCHITECTURES[row.architecture]}"
    if row.kernel not in WITHOUT_PRODUCTS and not row.matrix_unit:
        return "multiplies matrices without the matrix unit"
    return ", ".join(
        f"has no barrier before {shared.unordered} of {shared.name}" for shared in row.shared_by_threads if shared.wrong
    )


def table(rows: list[Compiled]) -> str:
    lines = [
        "| operation | kernel | configuration | sm | registers | spilled | shared | matrix unit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = (
            *(r.operation, r.kernel, r.configuration, r.architecture),
            *(r.registers, r.spilled, r.shared, r.matrix_unit),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def threads_table(rows: list[Compiled]) -> str:
    """What threads of a program share, and what holds their accesses to it apart."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        for shared in row.shared_by_threads:
            held = shared.exempt or shared.unordered or "a barrier"
            held = f"**nothing: {held}**" if shared.wrong else held
            found.setdefault((row.operation, row.kernel, shared.name, held), []).append(row.architecture)
    lines = ["| operation | kernel | shared | held apart by | sm | compilations |", "|---|---|---|---|---|---|"]
    for what, architectures in found.items():
        cells = (*what, " ".join(map(str, sorted(set(architectures)))), len(architectures))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(launches.CALLS))
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--cover", action="store_true", help="compile a few in which every setting occurs")
    extent.add_argument("--widest", action="store_true", help="compile of each kernel the widest heads")
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES, help="of these only")
    parser.add_argument("--out", type=Path, help="folder for what is written", default=Path("results"))
    options = parser.parse_args()

    usual = GATED if options.widest else COVERED if options.cover else tuple(ARCHITECTURES)
    for operation in [options.only] if options.only else launches.CALLS:
        for architecture in options.architecture or usual:
            chosen = launches.of_operation(operation, architecture)
            if options.widest:
                chosen = launches.widest(chosen, architecture)
            elif options.cover or architecture not in COVERED:
                chosen = launches.covering(chosen, architecture)
            WORK.extend((operation, launch, architecture) for launch in chosen)
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        rows, faults = [], 0
        for row in pool.map(compiled, range(len(WORK))):
            rows.append(row)
            if wrong(row):
                faults += 1
                print(f"{row.kernel} on sm_{row.architecture} {wrong(row)}: {row.configuration}", file=sys.stderr)
    print(f"{len(rows)} compilations, {faults} faults, {sum(row.spilled > 0 for row in rows)} with spills")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {**provenance.of_benchmark({"triton": triton.__version__}), "rows": [asdict(row) for row in rows]}
    (options.out / "compile.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "compile.md").write_text(f"{table(rows)}\n{threads_table(rows)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
