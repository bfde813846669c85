"""Stages and runs whose batches are packed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import failing_at_the_last_validation, tiny_config
from uneven_steps import CASES, first_step, uneven_stage, uneven_task

from seqzoo.config import ConfigError, compose
from seqzoo.models import build_model
from seqzoo.objectives import build_objective
from seqzoo.report import read_result
from seqzoo.runs import run
from seqzoo.runs.folder import pretraining_key, run_name
from seqzoo.spec import TaskSpec
from seqzoo.tasks import epoch_order, from_arrays, pack
from seqzoo.tasks.augmentation import crop
from seqzoo.training import TrainingError
from seqzoo.training.order import Order, budget, room_for

EXAMPLES = torch.arange(9)


@pytest.mark.parametrize("block", ["softmax_attention", "linear_attention", "vq_attention", "lru"])
@pytest.mark.parametrize("case", ["class", "positions", "next", "causal", "causal pixels", "masked", "masked values"])
def test_every_example_has_the_loss_that_it_has_in_a_row_of_its_own(case, block):
    task, name = uneven_task(case), case.split()[0]
    goal = build_objective(
        name if name in ("masked", "causal") else "task",
        task.spec,
        pixel_loss="l1" if case.endswith("values") else "cross_entropy",
    )
    config = tiny_config(".", model={"block": {"name": block}, "dropout": 0.0, "position": "learned"})
    torch.manual_seed(0)
    model = build_model(config.model, task.spec, head=goal.head, causal=name in ("causal", "next"))
    batch = task.train.batch(EXAMPLES)
    packed = pack(batch, task.spec, task.train.lengths[EXAMPLES])
    if name == "masked":
        hidden = goal.asked(batch, seed=1)
        valid = torch.arange(hidden.shape[1]) < batch.lengths[:, None]
        goal.asked = lambda batch, *, seed: hidden if batch.cu_seqlens is None else hidden[valid][None]
    measured, gradients = [], []
    for each in (batch, packed):
        loss, totals = goal(model, each, seed=1)
        measured.append({"mean": loss.item(), **{key: total.item() for key, total in totals.items()}})
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert measured[1] == pytest.approx(measured[0], rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_pairs_have_the_loss_that_they_have_in_rows():
    lengths = [(3, 16), (1, 1), (9, 2), (4, 4), (16, 5), (2, 7)]
    inputs = [[[(5 * n + t) % 8 for t in range(n)] for n in pair] for pair in lengths]
    task = from_arrays(
        "pairs",
        kind="tokens",
        inputs=inputs,
        labels=[0, 1, 0, 1, 0, 1],
        val=(inputs[:2], [0, 1]),
        test=(inputs[:2], [0, 1]),
        num_inputs=2,
    )
    config = tiny_config(".", model={"block": {"name": "lru"}, "dropout": 0.0, "position": "learned"})
    for name in ("task", "causal"):
        goal = build_objective(name, task.spec)
        model = build_model(config.model, task.spec, head=goal.head, causal=name == "causal")
        batch = task.train.batch(torch.arange(6))
        losses = [goal(model, each, seed=0).loss.item() for each in (batch, pack(batch, task.spec))]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"pretrain": True}, {"objective": "joint"}])
def test_pairs_are_trained_on_in_one_row(tmp_path, changes):
    inputs = [[[1, 2, 3], [4, 5]], [[6], [7, 8, 9, 1]]] * 8
    task = from_arrays(
        "pairs",
        kind="tokens",
        inputs=inputs,
        labels=[0, 1] * 8,
        val=(inputs[:2], [0, 1]),
        test=(inputs[:2], [0, 1]),
        num_inputs=2,
    )
    result = run(tiny_config(tmp_path, packing=True, **changes), task=task)
    assert result["tokens_seen"]["finetune"] >= 2400


def test_a_batch_is_packed_in_order():
    spec = TaskSpec(name="t", kind="tokens", vocab_size=50, max_length=8, num_classes=2, num_inputs=2)
    sequences = [torch.arange(n) + 5 * n for n in (3, 1, 8, 2)]
    task = from_arrays(
        "t",
        kind="tokens",
        inputs=[s.numpy() for s in sequences],
        labels=[0, 1, 0, 1],
        val_fraction=0.25,
        test_fraction=0.25,
    )
    split = task.train
    packed = pack(split.batch(torch.arange(len(split))), task.spec)
    values = [split.values[a:b] for a, b in zip(split.offsets, split.offsets[1:], strict=False)]
    assert torch.equal(packed.inputs, torch.cat(values)[None].long())
    assert torch.equal(packed.cu_seqlens, split.offsets)
    pairs = torch.zeros(2, 2, 8, dtype=torch.int64)
    for row, sequence in zip(pairs.flatten(0, 1), sequences, strict=True):
        row[: len(sequence)] = sequence
    batch = packed._replace(inputs=pairs, lengths=torch.tensor([[3, 1], [8, 2]]), cu_seqlens=None)
    assert torch.equal(pack(batch, spec).inputs, torch.cat(sequences)[None])
    assert pack(batch, spec).cu_seqlens.tolist() == [0, 3, 4, 12, 14]


@pytest.mark.parametrize("longest", [1, 7, 16])
def test_batches_of_positions_walk_through_epochs_without_a_gap(longest):
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(1, longest + 1, (40,), generator=generator)
    order, seen = Order(lengths, seed=3, room=longest), []
    epoch = int(lengths.sum())
    places = 3 * epoch // longest
    at = 0
    while at < places:
        count = 1 + at % 4
        batch = order.examples(at, count)
        assert len(batch) >= count
        assert abs(int(lengths[batch].sum()) - count * longest) <= longest
        seen.append(batch)
        at += count
    seen = torch.cat(seen)
    expected = torch.cat([epoch_order(40, seed=3, epoch=epoch) for epoch in range(5)])
    assert torch.equal(seen, expected[: len(seen)])
    assert torch.equal(order.examples(2, 5), torch.cat([order.examples(2, 1), order.examples(3, 4)]))


def test_a_budget_is_of_positions(tmp_path):
    stage = uneven_stage("class", tmp_path, packing=True, batch_size=2, accumulate=2, tokens=1000)
    room = room_for(stage.train, 1)
    assert stage.total_steps == budget(stage.config, len(stage.train), 35, room)[1] == -(-1000 // (4 * room))
    state = stage.run()
    assert abs(state.tokens - stage.total_steps * 4 * room) <= room
    longer = uneven_stage("joint twice", tmp_path / "twice", packing=True, batch_size=2, tokens=1000)
    assert room_for(longer.train, 2) == 2 * longer.train.spec.max_length
    assert abs(longer.positions(longer.examples(0, 2)) - 4 * longer.train.spec.max_length) <= 2 * room


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("masked", "joint"))])
def test_a_step_is_the_same_however_it_is_cut(case, tmp_path):
    whole = first_step(case, tmp_path, packing=True, batch_size=4, accumulate=1)
    for batch_size in (2, 1):
        parts = first_step(case, tmp_path, packing=True, batch_size=batch_size, accumulate=4 // batch_size)
        assert parts.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6, msg=f"{batch_size}: {name}")


def test_it_is_another_run_and_another_pretraining(task, tmp_path):
    plain, packed = (tiny_config(tmp_path, pretrain=True, packing=packing) for packing in (False, True))
    assert run_name(packed, task).startswith("toy-transformer-tiny-masked-packed-s0-")
    assert run_name(plain, task).startswith("toy-transformer-tiny-masked-s0-")
    assert pretraining_key(plain, task) != pretraining_key(packed, task)


@pytest.mark.parametrize("changes", [{"pretrain": True}, {"objective": "joint"}, {"augment": True}])
def test_an_interrupted_run_continues_alike(changes, task, tmp_path):
    task = replace(task, augmentation=crop)
    settings = {**changes, "packing": True, "finetuning": {"accumulate": 2}}
    whole = run(tiny_config(tmp_path / "whole", **settings), task=task)
    assert whole["packing"] is True
    assert read_result(Path(whole["folder"])).packing
    with failing_at_the_last_validation(), pytest.raises(TrainingError):
        run(tiny_config(tmp_path / "cut", **settings), task=task)
    again = run(tiny_config(tmp_path / "cut", **settings), task=task)
    assert again["test"] == whole["test"]
    assert again["tokens_seen"] == whole["tokens_seen"]


def test_a_packed_run_learns(task, tmp_path):
    result = run(tiny_config(tmp_path, packing=True, finetuning={"tokens": 8000}), task=task)
    assert result["test"]["accuracy"] > 0.85
    lines = [json.loads(line) for line in (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/accuracy" in line for line in lines) == 3


def test_a_model_is_not_compiled_for_every_row():
    with pytest.raises(ConfigError, match=r"packing=true compile=true: .*; valid: one of the two"):
        compose(["packing=true", "compile=true"])
