from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config

from seqzoo.config import StageConfig
from seqzoo.models import build_model
from seqzoo.objectives import build_objective
from seqzoo.runs.parts import build_fabric
from seqzoo.training import forecast as module
from seqzoo.training.forecast import forecast, training_rate
from seqzoo.training.loop import Stage


def rate_of(task, folder: Path, *, flops=1e3, flops_at=lambda length: 1e3, **changes) -> float:
    config = tiny_config(folder, finetuning=changes)
    torch.manual_seed(0)
    return training_rate(
        build_model(config.model, task.spec, head="classify", causal=False),
        build_objective("task", task.spec),
        task.train,
        config.finetuning,
        flops=flops,
        flops_at=flops_at,
        name="finetune",
        seed=0,
        folder=folder / "forecast",
        fabric=build_fabric(config),
    )


@pytest.fixture
def batches(monkeypatch):
    """The inputs of all steps taken."""
    seen, take_step = [], Stage.take_step

    def watched(stage):
        seen.extend(micro.batch for micro in stage.micro_batches())
        take_step(stage)

    monkeypatch.setattr(Stage, "take_step", watched)
    return seen


def test_a_rate_is_measured_on_whole_batches_where_they_are_small(task, tmp_path, batches):
    rate = rate_of(task, tmp_path, tokens=10_000)
    assert 100 < rate < 1e8
    assert 2 <= len(batches) <= 1 + 10_000 // (50 * 8 * 5), "few, where the stage is short"
    assert {len(batch.labels) for batch in batches} == {8}
    assert max(int(batch.lengths.max()) for batch in batches) > 8


def test_a_step_is_enough_of_a_stage_of_few(task, tmp_path, batches):
    rate_of(task, tmp_path, tokens=100)
    assert len(batches) == 2


def test_large_steps_are_made_smaller(task, tmp_path, batches, monkeypatch):
    monkeypatch.setattr(module, "peak_flops", lambda fabric: 1e9)
    monkeypatch.setattr(module, "SHORTEST", 3)
    fitting = 0.25 * 0.2 * 1e9 / 3
    rate_of(task, tmp_path, flops=fitting / 40)
    few = {len(batch.labels) for batch in batches}
    assert few < set(range(2, 8))
    batches.clear()
    rate_of(task, tmp_path, flops=fitting / 6)
    assert {tuple(batch.inputs.shape) for batch in batches} <= {(1, 5), (1, 6)}, "not padded to their full length"
    batches.clear()
    rate_of(task, tmp_path, flops=fitting)
    assert {tuple(batch.inputs.shape) for batch in batches} == {(1, 3)}


def test_operations_make_whole_steps_of_shorter_ones(task, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "peak_flops", lambda fabric: 1.0)
    monkeypatch.setattr(module, "SHORTEST", 4)
    monkeypatch.setattr(module.time, "perf_counter", iter(range(0, 1000, 10)).__next__)
    assert rate_of(task, tmp_path, flops=400.0, flops_at={4: 100.0}.__getitem__) == pytest.approx(4 / 10 / 4)


def test_what_the_first_step_has_compiled_is_not_counted(task, tmp_path, monkeypatch):
    seconds, tokens, take_step = [0.0], [], Stage.take_step

    def slow_at_first(stage):
        take_step(stage)
        seconds.append(seconds[-1] + (0.1 if tokens else 15.0))
        tokens.append(stage.state.tokens)

    monkeypatch.setattr(Stage, "take_step", slow_at_first)
    monkeypatch.setattr(module.time, "perf_counter", lambda: seconds[-1])
    rate = rate_of(task, tmp_path, tokens=10_000)
    assert rate == pytest.approx((tokens[-1] - tokens[0]) / (0.1 * (len(tokens) - 1)))


def test_nothing_else_is_moved(task, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    data = copy.deepcopy(task.train)
    config = tiny_config(tmp_path)
    model = build_model(config.model, task.spec, head="classify", causal=False)
    torch.set_rng_state(before)
    training_rate(
        model,
        build_objective("task", task.spec),
        task.train,
        config.finetuning,
        flops=1e3,
        flops_at=lambda length: 1e3,
        name="finetune",
        seed=0,
        folder=tmp_path / "forecast",
        fabric=build_fabric(config),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(task.train.values, data.values)
    assert list(tmp_path.iterdir()) == []


def said(task, stage: StageConfig, rate: float, **more) -> str:
    return forecast("pretrain", stage, task.train, task.val, rate, advice="recipe=tiny is made for it", **more)


def test_what_is_said(task):
    once = StageConfig(tokens=2_000_000, evaluations=1)
    no_val = replace(task, val=task.val.subset(torch.arange(0)))
    assert said(no_val, once, 52_345.0) == "pretrain: 2,000,000 tokens, about 38 s at 52,000 tokens/s"
    assert said(no_val, once, 52_345.0, seen=1_900_000) == (
        "pretrain: 100,000 of 2,000,000 tokens left, about 2 s at 52,000 tokens/s"
    )
    assert "about 76 s at" in said(no_val, once, 52_345.0, trials=1.0)
    assert "about 1 s at" in said(no_val, replace(once, tokens=10), 52_345.0)


def test_validations_count_a_third(task):
    stage = StageConfig(tokens=1_000, evaluations=6)
    seconds = (1_000 + 2 * int(task.val.lengths.sum())) / 25
    assert f"about {seconds:.0f} s at 25 tokens/s" in said(task, stage, 25.0)


def test_a_hopeless_stage_is_given_advice(task):
    stage = StageConfig(tokens=200_000_000)
    assert said(task, stage, 100.0).endswith("at 100 tokens/s; recipe=tiny is made for it")
    assert "about 23.1 days" in said(task, replace(stage, evaluations=1), 100.0)
    assert "recipe" not in said(task, stage, 1e6)
