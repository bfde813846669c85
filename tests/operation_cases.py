"""Every operation of tensors alone, in double precision, each way through it once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def outputs(case: Case, inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    y = case.call(*inputs, backend=backend)
    return (y,) if isinstance(y, Tensor) else tuple(y)
