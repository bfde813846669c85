"""What a program's own threads may do out of order is seen in the generated code, and what they may not is let be.

The compiler has no place in this process, where the interpreter has taken it: this file, run as a program, compiles its
kernels and prints what was found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import triton
import triton.language as tl
from generated import races

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def written_then_read(x, scratch, out, N, size, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Stored four at a time and, where `out` is in bfloat16, read back eight at a time: by other threads."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    sums = tl.zeros([BLOCK], tl.float32)
    for step in range(N):
        sums += tl.load(x + step * size + at, mask=inside, other=0.0)
        tl.store(scratch + step * size + at, sums, mask=inside)
    if BARRIER:
        tl.debug_barrier()
    for step in range(N):
        y = tl.load(scratch + step * size + at, mask=inside, other=0.0)
        tl.store(out + step * size + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def read_then_written(x, scratch, out, N, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """The read comes first in the text. In time, it follows the store of the round before."""
    at = tl.arange(0, BLOCK)
    for step in range(N):
        y = tl.load(scratch + (BLOCK - 1 - at))
        tl.debug_barrier()
        tl.store(out + step * BLOCK + at, y)
        tl.store(scratch + at, y + tl.load(x + step * BLOCK + at))
        if BARRIER:
            tl.debug_barrier()


@triton.jit
def overwritten(scratch, out, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Nothing is read after the store, but other threads may not have read yet."""
    at = tl.arange(0, BLOCK)
    y = tl.load(scratch + (BLOCK - 1 - at))
    tl.store(out + at, y)
    if BARRIER:
        tl.debug_barrier()
    tl.store(scratch + at, y)


@triton.jit
def carried_pointer(x, scratch, out, N, BLOCK: tl.constexpr):
    """The addresses of the store go through a loop, those of the read through a branch."""
    at = tl.arange(0, BLOCK)
    to = scratch + at
    for step in range(N):
        tl.store(to, tl.load(x + step * BLOCK + at))
        to += BLOCK
    back = scratch
    if N > 1:
        back = scratch + BLOCK
    tl.store(out + at, tl.load(back + (BLOCK - 1 - at)))


@triton.jit
def read_by_neighbours(scratch, out, N, size, BLOCK: tl.constexpr):
    """The layouts are the same, the addresses are one apart: an element is not read by the thread that wrote it."""
    at = tl.arange(0, BLOCK)
    for step in range(N):
        tl.store(scratch + step * size + at, at.to(tl.float32), mask=at < size)
    for step in range(N):
        tl.store(
            out + step * size + at, tl.load(scratch + step * size + at + 1, mask=at < size, other=0.0), mask=at < size
        )


@triton.jit
def moved_in_each_round(scratch, out, N, size, BLOCK: tl.constexpr):
    """One expression says where it is read and written, but of different rounds, which lie one apart."""
    at = tl.arange(0, BLOCK)
    for step in range(N):
        y = tl.load(scratch + step + at, mask=at < size, other=0.0)
        tl.debug_barrier()
        tl.store(scratch + step + at, y + 1, mask=at < size)
        tl.store(out + step * size + at, y, mask=at < size)


@triton.jit
def read_by_copies(scratch, out, BLOCK: tl.constexpr):
    """Fewer elements than threads: each is written by one, and read by several."""
    at = tl.arange(0, BLOCK)
    tl.store(scratch + at, at.to(tl.float32))
    tl.store(out + at, tl.load(scratch + at))


@triton.jit
def one_way(x, out, lengths, N, BLOCK: tl.constexpr):
    """Nothing is both written and read; where it is written was read, though."""
    at = tl.arange(0, BLOCK)
    first = tl.load(lengths)
    for step in range(N):
        tl.store(out + (first + step) * BLOCK + at, tl.load(x + step * BLOCK + at))


