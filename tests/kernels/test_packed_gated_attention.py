"""gated_attention over documents in one row: each comes out as if it were alone."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from agreement import assert_close
from fused_cases import poisoned
from often import others_slow
from torch import Tensor

from seqzoo.kernels import gated_attention
from seqzoo.kernels.gated_attention import GatedAttentionState

LENGTHS = [5, 0, 1, 18, 32, 70, 0]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
T, N, S, E = sum(LENGTHS), len(LENGTHS), 3, 4
NAMES = ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v")
PARTS = ("memory", "k_quad", "k_lin", "v")
POSITION = torch.tensor([3, 16, 0, 21, 48, 7, 5])  # in a chunk of 16, at its beginning, past it
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
FORMS = [("reference", torch.float64), ("chunked", torch.float64), ("chunked", torch.float32), ("fused", torch.float32)]
WAYS = ["both ways", "causal", "to a state", "from a state", "from a state to another"]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(chunk_len: int, causal: bool) -> dict[str, Tensor]:
    x = {name: draw(1, T, E if name in "uv" else S, seed=i) for i, name in enumerate(NAMES)}
    return x | {"bias": draw(chunk_len if causal else 2 * chunk_len - 1, seed=6), "w": draw(1, T, E, seed=7)}


def make_state(chunk_len: int, seed: int) -> dict[str, Tensor]:
    shapes = ((S, E), (chunk_len, S), (chunk_len, S), (chunk_len, E))
    return {name: draw(N, *shape, seed=seed + i) for i, (name, shape) in enumerate(zip(PARTS, shapes, strict=True))}


def run(inputs, state=None, w_state=None, **options) -> dict[str, Tensor]:
    """The output, the final state if there are weights for it, and the gradient of each input and of the state."""
    x = {name: y.detach().clone().requires_grad_() for name, y in inputs.items() if name != "w"}
    past = {name: y.detach().clone().requires_grad_(name != "position") for name, y in (state or {}).items()}
    initial = GatedAttentionState(**past) if past else None
    o = gated_attention(**x, initial_state=initial, output_final_state=w_state is not None, **options)
    o, final = o if w_state is not None else (o, None)
    leaves = x | {f"state {name}": y for name, y in past.items() if name != "position"}
    weights = (inputs["w"], *(() if w_state is None else w_state.values()))
    gradients = torch.autograd.grad((o, *(() if final is None else final[:4])), [*leaves.values()], weights)
    result = {"o": o} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    return result if final is None else result | {f"final {name}": y for name, y in final._asdict().items()}


def of_state(name: str) -> bool:
    return name.startswith(("final", "dstate"))


def one_by_one(inputs, state=None, w_state=None, **options) -> dict[str, Tensor]:
    """What the definition makes of each document alone; an empty one hands on its state."""
    found: dict[str, list[Tensor]] = {}
    for n, (start, end) in enumerate(pairwise(STARTS.tolist())):
        its = {name: y[:, start:end] if y.dim() > 1 else y for name, y in inputs.items()}
        past, weights = ({k: y[n : n + 1] for k, y in s.items()} if s is not None else None for s in (state, w_state))
        lengths = None
        if start == end:  # a step that does not count
            its = {name: y if name == "bias" else torch.ones_like(inputs[name][:, :1]) for name, y in its.items()}
            lengths = torch.tensor([0])
        for name, y in run(its, past, weights, lengths=lengths, **options, backend="reference").items():
            found.setdefault(name, []).append(y[:, : end - start] if y.dim() > 1 and not of_state(name) else y)
    return {
        name: sum(ys) if name == "dbias" else torch.cat(ys, 0 if of_state(name) else 1) for name, ys in found.items()
    }


def to(dtype: torch.dtype, x: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if x is None else {name: y.to(dtype) if y.is_floating_point() else y for name, y in x.items()}


@pytest.mark.parametrize(("backend", "dtype"), FORMS)
@pytest.mark.parametrize(
    ("way", "chunk_len"),
    others_slow(product(WAYS, (3, 16, 100)), [("both ways", 3), ("causal", 100), ("from a state to another", 16)]),
)
def test_documents_are_as_if_alone(way, chunk_len, backend, dtype):
    causal = way != "both ways"
    inputs = make(chunk_len, causal)
    state = make_state(chunk_len, 10) | {"position": POSITION} if "from" in way else None
    w_state = make_state(chunk_len, 20) if "to" in way else None
    options = {"chunk_len": chunk_len, "causal": causal, "scale": 0.3}
    expected = one_by_one(inputs, state, w_state, **options)
    ends = STARTS.int() if chunk_len == 16 else STARTS
    with poisoned():
        given = (to(dtype, inputs), to(dtype, state), to(dtype, w_state))
        values = run(*given, **options, cu_seqlens=ends, backend=backend)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        if name == "final position":
            assert torch.equal(value, expected[name])
            continue
        assert value.dtype == dtype
        assert_close(value, expected[name], TOLERANCE[dtype], name)


@pytest.mark.parametrize("backend", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_leaks_from_another_document(causal, stateful, backend):
    if stateful and not causal:
        pytest.skip("only causal attention has a state")
    dtype = torch.float32 if backend == "fused" else torch.float64
    inputs = to(dtype, make(16, causal))
    state = to(dtype, make_state(16, 10) | {"position": POSITION}) if stateful else None
    w_state = to(dtype, make_state(16, 20)) if stateful else None
    options = {"chunk_len": 16, "causal": causal, "cu_seqlens": STARTS, "backend": backend}
    clean = run(inputs, state, w_state, **options)
    for n in (3, 5):
        start, end = STARTS[n : n + 2].tolist()
        dirty = {name: y.clone() for name, y in inputs.items()}
        for name, y in dirty.items():
            if name != "bias":
                y[:, start:end] = math.nan
        for name, value in run(dirty, state, w_state, **options).items():
            if name == "dbias":
                continue
            of = (slice(n, n + 1),) if of_state(name) else (slice(None), slice(start, end))
            value[of] = clean[name][of]
            assert torch.equal(value, clean[name]), name


def test_documents_go_on_from_call_to_call():
    """In pieces that end anywhere in a chunk, and of which some are empty."""
    C, whole = 8, make(8, True)
    options = {"chunk_len": C, "causal": True, "bias": whole["bias"]}
    documents = [{name: whole[name][:, s:e] for name in NAMES} for s, e in pairwise(STARTS)]
    state, position, outputs = None, [0] * N, [[] for _ in range(N)]
    for steps in ([2, 0, 0, 9, 16, 1, 0], [0, 0, 1, 4, 3, 7, 0], [3, 0, 0, 0, 8, 26, 0], [0, 0, 0, 5, 5, 36, 0]):
        parts = [
            {name: y[:, at : at + size] for name, y in document.items()}
            for document, at, size in zip(documents, position, steps, strict=True)
        ]
        row = {name: torch.cat([part[name] for part in parts], 1) for name in NAMES}
        ends = torch.tensor([0, *steps]).cumsum(0)
        o, state = gated_attention(**row, **options, cu_seqlens=ends, initial_state=state, output_final_state=True)
        for n, y in enumerate(o.split(steps, 1)):
            outputs[n].append(y)
        position = [at + size for at, size in zip(position, steps, strict=True)]
        assert state.position.tolist() == position
    assert position == LENGTHS
    o, last = gated_attention(
        **{name: whole[name] for name in NAMES}, **options, cu_seqlens=STARTS, output_final_state=True
    )
    assert_close(torch.cat([y for ys in outputs for y in ys], 1), o, 1e-12)
    for name, value, right in zip(state._fields, state, last, strict=True):
        assert_close(value.double(), right.double(), 1e-12, name)


@pytest.mark.parametrize("backend", ["chunked", "fused"])
@pytest.mark.parametrize("causal", [False, True])
def test_short_documents_have_gradients_of_zero_where_there_is_nothing_to_see(causal, backend):
    inputs = to(torch.float32, make(100, causal))
    values = run(inputs, chunk_len=100, causal=causal, cu_seqlens=STARTS, backend=backend)
    assert (values["dq_lin"] == 0).all() == causal


@pytest.mark.parametrize(
    ("backend", "causal", "stateful"),
    [("chunked", True, True), ("chunked", False, False), ("fused", True, False)],
)
def test_graphs_do_not_depend_on_where_documents_end(backend, causal, stateful):
    inputs = to(torch.float32, make(8, causal))
    x = {name: y for name, y in inputs.items() if name != "w"}
    options = {"chunk_len": 8, "causal": causal, "output_final_state": stateful, "backend": backend}
    compiled = torch.compile(gated_attention, fullgraph=True, backend="aot_eager")
    for ends in (STARTS, torch.tensor([0, 30, 30, 35, 50, 51, 90, T])):
        with torch.compiler.set_stance("fail_on_recompile" if ends is not STARTS else "default"):
            leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
            found = compiled(**leaves, **options, cu_seqlens=ends)
        o, final = found if stateful else (found, ())
        expected = gated_attention(**x, **options, cu_seqlens=ends)
        expected, last = expected if stateful else (expected, ())
        assert_close(o, expected, 5e-6)
        for value, right in zip(final, last, strict=True):
            assert_close(value.double(), right.double(), 5e-6)
        gradients = torch.autograd.grad(o, [*leaves.values()], inputs["w"])
        right = run(inputs, chunk_len=8, causal=causal, cu_seqlens=ends, backend=backend)
        for name, value in zip(leaves, gradients, strict=True):
            assert_close(value, right[f"d{name}"], 1e-5, name)


@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_of_any_order_and_in_any_mode(causal):
    ends, C = torch.tensor([0, 3, 3, 8]), 2
    x = {name: y[:, :8, :2].clone().requires_grad_() for name, y in make(C, causal).items() if name in NAMES}

    def f(*tensors: Tensor) -> Tensor:
        return gated_attention(*tensors, chunk_len=C, causal=causal, cu_seqlens=ends)

    assert torch.autograd.gradcheck(f, [*x.values()], check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, [*x.values()], fast_mode=True)


def test_the_fused_form_has_a_second_derivative():
    ends = torch.tensor([0, 3, 3, 8])
    for causal in (False, True):
        second = []
        for backend, dtype in (("reference", torch.float64), ("fused", torch.float32)):
            made = to(dtype, make(2, causal))
            x = {name: made[name][:, :8].clone().requires_grad_() for name in NAMES}
            o = gated_attention(**x, chunk_len=2, causal=causal, cu_seqlens=ends, backend=backend)
            first = torch.autograd.grad(o.square().sum(), [*x.values()], create_graph=True)
            second.append(torch.autograd.grad(sum(y.square().sum() for y in first), [*x.values()]))
        for name, right, value in zip(NAMES, *second, strict=True):
            assert_close(value, right, 1e-4, name)


def test_half_precision_and_a_gradient_of_any_layout():
    inputs = make(16, True)
    expected = run(inputs, chunk_len=16, causal=True, cu_seqlens=STARTS, backend="reference")
    for backend in ("chunked", "fused"):
        half = to(torch.float16, inputs) | {"w": inputs["w"].half().mT.contiguous().mT}
        values = run(half, chunk_len=16, causal=True, cu_seqlens=STARTS, backend=backend)
        for name, value in values.items():
            assert value.dtype == torch.float16
            assert_close(value, expected[name], 5e-3, name)


def test_errors():
    inputs = {name: y for name, y in make(16, True).items() if name != "w"}
    options = {"chunk_len": 16, "causal": True}
    state = GatedAttentionState.empty(1, S, E, 16, device=None, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"initial_state must be memory \[7, 3, 4\].* position \[7\], a row for each"):
        gated_attention(**inputs, **options, cu_seqlens=STARTS, initial_state=state)
    with pytest.raises(ValueError, match="gated_attention: got cu_seqlens and lengths"):
        gated_attention(**inputs, **options, cu_seqlens=STARTS, lengths=torch.tensor([T]))
    with pytest.raises(ValueError, match="gated_attention: cu_seqlens must begin with 0"):
        gated_attention(**inputs, **options, cu_seqlens=STARTS[:-2])
