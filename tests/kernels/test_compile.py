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
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "operation",
    ["attention", "diagonal_scan", "favor_attention", "gated_attention", "linear_attention", "vq_attention"],
)
@pytest.mark.parametrize("extent", [["--widest"], pytest.param([], marks=pytest.mark.slow)], ids=["widest", "all"])
def test_compiles_without_a_gpu(operation, extent, tmp_path):
    # In a process of its own: here the interpreter has taken the compiler's place.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "compile.py", "--only", operation, *extent, "--out", tmp_path]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"| {operation} |" in (tmp_path / "compile.md").read_text()
    wanted = defaultdict(set)
    for row in json.loads((tmp_path / "compile.json").read_text())["rows"]:
        wanted[row["architecture"]].add((row["kernel"], row["configuration"], row["shared"]))
    assert {80, 90, 100, 120} <= wanted.keys()
    # What holds for the memory that sm_80's programs want holds for these, which read the same rows.
    assert wanted[86] <= wanted[80]
    assert wanted[89] <= wanted[80]
