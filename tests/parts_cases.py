"""Blocks and models on parts of the time beside themselves on all of it, in one of several processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from block_cases import VARIANTS, make, sequences
from ranks import summed
from torch import Tensor, nn

from seqzoo.blocks import Part
from seqzoo.models import ModelConfig, build_model
from seqzoo.objectives import build_objective
from seqzoo.spec import IGNORED, Batch, TaskSpec

NAMES = ("linear_attention", "lru", "s4d", "retnet", "mamba2", "gated_delta_net", "delta_net", "kda", "s5", "conv")
CASES = [
    (name, {key: value for key, value in options.items() if key != "dropout"}, causal)
    for name in NAMES
    for options in VARIANTS.get(name, [{}])
    for causal in (True, False)
]
SHAPES = ((70, None), (131, (131, 60, 3)), (9, (9, 9, 2)), (4, None))  # steps, and how many of each sequence count


def block_errors(
    cases: Iterable[tuple[str, dict[str, Any], bool]], shapes: Iterable[tuple[int, tuple[int, ...] | None]]
) -> dict[str, float]:
    """The largest relative error of outputs and gradients of each case, on this rank."""
    return {
        f"{name} {options} {'causal' if causal else 'both'} {T}": block_error(name, options, causal, T, lengths)
        for name, options, causal in cases
        for T, lengths in shapes
    }


def block_error(name: str, options: dict[str, Any], causal: bool, T: int, lengths: tuple[int, ...] | None) -> float:
    block, part, B = make(name, options, causal, train=True), Part(T), 3
    x, weight = sequences(B, T), sequences(B, T, seed=5)
    counting = None if lengths is None else torch.tensor(lengths)
    whole, own = x.clone().requires_grad_(), part.own(x).clone().requires_grad_()
    y = block(whole, lengths=counting)
    (y * weight).sum().backward()
    expected = gradients(block)
    y_own = block(own, lengths=counting, part=part)
    (y_own * part.own(weight)).sum().backward()
    found = {name: summed(gradient) for name, gradient in gradients(block).items()}
    assert found.keys() == expected.keys()
    pairs = [(y_own, part.own(y)), (own.grad, part.own(whole.grad))]
    return max(relative(*pair) for pair in [*pairs, *((found[name], expected[name]) for name in expected)])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Those of parameters, which are taken away."""
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    return found


def relative(x: Tensor, y: Tensor) -> float:
    return ((x - y).detach().norm() / y.detach().norm().clamp(min=1e-300)).item()


def model_errors() -> dict[str, float]:
    """The same of a model's loss and gradients, for all that it may be asked."""
    errors = {}
    for objective, changes in (
        *(("task", {"pooling": pooling}) for pooling in ("mean", "max", "last", "first")),
        ("task", {"position": "learned", "num_inputs": 2}),
        ("masked", {"position": "sinusoidal"}),
        ("causal", {"position": "learned"}),
        ("joint", {}),
        ("task", {"answer": "positions"}),
    ):
        errors[f"{objective} {changes}"] = model_error(objective, (21, 5, 1), **changes)
    return errors


def model_error(
    objective: str,
    lengths: tuple[int, ...],
    *,
    position: str = "none",
    pooling: str = "mean",
    num_inputs: int = 1,
    answer: Any = "class",
) -> float:
    spec = TaskSpec(
        name="toy",
        kind="tokens",
        vocab_size=7,
        max_length=21,
        num_classes=7,
        mask_id=6,
        num_inputs=num_inputs,
        answer=answer,
        mask_ratio=0.4,
    )
    config = ModelConfig(
        name="toy",
        d_model=16,
        num_layers=2,
        layers=["retnet", {"name": "lru", "state_dim": 5}],
        position=position,
        pooling=pooling,
        mlp_ratio=1.0,
    )
    goal = build_objective(objective, spec)
    torch.manual_seed(0)
    model = build_model(config, spec, head=goal.head, causal=objective == "causal").double()
    B, T = 3, 21
    inputs = torch.randint(0, 6, (B, T) if num_inputs == 1 else (B, 2, T))
    counting = torch.tensor(lengths) if num_inputs == 1 else torch.tensor([lengths, lengths[::-1]]).T
    targets = None
    if answer == "positions":
        asked = (torch.rand(B, T) < 0.5) & (torch.arange(T) < counting[:, None])
        targets = torch.where(asked, inputs, IGNORED)
    batch = Batch(inputs, counting, torch.randint(0, 7, (B,)), torch.arange(B), targets)
    expected = goal.weighed(model, batch, seed=3, shares=torch.ones_like(goal.count(batch, seed=3).double()))
    expected.loss.backward()
    wanted = gradients(model)

    batch = batch._replace(part=Part(T))
    counted = goal.count(batch, seed=3)
    shares = counted / summed(counted)
    loss, totals = goal.weighed(model, batch, seed=3, shares=shares)
    loss.backward()
    found = {name: summed(gradient) for name, gradient in gradients(model).items()}
    assert found.keys() == wanted.keys()
    pairs = [(found[name], wanted[name]) for name in wanted if wanted[name].any()]
    pairs += [(summed(loss.detach()), expected.loss)]
    pairs += [(summed(totals[name]), expected.totals[name]) for name in totals]
    return max(relative(*pair) for pair in pairs)


def bytes_sent() -> dict[tuple[str, bool, int], int]:
    found = {}
    for name in ("linear_attention", "lru", "s4d", "retnet", "mamba2", "gated_delta_net"):
        for causal in (True, False):
            for T in (20, 37, 64, 131):
                block, part = make(name, {}, causal, dtype=torch.float32, train=True), Part(T)
                sent, real = [0], dist.isend

                def isend(tensor: Tensor, *arguments: Any, sent=sent, real=real, **options: Any) -> Any:
                    sent[0] += tensor.nbytes
                    return real(tensor, *arguments, **options)

                dist.isend = isend
                try:
                    block(part.own(sequences(2, T, dtype=torch.float32)).requires_grad_(), part=part).sum().backward()
                finally:
                    dist.isend = real
                found[name, causal, T] = sent[0]
    return found
