"""linear_attention of heads that share queries and keys: as of heads that have them each, against the reference."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from agreement import assert_close
from torch import Tensor
from torch.func import jvp

from seqzoo.kernels import linear_attention

NAMES = ("q", "k", "v", "log_decay", "initial_state")


def make(B, T, G, R, Dk, Dv, *, decay="step", state=False, dtype=torch.float64, normalize=False):
    generator, H = torch.Generator().manual_seed(0), G * R

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = randn(B, T, G, Dk) / Dk**0.5, randn(B, T, G, Dk), randn(B, T, H, Dv)
    if normalize:
        q, k = q.exp(), k.exp()
    g = {"none": None, "head": -randn(H).abs() / 8, "step": -randn(B, T, H).abs() / 4}[decay]
    S = randn(B, H, Dk, Dv + normalize).abs() if state else None
    return {n: x.to(dtype) for n, x in zip(NAMES, (q, k, v, g, S), strict=True) if x is not None}


def run(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = linear_attention(**leaves, output_final_state=w_state is not None, **options)
    outputs, weights = ((outputs,), (w,)) if w_state is None else (outputs, (w, w_state))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("o", "state"), outputs, strict=False)) | dict(
        zip((f"d{name}" for name in leaves), gradients, strict=True)
    )


def assert_same(values: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert_close(value, expected[name], tolerance, name)


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}


CASES = [  # B, T, G, R, Dk, Dv, decay, state, lengths
    (2, 1, 1, 2, 3, 5, "step", True, None),
    (2, 2, 2, 3, 8, 7, "head", True, [2, 1]),
    (2, 64, 1, 4, 9, 17, "step", False, [64, 33]),
    (2, 65, 2, 2, 6, 4, "step", True, [65, 0]),
    (1, 130, 3, 2, 5, 12, "head", False, None),
    (3, 257, 1, 8, 66, 5, "step", True, [257, 130, 7]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "T", "G", "R", "Dk", "Dv", "decay", "state", "lengths"), CASES)
def test_agrees_with_reference(B, T, G, R, Dk, Dv, decay, state, lengths, dtype):
    inputs = make(B, T, G, R, Dk, Dv, decay=decay, state=state, dtype=dtype)
    w = torch.randn(B, T, G * R, Dv, dtype=dtype)
    w_state = torch.randn(B, G * R, Dk, Dv, dtype=dtype) if state else None
    options = {"causal": True, "lengths": None if lengths is None else torch.tensor(lengths)}
    values = run(inputs, w, w_state, **options)
    w_state = None if w_state is None else w_state.double()
    assert_same(
        values,
        run(wide(inputs), w.double(), w_state, **options, backend="reference"),
        1e-12 if dtype == torch.float64 else 5e-6,
    )


@pytest.mark.parametrize(
    ("causal", "decay", "normalize"), [(False, "step", False), (True, "none", False), (True, "step", True)]
)
def test_all_else_is_as_of_heads_of_their_own(causal, decay, normalize):
    inputs = make(2, 70, 2, 3, 4, 5, decay=decay, normalize=normalize, state=causal)
    w = torch.randn(2, 70, 6, 5, dtype=torch.float64)
    options = {"causal": causal, "normalize": normalize}
    assert_same(run(inputs, w, **options), run(inputs, w, **options, backend="reference"), 1e-12)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", ["head", "step"])
def test_documents(decay, state):
    lengths = [37, 1, 0, 64, 5, 90, 0]
    T, starts = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(1, T, 2, 2, 4, 6, decay=decay)
    w = torch.randn(1, T, 4, 6, dtype=torch.float64)
    w_state = torch.randn(7, 4, 4, 6, dtype=torch.float64) if state else None
    if state:
        inputs["initial_state"] = torch.randn_like(w_state)
    options = {"causal": True, "cu_seqlens": starts}
    assert_same(run(inputs, w, w_state, **options), run(inputs, w, w_state, **options, backend="reference"), 1e-12)


@pytest.mark.parametrize("shut", [-1e4, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_shut_gate_makes_two_sequences(shut, dtype):
    inputs = make(2, 130, 1, 4, 6, 5, dtype=dtype)
    inputs["log_decay"][:, [1, 64, 100]] = shut
    w = torch.randn(2, 130, 4, 5, dtype=dtype)
    values, expected = run(inputs, w, causal=True), run(wide(inputs), w.double(), causal=True, backend="reference")
    assert_same(values, expected, 1e-12 if dtype == torch.float64 else 5e-6)
    assert (values["dlog_decay"][:, [1, 64, 100]] == 0).all()


def test_decays_over_thousands_of_steps():
    """Where much is remembered, and where nothing is."""
    for rate in (1e-3, 1.0, 20.0):
        inputs = make(1, 4096, 1, 2, 8, 8, dtype=torch.float32)
        inputs["log_decay"] = -rate * torch.rand(1, 4096, 2)
        w = torch.randn(1, 4096, 2, 8)
        values = run(inputs, w, causal=True)
        expected = run(wide(inputs), w.double(), causal=True)
        for name, value in values.items():
            assert_close(value, expected[name], 2e-6, f"{name} at {rate}")


def test_derivatives_of_any_order(monkeypatch):
    for module in ("shared", "chunked"):
        monkeypatch.setattr(import_module(f"seqzoo.kernels.linear_attention.{module}"), "MIN_CHUNK", 2)
    inputs = make(2, 5, 1, 2, 2, 2, state=True)
    lengths = torch.tensor([5, 3])

    def f(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return linear_attention(**named, causal=True, output_final_state=True, lengths=lengths)

    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    ways = [torch.randn_like(x) for x in leaves]
    tangents = jvp(f, tuple(x.detach() for x in leaves), tuple(ways))[1]
    weights = [torch.randn_like(t) for t in tangents]
    gradients = torch.autograd.grad(f(*leaves), leaves, weights)
    forward = sum((t * w).sum() for t, w in zip(tangents, weights, strict=True))
    assert_close(forward, sum((d * way).sum() for d, way in zip(gradients, ways, strict=True)), 1e-12)


def test_keeps_no_weights_of_pairs():
    inputs = {name: x.requires_grad_() for name, x in make(2, 512, 1, 8, 16, 16, dtype=torch.float32).items()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o = linear_attention(**inputs, causal=True)
    assert o.requires_grad
    state = 2 * 8 * 16 * 16
    assert sum(kept.values()) < sum(x.numel() for x in inputs.values()) + (512 // 64 + 2) * state


def test_heads_that_do_not_divide():
    q, v = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 3, 4)
    with pytest.raises(ValueError, match="2 query/key heads do not divide 3 value heads"):
        linear_attention(q, q, v)
    with pytest.raises(ValueError, match="q and k or else k and v with G heads where G divides H, got"):
        linear_attention(q, q[:, :, :1], torch.zeros(1, 3, 4, 4))
