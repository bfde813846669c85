from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.local.local import LocalJobEnvironment
from tiny_runs import tiny_config, toy_task, wait_for_training

from seqzoo.config import CONFIGS, ConfigError, LauncherConfig, compose
from seqzoo.runs import campaign, run
from seqzoo.runs.campaign import expand, plan
from seqzoo.runs.cli import main
from seqzoo.runs.folder import Busy, in_hand
from seqzoo.runs.launch import Run, launch
from seqzoo.training import Interrupted

SCRIPT = Path(__file__).resolve().parents[2] / "train.py"
LISTOPS = [
    *("task=lra_listops", "recipe=tiny", "task.max_length=32", "task.min_length=4", "task.length_bound=24"),
    *("task.max_depth=3", "task.num_train=400", "task.num_val=50", "task.num_test=50", "task.workers=1"),
    *("model.d_model=16", "model.num_layers=1", "device=cpu", "wandb.mode=disabled"),
    *("pretraining.tokens=4000", "pretraining.batch_size=8", "finetuning.tokens=4000", "finetuning.batch_size=8"),
]


@pytest.fixture(scope="module")
def task():
    return toy_task()


@pytest.fixture
def listops(tmp_path) -> list[str]:
    return [*LISTOPS, f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]


def results(runs: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/result.json")}


def test_the_order_makes_the_table_useful_early():
    cells, failed = plan(
        expand(
            [
                "model=vq_transformer,lru,transformer",
                "task=smnist,lra_text,lra_image",
                "pretrain=true,false",
                "seed=1,0",
                "recipe=tiny",
            ]
        )
    )
    assert not failed
    order = [(c.config.seed, c.config.model.name, c.config.task.name, c.config.pretrain) for c in cells]
    assert len(order) == 36
    assert order[:5] == [
        (0, "transformer", "lra_image", False),
        (0, "transformer", "lra_image", True),
        (0, "lru", "lra_image", False),
        (0, "lru", "lra_image", True),
        (0, "transformer", "lra_text", False),
    ]
    assert order[12][1:3] == ("vq_transformer", "lra_image")
    assert [seed for seed, *_ in order] == [0] * 18 + [1] * 18


def test_runs_that_are_the_same_are_one():
    cells, _ = plan(expand(["objective=masked,causal", "pretrain=false,true", "recipe=tiny", "model=lru"]))
    assert [(cell.config.pretrain, cell.config.objective) for cell in cells] == [
        (False, "masked"),
        (True, "masked"),
        (True, "causal"),
    ]


def test_a_run_whose_data_are_missing_leaves_the_others(tmp_path, capsys):
    texts = f"task.text={tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"
    (tmp_path / "b.txt").write_text("to be or not to be " * 200)
    cells, failed = plan(expand(["task=char_lm", "model=lru", "causal=true", "recipe=tiny", texts]))
    assert [Path(cell.config.task.text).name for cell in cells] == ["b.txt"]
    assert len(failed) == 1
    assert "a.txt" in failed[0]
    assert "a.txt" in capsys.readouterr().err


def test_a_sweep_of_one_run_is_launched_too(listops, monkeypatch):
    launched = []

    def launch(cells, launcher, folder):
        launched.extend(cells)
        return iter(())

    monkeypatch.setattr("seqzoo.runs.campaign.launch", launch)
    main(["-m", *listops, "launcher=local"])
    assert len(launched) == 1


def test_a_pretraining_is_shared(task, tmp_path, monkeypatch):
    first = run(tiny_config(tmp_path, pretrain=True), task=task)
    trained = []
    stage = sys.modules["seqzoo.training.loop"].Stage
    monkeypatch.setattr(stage, "run", lambda self, old=stage.run: trained.append(self.name) or old(self))
    second = run(tiny_config(tmp_path, pretrain=True, finetuning={"lr": 1e-3}), task=task)
    assert trained == ["finetune"]
    assert second["pretrain_run"] == Path(first["folder"]).name
    assert second["tokens_seen"]["pretrain"] == first["tokens_seen"]["pretrain"]
    assert not (Path(second["folder"]) / "pretrain").exists()
    named = run(tiny_config(tmp_path, pretrain=first["folder"], finetuning={"lr": 1e-3}), task=task)
    assert named["test"] == second["test"]
    for change in ({"seed": 1}, {"pretraining": {"lr": 1e-3}}, {"model": {"d_model": 8}}, {"objective": "causal"}):
        trained.clear()
        assert run(tiny_config(tmp_path, pretrain=True, **change), task=task)["pretrain_run"] is None, change
        assert trained == ["pretrain", "finetune"], change


def test_what_another_process_has_in_hand_is_left_to_it(task, tmp_path):
    config = tiny_config(tmp_path, pretrain=True)
    done = run(config, task=task)
    folder = Path(done["folder"])
    (folder / "result.json").unlink()
    with in_hand(folder):
        with pytest.raises(Busy, match=f"at work on {folder}"):
            run(config, task=task)
        other = tiny_config(tmp_path, pretrain=True, finetuning={"lr": 1e-3})
        assert run(other, task=task)["pretrain_run"] == folder.name, "its pretraining is finished"
        (folder / "pretrain" / "summary.json").unlink()
        with pytest.raises(Busy, match=f"at work on {folder}"):
            run(tiny_config(tmp_path, pretrain=True, finetuning={"lr": 1e-4}), task=task)
    assert run(config, task=task)["test"] == done["test"]


def test_the_deadline_stops_a_run_that_then_continues(task, tmp_path):
    whole = run(tiny_config(tmp_path / "whole"), task=task)
    config = tiny_config(tmp_path / "parts")
    with pytest.raises(Interrupted):
        run(config, task=task, deadline=time.monotonic())
    (folder,) = (tmp_path / "parts").glob("toy-*")
    assert (folder / "finetune" / "last.safetensors").exists()
    assert run(config, task=task)["test"] == whole["test"]


def test_a_campaign_stops_when_its_time_is_up_and_goes_on(listops, tmp_path, capsys):
    sweep = ["-m", *listops, "model=lru", "pretrain=false,true", "seed=0"]
    assert main([*sweep, "budget=0.1s"]) == 3
    said = capsys.readouterr()
    assert "unfinished: " in said.out
    assert main(sweep) == 0
    assert "2 of 2 runs finished" in capsys.readouterr().out
    whole = [argument.replace("/runs", "/whole") for argument in sweep]
    assert main(whole) == 0
    parts, at_once = results(tmp_path / "runs"), results(tmp_path / "whole")
    assert parts.keys() == at_once.keys()
    assert all(parts[name]["test"] == at_once[name]["test"] for name in parts)
    capsys.readouterr()
    assert main(sweep) == 0
    assert "2 runs: 2 finished, 0 begun, 0 to begin" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["9", "0m", "m", "9 minutes", "-1s"])
