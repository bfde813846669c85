"""What a step minimises: a mean over all that it asks for, wherever in the step it is asked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config
from uneven_steps import CASES, first_step, uneven_stage, uneven_task

from seqzoo.config import ConfigError
from seqzoo.objectives import build_objective
from seqzoo.runs import run
from seqzoo.spec import IGNORED
from seqzoo.training import TrainingError
from seqzoo.training.evaluation import evaluate


@pytest.mark.parametrize("block", ["softmax_attention", "vq_attention"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_however_it_is_cut(case, block, tmp_path):
    whole = first_step(case, tmp_path, block=block, batch_size=8, accumulate=1)
    for batch_size in (4, 2, 1):
        parts = first_step(case, tmp_path, block=block, batch_size=batch_size, accumulate=8 // batch_size)
        assert parts.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6, msg=f"{batch_size}: {name}")


def test_equal_batches_weigh_what_they_always_did(tmp_path):
    """To the bit: a third each."""
    stage = uneven_stage("class", tmp_path, batch_size=4, accumulate=3)
    micros = stage.micro_batches()
    assert [micro.asked.item() for micro in micros] == [torch.tensor(1 / 3).item()] * 3
    assert math.fsum(micro.positions for micro in micros) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("case", ["positions", "next", "causal", "causal pixels"])
def test_steps_that_ask_for_nothing(case, tmp_path):
    """They change nothing but what momentum and decay do, and no figure."""
    stage = uneven_stage(case, tmp_path, batch_size=1, tokens=300)
    short = (stage.lengths == 1).nonzero().flatten()
    stage.examples = lambda start, count: short[:count]
    loss = stage.differentiate()
    assert loss == 0
    assert all(not p.grad.any() for p in stage.model.parameters() if p.grad is not None)
    assert "loss" not in stage_line(stage)
    before = [weight.clone() for weight in stage.model.parameters()]
    stage.take_step()
    assert stage.guard.failed == math.inf
    for weight, old in zip(stage.model.parameters(), before, strict=True):
        torch.testing.assert_close(weight, old, rtol=1e-3, atol=0)
    del stage.examples
    assert math.isfinite(stage.run().best["loss"])


def stage_line(stage):
    stage.logged, stage.state.training_seconds = (0, 0.0), 1.0
    return stage.log_training()


def test_a_line_weighs_its_steps_as_the_loss_does(tmp_path):
    stage = uneven_stage("causal", tmp_path, batch_size=2, accumulate=2)
    total = count = 0
    for _ in range(6):
        asked = (stage.lengths[stage.examples(0, 4)] - 1).sum().item()
        total, count = total + stage.differentiate().item() * asked, count + asked
        stage.state.step += 1
    assert stage_line(stage)["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("case", ["positions", "next", "causal", "masked"])
def test_a_run_on_data_with_sequences_of_one_step(case, tmp_path):
    pretrain = case in ("masked", "causal")
    settings = {"pretrain": pretrain, "objective": case if pretrain else "masked", "causal": case in ("next", "causal")}
    budget = {"tokens": 300, "batch_size": 1}
    result = run(
        tiny_config(tmp_path, **settings, pretraining=budget, finetuning={**budget, "batch_size": 2}),
        task=uneven_task(case),
    )
    assert math.isfinite(result["test"]["loss"])
    lines = (Path(result["folder"]) / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert any("train/loss" in json.loads(line) for line in lines.splitlines())


SECOND_STEP = "no sequence has a second step; valid: sequences of 2 steps and more"


@pytest.mark.parametrize(
    ("case", "split", "settings", "message"),
    [
        (
            "causal",
            "train",
            {"pretrain": True, "objective": "causal", "causal": True},
            f"objective=causal: train split of uneven: {SECOND_STEP}, or objective=masked",
        ),
        ("causal", "val", {"pretrain": True, "objective": "causal", "causal": True}, "objective=causal: val split"),
        ("next", "test", {"causal": True}, f"task=uneven: test split of uneven: {SECOND_STEP}"),
        ("positions", "val", {}, "task=uneven: val split of uneven: all targets are -100"),
    ],
)
def test_a_split_in_which_nothing_is_asked_is_refused(case, split, settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr("seqzoo.training.loop.Stage.take_step", None)  # before anything is trained
    task, empty = uneven_task(case), getattr(uneven_task(case, (1,)), split)
    if case == "positions":
        empty = replace(empty, targets=torch.full_like(empty.targets, IGNORED))
    task = replace(task, **{split: replace(empty, spec=task.spec)})
    with pytest.raises(ConfigError, match=message):
        run(tiny_config(tmp_path, **settings), task=task)
    stage = uneven_stage(case, tmp_path)
    objective = build_objective("causal" if case == "causal" else "task", task.spec)
    with pytest.raises(TrainingError, match=r"second step|targets"):
        evaluate(stage.model, objective, replace(empty, spec=task.spec), batch_size=4, fabric=stage.fabric)
