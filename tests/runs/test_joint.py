"""Runs of one phase: the task's loss, and masked self-pretraining beside it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import failing_at_the_last_validation, tiny_config

from seqzoo.config import Config, ConfigError, JointConfig, SearchConfig, compose, from_dict, to_dict
from seqzoo.models import task_head
from seqzoo.models.size import flops_per_token
from seqzoo.report import read_result
from seqzoo.runs import evaluate_run, load, run
from seqzoo.runs.folder import read_config, run_name
from seqzoo.spec import IGNORED
from seqzoo.tasks import Task, TaskConfig, build_task, from_arrays
from seqzoo.training import TrainingError
from seqzoo.training.checkpoint import load_checkpoint, load_weights
from seqzoo.training.loop import Stage


def joint(folder: Path, **changes) -> Config:
    return tiny_config(folder, objective="joint", **changes)


@pytest.fixture(scope="module")
def result(task, tmp_path_factory):
    return run(joint(tmp_path_factory.mktemp("runs"), n_test=10), task=task)


def lines(result, key: str) -> list[dict]:
    text = (Path(result["folder"]) / "metrics.jsonl").read_text()
    return [entry for entry in map(json.loads, text.splitlines()) if key in entry]


def test_the_result_is_of_one_stage(result, task, tmp_path):
    folder = Path(result["folder"])
    assert folder.name.startswith("toy-transformer-tiny-joint-w1-p1-s0-")
    assert (result["objective"], result["pretrain"], result["joint"]) == (
        "joint",
        False,
        {"weight": 1.0, "passes": 1, "whole": 0.0},
    )
    assert result["token_budget"] == {"pretrain": 0, "finetune": 2400}
    assert not (folder / "pretrain").exists()
    assert set(result["test"]) == set(result["val"]) - {"step"} == {"accuracy", "loss"}
    scratch = run(tiny_config(tmp_path, n_test=10), task=task)
    for key in ("params", "trained_params", "flops_per_token", "tokens_seen", "n_test"):
        assert result[key] == scratch[key], key
    assert (scratch["objective"], scratch["joint"]) == ("masked", None)
    assert read_result(folder).one_phase == (1.0, 1, 0.0, False)


def test_both_losses_are_logged_and_one_is_measured(result):
    trained = lines(result, "train/loss")
    assert all({"train/accuracy", "train/masked/loss", "train/masked/accuracy"} <= line.keys() for line in trained)
    first, last = (np.mean([line["train/masked/loss"] for line in part]) for part in (trained[:5], trained[-5:]))
    assert last < first
    for line in lines(result, "val/loss"):
        assert not any("masked" in key for key in line)


def test_the_second_head_goes_with_training(result, task):
    folder = Path(result["folder"]) / "finetune"
    kept, last = load_weights(folder / "best.safetensors"), load_checkpoint(folder / "last.safetensors").weights
    assert set(last) - set(kept) == {"second.scores.weight", "second.scores.bias"}
    model = load(folder.parent)
    assert model.state_dict().keys() == kept.keys()
    assert result["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert evaluate_run(folder.parent, task=task)["accuracy"] == result["test"]["accuracy"]
    with pytest.raises(ConfigError, match="trained from scratch"):
        load(folder.parent, "pretrain")


def test_its_weights_are_no_pretraining(result, task, tmp_path):
    with pytest.raises(ConfigError, match="objective is joint there and masked here"):
        run(tiny_config(tmp_path, pretrain=result["folder"]), task=task)


def test_it_begins_with_the_weights_that_training_from_scratch_begins_with(task, tmp_path, monkeypatch):
    begun = []

    def stop(stage):
        begun.append({name: tensor.clone() for name, tensor in stage.kept.state_dict().items()})
        raise TrainingError("stopped")

    monkeypatch.setattr(Stage, "run", stop)
    for config in (joint(tmp_path), tiny_config(tmp_path)):
        with pytest.raises(TrainingError):
            run(config, task=task)
    one, other = begun
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("budget", [{"tokens": 2400}, {"epochs": 2}])
def test_positions_count_in_each_pass(budget, task, tmp_path):
    once, twice = (
        run(joint(tmp_path, joint=JointConfig(passes=passes), finetuning=budget), task=task) for passes in (1, 2)
    )
    steps = [lines(result, "train/loss")[-1]["step"] for result in (once, twice)]
    tokens = [result["tokens_seen"]["finetune"] for result in (once, twice)]
    assert tokens[1] / steps[1] == pytest.approx(2 * tokens[0] / steps[0], rel=0.05)
    if "tokens" in budget:
        assert steps[0] == pytest.approx(2 * steps[1], abs=1)
        assert twice["token_budget"] == once["token_budget"]
    else:
        assert steps[0] == steps[1]
        assert twice["token_budget"]["finetune"] == 2 * once["token_budget"]["finetune"]
    assert "joint-w1-p2" in twice["folder"]


def test_operations_count_both_heads(task, tmp_path):
    config, spec = joint(tmp_path), task.spec

    def flops(head: str, passes: int = 1) -> float:
        return flops_per_token(config.model, spec, causal=False, head=head, passes=passes)

    both, D = "classify+per_position", config.model.d_model
    second = 2 * D * spec.vocab_size
    assert flops(both) == flops(task_head(spec)) + second
    assert flops(both, passes=2) == flops(task_head(spec)) + (second - 2 * D * spec.num_classes / 16) / 2


@pytest.mark.parametrize("passes", [1, 2])
def test_an_interrupted_run_continues_alike(passes, task, tmp_path):
    settings = {"joint": JointConfig(passes=passes, weight=0.5), "finetuning": {"accumulate": 2}}
    whole = run(joint(tmp_path / "whole", **settings), task=task)
    with failing_at_the_last_validation(), pytest.raises(TrainingError):
        run(joint(tmp_path / "cut", **settings), task=task)
    again = run(joint(tmp_path / "cut", **settings), task=task)
    assert again["test"] == whole["test"]
    assert Path(again["folder"]).name == Path(whole["folder"]).name


def test_the_weight_counts(task, tmp_path):
    light, heavy = (
        run(joint(tmp_path, joint=JointConfig(weight=weight), model={"dropout": 0.0}), task=task)
        for weight in (1e-9, 1.0)
    )
    filled = [lines(result, "train/masked/loss")[-1]["train/masked/loss"] for result in (light, heavy)]
    assert filled[0] > filled[1]
    assert "joint-w1e-09-p1" in light["folder"]


@pytest.mark.parametrize("passes", [1, 2])
def test_both_texts_of_pairs_are_masked(passes, tmp_path):
    generator = np.random.default_rng(0)
    pairs = [[generator.integers(0, 5, generator.integers(3, 9)) for _ in range(2)] for _ in range(60)]
    task = from_arrays("pairs", kind="tokens", inputs=pairs, labels=[i % 2 for i in range(60)], num_inputs=2)
    result = run(joint(tmp_path, joint=JointConfig(passes=passes), finetuning={"tokens": 1000}), task=task)
    assert math.isfinite(result["test"]["loss"])
    assert lines(result, "train/masked/loss")


@pytest.mark.parametrize("pixel_loss", ["cross_entropy", "l1"])
def test_pixels_are_told_by_level_or_by_value(pixel_loss, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (60, 16, 3))
    task = from_arrays("colours", kind="pixels", inputs=pictures, labels=[i % 2 for i in range(60)])
    result = run(joint(tmp_path, pixel_loss=pixel_loss, finetuning={"tokens": 1000}), task=task)
    assert ("train/masked/accuracy" in lines(result, "train/loss")[0]) == (pixel_loss == "cross_entropy")
    names = {run_name(joint(tmp_path, pixel_loss=loss), task) for loss in ("cross_entropy", "l1")}
    assert len(names) == 2


@pytest.fixture(scope="module")
def recall(tmp_path_factory) -> Task:
    config = TaskConfig(
        name="induction_heads",
        max_length=8,
        mask_ratio=0.15,
        num_symbols=3,
        num_train=100,
        num_val=20,
        num_test=20,
        generator_seed=0,
    )
    return build_task(config, data_dir=None, cache_dir=tmp_path_factory.mktemp("cache"))


def test_answers_at_positions_have_a_head_of_their_own(recall, tmp_path):
    result = run(joint(tmp_path, joint=JointConfig(passes=2), causal=True), task=recall)
    batch = recall.test.batch(torch.arange(20))
    scores = load(result["folder"])(batch.inputs, batch.lengths)
    right = (scores.argmax(-1) == batch.targets)[batch.targets != IGNORED]
    assert right.double().mean().item() == result["test"]["accuracy"]


def test_labels_are_told_from_whole_inputs_too(task, tmp_path):
    asked = compose(["objective=joint", "recipe=tiny"]).joint
    assert asked == JointConfig(whole=0.5), "whole inputs are what is tested"
    assert compose(["objective=joint", "recipe=tiny", "joint.passes=2"]).joint == JointConfig(passes=2)
    result = run(joint(tmp_path, joint=asked), task=task)
    folder = Path(result["folder"])
    assert folder.name.startswith("toy-transformer-tiny-joint-w1-p1-whole0.5-s0-")
    assert read_result(folder).one_phase == (1.0, 1, 0.5, False)
    assert result["joint"]["draws"] == 2
    assert read_config(folder).joint == asked


def test_what_stays_whole_is_in_the_name(task, tmp_path):
    plain, some, more = (run_name(joint(tmp_path, joint=JointConfig(whole=whole)), task) for whole in (0.0, 0.5, 0.6))
    assert len({plain, some, more}) == 3
    assert plain == run_name(joint(tmp_path), task)
    twice = JointConfig(passes=2, whole=0.5)
    assert run_name(joint(tmp_path, joint=twice), task) == run_name(joint(tmp_path, joint=JointConfig(passes=2)), task)


def test_rates_are_searched_by_accuracy(task, tmp_path):
    result = run(joint(tmp_path, lr="search", search=SearchConfig(rates=[1e-6, 1e-2], share=0.5)), task=task)
    trials = list(Path(result["folder"]).glob("finetune/search/*/summary.json"))
    assert len(trials) == 2
    assert all(json.loads(path.read_text()).keys() == {"lr", "accuracy", "seconds"} for path in trials)
    assert not any("second" in name for trial in trials for name in load_weights(trial.parent / "best.safetensors"))


def test_what_shapes_it_is_in_its_name(task, tmp_path):
    plain, scratch = run_name(joint(tmp_path), task), run_name(tiny_config(tmp_path), task)
    others = [{"joint": JointConfig(weight=0.5)}, {"joint": JointConfig(passes=2)}, {"seed": 1}, {"augment": True}]
    names = {plain, scratch, *(run_name(joint(tmp_path, **change), task) for change in others)}
    assert len(names) == 2 + len(others)
    assert run_name(joint(tmp_path, pretraining={"lr": 1.0}), task) == plain, "there is no pretraining"
    for pretrain in (False, True):
        unused = [tiny_config(tmp_path, pretrain=pretrain, joint=JointConfig(passes=passes)) for passes in (1, 2)]
        assert run_name(unused[0], task) == run_name(unused[1], task)


def test_configurations_of_before_are_read(result):
    config = read_config(Path(result["folder"]))
    assert from_dict(to_dict(config)) == config
    before = to_dict(compose(["recipe=tiny", "model=lru"]))
    name = run_name(from_dict(before))
    for key in ("joint", "augment"):
        del before[key]
    assert run_name(from_dict(before)) == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "pretrain=true",
            "objective=joint: it is one phase, .* pretrain=True .*; valid: pretrain=false, or obj",
        ),
        ("pretrain=runs/x", "valid: pretrain=false, or objective=masked"),
        ("pretrain=true share=0.5", "valid: pretrain=false"),
        ("tuning=head", "objective=joint: .* tuning=head .*; valid: tuning=full"),
        ("tuning=lora", "valid: tuning=full"),
        ("tuning=ladder", "valid: tuning=full"),
        ("joint.passes=3", "joint.passes=3: valid: 1 or more and up to 2"),
        ("joint.weight=0", "joint.weight=0.0: valid: above 0"),
    ],
)
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(["objective=joint", *overrides.split()])


def test_a_share_of_nothing_is_the_whole_budget_in_one_phase():
    recipe = ["objective=joint", "recipe=tiny", "model=lru"]
    budgets = ["pretraining.tokens=1000000", "finetuning.tokens=2500000"]
    shared = compose([*recipe, *budgets, "pretrain=true", "share=0"])
    plain = compose([*recipe, "finetuning.tokens=3500000"])
    assert run_name(shared) == run_name(plain)


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({"causal": True}, {"answer": "next"}, "asks each position for the next one, .*; valid: objective=masked"),
        ({}, {"mask_id": None}, "toy has no mask_id, so it cannot be masked; valid: pretrain=true objective=causal"),
        ({"pixel_loss": "l1"}, {}, "pixel_loss=l1: toy has no pixels; valid: cross_entropy"),
    ],
)
def test_tasks_that_cannot_be_masked_are_refused(changes, spec, message, task, tmp_path):
    other = replace(task.spec, **spec)
    splits = {name: replace(getattr(task, name), spec=other) for name in ("train", "val", "test")}
    with pytest.raises(ConfigError, match=message):
        run(joint(tmp_path, **changes), task=replace(task, spec=other, **splits))
    assert not list(tmp_path.iterdir())
