"""Derivatives beyond the first and in forward mode: of every operation, through gradients that are written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from operation_cases import CASES, B, Case, D, H, leaves, outputs, randn
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from seqzoo.kernels import diagonal_scan, nearest_code, vq_attention


@pytest.mark.parametrize("backend", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, backend):
    case = CASES[name]
    torch.manual_seed(0)
    call = lambda *x: case.call(*x, backend=backend)  # noqa: E731
    assert gradgradcheck(call, leaves(case), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name):
    case = CASES[name]
    torch.manual_seed(0)
    call = lambda *x: case.call(*x, backend="chunked")  # noqa: E731
    assert gradcheck(call, leaves(case), fast_mode=True, check_forward_ad=True, check_backward_ad=False)


def hessian_product(case: Case, inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Of the sum of squares of all outputs, with ones: through the inputs and through the gradients of outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = sum(y.abs().square().sum() for y in outputs(case, inputs, backend))
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    return list(torch.autograd.grad(sum(g.real.sum() for g in gradients), inputs))


OFTEN = (
    *("diagonal_scan complex True False", "diagonal_scan complex True both", "diagonal_scan real False True"),
    *("attention True 1", "linear_attention False True", "linear_attention state True", "linear_attention decay 3"),
    *("linear_attention decay 4 state", "delta_rule state"),
    *("favor_attention False", "favor_attention state", "vq_attention False 4", "gated_attention state"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in CASES
        if "projection" not in name  # to kernels it is a constant
    ],
)
def test_second_derivatives_of_kernels(name):
    case = CASES[name]
    narrow = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in case.inputs]
    wide = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in narrow]
    expected = hessian_product(case, wide, "reference")
    for number, pair in enumerate(zip(hessian_product(case, narrow, "fused"), expected, strict=True)):
        if name == "linear_attention True True" and number == 0:
            # A first step has one key and its query cancels: a row of zeros, in which double precision alone sees them.
            assert_close(*pair, 3e-5, "queries", worst_row=math.inf)
            pair = tuple(x[:, 1:] for x in pair)
        assert_close(*pair, 3e-5, f"input {number}")


def test_keys_are_straight_through_to_the_second_derivative_too():
    book, k = randn(H, 4, D), randn(B, 6, H, D)
    codes = nearest_code(k, book)
    options = {"codes": codes, "block_len": 3, "causal": True}
    case = Case(
        lambda q, k, v, **to: vq_attention(q, k, v, book, **options, **to), [randn(B, 6, H, D), k, randn(B, 6, H, D)]
    )
    expected = hessian_product(case, case.inputs, "reference")
    for pair in zip(hessian_product(case, case.inputs, "chunked"), expected, strict=True):
        assert_close(*pair, 1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "linear_attention True True",
        "delta_rule decay 4",
        "diagonal_scan complex True False",
        "vq_attention True 2",
    ],
)
def test_third_derivatives(name):
    case = CASES[name]

    def first(*inputs: Tensor) -> Tensor:
        loss = sum(y.abs().square().sum() for y in outputs(case, list(inputs), "chunked"))
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.stack([g.abs().square().sum() for g in gradients])

    torch.manual_seed(0)
    assert gradgradcheck(first, leaves(case), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_takes_what_carries_a_tangent(name):
    """Backward is linear in the gradients of outputs, so that a tangent of them goes through it as they do."""
    case = CASES[name]
    inputs = leaves(case)
    found = outputs(case, inputs, "chunked")
    ways = [torch.randn_like(y) for y in found]
    expected = torch.autograd.grad(found, inputs, ways, retain_graph=True)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(torch.zeros_like(w), w) for w in ways]
        tangents = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(found, inputs, duals)]
    for tangent, gradient in zip(tangents, expected, strict=True):
        assert tangent is not None
        assert_close(tangent, gradient, 1e-12)


@pytest.mark.parametrize(
    "name",
    ["linear_attention True True", "delta_rule decay 3", "diagonal_scan real True False", "attention True 2"],
)
def test_function_transforms(name):
    case = CASES[name]
    x, *others = (y.detach() for y in case.inputs)
    t = torch.randn_like(x)

    def loss(x: Tensor) -> Tensor:
        return sum(y.square().sum() for y in outputs(case, [x, *others], "chunked"))

    expected = hessian_product(Case(lambda x, **to: case.call(x, *others, **to), [x]), [x], "reference")[0].sum()
    ones = torch.ones_like(x)
    jvp = torch.func.jvp
    assert_close(jvp(lambda x: jvp(loss, (x,), (ones,))[1], (x,), (ones,))[1], expected, 1e-12, "forward over forward")
    assert_close(torch.func.hessian(loss)(x).sum(), expected, 1e-12, "forward over reverse")
    (slope,) = torch.autograd.grad(loss(y := x.clone().requires_grad_()), y)
    assert_close((torch.func.jacfwd(loss)(x) * t).sum(), (slope * t).sum(), 1e-12, "jacfwd")


@pytest.mark.parametrize("name", CASES)
def test_a_first_derivative_is_the_one_written_by_hand(name):
    """To the bit, and nothing more is kept, whether or not another derivative may follow."""
    case = CASES[name]
    inputs = leaves(case)
    found = outputs(case, inputs, "chunked")
    ways = [torch.randn_like(y) for y in found]
    once = torch.autograd.grad(found, inputs, ways, retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(found, inputs, ways, create_graph=True), strict=True):
        assert_close(b, a, 1e-14)


def test_kernels_leave_forward_mode_to_others(caplog):
    x, a = torch.randn(1, 4, 3), torch.rand(3)
    tangent = torch.func.jvp(lambda x: diagonal_scan(x, a, backend="fused"), (x,), (x,))[1]
    assert_close(tangent, diagonal_scan(x.double(), a.double(), backend="reference"), 1e-6)
    assert "no kernel has a derivative in forward mode" in caplog.text
