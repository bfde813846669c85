"""How large a model is, and which width makes it as large as another."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..spec import TaskSpec
from .model import JointModel, ModelConfig, build_model, task_head

WIDEST = 1 << 14
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def count_parameters(config: ModelConfig, spec: TaskSpec, *, causal: bool) -> int:
    """Parameters of the fine-tuned model, embedding and head included; nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config, spec, head=task_head(spec), causal=causal)
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(
    config: ModelConfig, spec: TaskSpec, *, causal: bool, head: str | None = None, passes: int = 1
) -> float:
    """Floating-point operations of the forward pass for each position of a sequence of `spec.max_length`.

    Counts matrix products and attention, 2 for a multiplication and an addition, as `torch.utils.flop_counter` does;
    products of complex numbers, as S4D has, count like real ones, and scans and the delta rule nothing. The model has
    the head that the task asks for, or `head`, one of those of `build_model`. One with two heads is called as in
    training, in two passes where `passes` says so, in each of which a position counts.
    """
    T = spec.max_length
    shape = (1,) if spec.num_inputs == 1 else (1, spec.num_inputs)
    with torch.device("meta"):
        model = build_model(config, spec, head=head or task_head(spec), causal=causal).eval()
        lengths = torch.full(shape, T)
        tail = (spec.channels,) if spec.kind == "pixels" else ()
        inputs = torch.zeros(*shape, T, *tail, dtype=torch.uint8 if spec.kind == "pixels" else torch.int64)
        hidden = {"mask": torch.zeros(*shape, T, dtype=torch.bool), "whole": passes == 2}
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(inputs, lengths, **(hidden if isinstance(model, JointModel) else {}))
    return counter.get_total_flops() / (passes * T * spec.num_inputs)


def fit_width(config: ModelConfig, spec: TaskSpec, size: str, *, causal: bool) -> ModelConfig:
    """`config` with the width that comes nearest to a size.

    Args:
        size: "params:<n>" for n parameters, or "flops:<n>" for n operations per token; n may end in k, M or G.

    Raises:
        ValueError: `size` is not of that form, no width up to 16,384 reaches it, or the smallest is twice as large.
    """
    measure, n = parse_size(size)
    step = 2 * (config.num_heads or 4)  # heads of an even width

    @cache
    def at(steps: int) -> float:
        sized = replace(config, d_model=steps * step)
        if measure == "params":
            return count_parameters(sized, spec, causal=causal)
        return flops_per_token(sized, spec, causal=causal)

    low, high = 1, 1
    if at(low) > 2 * n:
        raise ValueError(f"size={size}: {config.name} has {measure}:{at(low):,.0f} at its smallest width, {step}")
    while at(high) < n:
        low, high = high, 2 * high
        if high * step > WIDEST:
            raise ValueError(f"size={size}: no width up to {WIDEST:,} makes {config.name} so large")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < n else (low, middle)
    nearest = min((low, high), key=lambda steps: abs(at(steps) - n))
    return replace(config, d_model=nearest * step)


def parse_size(size: str) -> tuple[str, float]:
    """ "params:1.5M" -> ("params", 1500000.0).

    Raises:
        ValueError: `size` is not of that form.
    """
    match = re.fullmatch(r"(params|flops):(\d+(?:\.\d+)?)([kKmMgG]?)", size)
    if not match or not float(match[2]):
        raise ValueError(f"size={size}: valid: params:<n> or flops:<n>, n a number that may end in k, M or G")
    return match[1], float(match[2]) * UNITS[match[3].lower()]
