"""Training for as long as there is time, tried without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_gpu.log import read

ROOT = Path(__file__).resolve().parents[2]
NOT_THERE = ("wandb", "pooch", "submitit", "peft", "lightning")


@pytest.fixture
def bare(tmp_path):
    """An environment with nothing of what `gpu_train.txt` leaves out."""
    (tmp_path / "bare").mkdir()
    blocked = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in NOT_THERE)
    (tmp_path / "bare" / "sitecustomize.py").write_text(blocked)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "bare"), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}


def test_packages_are_those_the_tests_ran_with():
    wanted = [line for line in (ROOT / "benchmarks" / "gpu_train.txt").read_text().splitlines() if line[0] != "#"]
    assert wanted
    assert set(wanted) <= set((ROOT / "constraints.txt").read_text().splitlines())


@pytest.mark.slow
def test_steps_are_timed_and_a_run_is_begun_and_gone_on_with(bare, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, ROOT / "benchmarks" / "gpu_train.py", "--recipe", "tiny", "--models", "lru", "--steps", "2",
        "--tasks", "selective_copying", "--stages", "finetune", "--out", out,
    ]  # fmt: skip
    short = ["pretrain=false", "finetuning.tokens=20000", "finetuning.evaluations=1", "n_test=50", "n_val=50"]
    begun = subprocess.run([*command, "--deadline", "1", *short], env=bare, capture_output=True, text=True)
    assert begun.returncode == 3, begun.stdout + begun.stderr
    assert json.loads((out / "step.json").read_text())["not_reached"]

    done = subprocess.run([*command, "--deadline", "300", *short], env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out, "step")
    assert {row["form"] for row in rows} == {"fp32-eager", "fp32-compiled"}
    assert all(row["tokens_per_second"] > 0 and row["mfu"] > 0 for row in rows)
    assert len(list(out.glob("*/result.json"))) == 1

    report = [sys.executable, ROOT / "eval_lra.py", str(out), "--out", str(tmp_path / "report")]
    shown = subprocess.run(report, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "lru" in shown.stdout
