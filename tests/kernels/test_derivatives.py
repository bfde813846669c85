"""Derivatives beyond the first and in forward mode: of every operation, through gradients that are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from agreement import assert_close
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from seqzoo.kernels import (
    FavorState,
    GatedAttentionState,
    VQState,
    attention,
    delta_rule,
    diagonal_scan,
    favor_attention,
    gated_attention,
    linear_attention,
    nearest_code,
    vq_attention,
)

B, T, H, D, DV = 2, 7, 2, 3, 2
LENGTHS = torch.tensor([7, 4])


class Case(NamedTuple):
    """An operation of tensors alone, and these tensors in double precision."""

    call: Callable[..., Any]  # also takes backend=
    inputs: list[Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def scans(both: bool = False) -> dict[str, Case]:
    cases = {}
    for dtype in (torch.float64, torch.complex128):
        for constant in (True, False):
            for reverse in (False, True, "both"):
                a = randn(*((D,) if constant else (B, T, D)), dtype=dtype)
                inputs = [randn(B, T, D, dtype=dtype), a / (1 + a.abs()), 0.1 + rand(D)]
                inputs += [] if reverse == "both" else [randn(B, D, dtype=dtype)]

                def call(x, a, f, h0=None, reverse=reverse, **options):
                    state = {} if h0 is None else {"initial_state": h0, "output_final_state": True}
                    return diagonal_scan(x, a, factor=f, reverse=reverse, lengths=LENGTHS, **state, **options)

                name = f"diagonal_scan {'complex' if dtype.is_complex else 'real'} {constant} {reverse}"
                cases[name] = Case(call, inputs)
    return cases


def attentions() -> dict[str, Case]:
    cases = {}
    for causal in (True, False):
        for groups in (H, 1):
            inputs = [randn(B, T, H, D), randn(B, T, groups, D), randn(B, T, groups, DV)]
            cases[f"attention {causal} {groups}"] = Case(
                lambda *x, c=causal, **to: attention(*x, causal=c, lengths=LENGTHS, **to), inputs
            )
    inputs = [randn(B, T, H, D), randn(B, T, 1, D), randn(B, T, 1, DV)]
    for causal, window in ((True, 3), (False, (2, 1))):
        options = {"causal": causal, "window": window, "lengths": LENGTHS}
        cases[f"attention window {causal}"] = Case(lambda *x, o=options, **to: attention(*x, **o, **to), inputs)
    behind = {"causal": True, "position": torch.tensor([2, 0]), "lengths": torch.tensor([5, 2])}
    inputs = [randn(B, 3, H, D), randn(B, T, H, D), randn(B, T, H, DV)]
    cases["attention behind a cache"] = Case(lambda *x, **to: attention(*x, **behind, **to), inputs)
    cases["attention across"] = Case(lambda *x, **to: attention(*x, lengths=torch.tensor([0, 5]), **to), inputs)
    return cases


def linear_attentions() -> dict[str, Case]:
    cases = {}
    for normalize in (True, False):
        for causal in (True, False):
            options = {"causal": causal, "normalize": normalize, "lengths": LENGTHS}
            inputs = [rand(B, T, H, D), rand(B, T, H, D), randn(B, T, H, DV)]
            cases[f"linear_attention {causal} {normalize}"] = Case(
                lambda *x, o=options, **to: linear_attention(*x, **o, **to), inputs
            )
        resumed = [*inputs, rand(B, H, D, DV + normalize)]
        cases[f"linear_attention state {normalize}"] = Case(
            lambda q, k, v, s, n=normalize, **to: linear_attention(
                q, k, v, causal=True, normalize=n, initial_state=s, output_final_state=True, lengths=LENGTHS, **to
            ),
            resumed,
        )
    for shape in ((H,), (B, T, H)):
        cases[f"linear_attention decay {len(shape)}"] = Case(
            lambda q, k, v, g, **to: linear_attention(q, k, v, log_decay=g, causal=True, lengths=LENGTHS, **to),
            [*inputs, -rand(*shape)],
        )
    return cases


def decays_per_channel() -> dict[str, Case]:
    """Of linear_attention."""
    inputs = [rand(B, T, H, D), rand(B, T, H, D), randn(B, T, H, DV), -rand(B, T, H, D)]

    def call(q, k, v, g, s=None, *, options, **to):
        return linear_attention(q, k, v, log_decay=g, initial_state=s, lengths=LENGTHS, **options, **to)

    causal, normalized = {"causal": True}, {"normalize": True}
    from_state = {**causal, **normalized, "output_final_state": True}
    return {
        "linear_attention decay 4": Case(partial(call, options=causal), inputs),
        "linear_attention decay 4 both ways": Case(partial(call, options=normalized), inputs),
        "linear_attention decay 4 state": Case(partial(call, options=from_state), [*inputs, rand(B, H, D, DV + 1)]),
    }


def delta_rules() -> dict[str, Case]:
    cases = {}
    inputs = [randn(B, T, 1, D), randn(B, T, 1, D) / 2, randn(B, T, H, DV), rand(B, T, H)]
    for decay in ((), (B, T, H), (B, T, H, D)):

        def call(q, k, v, beta, *g, **to):
            return delta_rule(q, k, v, beta, log_decay=g[0] if g else None, lengths=LENGTHS, **to)

        cases[f"delta_rule decay {len(decay)}"] = Case(call, [*inputs, *([-rand(*decay)] if decay else [])])

    def resumed(q, k, v, beta, g, r, s, **to):
        state = {"initial_state": s, "output_final_state": True}
        return delta_rule(q, k, v, beta, log_decay=g, erase=r, lengths=LENGTHS, **state, **to)

    more = [-rand(B, T, H, D), randn(B, T, H, D) / 2, randn(B, H, D, DV)]
    cases["delta_rule state"] = Case(resumed, [*inputs, *more])
    return cases


def favor_attentions() -> dict[str, Case]:
    inputs = [randn(B, T, H, D), randn(B, T, H, D), randn(B, T, H, DV)]
    directions = randn(H, 5, D)
    cases = {
        f"favor_attention {causal}": Case(
            lambda *x, c=causal, **to: favor_attention(*x, directions, causal=c, lengths=LENGTHS, **to), inputs
        )
        for causal in (True, False)
    }
    cases["favor_attention projection"] = Case(
        lambda *x, **to: favor_attention(*x, lengths=LENGTHS, **to), [*inputs, directions]
    )

    def resumed(q, k, v, sums, **to):
        o, state = favor_attention(
            *(q, k, v, directions),
            causal=True,
            initial_state=FavorState(sums, torch.zeros(B, H, 5, dtype=sums.dtype)),
            output_final_state=True,
            **to,
        )
        return o, state.sums * state.log_scale.exp()[..., None]  # what a constant scale stands for

    cases["favor_attention state"] = Case(resumed, [*inputs, 0.1 + rand(B, H, 5, DV + 1)])
    return cases


def vq_attentions() -> dict[str, Case]:
    cases = {}
    book, k = randn(H, 4, D), randn(B, T, H, D)
    codes = nearest_code(k, book)
    for causal in (True, False):
        for shape in ((H, 3), (B, T, H, 3)):

            def call(q, v, bias, causal=causal, **to):
                options = {"codes": codes, "bias": bias, "block_len": 2, "causal": causal, "lengths": LENGTHS}
                return vq_attention(q, k.to(q.dtype), v, book.to(q.dtype), **options, **to)

            cases[f"vq_attention {causal} {len(shape)}"] = Case(
                call, [randn(B, T, H, D), randn(B, T, H, DV), randn(*shape)]
            )

    def resumed(q, v, values, sums, **to):
        empty = VQState.empty(B, H, 4, DV, 2, device="cpu", dtype=q.dtype)
        counts = torch.full_like(empty.counts, 2)
        state = empty._replace(values=values, sums=sums, counts=counts, position=empty.position + 10)
        options = {"codes": codes, "block_len": 2, "causal": True, "initial_state": state, "output_final_state": True}
        o, state = vq_attention(q, k.to(q.dtype), v, book.to(q.dtype), **options, **to)
        return o, state.values, state.sums

    inputs = [randn(B, T, H, D), randn(B, T, H, DV), randn(B, 2, H, DV), randn(B, H, 4, DV)]
    cases["vq_attention state"] = Case(resumed, inputs)
    return cases


def gated_attentions() -> dict[str, Case]:
    cases = {}
    inputs = [randn(B, T, n) for n in (D, DV, DV, DV, DV, D)]
    for causal in (True, False):
        cases[f"gated_attention {causal}"] = Case(
            lambda *x, c=causal, **to: gated_attention(*x[:6], chunk_len=3, bias=x[6], causal=c, lengths=LENGTHS, **to),
            [*inputs, randn(3 if causal else 5)],
        )

    def resumed(*x, **to):
        past = GatedAttentionState(*x[6:], torch.tensor([4, 3]))
        o, state = gated_attention(*x[:6], chunk_len=3, causal=True, initial_state=past, output_final_state=True, **to)
        return o, *state[:4]

    state = [randn(B, DV, D), randn(B, 3, DV), randn(B, 3, DV), randn(B, 3, D)]
    cases["gated_attention state"] = Case(resumed, [*inputs, *state])
    return cases


torch.manual_seed(0)
CASES = {
    **scans(),
    **attentions(),
    **linear_attentions(),
    **delta_rules(),
    **favor_attentions(),
    **vq_attentions(),
    **gated_attentions(),
    **decays_per_channel(),
}


def leaves(case: Case) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in case.inputs]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
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


def outputs(case: Case, inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    y = case.call(*inputs, backend=backend)
    return (y,) if isinstance(y, Tensor) else tuple(y)


def hessian_product(case: Case, inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Of the sum of squares of all outputs, with ones: through the inputs and through the gradients of outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = sum(y.abs().square().sum() for y in outputs(case, inputs, backend))
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    return list(torch.autograd.grad(sum(g.real.sum() for g in gradients), inputs))


OFTEN = (
    *("diagonal_scan complex True False", "diagonal_scan complex True both", "diagonal_scan real False True"),
    *("attention True 1", "linear_attention False True", "linear_attention state True", "linear_attention decay 3"),
    "linear_attention decay 4 state",
    *("favor_attention False", "favor_attention state", "vq_attention False 4", "gated_attention state"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in CASES
        if "projection" not in name  # to kernels it is a constant
        and "delta_rule" not in name  # there is no kernel
    ],
)
def test_second_derivatives_of_kernels(name):
    case = CASES[name]
    narrow = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in case.inputs]
    wide = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in narrow]
    expected = hessian_product(case, wide, "reference")
    for number, pair in enumerate(zip(hessian_product(case, narrow, "fused"), expected, strict=True)):
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
