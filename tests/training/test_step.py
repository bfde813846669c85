"""What a step asks of its device, on one that has no numbers to read: "meta" tensors raise where one is read."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from often import others_slow
from tiny_runs import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.models import build_model
from seqzoo.objectives import build_objective
from seqzoo.runs.parts import build_fabric
from seqzoo.tasks import from_arrays
from seqzoo.tasks.augmentation import crop, move
from seqzoo.training.loop import Stage

BLOCKS = {
    "softmax_attention": {"num_heads": 2},
    "linear_attention": {"num_heads": 2},
    "performer": {"num_heads": 2},
    "vq_attention": {"num_heads": 2, "block_len": 4},
    "gau": {},
    "lru": {},
    "s4d": {},
    "conv": {},
    "retnet": {"num_heads": 2},
    "mamba2": {"num_heads": 2, "state_dim": 4},
    "mamba3": {"num_heads": 2, "state_dim": 4},
    "mamba": {"state_dim": 4},
    "gla": {"num_heads": 2},
    "hgrn2": {"num_heads": 2},
    "mlstm": {"num_heads": 2},
    "rg_lru": {},
    "min_gru": {},
    "s5": {},
}


class Copies(TorchDispatchMode):
    """Notes what would be copied from the CPU while a GPU waits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "index", "index_put", "index_put_") and "cpu" in given and "meta" in made:
            self.found.append(str(function))
        return result


def pixel_task():
    inputs = [[(7 * i + j) % 256 for j in range(16)] for i in range(40)]
    return from_arrays(
        "grey", kind="pixels", inputs=inputs, labels=[i % 2 for i in range(40)], val_fraction=0.2, test_fraction=0.2
    )


def stage_without_numbers(
    task,
    folder,
    monkeypatch,
    *,
    objective,
    block="vq_attention",
    pixel_loss="cross_entropy",
    accumulate=1,
    passes=1,
    augmentation=None,
    packing=False,
):
    stages = {"finetuning": {"accumulate": accumulate}}
    config = tiny_config(folder, model={"block": {"name": block, **BLOCKS[block]}}, **stages)
    fabric = build_fabric(config)
    fabric.strategy._root_device = torch.device("meta")
    monkeypatch.setattr(fabric._accelerator, "setup_device", lambda device: None)
    # The fused AdamW knows no such device.
    monkeypatch.setattr(
        "seqzoo.training.loop.build_optimizer",
        lambda model, stage: torch.optim.RMSprop([{"params": list(model.parameters()), "base_lr": 1e-3}]),
    )
    # On a GPU the numbers would be drawn there, and these copies not wait.
    for user in ("seqzoo.objectives", "seqzoo.tasks.augmentation"):
        monkeypatch.setattr(f"{user}.uniform", lambda shape, seed, device: torch.rand(shape, device=device))
    monkeypatch.setattr("seqzoo.tasks.data._copy", lambda x, device: torch.empty_like(x, device=device))
    goal = build_objective(objective, task.spec, pixel_loss=pixel_loss, passes=passes)
    return Stage(
        build_model(config.model, task.spec, head=goal.head, causal=objective == "causal"),
        goal,
        task.train,
        task.val,
        config.finetuning,
        name="finetune",
        seed=0,
        folder=folder,
        fabric=fabric,
        augmentation=augmentation,
        packing=packing,
    )


GOALS = ("task", "masked", "causal", "joint")
# Of every block two goals, one of them with documents in one row.
OFTEN = {(block, GOALS[(n + i) % 4], i == 0) for n, block in enumerate(BLOCKS) for i in (0, 1)}


@pytest.mark.parametrize(
    ("block", "objective", "packing"), others_slow(itertools.product(BLOCKS, GOALS, [True, False]), OFTEN)
)
def test_a_step_waits_for_no_device(task, tmp_path, monkeypatch, block, objective, packing):
    stage = stage_without_numbers(task, tmp_path, monkeypatch, objective=objective, block=block, packing=packing)
    with Copies() as copies:
        stage.take_step()
    assert copies.found == []


@pytest.mark.parametrize("objective", ["task", "masked", "causal", "joint"])
@pytest.mark.parametrize("augmentation", [None, crop])
def test_batches_are_weighed_where_they_are(task, tmp_path, monkeypatch, objective, augmentation):
    options = {"objective": objective, "accumulate": 3, "augmentation": augmentation, "passes": 2}
    stage = stage_without_numbers(task, tmp_path, monkeypatch, **options)
    with Copies() as copies:
        stage.take_step()
    assert copies.found == []


@pytest.mark.parametrize("pixel_loss", ["cross_entropy", "l1"])
def test_a_step_on_pixels_waits_for_no_device(tmp_path, monkeypatch, pixel_loss):
    options = {"objective": "masked", "block": "lru", "pixel_loss": pixel_loss, "augmentation": move}
    stage = stage_without_numbers(pixel_task(), tmp_path, monkeypatch, **options)
    with Copies() as copies:
        stage.take_step()
    assert copies.found == []


def test_the_copies_are_found():
    x = torch.zeros(3, device="meta")
    for waits in (lambda: torch.tensor(1.0).to("meta"), lambda: x.copy_(torch.ones(3)), lambda: x[torch.tensor([0])]):
        with Copies() as copies:
            waits()
        assert copies.found


@pytest.mark.parametrize("pixel_loss", ["cross_entropy", "l1"])
@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_the_sums_of_a_gpu_are_those_of_a_cpu(monkeypatch, objective, pixel_loss):
    """What is left out of the sums counts as what was never scored, in values and gradients."""
    task = pixel_task()
    goal = build_objective(objective, task.spec, pixel_loss=pixel_loss)
    torch.manual_seed(0)
    config = tiny_config(".", model={"block": {"name": "lru"}, "dropout": 0.0})
    model = build_model(config.model, task.spec, head=goal.head, causal=objective == "causal")
    batch = task.train.batch(torch.arange(6))
    picked = goal(model, batch, seed=3)
    picked.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    monkeypatch.setattr("seqzoo.objectives._may_wait_for", lambda device: False)
    scored = goal(model, batch, seed=3)
    scored.loss.backward()
    assert scored.totals.keys() == picked.totals.keys()
    for name, total in picked.totals.items():
        assert scored.totals[name].item() == pytest.approx(total.item(), rel=1e-6), name
    for other, gradient in zip((p.grad for p in model.parameters() if p.grad is not None), gradients, strict=True):
        torch.testing.assert_close(other, gradient)
    assert math.isfinite(scored.loss.item())
