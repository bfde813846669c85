"""What a run says before it trains, and that saying it changes nothing."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from often import others_slow
from tiny_runs import tiny_config

from seqzoo.runs import run
from seqzoo.training import Interrupted
from seqzoo.training.checkpoint import load_checkpoint
from seqzoo.training.loop import Stage

TIMED = ("train/tokens_per_second", "train/mfu", "training_seconds", "cpu_share")


def told(capsys) -> dict[str, str]:
    """What was said of each stage that was to come."""
    found = re.findall(r"^(pretrain|finetune): (.*tokens.*, about .*)$", capsys.readouterr().err, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_each_stage_is_told_before_the_first(task, tmp_path, capsys, monkeypatch):
    class Begun(Exception):
        pass

    def begin(stage):
        raise Begun

    monkeypatch.setattr(Stage, "run", begin)
    with pytest.raises(Begun):
        run(tiny_config(tmp_path, pretrain=True), task=task)
    said = told(capsys)
    assert [*said] == ["pretrain", "finetune"]
    assert re.fullmatch(r"2,400 tokens, about \d+ s at [\d,]+ tokens/s", said["pretrain"])


def test_what_is_behind_is_not_told(task, tmp_path, capsys):
    config = tiny_config(tmp_path, pretrain=True)
    done = run(config, task=task)
    assert [*told(capsys)] == ["pretrain", "finetune"]
    run(replace(config, finetuning=replace(config.finetuning, lr=1e-3)), task=task)
    assert [*told(capsys)] == ["finetune"], "its pretraining is shared"
    run(replace(config, runs_dir=str(tmp_path / "other"), pretrain=done["folder"]), task=task)
    assert [*told(capsys)] == ["finetune"]
    run(config, task=task)
    assert told(capsys) == {}


def test_a_run_that_goes_on_tells_what_is_left(task, tmp_path, capsys, monkeypatch):
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Stage, "must_stop", lambda stage: stage.state.step == 9)
        with pytest.raises(Interrupted):
            run(config, task=task)
    capsys.readouterr()
    run(config, task=task)
    left, whole = re.match(r"([\d,]+) of ([\d,]+) tokens left, about", told(capsys)["finetune"]).groups()
    assert 0 < int(left.replace(",", "")) < int(whole.replace(",", "")) == 2400


def test_advice_names_the_recipe_for_the_machine(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("seqzoo.training.forecast.HOPELESS_SECONDS", 0.0)
    config = tiny_config(tmp_path)
    run(replace(config, recipe="paper"), task=task)
    assert told(capsys)["finetune"].endswith("; recipe=tiny is made for this machine")
    run(config, task=task)
    assert told(capsys)["finetune"].endswith("; fewer tokens or a smaller model would make it shorter")


RANDOM = [  # what they draw, or keep of a step, a forecast must leave alone
    {"name": "performer", "num_heads": 2, "redraw_every": 2},
    {"name": "vq_attention", "block_len": 4, "codebook_size": 8},
]
PLAIN = [{"name": "softmax_attention", "num_heads": 2}, {"name": "gau"}, {"name": "lru"}]


@pytest.mark.parametrize("block", others_slow([*RANDOM, *PLAIN], RANDOM), ids=lambda block: block["name"])
@pytest.mark.parametrize("tuning", ["full", pytest.param("ladder", marks=pytest.mark.slow)])
def test_a_run_is_the_same_run_without_it(task, tmp_path, monkeypatch, block, tuning):
    found = []
    for name in ("told", "untold"):
        config = tiny_config(tmp_path / name, pretrain=True, model={"block": block}, tuning=tuning)
        result = run(config, task=task)
        folder = Path(result["folder"])
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [{key: value for key, value in entry.items() if key not in TIMED} for entry in entries]
        weights = load_checkpoint(folder / "finetune" / "last.safetensors").weights
        found.append((lines, result["test"], weights))
        monkeypatch.setattr(sys.modules["seqzoo.runs.run"]._Run, "say_how_long", lambda planned: None)
    (lines, test, weights), (other_lines, other_test, other_weights) = found
    assert (lines, test) == (other_lines, other_test)
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
