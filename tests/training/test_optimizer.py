from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from seqzoo.config import StageConfig
from seqzoo.models.model import Residual
from seqzoo.training.errors import TrainingError
from seqzoo.training.guard import Guard
from seqzoo.training.muon import Muon, orthogonal
from seqzoo.training.optimizer import build_optimizer, parameter_groups, restore, set_lr
from seqzoo.training.schedule import lr_factor


class Recurrent(nn.Module):
    recurrence = ("rate", "inner.weight")

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(3))
        self.inner = nn.Linear(3, 3)


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3), Recurrent(), nn.LayerNorm(3), nn.Linear(3, 2))


def names_by_group(net: nn.Module, stage: StageConfig) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(net, stage)}


def test_every_parameter_is_in_exactly_one_group():
    net = model()
    groups = names_by_group(net, StageConfig(epochs=1))
    assert groups == {
        "recurrence": {"1.rate", "1.inner.weight"},
        "plain": {"1.inner.bias", "2.weight", "2.bias", "3.bias"},
        "decayed": {"0.weight", "3.weight"},
    }
    members = [p for group in parameter_groups(net, StageConfig(epochs=1)) for p in group["params"]]
    assert len(members) == len({id(p) for p in members}) == len(list(net.parameters()))


def test_recurrences_learn_slower_and_only_matrices_decay():
    stage = StageConfig(epochs=1, lr=0.01, recurrence_lr_factor=0.25, weight_decay=0.1)
    groups = {group["name"]: group for group in build_optimizer(model(), stage).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "recurrence": 0.0025,
        "plain": 0.01,
        "decayed": 0.01,
    }
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "recurrence": 0,
        "plain": 0,
        "decayed": 0.1,
    }


def test_frozen_parameters_are_left_out():
    net = model()
    net[0].requires_grad_(False)
    assert names_by_group(net, StageConfig(epochs=1))["decayed"] == {"3.weight"}


class Scaled(nn.Linear):
    lr_factors: ClassVar = {"weight": 16.0}


def test_a_module_may_ask_for_a_rate_of_its_own():
    net = nn.Sequential(Scaled(3, 3), nn.Linear(3, 2))
    groups = {group["name"]: group for group in parameter_groups(net, StageConfig(epochs=1, lr=0.01, weight_decay=0.1))}
    assert groups["rate x 16"]["params"] == [net[0].weight]
    assert groups["rate x 16"]["lr"] == groups["rate x 16"]["base_lr"] == pytest.approx(0.16)
    assert groups["rate x 16"]["weight_decay"] == 0.1
    assert groups["decayed"]["params"] == [net[1].weight]


def test_set_lr_scales_base_rates():
    optimizer = build_optimizer(model(), StageConfig(epochs=1, lr=0.01, recurrence_lr_factor=0.5))
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0005, 0.001, 0.001])


def test_warmup_then_constant():
    factors = [lr_factor(step, total_steps=8, warmup_steps=4, schedule="constant") for step in range(8)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_cosine_falls_from_one_towards_zero():
    factors = [lr_factor(step, total_steps=12, warmup_steps=2, schedule="cosine") for step in range(12)]
    assert factors[:3] == [0.5, 1, 1]
    assert factors[7] == pytest.approx(0.5)
    assert factors[11] == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_warmup_longer_than_the_stage():
    assert lr_factor(9, total_steps=10, warmup_steps=100, schedule="cosine") == 0.1


def trained(width: int) -> torch.optim.AdamW:
    net = nn.Linear(width, 2)
    optimizer = build_optimizer(net, StageConfig(epochs=1))
    net(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return optimizer


def test_state_of_other_parameters_is_refused():
    optimizer, kept = trained(3), trained(3).state_dict()["state"]
    restore(optimizer, kept)
    assert optimizer.state_dict()["state"][0]["exp_avg"].equal(kept[0]["exp_avg"])
    for other in (trained(4).state_dict()["state"], {2: kept[0]}):
        with pytest.raises(TrainingError, match="of other parameters"):
            restore(optimizer, other)


def layered() -> nn.Module:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 3))
    return nn.Sequential(nn.Embedding(5, 3), Residual(branch, 3, 0.0, mixes=False), nn.Linear(3, 2))


