from __future__ import annotations

import json
import math
import os
import signal
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config
from torch import nn

from seqzoo import after_step, build_block
from seqzoo.config import StageConfig
from seqzoo.models import build_model
from seqzoo.objectives import Objective, build_objective
from seqzoo.runs.parts import build_fabric
from seqzoo.tasks import epoch_order
from seqzoo.training import Interrupted, TrainingError
from seqzoo.training.checkpoint import load_checkpoint
from seqzoo.training.cores import Cores, cpu_share
from seqzoo.training.evaluation import evaluate, module_metrics
from seqzoo.training.loop import Stage
from seqzoo.training.order import budget
from seqzoo.training.tracker import Tracker


def build_stage(
    task,
    folder,
    *,
    objective=None,
    tracked=False,
    seed=0,
    dropout=0.1,
    precision="fp32",
    block=None,
    options=None,
    **changes,
):
    model = {"dropout": dropout, **({"block": block} if block else {})}
    config = tiny_config(folder, precision=precision, finetuning=changes, model=model)
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    return Stage(
        build_model(config.model, task.spec, head=objective.head if objective else "classify", causal=False),
        objective or build_objective("task", task.spec),
        task.train,
        task.val,
        config.finetuning,
        name="finetune",
        seed=seed,
        folder=folder / "finetune",
        fabric=build_fabric(config),
        tracker=Tracker(folder, {"logger": "none"}, group="") if tracked else None,
        **(options or {}),
    )


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder) -> list[dict]:
    timed = ("train/tokens_per_second", "train/mfu", "training_seconds", "cpu_share")
    return [{key: line[key] for key in line if key not in timed} for line in lines(folder)]


class Signalling(Objective):
    """An objective during whose `at`-th call a signal arrives."""

    head, monitor, maximise = "classify", "accuracy", True

    def __init__(self, inner, at: int, number: int):
        self.inner, self.left, self.number = inner, at, number

    def __call__(self, model, batch, *, seed):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.inner(model, batch, seed=seed)


def test_a_stage_past_its_last_step_ends(task, tmp_path):
    before = build_stage(task, tmp_path, tokens=600).run()
    shorter = build_stage(task, tmp_path, tokens=300)
    assert before.step > shorter.total_steps
    assert shorter.run() == before


def test_learns_and_keeps_the_best_weights(task, tmp_path):
    stage = build_stage(task, tmp_path, tracked=True, tokens=8000)
    state = stage.run()
    assert state.step == stage.total_steps == math.ceil(8000 / (8 * task.train.mean_length))
    curve = [line["val/accuracy"] for line in lines(tmp_path) if "val/accuracy" in line]
    assert len(curve) == 3
    assert state.best["accuracy"] == max(curve) > 0.85
    fabric = stage.fabric
    again = evaluate(stage.model, stage.objective, task.val, batch_size=8, fabric=fabric)
    assert again["accuracy"] == max(curve)


def test_counts_valid_tokens_only(task, tmp_path):
    stage = build_stage(task, tmp_path, epochs=2, batch_size=9)
    state = stage.run()
    N = len(task.train)
    order = torch.cat([epoch_order(N, seed=0, epoch=epoch) for epoch in range(3)])
    seen = order[: state.step * 9]
    assert state.step == math.ceil(2 * N / 9)
    assert state.tokens == int(task.train.lengths[seen].sum())


def test_batches_walk_through_epochs_without_a_gap(task, tmp_path):
    stage = build_stage(task, tmp_path, batch_size=7, accumulate=3)
    N = len(task.train)
    seen = []
    for step in range(N):
        stage.state.step = step
        seen += [stage.examples(7 * micro, 7) for micro in range(3)]
    seen = torch.cat(seen)
    assert seen.shape == (21 * N,)
    for epoch in range(21):
        assert torch.equal(seen[epoch * N : (epoch + 1) * N], epoch_order(N, seed=0, epoch=epoch))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [5, 11, 14])  # before, in and after the first validation
