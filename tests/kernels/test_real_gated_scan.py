"""real_gated_scan and its unit: decays in PyTorch and in the compiled loop, against the loop that defines them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close
from torch import Tensor, nn

from seqzoo import build_block
from seqzoo.kernels.real_gated_scan import Gate, real_gated_scan, real_gated_unit

T, D, H = 21, 12, 3
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
NAMES = ("h", "state", "du", "of weight", "of bias", "of input weight", "of input bias", "of rate", "of state")
ENDS = {
    "all begin": (2, {}),
    "some begin": (3, {"begins": torch.tensor([True, False, False]), "lengths": torch.tensor([T, 0, 9])}),
    "documents": (3, {"begins": torch.tensor([False, True, False]), "cu_seqlens": torch.tensor([0, 8, 8, T])}),
}


def make(R: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """u, weight and bias of both gates, the rate, a state of R sequences, and cotangents of h and of the last state."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights = [randn(H, D // H, D // H), randn(D), randn(H, D // H, D // H), randn(D)]
    tensors = [randn(rows, T, D), *weights, randn(D).exp() / 8, randn(R, D), randn(rows, T, D), randn(R, D)]
    return [x.to(dtype) for x in tensors]


def layer(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return u @ torch.block_diag(*weight) + bias


def run(tensors: list[Tensor], form: str, **options) -> list[Tensor | None]:
    """h, the final state, and gradients; with no `begins`, the sequences have no state."""
    *leaves, w, w_state = (x.detach().clone().requires_grad_() for x in tensors)
    u, weight, bias, input_weight, input_bias, rate, state = leaves
    options |= {"initial_state": state if "begins" in options else None, "output_final_state": True}
    if form == "unit":
        gates = Gate(weight, bias), Gate(input_weight, input_bias)
        outputs = real_gated_unit(u, *gates, rate, **options)
    else:
        gates = layer(u, weight, bias), layer(u, input_weight, input_bias)
        outputs = real_gated_scan(u, *gates, rate, backend=form, **options)
    return [*outputs, *torch.autograd.grad(outputs, leaves, (w, w_state), allow_unused=True)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(
    ("form", "dtype"), [("chunked", torch.float64), ("unit", torch.float64), ("unit", torch.float32)]
)
def test_agrees_with_reference(form, dtype, ends, reverse):
    R, options = ENDS[ends]
    tensors = make(R, 1 if "cu_seqlens" in options else R, dtype)
    expected = run([x.double() for x in tensors], "reference", reverse=reverse, **options)
    for name, value, target in zip(NAMES, run(tensors, form, reverse=reverse, **options), expected, strict=True):
        if target is None:
            assert value is None
        else:
            assert value.dtype == dtype
            assert_close(value, target, TOLERANCE[dtype], name)


def scanned(tensors: list[Tensor], backend: str, **options) -> list[Tensor]:
    """As `run`, of gates that are given."""
    *leaves, w, w_state = (x.detach().clone().requires_grad_() for x in tensors)
    *inputs, state = leaves
    outputs = real_gated_scan(*inputs, initial_state=state, output_final_state=True, backend=backend, **options)
    return [*outputs, *torch.autograd.grad(outputs, leaves, (w, w_state))]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["reference", "chunked", "unit"])
def test_what_lies_past_lengths_changes_nothing(form, reverse):
    R, options = ENDS["some begin"]
    tensors = make(R, R, torch.float64)
    if form != "unit":
        u, *layers, rate, state, w, w_state = tensors
        tensors = [u, layer(u, *layers[:2]), layer(u, *layers[2:]), rate, state, w, w_state]
    padding = (torch.arange(T) >= options["lengths"][:, None])[..., None]
    clean, dirty = (
        (run if form == "unit" else scanned)(
            [x.masked_fill(padding, past) if x.shape == (R, T, D) else x for x in tensors],
            form,
            reverse=reverse,
            **options,
        )
        for past in (0.0, math.nan)
    )
    assert all(torch.equal(value, target) for value, target in zip(dirty, clean, strict=True))


def test_has_derivatives_beyond_the_first():
    tensors = [x.requires_grad_() for x in make(2, 2, torch.float64)[:7]]

    def unit(u: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
        *input_gate, rate, state = others
        return real_gated_unit(u[:, :4], Gate(weight, bias), Gate(*input_gate), rate, initial_state=state)

    torch.autograd.gradgradcheck(unit, tensors, fast_mode=True)
    tangents = [torch.randn_like(x) for x in tensors]
    _, forward = torch.func.jvp(unit, tuple(tensors), tuple(tangents))
    w = torch.randn_like(forward)
    gradients = torch.autograd.grad(unit(*tensors), tensors, w)
    backward = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert_close((forward * w).sum(), backward, 1e-12)


def test_autocast_multiplies_in_half_and_adds_in_single_precision():
    u, weight, bias, input_weight, input_bias, rate, *_ = make(2, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        h = real_gated_unit(u, Gate(weight, bias), Gate(input_weight, input_bias), rate)
    half = u.bfloat16(), weight.bfloat16(), input_weight.bfloat16()
    gates = (
        torch.einsum("bthi,hio->btho", half[0].unflatten(-1, (H, -1)), W).flatten(2).float() + b
        for W, b in ((half[1], bias), (half[2], input_bias))
    )
    assert h.dtype == torch.float32
    assert_close(h, real_gated_scan(u, *gates, rate, backend="reference"), 2e-6)


def test_gates_that_are_looked_at_are_called():
    """Hooks, such as those that prune weights, see every call of a layer."""
    block, x, seen = build_block("rg_lru", D, causal=True, num_heads=H), torch.randn(2, T, D), []
    expected = block(x)
    block.input_gate.register_forward_hook(lambda module, given, y: seen.append(y))
    assert_close(block(x), expected, 2e-6)
    assert len(seen) == 1
    nn.utils.parametrize.register_parametrization(block.recurrence_gate, "weight", nn.Identity())
    assert_close(block(x), expected, 2e-6)


def test_the_gate_of_the_output_keeps_nothing_of_its_own():
    from seqzoo.blocks.rg_lru import gated

    h, z = (torch.randn(2, T, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, expected = torch.randn(2, T, D, dtype=torch.float64), h * F.gelu(z, approximate="tanh")
    assert_close(gated(h, z), expected, 1e-15)
    for value, target in zip(*(torch.autograd.grad(y, (h, z), w) for y in (gated(h, z), expected)), strict=True):
        assert_close(value, target, 1e-14)


def test_errors():
    v, rate = torch.zeros(2, 5, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"expected v and two gates \[B, T, D\] with T >= 1, and rate \[D\], got"):
        real_gated_scan(v, v, v[:, 1:], rate)
    with pytest.raises(ValueError, match=r"begins must be \[2\], a row for each sequence, got \[3\]"):
        real_gated_scan(v, v, v, rate, begins=torch.ones(3, dtype=torch.bool))
