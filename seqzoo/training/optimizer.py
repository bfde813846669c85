"""AdamW, or with it Muon, over groups of parameters: recurrences, those never decayed, those with a rate of their own,
matrices of layers where Muon moves them, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import StageConfig
from ..models.model import Residual
from .errors import TrainingError
from .muon import VERSION, Muon
from .shards import cut_as


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, with its `name`, `params`, `lr`, `base_lr` and `weight_decay`.

    - "recurrence": what modules name in their class attribute `recurrence` (decay rates, phases, step sizes). A smaller
      rate and no decay, since a small change of a rate near 1 is a large change of memory (Gu et al. 2022,
      "Efficiently Modeling Long Sequences with Structured State Spaces", appendix D).
    - "plain": norms, biases and whatever else has fewer than two dimensions, and what modules name in `undecayed`. No
      decay.
    - "rate x <factor>": what modules name, with that factor, in their attribute `lr_factors`.
    - "matrices": of `optimizer=muon`, the weights of linear layers in residual branches. Those of embeddings and heads
      are no maps between hidden vectors, and stay with AdamW; so do the factors of a low-rank change, whichever of them
      has a rate of its own.
    - "decayed": the rest.
    """
    recurrence, undecayed = (
        {
            id(parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters()
            if name in getattr(module, attribute, ())
        }
        for attribute in ("recurrence", "undecayed")
    )
    with_factors = [(module, factors) for module in model.modules() if (factors := getattr(module, "lr_factors", None))]
    own_factors = {
        id(module.get_parameter(name)): factor for module, factors in with_factors for name, factor in factors.items()
    }
    matrices = {
        id(linear.weight)
        for layer in model.modules()
        if isinstance(layer, Residual)
        for linear in layer.branch.modules()
        if isinstance(linear, nn.Linear)
    }
    matrices -= {id(parameter) for module, _ in with_factors for parameter in module.parameters()}
    members: dict[str, list[nn.Parameter]] = {"recurrence": [], "plain": [], "matrices": [], "decayed": []}
    factors = {"recurrence": stage.recurrence_lr_factor}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in recurrence:
            members["recurrence"].append(parameter)
        elif factor := own_factors.get(id(parameter)):
            name = f"rate x {factor:g}"
            factors[name] = factor
            members.setdefault(name, []).append(parameter)
        else:
            plain = parameter.dim() < 2 or id(parameter) in undecayed
            moved = "matrices" if stage.optimizer == "muon" and id(parameter) in matrices else "decayed"
            members["plain" if plain else moved].append(parameter)
    return [
        {
            "name": name,
            "params": params,
            "lr": stage.lr * factors.get(name, 1.0),
            "base_lr": stage.lr * factors.get(name, 1.0),
            "weight_decay": 0.0 if name in ("recurrence", "plain") else stage.weight_decay,
        }
        for name, params in members.items()
        if params
    ]


def recorded(optimizer: str) -> str:
    """What results and the names of runs call it: "muon" is PyTorch's, which it was at first."""
    return f"muon {VERSION}" if optimizer == "muon" else optimizer


def build_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019; betas 0.9 and 0.999), or Muon too, over `parameter_groups(model, stage)`."""
    groups = parameter_groups(model, stage)
    return MuonAdamW(groups) if stage.optimizer == "muon" else _adamw(groups)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the group "matrices", AdamW for all others, with one state.

    As Muon has no fused form, which would leave that to the device, it asks before each step whether that failed (see
    `Guard`).
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self.parts = [
            (build(self._groups(matrices)), matrices)
            for build, matrices in ((Muon, True), (_adamw, False))
            if self._groups(matrices)  # where only a head is trained there are no matrices
        ]

    def _groups(self, matrices: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if (group["name"] == "matrices") == matrices]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        if self.found_inf is not None and self.found_inf.item():
            return loss
        for part, matrices in self.parts:
            part.state = self.state  # which loading replaces, as it does groups
            part.param_groups = self._groups(matrices)
            part.step()
        return loss


def restore(optimizer: torch.optim.Optimizer, kept: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Gives `optimizer` what one of the same parameters kept of each, by their order in the groups.

    Raises:
        TrainingError: it was of other parameters. A fused step would not notice, and write where it must not.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, tensors in kept.items():
        shape = parameters[index].shape if index < len(parameters) else None
        if any(tensor.shape not in ((), shape) for tensor in tensors.values()):
            raise TrainingError("the optimiser's state is of other parameters, as of an earlier version of a block")
    own = {
        index: {name: cut_as(parameters[index], tensor) for name, tensor in tensors.items()}
        for index, tensors in kept.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": own})


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]