# By name: the kernel, the types of its pointers, its constants, and what is to be found: None, if nothing is shared.
FAULT, EARLY = "a read after a write", "a write after a read"
CASES = {
    "read after a loop": (written_then_read, ("fp32", "fp32", "bf16"), {"BARRIER": False}, FAULT),
    "barrier after the loop": (written_then_read, ("fp32", "fp32", "bf16"), {"BARRIER": True}, ""),
    "layouts are equal": (written_then_read, ("fp32", "fp32", "fp32"), {"BARRIER": False}, "exempt"),
    "stored in the round before": (read_then_written, ("fp32",) * 3, {"BARRIER": False}, FAULT),
    "barrier behind the store": (read_then_written, ("fp32",) * 3, {"BARRIER": True}, ""),
    "overwritten": (overwritten, ("fp32",) * 2, {"BARRIER": False}, EARLY),
    "barrier before it is overwritten": (overwritten, ("fp32",) * 2, {"BARRIER": True}, ""),
    "pointers in loops and branches": (carried_pointer, ("fp32",) * 3, {}, FAULT),
    "read by neighbours": (read_by_neighbours, ("fp32",) * 2, {}, FAULT),
    "moved in each round": (moved_in_each_round, ("fp32",) * 2, {}, FAULT),
    "read by several": (read_by_copies, ("fp32",) * 2, {"BLOCK": 64}, FAULT),
    "nothing is shared": (one_way, ("fp32", "fp32", "i64"), {}, None),
}


SLOW = [pytest.param(architecture, marks=pytest.mark.slow) for architecture in (80, 100, 120)]


@pytest.fixture(scope="module", params=[90, *SLOW], ids=lambda architecture: f"sm_{architecture}")
def found(request):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    command = [sys.executable, __file__, str(request.param)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("case", CASES)
def test_what_is_out_of_order_is_found(found, case):
    expected = CASES[case][-1]
    if expected is None:
        assert found[case] == []
        return
    [shared] = found[case]
    assert shared["name"] == "scratch"
    if expected == "exempt":
        assert shared["unordered"] == FAULT
        assert "one thread" in shared["exempt"]
        assert "sizePerThread" in shared["exempt"]
    else:
        assert expected in shared["unordered"]
        assert bool(shared["unordered"]) == bool(expected)
        assert shared["exempt"] == ""


PRODUCTS = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
{
    .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [kernel_param_0];
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
    cp.async.wait_group 0;
    bar.sync 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd2, %rd3, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned WAIT;
    BARRIER
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd1 + 0 ], 0x10, %r8;
    cp.async.commit_group;
    @%p2 bra $L__BB0_1;
    ret;
}
"""
PIPELINED = "ttng.warp_group_dot_wait %0 {pendings = 1 : i32}\nttg.async_copy_global_to_local"
EARLY_COPY = "a copy after a wait for some"
FUNCTION = "tt.func public @kernel(%x: !tt.ptr<bf16>) {\n}"


@pytest.mark.parametrize(
    ("barrier", "num_warps", "expected"),
    [("", 8, [EARLY_COPY]), ("bar.sync 0;", 8, [""]), ("bar.sync 1, 128;", 8, [EARLY_COPY]), ("", 4, [])],
    ids=["no barrier", "a barrier", "a barrier of some threads", "one warpgroup"],
)
def test_copies_wait_for_products_of_both_warpgroups(barrier, num_warps, expected):
    asm = {"ttir": FUNCTION, "ttgir": PIPELINED, "ptx": PRODUCTS.replace("WAIT", "1").replace("BARRIER", barrier)}
    found = races.of_kernel(["x"], asm, num_warps)
    assert [shared.unordered for shared in found] == expected
    assert all(shared.wrong == bool(shared.unordered) for shared in found)


@pytest.mark.parametrize(
    "instruction", ["call.uni helper, (%rd1)", "cp.async.bulk.shared.global [%r1], [%rd1], 16, [%r2]"]
)
def test_what_is_not_understood_is_an_error(instruction):
    text = PRODUCTS.replace("WAIT", "1").replace("BARRIER", f"{instruction};")
    with pytest.raises(ValueError, match="not understood"):
        races.accesses(races.ptx.Program(text), 0)


def main(architecture: int) -> None:
    import compile as compiler  # found in benchmarks/
    from launches import Launch

    results = {}
    for case, (kernel, pointers, constants, _) in CASES.items():
        constants = {"BLOCK": 1024, **constants}
        kinds = iter(pointers)
        types = {
            name: "constexpr" if name in constants else "i32" if name in ("N", "size") else f"*{next(kinds)}"
            for name in kernel.arg_names
        }
        divisible = [index for index, name in enumerate(types) if types[name] != "constexpr" and name != "N"]
        fixed = tuple(constants.items()), tuple(divisible), (("num_warps", 4),)
        launch = Launch(kernel, tuple(types.items()), *fixed)
        compiled = compiler.compile_launch(launch, architecture)
        shared = races.of_kernel(launch.arguments, compiled.asm, compiled.metadata.num_warps)
        results[case] = [asdict(one) for one in shared]
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]))
