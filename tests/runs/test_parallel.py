from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import failing_at_the_last_validation, tiny_config
from torchrun import torchrun
from uneven_steps import CASES, first_step

from seqzoo.runs import run
from seqzoo.training import TrainingError
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


LOSSES = """
import json
import sys
from pathlib import Path
from seqzoo.runs import run
from seqzoo.training.loop import Stage
from tiny_runs import tiny_config, toy_task
folder, block, optimizer, strategy, parts = sys.argv[1:]
losses, real = [], Stage.differentiate
def differentiate(stage):
    loss = real(stage)
    if stage.folder.name != "forecast":
        losses.append(stage.fabric.all_reduce(loss.double(), reduce_op="mean").item())
    return loss
Stage.differentiate = differentiate
options = {"codebook_size": 8, "block_len": 8} if block == "vq_attention" else {}
model = {"dropout": 0.0, "num_layers": 2, "block": {"name": block, **options}, "position": "sinusoidal"}
stage = {"tokens": 4500, "optimizer": optimizer}
result = run(
    tiny_config(folder, model=model, finetuning=stage, strategy=strategy, sequence_parallel=int(parts)),
    task=toy_task(),
)
told = {"losses": losses, "correct": round(result["test"]["accuracy"] * result["n_test"])}
Path(result["folder"], "told.json").write_text(json.dumps(told))
"""

KILLED = """
import os
import sys
from pathlib import Path
from seqzoo.runs import run
from tiny_runs import tiny_config, toy_task
folder, strategy, parts = sys.argv[1:]
Path(folder, f"pid {os.environ['RANK']}").write_text(str(os.getpid()))
model = {"dropout": 0.0, "block": {"name": "lru"}}
run(
    tiny_config(
        folder, model=model, finetuning={"tokens": 16000, "evaluations": 16}, strategy=strategy,
        sequence_parallel=int(parts),
    ),
    task=toy_task(),
)
"""


SHARED = """
import os
import sys
import time
from seqzoo.runs import folder, run
from tiny_runs import tiny_config, toy_task
remove_left = folder.remove_left
def slowly(*arguments):  # while another rank comes
    time.sleep(0.5)
    remove_left(*arguments)
folder.remove_left = slowly
run(tiny_config(sys.argv[1], pretrain=True, finetuning={"lr": 1e-3}), task=toy_task())
"""

WINDOW = """
import sys
import time
from pathlib import Path
from pytest import approx
from uneven_steps import uneven_stage
folder = Path(sys.argv[1])
whole = uneven_stage("class", folder, batch_size=8)
whole.started, whole.seconds_before = time.monotonic(), 0.0
for _ in range(3):
    whole.take_step()
before = {key: total.item() for key, total in whole.summed().items()}
whole.save()
whole.fabric.barrier()
again = uneven_stage("class", folder, batch_size=8)
assert before["count"] == 24, before
assert {key: total.item() for key, total in again.summed().items()} == before == again.state.window
for stage in (whole, again):
    stage.take_step()
told = [{key: total.item() for key, total in stage.summed().items()} for stage in (whole, again)]
assert told[0] == approx(told[1])
"""


def start(script: str, tmp_path: Path, *arguments: str, processes: int) -> None:
    """Runs a script in some processes."""
    subprocess.run(**torchrun(script, tmp_path, *arguments, processes=processes), check=True, timeout=300)


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
def test_processes_do_not_find_each_other_at_work_on_a_pretraining(task, tmp_path):
    """One that another run began, and that none has in hand."""
    with failing_at_the_last_validation(), pytest.raises(TrainingError, match="out of luck"):
        run(tiny_config(tmp_path / "runs", pretrain=True), task=task)
    start(SHARED, tmp_path, str(tmp_path / "runs"), processes=2)
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["pretrain_run"] is None


@pytest.mark.slow
def test_a_line_of_metrics_is_of_all_processes_though_a_checkpoint_lies_in_it(tmp_path):
    start(WINDOW, tmp_path, str(tmp_path), processes=2)


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


def told(tmp_path: Path, name: str, *arguments: str, processes: int) -> dict:
    start(LOSSES, tmp_path, str(tmp_path / name), *arguments, processes=processes)
    (path,) = (tmp_path / name).glob("*/told.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "optimizer"), [("lru", "adamw"), ("vq_attention", "adamw"), ("softmax_attention", "muon")]
)
def test_processes_have_the_losses_of_one(block, optimizer, tmp_path):
    """Of the first 50 steps, whatever they share out; and of the test as many right but for one."""
    one = told(tmp_path, "1", block, optimizer, "auto", "1", processes=1)
    cases = [(n, strategy, 1) for n in (2, 4) for strategy in ("ddp", "fsdp")]
    if block == "lru":
        cases += [(2, "ddp", 2), (4, "fsdp", 2)]
    for processes, strategy, parts in cases:
        case = f"{processes} {strategy} {parts}"
        several = told(tmp_path, case, block, optimizer, strategy, str(parts), processes=processes)
        assert several["losses"][:50] == pytest.approx(one["losses"][:50], abs=1e-5), case
        assert abs(several["correct"] - one["correct"]) <= 1, case


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "parts", "killed"), [("ddp", 1, 1), ("fsdp", 1, 0), ("ddp", 2, 1)])
def test_a_killed_process_ends_in_a_restart(strategy, parts, killed, tmp_path):
    """Of all of them, from the last checkpoint and to the end; on a quiet machine it takes some ten seconds."""
    command = torchrun(KILLED, tmp_path, str(tmp_path), strategy, str(parts), restarts=3)

    def validations() -> int:
        return sum(path.read_text().count("val/loss") for path in tmp_path.glob("*/metrics.jsonl"))

    def wait_for(happened) -> float:
        began = time.monotonic()
        while not happened():
            assert process.poll() is None
            assert time.monotonic() - began < 240
            time.sleep(0.05)
        return time.monotonic() - began

    with subprocess.Popen(**command) as process:
        try:
            wait_for(lambda: validations() >= 3)
            before, first = validations(), int((tmp_path / f"pid {killed}").read_text())
            os.kill(first, signal.SIGKILL)
            seconds = wait_for(lambda: validations() > before)
            print(f"{strategy}, {parts} parts: a validation {seconds:.1f} s after the kill")
            assert process.wait(240) == 0
        finally:
            process.kill()
    assert int((tmp_path / f"pid {killed}").read_text()) != first
    assert validations() == 16
