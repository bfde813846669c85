"""Weights & Biases without network: decoded files of runs that were stopped, and a service that dies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from dying import Moment, dying_at, in_child
from tiny_runs import tiny_config
from wandb_log import read_run

from seqzoo.runs import run

STAGE = {"tokens": 1200, "evaluations": 2}


def trained(folder: Path, task, moment: Moment | None, before=lambda: None) -> int:
    def work() -> None:
        os.environ.pop("WANDB_MODE", None)
        with dying_at(moment):
            before()
            run(
                tiny_config(folder, pretrain=True, wandb_mode="offline", pretraining=STAGE, finetuning=STAGE), task=task
            )

    return in_child(work)


def lines_of(folder: Path) -> list[dict]:
    """metrics.jsonl as W&B has its lines."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{f"{e['stage']}/{key}": value for key, value in e.items() if key != "stage"} for e in entries]


@pytest.mark.slow
def test_after_a_kill_the_newest_folder_holds_the_whole_history(task, tmp_path):
    assert trained(tmp_path, task, Moment("logged", 6)) == -signal.SIGKILL
    assert trained(tmp_path, task, Moment("half line", 9)) == -signal.SIGKILL
    assert trained(tmp_path, task, None) == 0
    (folder,) = tmp_path.iterdir()
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    _, history, _ = read_run(log)
    logged = [{key: value for key, value in line.items() if key[0] != "_"} for line in history]
    assert logged == lines_of(folder)
    assert [line["_step"] for line in history] == list(range(len(history)))
    assert len(list(folder.glob("wandb/earlier/offline-run-*"))) == 2


@pytest.mark.slow
def test_a_service_that_dies_takes_nothing_along(task, tmp_path):
    from seqzoo.training import tracker

    append = tracker.append

    def kill_the_service() -> None:
        def append_and_kill(path: Path, text: str) -> None:
            append(path, text)
            for child in Path("/proc").glob("[0-9]*/stat"):
                fields = child.read_text().rpartition(")")[2].split()
                if fields[1] == str(os.getpid()) and text:
                    os.kill(int(child.parent.name), signal.SIGKILL)
                    (tmp_path / "killed").touch()

        tracker.append = append_and_kill

    assert trained(tmp_path / "runs", task, None, kill_the_service) == 0
    assert (tmp_path / "killed").exists()
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["schema"] == 1
    assert {line.get("pretrain/step") for line in lines_of(folder)} >= {1, 2, 3}