def test_resuming_is_bitwise_exact(task, tmp_path, number, at):
    whole = build_stage(task, tmp_path / "whole", tracked=True)
    expected = whole.run()

    classification = build_objective("task", task.spec)
    interrupted = build_stage(task, tmp_path / "cut", tracked=True, objective=Signalling(classification, at, number))
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="resume="):
        interrupted.run()
    assert signal.getsignal(number) == handler
    assert 0 < interrupted.state.step < whole.total_steps

    resumed = build_stage(task, tmp_path / "cut", tracked=True, seed=0)
    assert resumed.state.step == interrupted.state.step
    state = resumed.run()
    assert (state.step, state.tokens, state.best) == (expected.step, expected.tokens, expected.best)
    weights = load_checkpoint(tmp_path / "cut" / "finetune" / "last.safetensors").weights
    for name, tensor in load_checkpoint(tmp_path / "whole" / "finetune" / "last.safetensors").weights.items():
        assert torch.equal(weights[name], tensor), name
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


@pytest.mark.parametrize("at", [9, 11])  # before and in the first validation
def test_what_blocks_report_outlives_an_interruption(task, tmp_path, at):
    block = {"name": "vq_attention", "block_len": 4, "codebook_size": 8}
    build_stage(task, tmp_path / "whole", tracked=True, block=block).run()
    objective = Signalling(build_objective("task", task.spec), at, signal.SIGTERM)
    with pytest.raises(Interrupted):
        build_stage(task, tmp_path / "cut", tracked=True, block=block, objective=objective).run()
    assert not [line for line in lines(tmp_path / "cut") if "val/loss" in line]
    build_stage(task, tmp_path / "cut", tracked=True, block=block).run()
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    reported = [line for line in lines(tmp_path / "cut") if "backbone.layers.0.branch/codes_used" in line]
    assert len(reported) == 3


