"""Where a computation first left the finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """What to blame for a non-finite loss: a parameter, else the first module, in the order in which modules finish,
    whose output holds NaN or infinity while `forward` runs, else a gradient.

    `forward` is run once, without gradients and without compilation.
    """
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            return f"parameter {name} is not finite"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(f"{name} ({type(module).__name__})" if name else type(module).__name__)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"first non-finite output: {found[0]}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"all outputs are finite; the gradient of {name} is not"
    return "all outputs and gradients are finite; the loss is not"


def _finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    return all(map(_finite, output)) if isinstance(output, (tuple, list)) else True
