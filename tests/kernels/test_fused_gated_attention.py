"""gated_attention in Triton against masked quadratic weights."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from often import others_slow
from torch import Tensor

from seqzoo.kernels import gated_attention
from seqzoo.kernels.gated_attention import GatedAttentionState, fused

NAMES = ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v", "bias")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def make(B, T, S, E, chunk_len, *, causal, bias=True, dtype=torch.float32, size=1.0) -> dict[str, Tensor]:
    """Inputs by name; the bias stays in single precision."""
    u, v = torch.randn(B, T, E), torch.randn(B, T, E)
    keys = [size * torch.randn(B, T, S) for _ in range(4)]
    inputs = dict(zip(NAMES, (y.to(DEVICE, dtype) for y in (u, *keys, v)), strict=False))
    return inputs | ({"bias": torch.randn(chunk_len if causal else 2 * chunk_len - 1).to(DEVICE)} if bias else {})


def run(inputs: dict[str, Tensor], w: Tensor, **options) -> dict[str, Tensor]:
    inputs = {name: y.detach().clone().requires_grad_() for name, y in inputs.items()}
    o = gated_attention(**inputs, **options)
    gradients = torch.autograd.grad(o, list(inputs.values()), w)
    return {"o": o} | dict(zip((f"d{name}" for name in inputs), gradients, strict=True))


def shapes_of_state(B, S, E, chunk_len) -> dict[str, tuple[int, ...]]:
    return {
        "memory": (B, S, E),
        "k_quad": (B, chunk_len, S),
        "k_lin": (B, chunk_len, S),
        "v": (B, chunk_len, E),
    }


def make_state(B, S, E, chunk_len, position, *, dtype=torch.float32) -> dict[str, Tensor]:
    """By name, of numbers that `dtype` has: in rows not seen yet too, where they must count for nothing."""
    drawn = {name: torch.randn(shape) for name, shape in shapes_of_state(B, S, E, chunk_len).items()}
    state = {name: y.to(dtype).float().to(DEVICE) for name, y in drawn.items()}
    return state | {"position": torch.tensor(position, device=DEVICE)}


def run_with_state(
    inputs: dict[str, Tensor], w: Tensor, state: dict[str, Tensor], w_state: list[Tensor], **options
) -> dict[str, Tensor]:
    """From `state`, if there is one, to a state, if there are weights for it; gradients through both."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in inputs.items()}
    past = {n: y.detach().clone().requires_grad_(n != "position") for n, y in state.items()}
    options |= {"initial_state": GatedAttentionState(**past) if past else None, "output_final_state": bool(w_state)}
    o = gated_attention(**leaves, **options)
    o, final = o if w_state else (o, ())
    of = [*leaves.values(), *list(past.values())[:4]]
    gradients = torch.autograd.grad((o, *final[:4]), of, (w, *w_state))
    names = [f"d{name}" for name in leaves] + [f"dstate_{name}" for name in list(past)[:4]]
    values = {f"state_{name}": y for name, y in zip(GatedAttentionState._fields, final, strict=False)}
    return {"o": o} | values | dict(zip(names, gradients, strict=True))


def check(inputs: dict[str, Tensor], *, lengths=None, **options) -> None:
    v = inputs["v"]
    w = torch.randn(v.shape).to(v)
    lengths = None if lengths is None else torch.tensor(lengths)
    clean = {name: wide(y).cpu() for name, y in inputs.items()}
    expected = run(clean, wide(w).cpu(), lengths=lengths, **options, backend="reference")
    if lengths is not None:
        lengths = lengths.to(DEVICE)
        padding = (torch.arange(v.shape[1], device=DEVICE) >= lengths[:, None])[..., None]
        inputs = {name: y.masked_fill(padding, float("nan")) if y.dim() > 1 else y for name, y in inputs.items()}
        w = w.masked_fill(padding, float("nan"))
    with poisoned():
        values = run(inputs, w, lengths=lengths, **options, backend="fused")
    for name, value in values.items():
        assert value.dtype == inputs.get(name[1:], v).dtype
        assert_close(value.cpu(), expected[name], TOLERANCE[v.dtype], name)
        if lengths is not None and value.dim() > 1:
            assert (value.masked_select(padding) == 0).all(), name


