"""AdamW over three groups of parameters: recurrences, those that are never decayed, and the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import StageConfig


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, with its `name`, `params`, `lr`, `base_lr` and `weight_decay`.

    - "recurrence": what modules name in their class attribute `recurrence` (decay rates, phases, step sizes). A smaller
      rate and no decay, since a small change of a rate near 1 is a large change of memory (Gu et al. 2022,
      "Efficiently Modeling Long Sequences with Structured State Spaces", appendix D).
    - "plain": norms, biases and whatever else has fewer than two dimensions, and what modules name in `undecayed`. No
      decay.
    - "decayed": the rest.
    """
    recurrence, undecayed = (
        {id(module.get_parameter(name)) for module in model.modules() for name in getattr(module, attribute, ())}
        for attribute in ("recurrence", "undecayed")
    )
    members: dict[str, list[nn.Parameter]] = {"recurrence": [], "plain": [], "decayed": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in recurrence:
            members["recurrence"].append(parameter)
        else:
            plain = parameter.dim() < 2 or id(parameter) in undecayed
            members["plain" if plain else "decayed"].append(parameter)
    factors = {"recurrence": stage.recurrence_lr_factor}
    decays = {"decayed": stage.weight_decay}
    return [
        {
            "name": name,
            "params": params,
            "lr": stage.lr * factors.get(name, 1.0),
            "base_lr": stage.lr * factors.get(name, 1.0),
            "weight_decay": decays.get(name, 0.0),
        }
        for name, params in members.items()
        if params
    ]


def build_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with betas 0.9 and 0.999 over `parameter_groups(model, stage)`."""
    return torch.optim.AdamW(parameter_groups(model, stage), betas=(0.9, 0.999), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]
