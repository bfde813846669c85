"""vq_attention over documents in one row: each comes out as if it were alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from agreement import assert_close
from fused_cases import poisoned
from often import others_slow
from torch import Tensor

from seqzoo.kernels import VQState, vq_attention
from seqzoo.kernels.vq_attention.outside import read_outside, read_outside_backward, sums_outside

LENGTHS = [5, 0, 1, 18, 32, 70, 0]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
T, N, H, D, Dv, S = sum(LENGTHS), len(LENGTHS), 2, 4, 5, 6
SEEN = torch.tensor([1, 9, 0, 40, 8, 17, 3])  # positions behind each state
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
FORMS = [("reference", torch.float64), ("chunked", torch.float64), ("chunked", torch.float32), ("fused", torch.float32)]
WHAT_LEAKS = [(False, False), (True, False), (True, True)]
WAYS = ["both ways", "causal", "to a state", "from a state", "from a state to another"]
CODEBOOK = torch.randn(H, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CODES = torch.randint(S, (1, T, H), generator=torch.Generator().manual_seed(2))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(block_len: int, causal: bool, by_query: bool = True) -> dict[str, Tensor]:
    reach = min(block_len, 3)
    offsets = reach + 1 if causal else 2 * reach + 1
    x = {name: draw(1, T, H, width, seed=i) for i, (name, width) in enumerate(zip("qkvw", (D, D, Dv, Dv), strict=True))}
    x["q"] = x["q"] / D**0.5
    return x | {"bias": draw(*((1, T, H) if by_query else (H,)), offsets, seed=5)}


def make_state(block_len: int) -> VQState:
    steps = int(SEEN.max())
    codes = torch.randint(S, (N, steps, H), generator=torch.Generator().manual_seed(3))
    empty = VQState.empty(N, H, S, Dv, block_len, device=None, dtype=torch.float64)
    return empty.advance(codes, draw(N, steps, H, Dv, seed=4), SEEN)


def run(inputs, codes, state=None, w_state=None, **options) -> dict[str, Tensor]:
    """The output, the final state if there are weights for it, and the gradient of each input and of the state."""
    x = {name: y.detach().clone().requires_grad_() for name, y in inputs.items() if name != "w"}
    q, k, v, bias = x.values()
    leaves = dict(x)
    if state is not None:
        leaves |= {f"state {name}": getattr(state, name).clone().requires_grad_() for name in ("values", "sums")}
        state = state._replace(values=leaves["state values"], sums=leaves["state sums"])
    options |= {"codes": codes, "bias": bias, "initial_state": state, "output_final_state": w_state is not None}
    y = vq_attention(q, k, v, CODEBOOK.to(q.dtype), **options)
    y, final = y if w_state is not None else (y, None)
    outputs = (y,) if final is None else (y, final.values, final.sums)
    gradients = torch.autograd.grad(outputs, [*leaves.values()], (inputs["w"], *(w_state or ())))
    result = {"y": y} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    if state is not None:  # the sum of no values at all is 0, and no one asks how it would change the result
        result["dstate sums"] = result["dstate sums"] * (state.counts > 0)[..., None]
    return result if final is None else result | {f"final {name}": x for name, x in final._asdict().items()}


def of_state(name: str) -> bool:
    return name.startswith(("final", "dstate"))


def shared(name: str, value: Tensor) -> bool:
    return name == "dbias" and value.dim() == 2


def one_by_one(inputs, state=None, w_state=None, **options) -> dict[str, Tensor]:
    """What the definition makes of each document alone; an empty one hands on its state."""
    found: dict[str, list[Tensor]] = {}
    for n, (start, end) in enumerate(pairwise(STARTS.tolist())):
        rows, lengths = slice(start, end), None
        if start == end:  # a step that does not count
            rows, lengths = slice(0, 1), torch.tensor([0])
        its = {name: y[:, rows] if y.dim() == 4 else y for name, y in inputs.items()}
        past = None if state is None else VQState(*(x[n : n + 1] for x in state))
        weights = None if w_state is None else [x[n : n + 1] for x in w_state]
        for name, y in run(its, CODES[:, rows], past, weights, lengths=lengths, **options, backend="reference").items():
            whole = of_state(name) or shared(name, y)
            found.setdefault(name, []).append(y if whole else y[:, : end - start])
    return {
        name: sum(ys) if shared(name, ys[0]) else torch.cat(ys, 0 if of_state(name) else 1)
        for name, ys in found.items()
    }


def to(dtype, inputs, state, w_state):
    inputs = {name: y.to(dtype) for name, y in inputs.items()}
    state = state and state._replace(values=state.values.to(dtype), sums=state.sums.to(dtype))
    return inputs, CODES, state, w_state and [y.to(dtype) for y in w_state]


def weights_of_state(block_len: int) -> list[Tensor]:
    return [draw(N, block_len, H, Dv, seed=6), draw(N, H, S, Dv, seed=7)]


@pytest.mark.parametrize(("backend", "dtype"), FORMS)
@pytest.mark.parametrize(
    ("way", "block_len", "by_query"),
    others_slow(
        [(way, *blocks) for way in WAYS for blocks in ((3, True), (16, False), (100, True))],
        [("both ways", 3, True), ("causal", 100, True), ("from a state to another", 16, False)],
    ),
)
def test_documents_are_as_if_alone(way, block_len, by_query, backend, dtype):
    causal = way != "both ways"
    inputs = make(block_len, causal, by_query)
    state = make_state(block_len) if "from" in way else None
    w_state = weights_of_state(block_len) if "to" in way else None
    options = {"block_len": block_len, "causal": causal}
    expected = one_by_one(inputs, state, w_state, **options)
    ends = STARTS.int() if by_query else STARTS
    with poisoned():
        values = run(*to(dtype, inputs, state, w_state), **options, cu_seqlens=ends, backend=backend)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        if value.is_floating_point():
            assert value.dtype == dtype
            assert_close(value, expected[name], TOLERANCE[dtype], name)
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("causal", "stateful", "backend"),
    others_slow(
        [(*way, backend) for way in WHAT_LEAKS for backend in ("reference", "chunked", "fused")],
        [(True, True, "fused"), *((*way, backend) for way in WHAT_LEAKS for backend in ("reference", "chunked"))],
    ),
)
def test_nothing_leaks_from_another_document(causal, stateful, backend):
    dtype = torch.float32 if backend == "fused" else torch.float64
    state, w_state = (make_state(8), weights_of_state(8)) if stateful else (None, None)
    inputs, codes, state, w_state = to(dtype, make(8, causal), state, w_state)
    options = {"block_len": 8, "causal": causal, "cu_seqlens": STARTS, "backend": backend}
    clean = run(inputs, codes, state, w_state, **options)
    for n in (3, 5):
        start, end = STARTS[n : n + 2].tolist()
        dirty = {name: y.clone() for name, y in inputs.items()}
        for y in dirty.values():
            y[:, start:end] = math.nan
        for name, value in run(dirty, codes, state, w_state, **options).items():
            of = (slice(n, n + 1),) if of_state(name) else (slice(None), slice(start, end))
            value[of] = clean[name][of]
            assert torch.equal(value, clean[name]), name


def test_documents_go_on_from_call_to_call():
    L, x = 8, make(8, True)
    state, position = None, [0] * N
    outputs: list[list[Tensor]] = [[] for _ in range(N)]
    options = {"block_len": L, "causal": True, "output_final_state": True}
    for steps in ([2, 0, 0, 9, 16, 1, 0], [0, 0, 1, 4, 3, 7, 0], [3, 0, 0, 0, 8, 26, 0], [0, 0, 0, 5, 5, 36, 0]):
        places = zip(STARTS.tolist(), position, steps, strict=False)
        index = torch.cat([torch.arange(first + at, first + at + size) for first, at, size in places])
        q, k, v, bias = (x[name][:, index] for name in ("q", "k", "v", "bias"))
        given = {"codes": CODES[:, index], "bias": bias, "initial_state": state}
        y, state = vq_attention(q, k, v, CODEBOOK, **given, cu_seqlens=torch.tensor([0, *steps]).cumsum(0), **options)
        for n, part in enumerate(y.split(steps, 1)):
            outputs[n].append(part)
        position = [at + size for at, size in zip(position, steps, strict=True)]
    assert state.position.tolist() == position == LENGTHS
    given = {"codes": CODES, "bias": x["bias"], "cu_seqlens": STARTS}
    y, last = vq_attention(x["q"], x["k"], x["v"], CODEBOOK, **given, **options)
    assert_close(torch.cat([part for parts in outputs for part in parts], 1), y, 1e-12)
    for name, value, right in zip(state._fields, state, last, strict=True):
        assert_close(value.double(), right.double(), 1e-12, name)


@pytest.mark.parametrize(
    ("backend", "causal", "stateful"),
    [
        ("chunked", True, True),
        ("chunked", False, False),
        pytest.param("fused", True, False, marks=pytest.mark.slow),
    ],
)
def test_graphs_do_not_depend_on_where_documents_end(backend, causal, stateful):
    inputs, codes, *_ = to(torch.float32, make(8, causal), None, None)
    options = {"block_len": 8, "causal": causal, "output_final_state": stateful, "backend": backend, "codes": codes}
    compiled = torch.compile(vq_attention, fullgraph=True, backend="aot_eager")
    for ends in (STARTS, torch.tensor([0, 30, 30, 35, 50, 51, 90, T])):
        with torch.compiler.set_stance("fail_on_recompile" if ends is not STARTS else "default"):
            leaves = {name: y.clone().requires_grad_() for name, y in inputs.items() if name != "w"}
            q, k, v, bias = leaves.values()
            found = compiled(q, k, v, CODEBOOK.float(), bias=bias, **options, cu_seqlens=ends)
        y = found[0] if stateful else found
        gradients = torch.autograd.grad(y, [*leaves.values()], inputs["w"])
        expected = run(inputs, codes, block_len=8, causal=causal, cu_seqlens=ends, backend=backend)
        assert_close(y, expected["y"], 5e-6)
        for name, value in zip(leaves, gradients, strict=True):
            assert_close(value, expected[f"d{name}"], 1e-5, name)


@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_of_any_order_and_in_any_mode(causal):
    """Of q, v and the bias: that of a key is not the derivative."""
    ends, T = torch.tensor([0, 7, 7, 11]), 11
    made = make(2, causal)
    q, v, bias = (made[name][:, :T, :1].clone().requires_grad_() for name in ("q", "v", "bias"))
    k, codes, codebook = made["k"][:, :T, :1], CODES[:, :T, :1], CODEBOOK[:1]
    bias = bias[..., : 2 if causal else 3].detach().requires_grad_()

    def f(q: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        options = {"codes": codes, "block_len": 2, "bias": bias, "causal": causal, "cu_seqlens": ends}
        return vq_attention(q, k, v, codebook, **options)

    assert torch.autograd.gradcheck(f, (q, v, bias), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (q, v, bias), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_form_has_a_second_derivative(causal):
    ends, second = torch.tensor([0, 7, 7, 11]), []
    for backend, dtype in (("reference", torch.float64), ("fused", torch.float32)):
        made = make(2, causal, by_query=False)
        q, k, v = (made[name][:, :11].to(dtype).requires_grad_() for name in "qkv")
        given = {"codes": CODES[:, :11], "bias": made["bias"].to(dtype), "block_len": 2, "causal": causal}
        y = vq_attention(q, k, v, CODEBOOK.to(dtype), **given, cu_seqlens=ends, backend=backend)
        first = torch.autograd.grad(y.square().sum(), (q, k, v), create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), (q, v)))
    for name, right, value in zip("qv", *second, strict=True):
        assert_close(value, right, 1e-4, name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seen", [True, False])
def test_reading_outside_keeps_to_documents_whether_their_ends_are_seen_or_not(seen, causal, monkeypatch):
    """On a GPU no one looks where documents begin: there, what was read of others is forgotten."""
    ends = [0, 1, 1, 6, 10, 12]
    weights, values, dy = draw(2, 12, 3, 4, seed=0), draw(2, 12, 3, 5, seed=1), draw(2, 12, 3, 5, seed=2)
    codes = torch.randint(4, (2, 12, 3), generator=torch.Generator().manual_seed(0))
    arguments = (weights, values, codes, causal)
    if not seen:
        monkeypatch.setattr(Tensor, "tolist", lambda x: [*x.unbind()])
    starts = torch.tensor(ends)
    y = read_outside(*arguments, starts)
    d_weights, d_values = read_outside_backward(dy, *arguments, starts)
    monkeypatch.undo()
    for start, end in pairwise(ends):
        blocks = slice(start, end)
        its = (weights[:, blocks], values[:, blocks], codes[:, blocks], causal)
        if end > start:
            assert_close(y[:, blocks], read_outside(*its), 1e-13)
            alone = read_outside_backward(dy[:, blocks], *its)
            assert_close(d_weights[:, blocks], alone[0], 1e-13)
            assert_close(d_values[:, blocks], alone[1], 1e-13)
    torch.library.opcheck(read_outside, (*arguments, starts))
    torch.library.opcheck(read_outside_backward, (dy, *arguments, starts))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_sums_outside_keep_to_documents(dtype, causal):
    ends = [0, 1, 1, 6, 10, 12]
    blocks = (10 * draw(1, 2, 12, 3, seed=0)).to(dtype)
    sums = sums_outside(blocks, causal, torch.tensor(ends))
    for start, end in pairwise(ends):
        if end > start:
            assert_close(sums[:, :, start:end].double(), sums_outside(blocks[:, :, start:end], causal).double(), 1e-13)


def test_errors():
    x = make(8, True)
    given = {"codes": CODES, "block_len": 8, "causal": True}
    state = VQState.empty(1, H, S, Dv, 8, device=None, dtype=torch.float64)
    with pytest.raises(ValueError, match="initial_state must have a row for each of 7 documents, got 1"):
        vq_attention(x["q"], x["k"], x["v"], CODEBOOK, **given, cu_seqlens=STARTS, initial_state=state)
    with pytest.raises(ValueError, match="vq_attention: got cu_seqlens and lengths"):
        vq_attention(x["q"], x["k"], x["v"], CODEBOOK, **given, cu_seqlens=STARTS, lengths=torch.tensor([T]))