class Inner(nn.Module):
    """The middle layer alone, which takes its lengths."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids):
        return self.net[2](self.net[1](self.net[0](ids), None))


MUON = StageConfig(epochs=1, lr=0.01, weight_decay=0.1, optimizer="muon")


def test_muon_moves_the_matrices_of_layers_and_nothing_else():
    groups = names_by_group(layered(), MUON)
    assert groups["matrices"] == {"1.branch.0.weight", "1.branch.2.weight"}
    assert groups["decayed"] == {"0.weight", "2.weight"}
    assert "matrices" not in names_by_group(layered(), StageConfig(epochs=1))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    Inner(net)(torch.arange(5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_update_of_muon_is_orthogonal_and_as_large_as_adamws():
    net = layered()
    weight, optimizer = net[1].branch[0].weight, build_optimizer(net, MUON)
    before = weight.detach().clone()
    Inner(net)(torch.arange(5)).square().sum().backward()
    gradient = torch.linalg.svdvals(weight.grad)
    optimizer.step()
    update = (weight.detach() - (1 - 0.01 * 0.1) * before) / (0.01 * 0.2 * math.sqrt(6))
    *values, nothing = torch.linalg.svdvals(update)
    assert gradient[1] < 0.1 * gradient[0]
    assert all(0.3 < value < 1.3 for value in values)  # as near to 1 as five iterations bring them
    assert nothing < 1e-3, "inputs behind a norm add up to 0: no gradient says how their mean counts"


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 20, 7), (3, 7, 20)])
def test_muon_iterates_on_singular_values(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = (s / s.norm(dim=1, keepdim=True))[:, None]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonal(x), u * s @ v, rtol=0, atol=1e-12)
    single = orthogonal(x.float())
    assert (single - u * s @ v).norm() < 1e-5 * s.norm(), "in single precision, which bfloat16 is far from"


def test_muon_takes_the_steps_of_pytorchs():
    """For matrices of one shape as for one alone, and whichever of them has a gradient."""
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in ((24, 10), (10, 10), (24, 10))] for _ in range(2))
    optimizers = (
        Muon([{"params": ours, "lr": 0.01, "weight_decay": 0.1}]),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            gradient = None if number % 4 == i else torch.randn(pair[0].shape, generator=generator)
            for weight in pair:
                weight.grad = None if gradient is None else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(optimizers[0].state[one], optimizers[1].state[other], rtol=0, atol=0)
        assert (one - other).norm() < 0.02 * one.norm(), "theirs iterate in bfloat16"


def test_muon_goes_on_from_what_it_kept():
    nets = layered(), layered()
    first, second = (build_optimizer(net, MUON) for net in nets)
    for _ in range(3):
        step(nets[0], first)
    nets[1].load_state_dict(nets[0].state_dict())
    kept = first.state_dict()["state"]
    restore(second, {index: {name: x.clone() for name, x in tensors.items()} for index, tensors in kept.items()})
    for net, optimizer in zip(nets, (first, second), strict=True):
        step(net, optimizer)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert a.equal(b)


def test_a_failed_step_moves_nothing_of_muons():
    net = layered()
    optimizer = build_optimizer(net, MUON)
    step(net, optimizer)
    weights = {name: x.clone() for name, x in net.state_dict().items()}
    Guard(optimizer, torch.device("cpu")).watch(1, torch.tensor(False))
    step(net, optimizer)
    assert all(net.state_dict()[name].equal(x) for name, x in weights.items())


def test_muon_without_matrices_is_adamw():
    net = layered()
    net[1].requires_grad_(False)
    step(net, build_optimizer(net, MUON))
    assert not net[2].weight.equal(layered()[2].weight)
