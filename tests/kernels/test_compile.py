"""Triton kernels compile for every architecture without a GPU, spill no register, and have no race within a program.

On every change, of each kernel the widest heads on each architecture, which are the first to have too few registers or
too little memory; on sm_90, whose code is the one with most parts, also every row of the tables, switch and argument.
`-m slow`, every configuration of every kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
from generated import ptx

ROOT = Path(__file__).resolve().parents[2]
CODE = """
.visible .entry kernel(.param .u64 kernel_param_0)
{
    .loc 1 5 0                              // fused.py:5:0
$L__func_begin0:
    bar.sync 0;
    .pragma "nounroll";
$L__tmp1:
    ret;
$L__func_end0:
}
    .file 1 "/kernels/attention/fused.py"
    .section .debug_info
    {
.b64 $L__tmp1                               // DW_AT_low_pc
    }
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("1 5 0", "2 7 1", True),
        ("fused.py:5", "forward.py:7", True),
        ("attention/fused", "attention/forward", True),
        ("$L__tmp1", "$L__tmp2", True),
        ("// DW_AT_low_pc", "\n.b8 7", True),
        ("bar.sync 0", "bar.sync 1", False),
        ("nounroll", "unroll", False),
        (".u64", ".u32", False),
    ],
)
def test_a_digest_is_of_the_code_wherever_its_source_stands(old, new, same):
    assert old in CODE
    assert (ptx.digest(CODE.replace(old, new)) == ptx.digest(CODE)) == same


OPERATIONS = (
    *("attention", "delta_rule", "diagonal_scan", "favor_attention", "gated_attention", "linear_attention"),
    "vq_attention",
)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
WIDEST = ["--widest"]
# Every setting on every architecture; all of their combinations are hours, and the benchmark's own.
COVERING = ["--cover", *(f"--architecture={architecture}" for architecture in ARCHITECTURES)]


@pytest.mark.parametrize(
    ("operations", "extent"),
    [
        pytest.param(OPERATIONS, WIDEST, id="widest"),
        *(pytest.param([name], COVERING, id=f"covering-{name}", marks=pytest.mark.slow) for name in OPERATIONS),
    ],
)
def test_compiles_without_a_gpu(operations, extent, tmp_path):
    # In a process of its own: here the interpreter has taken the compiler's place.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    only = ["--only", *operations] if len(operations) == 1 else []
    command = [sys.executable, ROOT / "benchmarks" / "compile.py", *only, *extent, "--out", tmp_path]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    table, rows = (tmp_path / "compile.md").read_text(), json.loads((tmp_path / "compile.json").read_text())["rows"]
    wanted = (80, 90, 100) if extent == WIDEST else ARCHITECTURES
    assert {*product(operations, wanted)} <= {(row["operation"], row["architecture"]) for row in rows}
    assert all(f"| {operation} |" in table for operation in operations)
    shared = defaultdict(dict)
    for row in rows:
        shared[row["architecture"]][row["kernel"], row["configuration"]] = row["shared"]
    # What holds for the memory that sm_80's programs want holds for those that read the same rows.
    for newer in (86, 89):
        same = shared[80].keys() & shared[newer].keys()
        assert {launch: shared[newer][launch] for launch in same} == {launch: shared[80][launch] for launch in same}