def test_a_budget_is_a_duration(budget):
    with pytest.raises(ConfigError, match=f"budget={budget}: valid: a number above 0 and s, m, h or d"):
        compose([f"budget='{budget}'"])


def test_jobs_have_no_budget():
    with pytest.raises(ConfigError, match=r"valid: launcher.options.timeout_min"):
        compose(["budget=9m", "launcher=slurm"])
    with pytest.raises(ConfigError, match=r"launcher.parallel=0: valid: 1 or more"):
        compose(["launcher=local", "launcher.parallel=0"])


def test_studies_stand_for_sweeps(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "sizes.yaml").write_text("size: params:50k,params:100k\npretrain: false,true\n")
    monkeypatch.setattr("seqzoo.runs.campaign.CONFIGS", tmp_path)
    sweep = ["size=params:50k,params:100k", "pretrain=false,true"]
    assert expand(["study=sizes", "model=lru"]) == expand([*sweep, "model=lru"])
    assert expand(["study=sizes", "size=params:70k"]) == expand([sweep[1], "size=params:70k"])
    with pytest.raises(ConfigError, match=r"no study 'size'.*valid: sizes"):
        expand(["study=size"])


def test_a_study_may_have_parts_that_come_one_after_another(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "two.yaml").write_text(
        "- {model: 'lru,transformer', seed: '0,1', pretrain: true}\n- {model: 's4d,lru', pretrain: 'true,false'}\n"
    )
    monkeypatch.setattr("seqzoo.runs.campaign.CONFIGS", tmp_path)
    cells, failed = plan(expand(["study=two", "task=lra_text", "recipe=tiny"]))
    assert not failed
    assert [(cell.config.seed, cell.config.model.name, cell.config.pretrain) for cell in cells] == [
        (0, "transformer", True),
        (0, "lru", True),
        (1, "transformer", True),
        (1, "lru", True),
        (0, "lru", False),
        (0, "s4d", False),
        (0, "s4d", True),
    ]
    first, second = expand(["study=two", "model=flash", "size=params:50k"])
    assert [len(first), len(second)] == [2, 2]
    assert all({"model=flash", "size=params:50k"} < set(run) for run in (*first, *second))


