"""Every operation on a device, values and gradients in each of its forms, against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels.agreement import relative_error
from ..kernels.real_gated_scan import real_gated_scan
from ..kernels.selective_scan import selective_scan

B, T, H, D = 2, 37, 2, 32  # heads of 32 channels: narrow tiles are what reports of wrong code have in common
# Of the whole tensor, relative. Rounding is a tenth of these or less, wrong code a hundred times as much.
BOUNDS = {torch.float32: 1e-4, torch.complex64: 1e-4, torch.bfloat16: 5e-2}
WIDE = {torch.complex64: torch.complex128}  # of others, float64
Tensors = dict[str, Tensor]


class Operation(NamedTuple):
    name: str
    shapes: dict[str, tuple[int, ...]]  # of what is drawn
    call: Callable[[Tensors, Any], Any]  # of the tensors and the form
    constant: tuple[str, ...] = ()  # have no gradient
    dtype: torch.dtype = torch.float32
    fused: bool = True


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _decay(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)


def _inside(a: Tensor) -> Tensor:
    """Coefficients of a recurrence that forgets."""
    return 0.9 * a / (1 + a.abs())


HEADS: dict[str, tuple[int, ...]] = {"q": (B, T, H, D), "k": (B, T, H, D), "v": (B, T, H, D)}
OPERATIONS = (
    Operation("attention", HEADS, lambda x, form: kernels.attention(x["q"], x["k"], x["v"], causal=True, backend=form)),
    Operation(
        "linear_attention",
        {**HEADS, "g": (B, T, H)},
        lambda x, form: kernels.linear_attention(
            _unit(x["q"]), _unit(x["k"]), x["v"], log_decay=_decay(x["g"]), causal=True, backend=form
        ),
    ),
    Operation(
        "delta_rule",
        {**HEADS, "g": (B, T, H), "beta": (B, T, H)},
        lambda x, form: kernels.delta_rule(
            _unit(x["q"]), _unit(x["k"]), x["v"], x["beta"].sigmoid(), log_decay=_decay(x["g"]), backend=form
        ),
    ),
    Operation(
        "favor_attention",
        {**HEADS, "w": (H, 48, D)},
        lambda x, form: kernels.favor_attention(
            _unit(x["q"]), _unit(x["k"]), x["v"], x["w"], causal=True, backend=form
        ),
        constant=("w",),
    ),
    Operation(
        "vq_attention",
        {**HEADS, "codebook": (H, 24, D)},
        lambda x, form: kernels.vq_attention(
            _unit(x["q"]), x["k"], x["v"], x["codebook"], block_len=16, causal=True, backend=form
        ),
        constant=("codebook",),
    ),
    Operation(
        "gated_attention",
        {"u": (B, T, 64), "v": (B, T, 64), **dict.fromkeys(("q1", "k1", "q2", "k2"), (B, T, D))},
        lambda x, form: kernels.gated_attention(
            x["u"], x["q1"], x["k1"], x["q2"], x["k2"], x["v"], chunk_len=16, causal=True, backend=form
        ),
    ),
    Operation(
        "diagonal_scan",
        {"x": (B, T, 64), "a": (64,)},
        lambda x, form: kernels.diagonal_scan(x["x"], _inside(x["a"]), backend=form),
        dtype=torch.complex64,
    ),
    Operation(
        "real_gated_scan",
        {**dict.fromkeys(("v", "recurrence_gate", "input_gate"), (B, T, 64)), "rate": (64,)},
        lambda x, form: real_gated_scan(x["v"], x["recurrence_gate"], x["input_gate"], x["rate"].exp(), backend=form),
        fused=False,
    ),
    Operation(
        "selective_scan",
        {"v": (B, T, D), "dt": (B, T, D), "A": (D, 8), "write": (B, T, 8), "read": (B, T, 8)},
        lambda x, form: selective_scan(x["v"], x["dt"].sigmoid(), -x["A"].exp(), x["write"], x["read"], backend=form),
        fused=False,
    ),
)


class Check(NamedTuple):
    """An operation in one of its forms."""

    operation: Operation
    form: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.operation.name} {self.form} {str(self.dtype).removeprefix('torch.')}"


def checks(device: torch.device) -> Iterator[Check]:
    """What runs on such a device: its forms in float32 and, in Triton, in bfloat16 too."""
    for operation in OPERATIONS:
        yield Check(operation, "chunked", operation.dtype)
        if operation.fused and device.type == "cuda":
            yield Check(operation, "fused", operation.dtype)
            if not operation.dtype.is_complex:
                yield Check(operation, "fused", torch.bfloat16)


def worst(check: Check, device: torch.device) -> tuple[str, float]:
    """The tensor that lies furthest from its definition, "output" or a gradient's, and how far."""
    drawn = draw(check, device)
    exact = {name: x.detach().cpu().to(WIDE.get(x.dtype, torch.float64)) for name, x in drawn.items()}
    expected = results(check.operation, exact, "reference")
    found = results(check.operation, drawn, check.form)
    errors = {name: relative_error(found[name].cpu(), expected[name])[0] for name in expected}
    return max(errors.items(), key=lambda item: item[1])


def draw(check: Check, device: torch.device) -> Tensors:
    """The operation's arguments, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex64 if check.operation.dtype.is_complex else torch.float32
    return {
        name: torch.randn(*shape, generator=generator, dtype=wide).to(device, check.dtype)
        for name, shape in check.operation.shapes.items()
    }


def results(operation: Operation, given: Tensors, form: str) -> Tensors:
    """The output, and the gradient of each argument of a sum over it with fixed weights."""
    x = {name: tensor.detach().requires_grad_(name not in operation.constant) for name, tensor in given.items()}
    output = operation.call(x, form)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape)
    wanted = [name for name in x if name not in operation.constant]
    total = (output.real if output.is_complex() else output).mul(weights).sum()
    gradients = torch.autograd.grad(total, [x[name] for name in wanted])
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}