CASES = [  # B, T, S, E, chunk_len, causal, bias, lengths, dtype, pieces that work is cut into
    (2, 1, 3, 5, 4, True, True, None, torch.float32, 1),
    (1, 2, 8, 7, 1, False, True, None, torch.float32, 1),
    (2, 15, 5, 3, 2, True, True, [15, 4], torch.float32, 3),
    (2, 9, 4, 6, 1, True, True, None, torch.float32, 1),
    (2, 16, 24, 16, 5, True, True, [3, 16], torch.float32, 1),
    (2, 16, 8, 24, 300, False, True, None, torch.float32, 1),
    (3, 63, 16, 10, 20, True, False, [63, 0, 40], torch.float32, 3),
    (3, 63, 16, 10, 33, False, True, [63, 0, 40], torch.float32, 1),
    (2, 64, 8, 100, 64, True, True, [64, 33], torch.float32, 3),
    (2, 64, 16, 16, 16, False, False, [64, 33], torch.float16, 1),
    (2, 65, 24, 8, 32, True, True, [65, 64], torch.float16, 3),
    (1, 65, 100, 24, 64, False, True, None, torch.float32, 1),
    (1, 100, 64, 64, 100, True, True, None, torch.float16, 1),
    (2, 100, 8, 64, 37, True, True, None, torch.float32, 1),
    (2, 257, 8, 16, 64, True, True, [257, 130], torch.float32, 3),
    (1, 257, 16, 24, 70, False, True, None, torch.float32, 3),
    (2, 130, 8, 8, 129, False, True, [100, 130], torch.float16, 1),
]


@pytest.mark.parametrize(
    ("B", "T", "S", "E", "chunk_len", "causal", "bias", "lengths", "dtype", "pieces"), others_slow(CASES, CASES[::2])
)
def test_agrees_with_reference(B, T, S, E, chunk_len, causal, bias, lengths, dtype, pieces, monkeypatch):
    monkeypatch.setattr(fused, "_pieces", lambda programs, most, device: min(pieces, most))
    inputs = make(B, T, S, E, chunk_len, causal=causal, bias=bias, dtype=dtype)
    check(inputs, chunk_len=chunk_len, causal=causal, lengths=lengths)