def test_resuming_from_an_older_checkpoint_rewrites_the_lines_after_it(task, tmp_path):
    build_stage(task, tmp_path, tracked=True).run()
    before = untimed(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "step": 999}\n{"stage": "fine')
    build_stage(task, tmp_path, tracked=True).run()
    assert untimed(tmp_path) == before


def test_same_seed_same_run_other_seed_another(task, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_stage(task, tmp_path / name, tracked=True, seed=seed).run()
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert untimed(tmp_path / "a") != untimed(tmp_path / "c")


def test_accumulation_equals_one_big_batch(task, tmp_path):
    big = build_stage(task, tmp_path / "big", tokens=600, dropout=0.0, batch_size=12)
    small = build_stage(task, tmp_path / "small", tokens=600, dropout=0.0, batch_size=4, accumulate=3)
    assert big.run().tokens == small.run().tokens
    parts = load_checkpoint(tmp_path / "small" / "finetune" / "last.safetensors").weights
    for name, tensor in load_checkpoint(tmp_path / "big" / "finetune" / "last.safetensors").weights.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


class Overflow(nn.Module):
    """Infinite from its `at`-th training call on."""

    def __init__(self, inner: nn.Module, at: int):
        super().__init__()
        self.inner, self.left = inner, at

    def forward(self, x, **options):
        self.left -= self.training
        return self.inner(x, **options) * (math.inf if self.left <= 0 and self.training else 1)


@pytest.mark.parametrize("read_every", [1, 16])
def test_a_nonfinite_loss_names_step_and_module_and_keeps_the_checkpoint(task, tmp_path, monkeypatch, read_every):
    monkeypatch.setattr("seqzoo.training.saves.SHARE", 1e-9)  # checkpoints at validations only
    stage = build_stage(task, tmp_path)
    stage.read_every = stage.log_every = read_every
    assert min(stage.evaluations) == stage.total_steps // 3
    failing = stage.total_steps // 3 + 3
    layer = stage.model.backbone.layers[1]
    layer.branch = Overflow(layer.branch, failing)
    with pytest.raises(TrainingError, match=rf"step {failing}: .*backbone\.layers\.1\.branch \(Overflow\)") as raised:
        stage.run()
    assert str(tmp_path / "finetune" / "last.safetensors") in str(raised.value)
    weights, _, state = load_checkpoint(tmp_path / "finetune" / "last.safetensors")
    assert state["step"] == stage.total_steps // 3
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(torch.isfinite(parameter).all() for parameter in stage.model.parameters())


@pytest.mark.parametrize(
    "block", [{"name": "vq_attention", "block_len": 4, "codebook_size": 8}, {"name": "performer", "redraw_every": 1}]
)
def test_weights_stay_where_a_failure_found_them(task, tmp_path, block):
    """However late it is read; and so do codebooks and random features."""
    sound, failing = (build_stage(task, tmp_path / name, block=block) for name in ("sound", "failing"))
    failing.model.backbone.layers[1].branch = Overflow(failing.model.backbone.layers[1].branch, 4)
    for stage, steps in ((sound, 3), (failing, 9)):
        for _ in range(steps):
            stage.take_step()
    left, found = ([*stage.model.parameters(), *stage.model.buffers()] for stage in (sound, failing))
    assert all(map(torch.equal, left, found))
    assert failing.guard.failed == 4


def test_a_nonfinite_gradient_is_not_stepped_on(task, tmp_path):
    stage = build_stage(task, tmp_path)
    stage.model.backbone.norm.bias.register_hook(lambda grad: grad * math.nan)
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 1: .*gradient of backbone\.norm\.bias is not.*no checkpoint yet"):
        stage.run()
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_deadline_is_an_interruption(task, tmp_path, monkeypatch):
    expected = build_stage(task, tmp_path / "whole", tracked=True).run()
    now = [0.0]
    monkeypatch.setattr("seqzoo.training.loop.time.monotonic", lambda: now[0])
    take_step = Stage.take_step

    def timed_step(stage):
        take_step(stage)
        now[0] += 1

    monkeypatch.setattr(Stage, "take_step", timed_step)
    for moment in (0.0, 7.0):
        late = build_stage(task, tmp_path / "late", tracked=True, options={"deadline": moment})
        with pytest.raises(Interrupted, match="resume="):
            late.run()
        assert late.state.step == moment, "none after it"
        assert load_checkpoint(tmp_path / "late" / "finetune" / "last.safetensors").state["step"] == moment
    monkeypatch.undo()
    state = build_stage(task, tmp_path / "late", tracked=True).run()
    assert state.best == expected.best
    assert untimed(tmp_path / "late") == untimed(tmp_path / "whole")


def test_a_deadline_cuts_a_validation_short(task, tmp_path):
    class Slow(Signalling):
        def __call__(self, model, batch, *, seed):
            if not model.training:
                stage.deadline = 0.0
            return self.inner(model, batch, seed=seed)

    stage = build_stage(task, tmp_path, objective=Slow(build_objective("task", task.spec), 0, 0))
    with pytest.raises(Interrupted):
        stage.run()
    state = load_checkpoint(tmp_path / "finetune" / "last.safetensors").state
    assert state["step"] == min(stage.evaluations)
    assert state["evaluated"] == 0


def test_checkpoints_are_as_frequent_as_they_are_cheap(task, tmp_path, monkeypatch):
    now, saves = [0.0], []
    monkeypatch.setattr("seqzoo.training.loop.time.monotonic", lambda: now[0])
    take_step = Stage.take_step

    def timed_step(stage):
        take_step(stage)
        now[0] += 1

    def timed_save(path, checkpoint, fabric=None):
        saves.append(checkpoint.state["step"])
        now[0] += 0.0625

    monkeypatch.setattr(Stage, "take_step", timed_step)
    monkeypatch.setattr("seqzoo.training.loop.save_checkpoint", timed_save)
    stage = build_stage(task, tmp_path, tokens=8000, evaluations=1)
    stage.run()
    assert saves[0] == 2, "the first after more than a second"
    assert saves[1] == 13, "two of 0.0625 s are a hundredth of 12.5 s"
    assert set(np.diff(saves[1:-1])) <= {6, 7}, "then every hundred times 0.0625 s"

    saves.clear()
    monkeypatch.setattr("seqzoo.training.saves.SECONDS", 3.0)
    build_stage(task, tmp_path, tokens=8000, evaluations=1).run()
    assert set(np.diff(saves[:-1])) == {4}


def test_utilisation_is_the_share_of_the_measured_peak(task, tmp_path, monkeypatch):
    monkeypatch.setattr("seqzoo.training.peak.matmul_flops_per_second", lambda device, precision: 1e9)
    stage = build_stage(task, tmp_path, tracked=True, options={"flops_per_token": 1e3})
    stage.run()
    trained = [line for line in lines(tmp_path) if "train/loss" in line]
    for line in trained:
        assert line["train/mfu"] == pytest.approx(3e3 * line["train/tokens_per_second"] / 1e9)
    assert stage.utilisation(1e5) == pytest.approx(0.3)
    assert build_stage(task, tmp_path / "other").utilisation(1e5) is None


@pytest.mark.slow
def test_a_compiled_stage_computes_what_an_eager_one_does(task, tmp_path):
    goal = build_objective("masked", task.spec)
    runs = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        stage = build_stage(
            task, folder, objective=goal, tracked=True, dropout=0.0, tokens=1200, options={"compile": compiled}
        )
        stage.run()
        runs[compiled] = (load_checkpoint(folder / "finetune" / "last.safetensors").weights, lines(folder)[-1])
    for name, weight in runs[False][0].items():
        torch.testing.assert_close(runs[True][0][name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert runs[True][1]["val/loss"] == pytest.approx(runs[False][1]["val/loss"], rel=1e-3)


def test_evaluation_counts_every_example_once(task, tmp_path):
    stage = build_stage(task, tmp_path)
    seen = []

    class Recording(Signalling):
        def __call__(self, model, batch, *, seed):
            seen.append(batch)
            return self.inner(model, batch, seed=seed)

    recording = Recording(stage.objective, 0, 0)
    metrics = evaluate(stage.model, recording, task.val, batch_size=5, fabric=stage.fabric)
    assert torch.equal(torch.cat([batch.index for batch in seen]).sort().values, torch.arange(len(task.val)))
    assert max(len(batch.index) for batch in seen) <= 5
    lengths = torch.cat([batch.lengths for batch in seen])
    assert torch.equal(lengths, lengths.sort().values)

    batch = task.val.batch(torch.arange(len(task.val)))
    with torch.no_grad():
        scores = stage.model.eval()(batch.inputs, batch.lengths)
    assert metrics["accuracy"] == (scores.argmax(-1) == batch.labels).double().mean().item()
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(scores, batch.labels).item(), rel=1e-5)


def test_a_rank_without_an_example_evaluates_nothing(task, tmp_path, monkeypatch):
    """Where there are more ranks than examples; it adds 0 to every sum of the others."""
    stage, one, sums = build_stage(task, tmp_path), task.val.subset(torch.tensor([3])), []
    monkeypatch.setattr(type(stage.fabric), "world_size", 2)
    monkeypatch.setattr(stage.fabric, "all_reduce", lambda total, reduce_op: sums.append(total) or total)
    for rank in (0, 1):
        monkeypatch.setattr(type(stage.fabric), "global_rank", rank)
        with suppress(TrainingError):  # as this rank alone has nothing
            evaluate(stage.model, stage.objective, one, batch_size=8, fabric=stage.fabric)
    assert len(sums) == 6
    assert sums[0] == 1
    assert not any(sums[3:])


def test_masks_of_a_validation_are_always_the_same(task, tmp_path):
    stage = build_stage(task, tmp_path)
    model = build_model(tiny_config(tmp_path).model, task.spec, head="per_position", causal=False)
    masked = build_objective("masked", task.spec)
    first, second = (evaluate(model, masked, task.val, batch_size=8, fabric=stage.fabric) for _ in range(2))
    assert first == second


def test_bf16_trains(task, tmp_path):
    stage = build_stage(task, tmp_path, precision="bf16", tokens=6000)
    dtypes = set()
    stage.model.backbone.layers[1].branch.register_forward_hook(lambda m, a, out: dtypes.add(out.dtype))
    assert stage.run().best["accuracy"] > 0.8
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in stage.model.parameters()} == {torch.float32}


def test_losses_and_duties_of_blocks_are_honoured(task, tmp_path, monkeypatch):
    stage = build_stage(task, tmp_path, tracked=True)
    calls = []
    monkeypatch.setattr("seqzoo.training.loop.after_step", lambda model: calls.append(model))
    weight = stage.model.backbone.norm.weight
    monkeypatch.setattr("seqzoo.training.loop.auxiliary_loss", lambda model: 100 * weight.square().sum())
    stage.model.backbone.norm.metrics = lambda: {"used": 0.5}
    stage.run()
    assert calls == [stage.model] * stage.total_steps
    assert load_checkpoint(tmp_path / "finetune" / "last.safetensors").weights["backbone.norm.weight"].norm() < 3.9
    assert [line["backbone.norm/used"] for line in lines(tmp_path) if "val/loss" in line] == [0.5] * 3


def test_lines_say_how_much_of_the_cores_there_was(task, tmp_path, monkeypatch):
    laps = iter([(3.0, 1.0), *[(1.0, 0.0)] * 1000])
    monkeypatch.setattr(Cores, "lap", lambda cores: next(laps))
    state = build_stage(task, tmp_path, tracked=True).run()
    first, *others = lines(tmp_path)
    assert first["cpu_share"] == 0.75
    assert {line["cpu_share"] for line in others} == {1.0}
    assert (state.cpu_ran, state.cpu_waited) == (3.0 + len(others), 1.0)


def test_nothing_is_said_of_cores_where_nobody_counts(task, tmp_path, monkeypatch):
    monkeypatch.setattr(Cores, "lap", lambda cores: (0.0, 0.0))
    state = build_stage(task, tmp_path, tracked=True).run()
    assert not [line for line in lines(tmp_path) if "cpu_share" in line]
    assert cpu_share(state.cpu_ran, state.cpu_waited) is None


def test_validations_know_how_long_training_took(task, tmp_path):
    state = build_stage(task, tmp_path, tracked=True).run()
    seconds = [line["training_seconds"] for line in lines(tmp_path) if "val/loss" in line]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == state.training_seconds


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (StageConfig(tokens=1000, batch_size=4), (1000, 25)),
        (StageConfig(tokens=1001, batch_size=4, accumulate=5), (1001, 6)),
        (StageConfig(epochs=1.5, batch_size=4), (1500, 38)),
        (StageConfig(tokens=1, batch_size=4), (1, 1)),
    ],
)
def test_budgets(stage, expected):
    assert budget(stage, n=100, tokens=1000) == expected


def test_pairs_count_both_sequences(task, tmp_path):
    pairs = replace(task.spec, num_inputs=2)
    half = len(task.train) // 2
    split = replace(task.train.subset(torch.arange(2 * half)), spec=pairs, labels=task.train.labels[:half])
    stage = build_stage(replace(task, spec=pairs, train=split, val=split), tmp_path, epochs=1)
    assert stage.budget == int(split.offsets[-1])


def test_each_block_reports_its_figures_once():
    model = nn.Sequential(build_block("vq_attention", 16, codebook_size=8), build_block("lru", 16))
    model(torch.randn(2, 50, 16)).sum().backward()
    after_step(model)
    assert sorted(module_metrics(model)) == ["0/codebook_perplexity", "0/codes_used", "0/relative_error"]
