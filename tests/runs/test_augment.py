"""Runs whose training batches are augmented."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import failing_at_the_last_validation, tiny_config

from seqzoo.config import ConfigError
from seqzoo.report import read_result
from seqzoo.runs import run
from seqzoo.runs.folder import pretraining_key, run_name
from seqzoo.tasks.augmentation import crop
from seqzoo.training import TrainingError
from seqzoo.training.loop import Stage


@pytest.fixture(scope="module")
def augmented(task):
    """The toy task, with an augmentation that keeps its answers often enough."""
    return replace(task, augmentation=crop)


def test_it_is_another_run_and_another_pretraining(task, tmp_path):
    plain, augmented = (tiny_config(tmp_path, pretrain=True, augment=augment) for augment in (False, True))
    assert run_name(augmented, task).startswith("toy-transformer-tiny-masked-augmented-s0-")
    assert run_name(plain, task).startswith("toy-transformer-tiny-masked-s0-")
    assert pretraining_key(plain, task) != pretraining_key(augmented, task)


@pytest.mark.parametrize("changes", [{}, {"pretrain": True}, {"objective": "joint"}])
def test_training_batches_are_augmented_and_others_are_not(changes, augmented, tmp_path, monkeypatch):
    seen = []

    def watched(batch, spec, *, seed):
        seen.append(seed)
        return crop(batch, spec, seed=seed)

    validated = []
    validate = Stage.validate

    def noting(stage):
        before = len(seen)
        metrics = validate(stage)
        validated.append(len(seen) == before)
        return metrics

    monkeypatch.setattr(Stage, "validate", noting)
    result = run(tiny_config(tmp_path, augment=True, **changes), task=replace(augmented, augmentation=watched))
    assert result["augment"] is True
    assert read_result(Path(result["folder"])).augment
    plain = run(tiny_config(tmp_path, **changes), task=augmented)
    assert plain["augment"] is False
    assert result["tokens_seen"] == plain["tokens_seen"], "positions count as they are before"
    stages = [name for name, tokens in result["tokens_seen"].items() if tokens]
    steps = sum(tokens for tokens in result["tokens_seen"].values()) / (8 * augmented.train.mean_length)
    assert len(seen) == len(set(seen)) == pytest.approx(steps, rel=0.1)
    assert len(validated) == 2 * 3 * len(stages)
    assert all(validated)


def test_an_interrupted_run_continues_alike(augmented, tmp_path):
    settings = {"augment": True, "finetuning": {"accumulate": 2}}
    whole = run(tiny_config(tmp_path / "whole", **settings), task=augmented)
    with failing_at_the_last_validation(), pytest.raises(TrainingError):
        run(tiny_config(tmp_path / "cut", **settings), task=augmented)
    assert run(tiny_config(tmp_path / "cut", **settings), task=augmented)["test"] == whole["test"]


def test_masks_and_dropout_are_drawn_as_without(augmented, tmp_path, monkeypatch):
    """An augmentation that changes nothing changes nothing."""
    same = replace(augmented, augmentation=lambda batch, spec, *, seed: batch)
    plain, other = (run(tiny_config(tmp_path, pretrain=True, augment=augment), task=same) for augment in (False, True))
    assert plain["folder"] != other["folder"]
    assert plain["test"] == other["test"]
    assert plain["val"] == other["val"]


def test_a_step_weighs_what_is_left_of_its_batches(augmented, tmp_path, monkeypatch):
    begun = []

    def stop(stage):
        begun.append(stage)
        raise TrainingError("stopped")

    monkeypatch.setattr(Stage, "run", stop)
    with pytest.raises(TrainingError):
        run(tiny_config(tmp_path, augment=True, finetuning={"accumulate": 3}), task=augmented)
    (stage,) = begun
    micros = stage.micro_batches()
    lengths = torch.stack([micro.batch.lengths.sum() for micro in micros])
    assert int(lengths.sum()) < stage.positions(stage.examples(0, 24))
    for micro, part in zip(micros, lengths / lengths.sum(), strict=True):
        assert micro.positions == pytest.approx(part.item())
        assert micro.asked == pytest.approx(1 / 3)


def test_pretraining_without_it_is_not_taken(augmented, tmp_path):
    pretrained = run(tiny_config(tmp_path, pretrain=True), task=augmented)
    with pytest.raises(ConfigError, match="augment is False there and True here"):
        run(tiny_config(tmp_path, pretrain=pretrained["folder"], augment=True), task=augmented)


def test_a_task_without_one_is_refused(task, tmp_path):
    with pytest.raises(ConfigError, match=r"augment=true: toy has none; valid: augment=false, or .*: .*lra_text"):
        run(tiny_config(tmp_path, augment=True), task=task)
    assert not list(tmp_path.iterdir())
