"""Runs of tasks that ask for more than a class: at positions, and for the next position everywhere."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from often import others_slow
from tiny_runs import failing_at_the_last_validation, tiny_config

from seqzoo import load
from seqzoo.config import ConfigError, SearchConfig
from seqzoo.runs import evaluate_run, run
from seqzoo.runs.attempt import report
from seqzoo.runs.folder import run_name
from seqzoo.spec import IGNORED
from seqzoo.tasks import Task, TaskConfig, build_task
from seqzoo.training import TrainingError

HEADS = TaskConfig(
    name="induction_heads",
    max_length=8,
    mask_ratio=0.15,
    num_symbols=3,
    num_train=400,
    num_val=50,
    num_test=80,
    generator_seed=0,
)


@pytest.fixture(scope="module")
def recall(tmp_path_factory) -> Task:
    return build_task(HEADS, data_dir=None, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TaskConfig:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 40)
    return TaskConfig(
        name="char_lm",
        max_length=16,
        mask_ratio=0.15,
        text=str(path),
        val_fraction=0.1,
        test_fraction=0.1,
        min_frequency=1,
    )


def config(folder: Path, task: TaskConfig, **changes):
    return replace(tiny_config(folder, **changes), task=task, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("objective", others_slow([None, "masked", "causal"], ["masked"]))
def test_answers_at_positions_are_learnt(objective, recall, tmp_path):
    settings = {"pretrain": objective is not None, "objective": objective or "masked", "causal": True}
    settings["model"] = {"block": {"name": "lru"}}  # which knows what came before what
    result = run(config(tmp_path, HEADS, **settings, finetuning={"tokens": 40_000, "batch_size": 16, "lr": 1e-2}))
    assert result["test"].keys() == {"accuracy", "loss"}
    assert result["test"]["accuracy"] > 0.6 > 1.5 * result["majority"]
    assert result["majority"] == recall.majority
    assert result["n_test"] == 80
    assert result["task_note"] == "length 8, num_symbols 3, num_train 400, num_val 50, num_test 80"

    model = load(result["folder"])
    assert result["params"] == sum(parameter.numel() for parameter in model.parameters())
    batch = recall.test.batch(torch.arange(80))
    with torch.no_grad():
        scores = model(batch.inputs, batch.lengths)
    assert scores.shape == (80, 8, recall.spec.vocab_size)
    asked = batch.targets != IGNORED
    assert (scores.argmax(-1) == batch.targets)[asked].double().mean() == result["test"]["accuracy"]
    assert evaluate_run(result["folder"])["accuracy"] == result["test"]["accuracy"]


def test_an_own_task_may_ask_at_positions(recall, tmp_path):
    result = run(tiny_config(tmp_path, n_test=20, n_val=10), task=recall)
    assert result["n_test"] == 20
    assert result["task"] == "induction_heads"
    with_other_answers = replace(recall, train=replace(recall.train, targets=recall.train.targets.flip(0)))
    other = run(tiny_config(tmp_path, n_test=20, n_val=10), task=with_other_answers)
    assert other["folder"] != result["folder"]


def test_an_interrupted_run_continues_alike(tmp_path):
    settings = {"finetuning": {"tokens": 4000}, "causal": True}
    whole = run(config(tmp_path / "whole", HEADS, **settings))
    with failing_at_the_last_validation(), pytest.raises(TrainingError):
        run(config(tmp_path / "cut", HEADS, **settings))
    assert run(config(tmp_path / "cut", HEADS, **settings))["test"] == whole["test"]


def test_text_is_measured_in_bits(text, tmp_path, capsys):
    result = run(config(tmp_path, text, causal=True, finetuning={"tokens": 12_000}))
    test = result["test"]
    assert test.keys() == {"accuracy", "loss", "bits_per_character"}
    assert test["bits_per_character"] == pytest.approx(test["loss"] / math.log(2))
    assert test["bits_per_character"] < 3 < math.log2(28), "better than guessing"
    assert result["val"]["bits_per_character"] == pytest.approx(result["val"]["loss"] / math.log(2))
    assert 0 < result["majority"] < 0.3
    entries = [json.loads(line) for line in (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["val/loss"] for entry in entries if "val/loss" in entry]
    assert result["val"]["loss"] == min(losses)
    again = evaluate_run(result["folder"])
    assert again["bits_per_character"] == pytest.approx(test["bits_per_character"])
    assert load(result["folder"])(torch.ones(1, 4, dtype=torch.int64), torch.tensor([4])).shape == (1, 4, 32)
    assert "bits per character" in capsys.readouterr().err
    report(result)
    assert f"test {test['bits_per_character']:.4f} bits per character, accuracy" in capsys.readouterr().out


def test_a_run_is_named_by_what_its_text_says(text, tmp_path):
    for folder, words in (("a", "one two"), ("b", "one two"), ("c", "two one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(words)
    names = [
        run_name(replace(config(tmp_path, replace(text, text="text.txt")), data_dir=str(tmp_path / folder)))
        for folder in "abc"
    ]
    assert names[0] == names[1] != names[2]
    assert run_name(config(tmp_path, replace(text, text=str(tmp_path / "a" / "text.txt")))) == names[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": False}, r"causal=false: char_lm asks each position for the next one; valid: causal=true"),
        ({"causal": True, "pretrain": True}, r"pretrain=True: char_lm .* valid: pretrain=false"),
        ({"causal": True, "pretrain": True, "objective": "causal"}, "valid: pretrain=false"),
    ],
)
def test_next_positions_are_for_causal_models_from_scratch(changes, message, text, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path, text, **changes))
    assert not list(tmp_path.glob("char_lm-*")), "no run folder is begun"


def test_rates_are_searched_by_what_the_task_monitors(text, tmp_path):
    search = SearchConfig(rates=[1e-6, 1e-2], share=0.5)
    result = run(config(tmp_path, text, causal=True, lr="search", search=search, finetuning={"tokens": 4000}))
    trials = {}
    for path in Path(result["folder"]).glob("finetune/search/*/summary.json"):
        summary = json.loads(path.read_text())
        trials[summary["lr"]] = summary["loss"]
    assert result["lr"]["finetune"] == min(trials, key=lambda lr: trials[lr]) == 1e-2
    result = run(config(tmp_path, HEADS, causal=True, lr="search", search=search))
    summary = json.loads(next(Path(result["folder"]).glob("finetune/search/*/summary.json")).read_text())
    assert summary.keys() == {"lr", "accuracy", "seconds"}


@pytest.mark.parametrize("size", ["params:20k", "flops:50k"])
def test_a_size_counts_the_head_at_every_position(size, text, tmp_path):
    result = run(config(tmp_path, text, causal=True, size=size, finetuning={"tokens": 100}))
    measured = result["params"] if size.startswith("params") else result["flops_per_token"]
    assert measured == pytest.approx(20_000 if size.startswith("params") else 50_000, rel=0.25)
    assert result["params"] == sum(parameter.numel() for parameter in load(result["folder"]).parameters())
