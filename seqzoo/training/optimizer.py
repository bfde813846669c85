"""AdamW over groups of parameters: recurrences, those never decayed, those with a rate of their own, the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import StageConfig
from .errors import TrainingError


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, with its `name`, `params`, `lr`, `base_lr` and `weight_decay`.

    - "recurrence": what modules name in their class attribute `recurrence` (decay rates, phases, step sizes). A smaller
      rate and no decay, since a small change of a rate near 1 is a large change of memory (Gu et al. 2022,
      "Efficiently Modeling Long Sequences with Structured State Spaces", appendix D).
    - "plain": norms, biases and whatever else has fewer than two dimensions, and what modules name in `undecayed`. No
      decay.
    - "rate x <factor>": what modules name, with that factor, in their attribute `lr_factors`.
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
    own_factors = {
        id(module.get_parameter(name)): factor
        for module in model.modules()
        for name, factor in getattr(module, "lr_factors", {}).items()
    }
    members: dict[str, list[nn.Parameter]] = {"recurrence": [], "plain": [], "decayed": []}
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
            members["plain" if plain else "decayed"].append(parameter)
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


def build_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with betas 0.9 and 0.999 over `parameter_groups(model, stage)`."""
    return torch.optim.AdamW(parameter_groups(model, stage), betas=(0.9, 0.999), fused=True)


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
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(kept)})


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]
