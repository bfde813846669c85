"""favor_attention in Triton against the quadratic definition."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from often import others_slow
from torch import Tensor

from seqzoo.kernels.favor_attention import FavorState, favor_attention, fused
from seqzoo.kernels.launching import cut_time

NAMES = ("q", "k", "v", "sums")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def make(B, T, H, D, M, Dv, *, state=False, dtype=torch.float32, size=1.0) -> dict[str, Tensor]:
    """Inputs by name; the state is one that keys of the same size could have left."""
    q, k = (torch.randn(B, T, H, D) * size * D**-0.25 for _ in range(2))
    inputs = {"q": q, "k": k, "v": torch.randn(B, T, H, Dv), "projection": torch.randn(H, M, D)}
    inputs = {name: x.to(DEVICE, dtype) for name, x in inputs.items()}
    if state:
        inputs["sums"] = torch.randn(B, H, M, Dv + 1).abs().to(DEVICE) + 0.1
        inputs["log_scale"] = ((torch.randn(B, H, M) - size) * size).to(DEVICE)
    return inputs


def run(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradients."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in NAMES if name in inputs}
    q, k, v, projection, *state = (inputs | leaves).values()
    options["initial_state"] = FavorState(*state) if state else None
    o = favor_attention(q, k, v, projection, **options, output_final_state=w_state is not None)
    values, outputs, weights = {"o": o}, (o,), (w,)
    if w_state is not None:
        o, last = o
        values, outputs, weights = {"o": o, **last._asdict()}, (o, last.sums), (w, w_state)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, materialize_grads=True)
    return values | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def check(inputs, *, lengths=None, causal=False, state=False, tolerance=None, worst_row=100.0) -> None:
    """Against the reference; with `state`, of the final state too.

    A query that sees one key has no gradient: its worst row is a difference of equal numbers.
    """
    q, v = inputs["q"], inputs["v"]
    B, _, H, Dv = v.shape
    w = torch.randn(v.shape).to(v)
    w_state = torch.randn(B, H, inputs["projection"].shape[1], Dv + 1) if state else None
    expected = run(
        {name: wide(x).cpu() for name, x in inputs.items()},
        wide(w).cpu(),
        wide(w_state),
        causal=causal,
        lengths=None if lengths is None else torch.tensor(lengths),
        backend="reference",
    )
    if lengths is not None:  # what is past the end is never used
        lengths = torch.tensor(lengths, device=DEVICE)
        padding = (torch.arange(v.shape[1], device=DEVICE) >= lengths[:, None])[..., None, None]
        inputs = inputs | {name: inputs[name].masked_fill(padding, float("nan")) for name in ("q", "k", "v")}
        w = w.masked_fill(padding, float("nan"))
    w_state = None if w_state is None else w_state.to(DEVICE)
    with poisoned():
        values = run(inputs, w, w_state, causal=causal, lengths=lengths, backend="fused")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        if name == "log_scale":  # -inf where nothing has been seen
            within = {"rtol": 1e-6, "atol": 1e-6} if q.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(value.double().cpu(), expected[name], **within)
        else:
            assert_close(value.cpu(), expected[name], tolerance or TOLERANCE[q.dtype], name, worst_row=worst_row)


CASES = [  # B, T, H, D, M, Dv, causal, state, lengths, dtype
    (2, 1, 2, 8, 5, 3, False, False, None, torch.float32),
    (2, 1, 2, 8, 16, 8, True, True, None, torch.float32),
    (1, 2, 3, 16, 44, 16, True, False, None, torch.float32),
    (2, 15, 1, 8, 16, 3, False, False, [15, 4], torch.float32),
    (2, 16, 2, 8, 16, 9, True, True, [3, 16], torch.float32),
    (3, 63, 1, 24, 30, 24, True, False, [63, 0, 40], torch.float32),
    (3, 64, 2, 8, 16, 17, False, False, [64, 0, 33], torch.float32),
    (2, 65, 1, 64, 40, 64, True, True, [65, 64], torch.float32),
    (2, 65, 2, 24, 20, 4, False, False, None, torch.float16),
    (2, 65, 1, 100, 33, 16, True, True, [65, 30], torch.float16),
    (1, 64, 1, 16, 70, 100, False, False, None, torch.float16),
    (2, 100, 1, 16, 3, 40, True, True, [51, 100], torch.float32),
    (1, 257, 1, 16, 12, 6, True, True, [257], torch.float32),
    (1, 257, 1, 8, 16, 8, False, False, [200], torch.float32),
]


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "M", "Dv", "causal", "state", "lengths", "dtype"), others_slow(CASES, CASES[::2])
)
def test_agrees_with_reference(B, T, H, D, M, Dv, causal, state, lengths, dtype):
    inputs = make(B, T, H, D, M, Dv, state=state, dtype=dtype)
    check(inputs, causal=causal, state=causal, lengths=lengths)


@pytest.mark.parametrize("causal", [False, True])
def test_time_in_segments(causal, monkeypatch):
    """Some of them past the end of a sequence."""
    monkeypatch.setattr(fused, "SEGMENT", 64)
    monkeypatch.setattr(fused, "_segment_len", partial(cut_time, least=32, wanted=1000))
    inputs = make(2, 150, 1, 8, 10, 5, state=causal)
    check(inputs, causal=causal, state=causal, lengths=[150, 50])


def test_pairs_one_by_one(monkeypatch):
    """What only steep keys call for, at sizes where errors show."""
    monkeypatch.setattr(fused, "SAFE_RISE", 2.0)
    monkeypatch.setattr(fused, "SEGMENT", 64)
    check(make(2, 70, 1, 8, 20, 5, state=True), causal=True, state=True, lengths=[70, 21])


@pytest.mark.parametrize(("causal", "state"), [(False, False), (True, False), (True, True)])
def test_inputs_thirty_times_as_large(causal, state):
    inputs = make(2, 40, 2, 16, 16, 5, state=state, size=30.0)
    # A feature's relative error is that of its exponent, rounded at the size of |k|²/2, however it is computed.
    rounding = torch.finfo(torch.float32).eps / 2 * inputs["k"].square().sum(-1).max().item() / 2
    check(inputs, causal=causal, lengths=[40, 37], tolerance=rounding, worst_row=1000)


def test_growing_keys_do_not_hide_the_past():
    """Each key's features dwarf all before it, which no query before it may notice."""
    inputs = make(1, 40, 1, 8, 12, 3)
    inputs["projection"] = torch.cat([torch.eye(8), -torch.eye(8)[:4]])[None].to(DEVICE) * 40
    inputs["k"] = inputs["k"] * torch.linspace(0.1, 20, 40, device=DEVICE)[:, None, None]
    before = run(inputs, torch.ones_like(inputs["v"]), causal=True, backend="fused")["o"]
    check(inputs, causal=True, tolerance=1e-3, worst_row=100)
    inputs["k"][:, 31:] *= 30
    after = run(inputs, torch.ones_like(inputs["v"]), causal=True, backend="fused")["o"]
    assert_close(after[:, :31], before[:, :31], 1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_zero_denominator_gives_zero(causal):
    inputs = make(2, 6, 1, 4, 5, 3)
    inputs["k"][0] = 1e30  # |k|²/2 is beyond single precision, so that every feature is exactly 0
    values = run(inputs, torch.ones_like(inputs["v"]), causal=causal, backend="fused")
    assert (values["o"][0] == 0).all()
    assert (values["o"][1] != 0).all()
    assert (values["dq"][0] == 0).all()
    assert all(value.isfinite().all() for value in values.values())


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_come_in_any_layout(causal):
    inputs = make(2, 5, 2, 4, 6, 4)
    for name, gradient in awkward(torch.randn_like(inputs["v"])).items():
        value = run(inputs, gradient, causal=causal, backend="fused")
        expected = run(inputs, gradient.contiguous(), causal=causal, backend="fused")
        assert all(torch.equal(value[key], expected[key]) for key in value), name


def test_a_split_sequence_goes_on_where_it_stopped():
    q, k, v, projection = make(2, 40, 2, 8, 10, 3).values()
    k.requires_grad_()
    options = {"causal": True, "backend": "fused"}
    whole = favor_attention(q, k, v, projection, **options)
    first, state = favor_attention(*(x[:, :13] for x in (q, k, v)), projection, output_final_state=True, **options)
    rest = favor_attention(*(x[:, 13:] for x in (q, k, v)), projection, initial_state=state, **options)
    assert_close(torch.cat([first, rest], 1), whole, 2e-6)
    assert not state.log_scale.requires_grad


def test_one_projection_serves_all_heads():
    q, k, v, projection = make(1, 20, 3, 4, 6, 3).values()
    shared = favor_attention(q, k, v, projection[0], backend="fused")
    assert torch.equal(shared, favor_attention(q, k, v, projection[:1].repeat(3, 1, 1), backend="fused"))


@pytest.mark.parametrize(("causal", "packed"), others_slow(product((False, True), repeat=2), [(True, True)]))
def test_operator(causal, packed):
    q, k, v, projection = make(1 if packed else 2, 5, 1, 16, 6, 16).values()
    state = (torch.rand(2, 1, 6, 16), torch.rand(2, 1, 6) + 1, torch.randn(2, 1, 6)) if causal else (None,) * 3
    state = [x if x is None else x.to(DEVICE) for x in state]
    lengths = None if packed else torch.tensor([5, 2], device=DEVICE)
    starts = torch.tensor([0, 2, 5], device=DEVICE) if packed else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sums = [x if x is None else x.requires_grad_() for x in state[:2]]
    forward = torch.ops.seqzoo.favor_attention_fused.default
    torch.library.opcheck(forward, (*leaves, projection, *sums, state[2], lengths, starts, causal))
    plain = [
        *(x.detach() for x in leaves),
        projection,
        *(x if x is None else x.detach() for x in state),
        lengths,
        starts,
    ]
    o, log_sum, *last = forward(*plain, causal)
    backward = torch.ops.seqzoo.favor_attention_fused_backward.default
    torch.library.opcheck(backward, (o, *last[:2], *plain, o, log_sum, *last, causal))


@pytest.mark.parametrize("causal", [False, True])
def test_two_runs_are_equal_to_the_bit(causal):
    inputs = make(1, 40, 2, 8, 12, 8)
    w = torch.randn_like(inputs["v"])
    first, second = (run(inputs, w, causal=causal, backend="fused") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_no_kernel_takes_runs_without_one(caplog):
    q, k, v, projection = make(1, 5, 2, 4, 6, 3).values()
    projection.requires_grad_()
    o = favor_attention(q, k, v, projection, backend="fused")
    assert torch.equal(o, favor_attention(q, k, v, projection, backend="chunked"))
    assert "favor_attention: no kernel has a gradient of the projection; the chunked form runs" in caplog.text
