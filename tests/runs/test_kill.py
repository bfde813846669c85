"""A process that dies without a word, again and again, and the run that it was training."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import wait_for_training

from seqzoo.training.checkpoint import load_checkpoint

SCRIPT = """
import sys
import torch
from tiny_runs import tiny_config, toy_task
from seqzoo.runs import run
torch.set_num_threads(1)
stages = {"pretraining": {"tokens": 40_000}, "finetuning": {"tokens": 80_000}}
run(tiny_config(sys.argv[1], pretrain=True, **stages), task=toy_task())
"""


def start(folder: Path) -> subprocess.Popen:
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait(timeout=300) == 0
    draw = random.Random(0)
    for _ in range(4):
        process = start(cut)
        wait_for_training(process, cut)
        time.sleep(2 * draw.random())
        process.kill()
        process.wait()
    assert start(cut).wait(timeout=300) == 0

    (expected,), (continued,) = whole.iterdir(), cut.iterdir()
    for stage in ("pretrain", "finetune"):
        before, after = (load_checkpoint(folder / stage / "last.safetensors") for folder in (expected, continued))
        for name, tensor in before.weights.items():
            assert torch.equal(after.weights[name], tensor), name
        assert after.state["tokens"] == before.state["tokens"]
