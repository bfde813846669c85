"""Triton kernels compile for every architecture without a GPU, spill no register, and have no race within a program.

On every change a covering set; `-m slow`, every configuration of every kernel.
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
@pytest.mark.parametrize("extent", [["--cover"], pytest.param([], marks=pytest.mark.slow)], ids=["covering", "all"])
def test_compiles_without_a_gpu(operation, extent, tmp_path):
    # In a process of its own: here the interpreter has taken the compiler's place.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "compile.py", "--only", operation, *extent, "--out", tmp_path]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"| {operation} |" in (tmp_path / "compile.md").read_text()
    shared = defaultdict(dict)
    for row in json.loads((tmp_path / "compile.json").read_text())["rows"]:
        shared[row["architecture"]][row["kernel"], row["configuration"]] = row["shared"]
    assert {80, 90, 100, 120} <= shared.keys()
    # What holds for the memory that sm_80's programs want holds for those that read the same rows.
    for newer in (86, 89):
        same = shared[80].keys() & shared[newer].keys()
        assert {launch: shared[newer][launch] for launch in same} == {launch: shared[80][launch] for launch in same}
