"""Processes die, and runs end as if they had not: weights, moments, counters, metrics and result bit by bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from dying import Moment, assert_equal, dying_at, in_child, what_is_left
from tiny_runs import tiny_config, wait_for_training
from torchrun import torchrun

from seqzoo.runs import run
from seqzoo.runs.cli import main

MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"block": {"name": "softmax_attention", "num_heads": 2}},
    "lru": {"block": {"name": "lru"}},
    "performer": {"block": {"name": "performer", "num_heads": 2, "redraw_every": 3}},
    "vq_transformer": {"block": {"name": "vq_attention", "codebook_size": 8, "block_len": 8}},
}
SHORT = {"tokens": 480, "evaluations": 2, "accumulate": 2, "batch_size": 4}


def config(folder: Path, model: str = "transformer", **changes: Any) -> Any:
    return tiny_config(
        folder, pretrain=True, pretraining=SHORT, finetuning=SHORT, model={"name": model, **MODELS[model]}, **changes
    )


def killed(folder: Path, task: Any, moment: Moment | None, model: str = "transformer", **changes: Any) -> int:
    """The status of a process that trains in `folder`, or goes on, and is killed at `moment`."""

    def work() -> None:
        with dying_at(moment):
            run(config(folder, model, **changes), task=task)

    return in_child(work)


def ended(folder: Path) -> dict[str, Any]:
    (run_folder,) = folder.iterdir()
    assert not list(run_folder.rglob("*.tmp"))
    return what_is_left(run_folder)


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    """What an undisturbed run of each model leaves, and how often what happens in it."""
    made: dict[str, tuple[dict[str, Any], Counter[str]]] = {}

    def of(model: str) -> tuple[dict[str, Any], Counter[str]]:
        if model not in made:
            folder, noted = tmp_path_factory.mktemp(model), Counter[str]()
            with dying_at(None, noted):
                run(config(folder, model), task=task)
            made[model] = ended(folder), noted
        return made[model]

    return of


@pytest.mark.parametrize(
    "moments",
    [
        [Moment("half checkpoint", 3), Moment("half checkpoint", 1)],  # twice in the writing of one checkpoint
        # a file that is whole, but for its name
        pytest.param([Moment("rename", 6), Moment("half line", 1)], marks=pytest.mark.slow),
        [Moment("logged", 3), Moment("validated", 1)],  # a validation's line is there, the checkpoint after it not
    ],
    ids=lambda moments: ", ".join(f"{what} {number}" for what, number in moments),
)
def test_killed_at_the_worst_moments_a_run_ends_the_same(moments, whole, task, tmp_path):
    expected, noted = whole("transformer")
    for moment in moments:
        assert noted[moment.what] >= moment.number
        assert killed(tmp_path, task, moment) == -signal.SIGKILL
    assert killed(tmp_path, task, None) == 0
    assert_equal(ended(tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_killed_anywhere_a_run_ends_the_same(model, whole, task, tmp_path):
    expected, noted = whole(model)
    draw = random.Random(model)
    for number in range(5):
        folder = tmp_path / str(number)
        for _ in range(8):
            what = draw.choice(sorted(noted))
            if killed(folder, task, Moment(what, draw.randint(1, noted[what])), model) == 0:
                break
        assert killed(folder, task, None, model) == 0
        assert_equal(ended(folder), expected)


@pytest.mark.slow
def test_killed_in_a_search_for_a_rate_a_run_ends_the_same(task, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    assert killed(undisturbed, task, None, lr="search") == 0
    for moment in (Moment("half checkpoint", 5), Moment("rename", 9), Moment("validated", 4)):
        assert killed(tmp_path / "cut", task, moment, lr="search") == -signal.SIGKILL
    assert killed(tmp_path / "cut", task, None, lr="search") == 0
    assert_equal(ended(tmp_path / "cut"), ended(undisturbed))


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(whole, task, tmp_path):
    expected, _ = whole("transformer")
    assert killed(tmp_path, task, Moment("saved", 4)) == -signal.SIGKILL

    def work() -> None:
        with dying_at(None), patch("time.time", lambda: 1e9):  # 2001
            run(config(tmp_path), task=task)

    assert in_child(work) == 0
    assert_equal(ended(tmp_path), expected)


@pytest.fixture
def command(task, tmp_path, monkeypatch):
    """The status of `train.py` in `tmp_path`, which signals reach when a line was logged or as a checkpoint begins."""
    wanted = config(tmp_path)
    wanted.task.name = task.spec.name
    monkeypatch.setattr(sys.modules["seqzoo.runs.attempt"], "compose", lambda _: wanted)
    monkeypatch.setattr(sys.modules["seqzoo.runs.parts"], "build_task", lambda *_, **__: task)

    def ending(what: str = "line", number: int = 0, *signals: int) -> int:
        def work() -> int:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with dying_at(Moment(what, number), signals=signals):
                return main([])

        return in_child(work)

    return ending


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        pytest.param([signal.SIGTERM], 130, id="SIGTERM"),
        pytest.param([signal.SIGINT], 130, id="SIGINT", marks=pytest.mark.slow),
        pytest.param([signal.SIGHUP], -signal.SIGHUP, id="SIGHUP", marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGINT], 130, id="SIGINT twice", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_that_goes_on_the_same(signals, status, whole, command, tmp_path):
    expected, _ = whole("transformer")
    assert command("checkpoint", 4, *signals) == status
    assert command() == 0
    assert_equal(ended(tmp_path), expected)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_continued_is_the_same(whole, task, tmp_path):
    expected, _ = whole("transformer")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with dying_at(None):
                run(config(tmp_path), task=task)
            status = 0
        finally:
            os._exit(status)
    while not list(tmp_path.glob("*/pretrain/last.safetensors")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.005)
    os.kill(child, signal.SIGSTOP)
    time.sleep(0.2)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_equal(ended(tmp_path), expected)


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_run_goes_on_the_same(tmp_path):
    """Two processes under torchrun, the second killed while both train."""
    script = (
        "import sys\n"
        "from tiny_runs import tiny_config, toy_task\n"
        "from seqzoo.runs import run\n"
        "run(tiny_config(sys.argv[1], finetuning={'tokens': 60_000}), task=toy_task())\n"
    )

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(**torchrun(script, tmp_path, str(folder)), stderr=subprocess.DEVNULL)

    def ranks(process: subprocess.Popen[bytes]) -> list[int]:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(child) for child in children]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait(timeout=600) == 0
    process = start(cut)
    wait_for_training(process, cut)
    os.kill(ranks(process)[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert start(cut).wait(timeout=600) == 0
    assert_equal(ended(cut), ended(whole))
