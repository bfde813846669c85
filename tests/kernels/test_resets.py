"""A gate that lets nothing through makes two sequences of one, in values and in every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from often import others_slow
from torch import Tensor

from seqzoo.kernels import delta_rule, diagonal_scan, linear_attention

B, T, H, DK, DV = 2, 80, 2, 6, 5
SHUT = (-1e4, -math.inf)
PLACES = (1, 30, 64, 79)  # of the first step that remembers nothing
FORMS = [("reference", torch.float64), ("chunked", torch.float64), ("chunked", torch.float32), ("fused", torch.float32)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
shut_gates = pytest.mark.parametrize("shut", SHUT)
ALL = [(shut, *form) for shut in SHUT for form in FORMS]
shut_gates_in_all_forms = pytest.mark.parametrize(
    ("shut", "backend", "dtype"),
    others_slow(ALL, [case for case in ALL if case[0] == -math.inf or case[1] != "fused"]),
    ids=lambda value: str(value).removeprefix("torch."),
)


def places(backend: str) -> tuple[int, ...]:
    return PLACES if backend == "chunked" else PLACES[1:2]


def run(operation, inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None, **options) -> dict[str, Tensor]:
    """The output, the last state if it has a weight, and the gradient of each input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = operation(**leaves, output_final_state=w_state is not None, **options)
    outputs, weights = ((outputs,), (w,)) if w_state is None else (outputs, (w, w_state))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("y", "state"), outputs, strict=False)) | {
        f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def in_turn(first: dict[str, Tensor], second: dict[str, Tensor], *, backward: bool = False) -> dict[str, Tensor]:
    """What two runs give together, of which the second begins anew where the first ends; `backward`: in front of it."""
    order = (second, first) if backward else (first, second)
    states = {"state": second.get("state"), "dinitial_state": first.get("dinitial_state")}
    timed = (first.keys() & second.keys()) - states.keys()
    return {name: torch.cat([part[name] for part in order], 1) for name in timed} | {
        name: state for name, state in states.items() if state is not None
    }


def assert_same(values: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, where: object = "") -> None:
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert_close(value, expected[name], tolerance, f"{name} {where}")


def attended(dtype: torch.dtype, per_channel: bool) -> dict[str, Tensor]:
    """Inputs of linear_attention, positive that they may be normalised."""
    q, k, v = torch.rand(B, T, H, DK) / DK**0.5, torch.rand(B, T, H, DK), torch.randn(B, T, H, DV)
    gates = -torch.rand(B, T, H, DK) if per_channel else -torch.rand(B, T, H)
    return {name: x.to(dtype) for name, x in {"q": q, "k": k, "v": v, "log_decay": gates}.items()}


@shut_gates_in_all_forms
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("per_channel", [False, True], ids=["step", "channel"])
def test_linear_attention(per_channel, causal, normalize, shut, backend, dtype):
    options = {"causal": causal, "normalize": normalize, "backend": backend}
    w = torch.randn(B, T, H, DV).to(dtype)
    states = torch.rand(2, B, H, DK, DV + normalize).to(dtype)
    start, w_state = ({"initial_state": states[0]}, states[1]) if causal else ({}, None)
    for place in places(backend):
        inputs = attended(dtype, per_channel)
        inputs["log_decay"][:, place] = shut
        before, after = ({name: x[:, part] for name, x in inputs.items()} for part in (slice(place), slice(place, T)))
        whole = run(linear_attention, inputs | start, w, w_state, **options)
        first = run(linear_attention, before | start, w[:, :place], None, **options)
        second = run(linear_attention, after, w[:, place:], w_state, **options)
        assert_same(whole, in_turn(first, second), TOLERANCE[dtype], f"at {place}")


@shut_gates
@pytest.mark.parametrize("causal", [True, False])
def test_channels_of_linear_attention_forget_each_for_itself(causal, shut):
    inputs, w = attended(torch.float64, per_channel=True), torch.randn(B, T, H, DV, dtype=torch.float64)
    inputs["log_decay"][:, 40, :, :2] = shut
    inputs["log_decay"][:, 70, :, 3] = shut
    alone = []
    for c in range(DK):
        of_one = {"q": inputs["q"][..., c : c + 1], "k": inputs["k"][..., c : c + 1], "v": inputs["v"]}
        alone.append(run(linear_attention, of_one | {"log_decay": inputs["log_decay"][..., c]}, w, None, causal=causal))
    expected = {name: torch.stack([each[name] for each in alone]) for name in alone[0]}
    expected = {
        "y": expected["y"].sum(0),
        "dq": expected["dq"].squeeze(-1).movedim(0, -1),
        "dk": expected["dk"].squeeze(-1).movedim(0, -1),
        "dv": expected["dv"].sum(0),
        "dlog_decay": expected["dlog_decay"].movedim(0, -1),
    }
    assert_same(run(linear_attention, inputs, w, None, causal=causal), expected, 1e-12)


@shut_gates_in_all_forms
@pytest.mark.parametrize("per_channel", [False, True], ids=["step", "channel"])
def test_delta_rule(per_channel, shut, backend, dtype):
    w = torch.randn(B, T, H, DV).to(dtype)
    start, w_state = torch.rand(2, B, H, DK, DV).to(dtype)
    for place in places(backend):
        inputs = attended(dtype, per_channel) | {"beta": torch.rand(B, T, H).to(dtype)}
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["log_decay"][:, place] = shut
        before, after = ({name: x[:, part] for name, x in inputs.items()} for part in (slice(place), slice(place, T)))
        whole = run(delta_rule, inputs | {"initial_state": start}, w, w_state, backend=backend)
        first = run(delta_rule, before | {"initial_state": start}, w[:, :place], None, backend=backend)
        second = run(delta_rule, after, w[:, place:], w_state, backend=backend)
        assert_same(whole, in_turn(first, second), TOLERANCE[dtype], f"at {place}")


def gated_scan(x: Tensor, log_decay: Tensor, **options) -> Tensor:
    return diagonal_scan(x, log_decay.exp(), **options)


@shut_gates_in_all_forms
@pytest.mark.parametrize("reverse", [False, True])
def test_diagonal_scan(reverse, shut, backend, dtype):
    options = {"factor": torch.rand(4).to(dtype), "reverse": reverse, "backend": backend}
    w, (h0, w_state) = torch.randn(B, T, 4).to(dtype), torch.randn(2, B, 4).to(dtype)
    for place in places(backend):
        x, g = torch.randn(B, T, 4).to(dtype), -torch.rand(B, T, 4).to(dtype)
        g[:, place - 1 if reverse else place] = shut
        parts = [
            ({"x": x[:, part], "log_decay": g[:, part]}, w[:, part])
            for part in ((slice(place, T), slice(place)) if reverse else (slice(place), slice(place, T)))
        ]
        start = {"initial_state": h0}
        whole = run(gated_scan, {"x": x, "log_decay": g} | start, w, w_state, **options)
        first = run(gated_scan, parts[0][0] | start, parts[0][1], None, **options)
        second = run(gated_scan, *parts[1], w_state, **options)
        assert_same(whole, in_turn(first, second, backward=reverse), TOLERANCE[dtype], f"at {place}")
