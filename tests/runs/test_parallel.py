from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from uneven_steps import CASES, first_step

from seqzoo.training.checkpoint import load_checkpoint

SCRIPT = """
import sys
from tiny_runs import tiny_config, toy_task
from seqzoo.runs import run
pretrain = sys.argv[2] == "pretrain"
run(tiny_config(sys.argv[1], pretrain=pretrain, model={"dropout": 0.0}), task=toy_task())
"""


STEPS = """
import sys
from pathlib import Path
import torch
from uneven_steps import CASES, first_step
for case in CASES:
    for accumulate in (1, 2):
        cut = {"batch_size": 8 // accumulate, "accumulate": accumulate}
        step = first_step(case, Path(sys.argv[1]), block="vq_attention", **cut)
        if torch.distributed.get_rank() == 0:
            torch.save(step, f"{sys.argv[1]}/{case} {accumulate}")
"""


def start(script: str, tmp_path: Path, *arguments: str, processes: int) -> None:
    """Runs a script in some processes."""
    path = tmp_path / "script.py"
    path.write_text(script)
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([sys.executable, *launcher, str(path), *arguments], env=environment, check=True, timeout=300)


def launch(tmp_path: Path, name: str, *, processes: int, kind: str) -> Path:
    """Trains in some processes; returns the run folder."""
    start(SCRIPT, tmp_path, str(tmp_path / name), kind, processes=processes)
    (folder,) = (tmp_path / name).iterdir()
    return folder


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    one, two = (launch(tmp_path, str(n), processes=n, kind="scratch") for n in (1, 2))
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for key in ("tokens_seen", "n_test", "params"):
        assert results[0][key] == results[1][key], key
    assert results[1]["test"]["loss"] == pytest.approx(results[0]["test"]["loss"], rel=1e-3)
    weights = load_checkpoint(two / "finetune" / "last.safetensors").weights
    for name, tensor in load_checkpoint(one / "finetune" / "last.safetensors").weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_pretrain(tmp_path):
    folder = launch(tmp_path, "runs", processes=2, kind="pretrain")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if line["stage"] == "pretrain" and "val/loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert json.loads((folder / "result.json").read_text())["tokens_seen"]["pretrain"] >= 2400


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    """Whatever each of them asks for."""
    start(STEPS, tmp_path, str(tmp_path), processes=2)
    for case in CASES:
        whole = first_step(case, tmp_path, block="vq_attention", batch_size=8, accumulate=1)
        for accumulate in (1, 2):
            step = torch.load(tmp_path / f"{case} {accumulate}")
            assert step.keys() == whole.keys()
            for name, tensor in whole.items():
                torch.testing.assert_close(step[name], tensor, rtol=1e-4, atol=1e-6, msg=f"{case}: {name}")