@pytest.mark.parametrize("study", sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml")))
def test_every_study_can_be_run(study):
    cells, failed = plan(expand([f"study={study}", "task=lra_text", "model=lru", "recipe=tiny"]))
    assert not failed
    assert len(cells) >= 3
    assert any(cell.config.pretrain for cell in cells)


def test_runs_that_differ_in_plain_keys_are_composed_once(monkeypatch):
    composed = []
    monkeypatch.setattr(campaign, "compose", lambda overrides: composed.append(overrides) or compose(overrides))
    sweep = [
        "task=lra_text",
        "model=lru",
        "recipe=tiny",
        "seed=0,1",
        "share=0,0.5",
        "pretrain=true",
        "augment=True,false",
    ]
    cells, failed = plan(expand(sweep))
    assert not failed
    assert len(cells) == 8
    assert len(composed) == 1
    assert all(cell.config == compose(cell.overrides) for cell in cells)
    composed.clear()
    _, failed = plan(expand([*sweep[:3], "seed=-1,0x1", "share=0.5,2"]))
    assert len(failed) == 4
    assert len(composed) == 5, "what cannot be run is told by what composes all of it"


def test_a_long_sweep_says_that_it_is_being_composed(monkeypatch, capsys):
    monkeypatch.setattr(campaign, "QUIET", 0.0)
    plan(expand(["task=lra_text", "model=lru", "recipe=tiny", "seed=0,1"]))
    assert capsys.readouterr().out.splitlines() == ["0 of 2 runs composed", "1 of 2 runs composed"]


def test_half_of_a_budget_is_its_own_scratch_partner():
    cells, _ = plan(expand(["study=budget", "task=lra_text", "model=lru", "recipe=tiny"]))
    budgets = [(cell.config.pretrain, cell.config.finetuning.tokens) for cell in cells]
    for pretrained, tokens in budgets:
        assert not pretrained or (False, 2 * tokens) in budgets


@pytest.mark.slow
def test_a_killed_campaign_goes_on_where_it_was(listops, tmp_path):
    longer = [argument.replace("tokens=4000", "tokens=20000") for argument in listops]
    sweep = ["-m", *longer, "model=lru,transformer", "pretrain=false,true"]
    assert main(sweep) == 0
    whole = results(tmp_path / "runs")
    killed = [argument.replace("/runs", "/killed") for argument in sweep]
    command = [sys.executable, str(SCRIPT), *killed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as here: their number decides the order of sums
    kills = 0
    for seconds in (0.2, 0.5, 0.8):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_training(process, tmp_path / "killed")
        time.sleep(seconds)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 2
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "4 of 4 runs finished" in done.stdout
    again = results(tmp_path / "killed")
    assert again.keys() == whole.keys()
    for name, result in again.items():
        assert result["test"] == whole[name]["test"], name
        assert result["tokens_seen"] == whole[name]["tokens_seen"], name


def test_jobs_of_this_machine(listops, tmp_path, capsys):
    sweep = [*listops, "model=lru", "pretrain=true", "finetuning.lr=1e-3,2e-3,3e-3"]
    assert main(["-m", *sweep, "launcher=local", "launcher.parallel=2"]) == 0
    said = capsys.readouterr().out
    assert said.count("job ") == 3
    assert "3 of 3 runs finished" in said
    finished = results(tmp_path / "runs").values()
    assert [result["pretrain_run"] is None for result in finished].count(True) == 1, "one pretraining for all"
    assert main(["-m", *sweep]) == 0
    assert "3 runs: 3 finished" in capsys.readouterr().out


@pytest.mark.parametrize(("finished", "at_a_time"), [(True, 2), (False, 1)])
def test_only_an_unfinished_pretraining_is_waited_for(listops, tmp_path, monkeypatch, finished, at_a_time):
    cells, _ = plan(expand([*listops, "model=lru", "pretrain=true", "finetuning.lr=1e-3,2e-3,3e-3"]))
    beside = tmp_path / "runs" / "lra_listops-lru-tiny-masked-s0-01234567" / "pretrain"
    beside.mkdir(parents=True)
    (beside / "key").write_text(cells[0].key)
    if finished:
        (beside / "summary.json").write_text("{}")
    running, most = [], []

    class Job:
        job_id, asked = 1, 0

        def done(self):
            self.asked += 1
            return self.asked > 2

        def exception(self):
            running.remove(self)

        def result(self):
            return 0

    class Executor:
        def submit(self, run, overrides):
            running.append(Job())
            most.append(len(running))
            return running[-1]

    monkeypatch.setattr("seqzoo.runs.launch._executor", lambda launcher, folder: Executor())
    monkeypatch.setattr("seqzoo.runs.launch.POLL_SECONDS", 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher = LauncherConfig(cluster="local", parallel=2)
    assert [cell for cell, _ in launch(cells, launcher, tmp_path)] == cells
    assert max(most) == at_a_time


def test_ctrl_c_stops_jobs_of_this_machine(listops, tmp_path, monkeypatch, capsys):
    cancelled = []

    class Job:
        job_id = 1

        def __init__(self, overrides):
            self.overrides = overrides

        def done(self):
            raise KeyboardInterrupt

        def cancel(self):
            cancelled.append(self.overrides)

    class Executor:
        def submit(self, run, overrides):
            return Job(overrides)

    monkeypatch.setattr("seqzoo.runs.launch._executor", lambda launcher, folder: Executor())
    assert main(["-m", *listops, "seed=0,1", "launcher=local"]) == 130
    assert len(cancelled) == 1
    assert "the same command goes on" in capsys.readouterr().err


def test_a_job_at_its_time_limit_is_queued_again(tmp_path, monkeypatch):
    queued_again = []
    environment = LocalJobEnvironment()
    monkeypatch.setattr(environment, "_requeue", queued_again.append)
    job = DelayedSubmission(Run(), ["seed=0", "seed=1"])
    job.set_timeout(timeout_min=1, max_num_timeout=3)
    paths = JobPaths(tmp_path, "1")
    with pytest.raises(SystemExit):
        SignalHandler(environment, paths, job).checkpoint_and_try_requeue(signal.SIGUSR2)
    assert queued_again == [2]
    again = DelayedSubmission.load(paths.submitted_pickle)
    assert isinstance(again.function, Run)
    assert again.args == (["seed=0", "seed=1"],)


def test_a_launcher_that_is_not_here_is_explained(listops, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is SLURM, the test finds none and queues nothing
    assert main(["-m", *listops, "seed=0,1", "launcher=slurm", "precision=fp32"]) == 2
    assert "launcher: " in capsys.readouterr().err
    assert main(["-m", *listops, "seed=0,1", "launcher=local", "launcher.options.walltime=5"]) == 2
    assert "walltime" in capsys.readouterr().err
    assert main([*listops, "launcher=local"]) == 2
    assert "add -m" in capsys.readouterr().err
    monkeypatch.setattr("seqzoo.runs.cli.attempt", lambda overrides: 0)
    assert main([*listops, "launcher=here"]) == 0