@pytest.mark.parametrize("causal", [False, True])
def test_large_inputs(causal):
    check(make(1, 40, 16, 8, 16, causal=causal, size=30.0), chunk_len=16, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_weights_that_half_precision_does_not_hold(causal):
    inputs = make(1, 40, 16, 8, 16, causal=causal, dtype=torch.float16, size=20.0)
    scores = inputs["q_quad"].float() @ inputs["k_quad"].float().mT / 16
    assert scores.square().max() > torch.finfo(torch.float16).max
    check(inputs | {"u": inputs["u"] / 2**6, "v": inputs["v"] / 2**8}, chunk_len=16, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_come_in_any_layout_and_repeat_themselves(causal):
    inputs = make(2, 17, 4, 4, 8, causal=causal)
    w = torch.randn_like(inputs["v"])
    options = {"chunk_len": 8, "causal": causal, "backend": "fused"}
    for name, gradient in awkward(w).items():
        value, expected = run(inputs, gradient, **options), run(inputs, gradient.contiguous(), **options)
        assert all(torch.equal(value[key], expected[key]) for key in value), name


def test_inputs_come_as_slices_and_in_any_layout():
    inputs = make(2, 17, 16, 32, 8, causal=True)
    names = NAMES[1:5]
    keys = torch.stack([inputs[name] for name in names], 2).unbind(2)
    projected = torch.cat([inputs["u"], inputs["v"], inputs["q_lin"]], -1)
    slices = inputs | dict(zip(names, keys, strict=True)) | dict(zip("uv", projected.split(32, -1), strict=False))
    transposed = {name: y.transpose(0, -2).contiguous().transpose(0, -2) for name, y in inputs.items() if y.dim() > 1}
    w = torch.randn_like(inputs["v"])
    leaves = {name: y.requires_grad_() for name, y in inputs.items()}
    options = {"chunk_len": 8, "causal": True, "backend": "fused"}
    expected = torch.autograd.grad(gated_attention(**leaves, **options), list(leaves.values()), w)
    for given in (slices, inputs | transposed, slices | {"k_lin": transposed["k_lin"]}):
        leaves = {name: y.detach().requires_grad_() for name, y in given.items()}
        assert not leaves["q_quad"].is_contiguous()
        gradients = torch.autograd.grad(gated_attention(**leaves, **options), list(leaves.values()), w)
        for name, value, right in zip(leaves, gradients, expected, strict=True):
            assert torch.equal(value, right), name


STATES = [  # B, T, S, E, chunk_len, bias, positions of the state (None: none to start from), lengths, dtype, pieces
    (3, 2, 3, 5, 4, True, [0, 3, 9], [2, 1, 0], torch.float32, 1),
    (2, 2, 8, 7, 1, True, [1, 5], None, torch.float32, 1),
    (2, 15, 5, 3, 16, True, [15, 16], [15, 4], torch.float32, 2),
    (2, 15, 5, 3, 64, True, [17, 130], None, torch.float32, 1),
    (2, 16, 24, 16, 8, False, [8, 3], None, torch.float32, 3),
    (2, 16, 16, 24, 8, True, None, [3, 16], torch.float32, 3),
    (3, 63, 4, 10, 7, True, [0, 7, 20], [63, 0, 40], torch.float32, 3),
    (2, 64, 16, 16, 32, True, [64, 1], [64, 33], torch.float16, 2),
    (2, 65, 24, 40, 20, True, [6, 13], None, torch.float16, 1),
    (2, 100, 12, 20, 70, True, [69, 300], [51, 100], torch.float32, 2),
    (1, 130, 40, 8, 33, False, None, None, torch.float16, 3),
]


@pytest.mark.parametrize(
    ("B", "T", "S", "E", "chunk_len", "bias", "position", "lengths", "dtype", "pieces"),
    others_slow(STATES, STATES[::2]),
)
def test_state_agrees_with_reference(B, T, S, E, chunk_len, bias, position, lengths, dtype, pieces, monkeypatch):
    monkeypatch.setattr(fused, "_pieces", lambda programs, most, device: min(pieces, most))
    inputs = make(B, T, S, E, chunk_len, causal=True, bias=bias, dtype=dtype)
    state = {} if position is None else make_state(B, S, E, chunk_len, position, dtype=dtype)
    w = torch.randn(B, T, E).to(DEVICE, dtype)
    w_state = [torch.randn(shape, device=DEVICE) for shape in shapes_of_state(B, S, E, chunk_len).values()]
    options = {"chunk_len": chunk_len, "causal": True, "lengths": None if lengths is None else torch.tensor(lengths)}
    wide_inputs, wide_state = (
        {name: y.cpu() if name == "position" else wide(y).cpu() for name, y in given.items()}
        for given in (inputs, state)
    )
    wide_w = [wide(y).cpu() for y in w_state]
    expected = run_with_state(wide_inputs, wide(w).cpu(), wide_state, wide_w, **options, backend="reference")
    if lengths is not None:
        options["lengths"] = options["lengths"].to(DEVICE)
        padding = (torch.arange(T, device=DEVICE) >= options["lengths"][:, None])[..., None]
        inputs = {name: y.masked_fill(padding, float("nan")) if y.dim() > 1 else y for name, y in inputs.items()}
        w = w.masked_fill(padding, float("nan"))
    with poisoned():
        values = run_with_state(inputs, w, state, w_state, **options, backend="fused")
        again = run_with_state(inputs, w, state, w_state, **options, backend="fused")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert torch.equal(value, again[name]), name
        if name == "state_position":
            assert torch.equal(value.cpu(), expected[name])
            continue
        assert value.dtype == (torch.float32 if "state" in name else inputs.get(name[1:], w).dtype)
        assert_close(value.cpu(), expected[name], TOLERANCE[dtype], name)
        if lengths is not None and "state" not in name and value.dim() > 1:
            assert (value.masked_select(padding) == 0).all(), name


@pytest.mark.parametrize("chunk_len", [8, 20, 60])
def test_split_and_resume(chunk_len):
    B, T, S, E = 2, 60, 4, 3
    inputs = make(B, T, S, E, chunk_len, causal=True)
    options = {"chunk_len": chunk_len, "causal": True, "backend": "fused"}
    w, w_state = torch.randn(B, T, E), [torch.randn(shape) for shape in shapes_of_state(B, S, E, chunk_len).values()]
    whole = run_with_state(inputs, w, {}, w_state, **options)
    assert torch.equal(whole["o"], gated_attention(**inputs, **options))
    leaves = {name: y.requires_grad_() for name, y in inputs.items()}
    outputs, state = [], None
    for part in torch.arange(T).split([7, 1, 12, 25, 15]):
        piece = {name: y if name == "bias" else y[:, part] for name, y in inputs.items()}
        o, state = gated_attention(**piece, **options, initial_state=state, output_final_state=True)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad((o, *state[:4]), list(leaves.values()), (w, *w_state))
    resumed = {"o": o, **{f"state_{n}": y for n, y in state._asdict().items()}}
    resumed |= dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    for name, value in resumed.items():
        assert_close(value.double(), whole[name].double(), 5e-6, name)


def test_state_far_into_a_sequence():
    """More positions than an int32 counts."""
    state = make_state(1, 4, 3, 8, [2**40 * 8 + 5])
    state["memory"] *= 2.0**43
    given = {"chunk_len": 8, "causal": True, "initial_state": GatedAttentionState(**state)}
    inputs = make(1, 10, 4, 3, 8, causal=True)
    expected = gated_attention(**inputs, **given, backend="reference")
    o, after = gated_attention(**inputs, **given, output_final_state=True, backend="fused")
    assert_close(o, expected, 5e-6)
    assert after.position.item() == 2**40 * 8 + 15


def test_state_in_any_layout_and_under_autocast():
    inputs, state = make(2, 17, 16, 32, 8, causal=True), make_state(2, 16, 32, 8, [5, 16])
    w = torch.randn(2, 17, 32)
    w_state = [torch.ones(()).expand(shape) for shape in shapes_of_state(2, 16, 32, 8).values()]
    options = {"chunk_len": 8, "causal": True, "backend": "fused"}
    expected = run_with_state(inputs, w, state, [y.contiguous() for y in w_state], **options)
    transposed = {n: y.mT.contiguous().mT if y.dim() > 1 else y for n, y in state.items()}
    value = run_with_state(inputs, w, transposed, w_state, **options)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = run_with_state(inputs, w, state, w_state, **options)
    for name, right in expected.items():
        assert torch.equal(value[name], right), name
        if not name.startswith("d"):  # autograd runs PyTorch's own products under the autocast of its caller
            assert torch.equal(cast[name], right), name


def test_state_compiles_whole():
    inputs, state = make(2, 20, 4, 3, 8, causal=True), make_state(2, 4, 3, 8, [5, 16])
    options = {"chunk_len": 8, "causal": True, "output_final_state": True, "backend": "fused"}
    past = GatedAttentionState(**state)
    expected = gated_attention(**inputs, **options, initial_state=past)
    compiled = torch.compile(gated_attention, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs, **options, initial_state=past)
    for value, right in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.parametrize(
    ("causal", "T", "bias"), others_slow([(True, 9, True), (True, 4, False), (False, 9, True)], [(True, 9, True)])
)
def test_operator(causal, T, bias):
    inputs = make(2, T, 16, 16, 4, causal=causal, bias=bias)
    tensors = [inputs[name].requires_grad_() if name in inputs else None for name in NAMES]
    options = (torch.tensor([T, 3], device=DEVICE), 4, causal, 0.5)
    for resumed in (False, True) if causal else (False,):
        state = make_state(2, 16, 16, 4, [5, 0])
        initial, earlier = (state["memory"].requires_grad_(), state["position"]) if resumed else (None, None)
        torch.library.opcheck(torch.ops.seqzoo.gated_attention_fused.default, (*tensors, initial, earlier, *options))
        plain = [None if y is None else y.detach() for y in (*tensors, initial)]
        o, memory = torch.ops.seqzoo.gated_attention_fused(*plain, earlier, *options)
        backward = torch.ops.seqzoo.gated_attention_fused_backward.default
        given = (o, *plain, earlier, options[0], memory, *options[1:], bias, resumed)
        torch.library.opcheck(backward, given)


def test_what_no_kernel_takes_runs_without_one(caplog):
    inputs = make(1, 1, 4, 3, 4, causal=True)
    options = {"chunk_len": 4, "causal": True, "output_final_state": True}
    o, state = gated_attention(**inputs, **options, backend="fused")
    expected, expected_state = gated_attention(**inputs, **options, backend="chunked")
    assert torch.equal(o, expected)
    assert torch.equal(state.v, expected_state.v)
    said = "gated_attention: no kernel makes a single step with a state; the chunked form runs in place of the fused"
    assert caplog.text.count(said) == 1
    gated_attention(**make(1, 5, 129, 3, 4, causal=True), chunk_len=4, causal=True, backend="fused")
    assert "gated_attention: no kernel takes more than 128 channels in torch.float32; the chunked form" in caplog.text
