"""gated_attention: the chunked form against masked quadratic weights, in values, gradients and state."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.gated_attention import GatedAttentionState, gated_attention

NAMES = ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v")


def make(B, T, S, E, *, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = (E, S, S, S, S, E)
    return {
        name: torch.randn(B, T, width, dtype=torch.float64, generator=generator).to(dtype)
        for name, width in zip(NAMES, widths, strict=True)
    }


def make_bias(chunk_len, causal, *, dtype=torch.float64) -> Tensor:
    offsets = chunk_len if causal else 2 * chunk_len - 1
    return torch.randn(offsets, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def make_state(B, S, E, chunk_len, position, *, dtype=torch.float64) -> dict[str, Tensor]:
    """A state as a call would leave it: no memory before the first full chunk, zeros in rows not seen."""
    tokens = make(B, chunk_len, S, E, dtype=dtype, seed=1)
    position = torch.tensor(position)
    seen = torch.arange(chunk_len)[:, None] < (position % chunk_len)[:, None, None]  # [B, chunk_len, 1]
    memory = torch.randn(B, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows = {name: torch.where(seen, tokens[name], 0) for name in ("k_quad", "k_lin", "v")}
    return {"memory": memory * (position >= chunk_len)[:, None, None], **rows, "position": position}


def run(inputs: dict[str, Tensor], w: Tensor, state=None, w_state=None, **options) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradient of each input and part of the state."""
    inputs = {name: y.detach().clone().requires_grad_() for name, y in inputs.items()}
    state = {} if state is None else {n: y.detach().clone().requires_grad_(n != "position") for n, y in state.items()}
    leaves = [*inputs.values(), *list(state.values())[:4]]
    names = [f"d{name}" for name in inputs] + [f"dstate_{name}" for name in list(state)[:4]]
    if w_state is None:
        o = gated_attention(**inputs, **options)
        return {"o": o} | dict(zip(names, torch.autograd.grad(o, leaves, w), strict=True))
    initial = GatedAttentionState(**state) if state else None
    o, final = gated_attention(**inputs, **options, initial_state=initial, output_final_state=True)
    gradients = torch.autograd.grad((o, *final[:4]), leaves, (w, *w_state))
    return {"o": o, **{f"state_{n}": y for n, y in final._asdict().items()}} | dict(zip(names, gradients, strict=True))


def weights_of_state(B, S, E, chunk_len, *, dtype=torch.float64) -> list[Tensor]:
    shapes = ((S, E), (chunk_len, S), (chunk_len, S), (chunk_len, E))
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(B, *shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


CASES = [  # B, T, S, E, chunk_len, causal, positions of the state, lengths
    (2, 1, 3, 5, 4, True, None, None),
    (3, 1, 3, 5, 4, True, [0, 3, 9], [1, 1, 0]),
    (2, 1, 3, 5, 1, False, None, None),
    (2, 2, 8, 7, 1, True, [1, 5], None),
    (2, 15, 5, 3, 16, True, [15, 16], [15, 4]),
    (2, 15, 5, 3, 4, False, None, [15, 4]),
    (2, 16, 7, 9, 16, True, None, [3, 16]),
    (2, 16, 7, 9, 8, True, [8, 3], None),
    (3, 63, 4, 10, 7, True, [0, 7, 20], [63, 0, 40]),
    (3, 63, 4, 10, 7, False, None, [63, 0, 40]),
    (2, 64, 9, 17, 16, False, None, None),
    (2, 64, 9, 17, 64, True, [64, 1], [64, 33]),
    (2, 65, 6, 4, 64, True, None, [65, 64]),
    (2, 65, 6, 4, 13, True, [6, 13], None),
    (2, 100, 12, 20, 256, True, [255, 300], [51, 100]),
    (2, 100, 12, 20, 256, False, None, None),
    (2, 257, 6, 10, 64, True, [70, 63], [257, 130]),
    (2, 257, 6, 10, 32, True, None, None),
    (2, 257, 6, 10, 50, False, None, [200, 257]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "T", "S", "E", "chunk_len", "causal", "position", "lengths"), CASES)
def test_agrees_with_reference(B, T, S, E, chunk_len, causal, position, lengths, dtype):
    inputs = make(B, T, S, E, dtype=dtype) | {"bias": make_bias(chunk_len, causal, dtype=dtype)}
    state = None if position is None else make_state(B, S, E, chunk_len, position, dtype=dtype)
    w = torch.randn(B, T, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    w_state = weights_of_state(B, S, E, chunk_len, dtype=dtype) if position is not None else None
    lengths = None if lengths is None else torch.tensor(lengths)
    options = {"chunk_len": chunk_len, "causal": causal, "lengths": lengths, "scale": 0.3}
    values = run(inputs, w, state, w_state, **options)
    wide = [
        None if d is None else {n: y if n == "position" else y.double() for n, y in d.items()} for d in (inputs, state)
    ]
    w_wide = None if w_state is None else [y.double() for y in w_state]
    expected = run(wide[0], w.double(), wide[1], w_wide, **options, backend="reference")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        if name == "state_position":
            assert torch.equal(value, expected[name])
            continue
        assert value.dtype == dtype
        assert_close(value, expected[name], 1e-12 if dtype == torch.float64 else 3e-6, name)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_the_sums_written_out(causal, backend):
    T, C, S = 17, 5, 3
    inputs, bias = make(1, T, S, 4), make_bias(C, causal)
    u, q_quad, k_quad, q_lin, k_lin, v = (y[0] for y in inputs.values())
    expected = torch.zeros(T, 4, dtype=torch.float64)
    for i in range(T):
        for j in range(T):
            if i // C == j // C and (j <= i or not causal):
                score = q_quad[i] @ k_quad[j] / (C * S) ** 0.5 + bias[j - i + C - 1]
                expected[i] += score.relu() ** 2 * v[j]
            if not causal:
                expected[i] += (q_lin[i] @ k_lin[j]) * v[j] / T
            elif j // C < i // C:
                expected[i] += (q_lin[i] @ k_lin[j]) * v[j] / (i // C * C)
    o = gated_attention(**inputs, chunk_len=C, bias=bias, causal=causal, backend=backend)
    assert_close(o[0], u * expected, 1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    inputs = make(2, 5, 2, 1) | {"bias": make_bias(2, causal)}
    leaves = {name: y.requires_grad_() for name, y in inputs.items()}
    state = make_state(2, 2, 1, 2, [3, 0]) if causal else {}
    parts = [y.requires_grad_() for n, y in state.items() if n != "position"]

    def f(*tensors):
        before = GatedAttentionState(*tensors[7:], position=state["position"]) if causal else None
        out = gated_attention(
            *tensors[:6],
            chunk_len=2,
            bias=tensors[6],
            causal=causal,
            initial_state=before,
            output_final_state=causal,
            lengths=torch.tensor([5, 2]),
        )
        return (out[0], *out[1][:4]) if causal else out

    assert torch.autograd.gradcheck(f, [*leaves.values(), *parts])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("causal", "stateful"), [(False, False), (True, False), (True, True)])
def test_padding_has_no_effect(backend, causal, stateful):
    lengths = torch.tensor([40, 70, 0])
    padding = torch.arange(70) >= lengths[:, None]  # [B, T]
    inputs = make(3, 70, 4, 5)
    w = torch.randn(3, 70, 5, dtype=torch.float64)
    state = make_state(3, 4, 5, 16, [3, 16, 50]) if stateful else None
    w_state = weights_of_state(3, 4, 5, 16) if stateful else None
    options = {"chunk_len": 16, "bias": make_bias(16, causal), "causal": causal, "backend": backend}

    def poison(y):
        return y.masked_fill(padding[..., None], float("nan"))

    clean = run(inputs, w, state, w_state, **options, lengths=lengths)
    dirty = run({n: poison(y) for n, y in inputs.items()}, poison(w), state, w_state, **options, lengths=lengths)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    for name in ("o", *(f"d{name}" for name in NAMES)):
        assert (dirty[name][padding] == 0).all()

    first = {n: y[:1, :40] for n, y in inputs.items()}
    alone = run(
        first,
        w[:1, :40],
        {n: y[:1] for n, y in state.items()} if stateful else None,
        [y[:1] for y in w_state] if stateful else None,
        **options,
    )
    for name, value in alone.items():
        shared = dirty[name][:1] if "state" in name else dirty[name][:1, :40]
        assert_close(shared.double(), value.double(), 1e-13, name)
    if stateful:  # an empty sequence hands its state on
        for name, value in state.items():
            assert torch.equal(dirty[f"state_{name}"][2], value[2]), name


@pytest.mark.parametrize("chunk_len", [1, 8, 20, 200])
def test_split_and_resume(chunk_len):
    inputs = make(2, 90, 4, 3)
    w, w_state = torch.randn(2, 90, 3, dtype=torch.float64), weights_of_state(2, 4, 3, chunk_len)
    options = {"chunk_len": chunk_len, "bias": make_bias(chunk_len, True), "causal": True}
    whole = run(inputs, w, None, w_state, **options)
    assert_close(whole["o"], gated_attention(**inputs, **options, backend="reference"), 1e-12)
    leaves = {name: y.requires_grad_() for name, y in inputs.items()}
    outputs, state = [], None
    for part in torch.arange(90).split([1, 7, 1, 1, 10, 45, 25]):
        piece = {name: y[:, part] for name, y in inputs.items()}
        o, state = gated_attention(**piece, **options, initial_state=state, output_final_state=True)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad((o, *state[:4]), list(leaves.values()), (w, *w_state))
    resumed = {"o": o, **{f"state_{n}": y for n, y in state._asdict().items()}}
    resumed |= dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    assert resumed.keys() == whole.keys()
    for name, value in resumed.items():
        assert_close(value.double(), whole[name].double(), 1e-12, name)


def test_ragged_steps_resume_where_each_sequence_stopped():
    inputs, bias = make(2, 40, 4, 3), make_bias(6, True)
    whole = gated_attention(**inputs, chunk_len=6, bias=bias, causal=True)
    state, position = None, torch.zeros(2, dtype=torch.int64)
    for lengths in ([5, 1], [0, 6], [8, 8], [1, 1], [7, 0], [3, 4]):
        steps = torch.tensor(lengths)
        index = (position[:, None] + torch.arange(8)).clamp(max=39)[..., None]
        piece = {name: y.gather(1, index.expand(-1, -1, y.shape[-1])) for name, y in inputs.items()}
        o, state = gated_attention(
            **piece, chunk_len=6, bias=bias, causal=True, lengths=steps, initial_state=state, output_final_state=True
        )
        for b, n in enumerate(lengths):
            assert_close(o[b, :n], whole[b, position[b] : position[b] + n], 1e-13)
        position += steps
        assert torch.equal(state.position, position)
        unseen = torch.arange(6) >= (position % 6)[:, None]
        assert all((rows[unseen] == 0).all() for rows in (state.k_quad, state.k_lin, state.v))


def test_far_into_a_sequence():
    """Position enters through the number of keys before a chunk only, at any size."""
    inputs = make(1, 10, 4, 3)
    state = make_state(1, 4, 3, 8, [2**40 * 8 + 5])
    o, after = gated_attention(
        **inputs, chunk_len=8, causal=True, initial_state=GatedAttentionState(**state), output_final_state=True
    )
    assert after.position.item() == 2**40 * 8 + 15
    near = gated_attention(**{n: y[:, 3:] for n, y in inputs.items()}, chunk_len=8, causal=True)
    assert_close(o[:, 3:], near, 1e-9)  # the memory is divided by 2^43


def test_layouts_of_inputs_and_gradients():
    inputs, state = make(2, 70, 4, 4), make_state(2, 4, 4, 16, [5, 16])
    w_state = [torch.ones((), dtype=torch.float64).expand_as(y) for y in weights_of_state(2, 4, 4, 16)]
    gradients = {
        "expanded": torch.ones((), dtype=torch.float64).expand(2, 70, 4),
        "transposed": torch.randn(4, 70, 2, dtype=torch.float64).permute(2, 1, 0),
        "sliced": torch.randn(2, 140, 8, dtype=torch.float64)[:, ::2, 2:6],
    }
    for layout, w in gradients.items():
        expected = run(inputs, w.contiguous(), state, [y.contiguous() for y in w_state], chunk_len=16, causal=True)
        for name, value in run(inputs, w, state, w_state, chunk_len=16, causal=True).items():
            assert torch.equal(value, expected[name]), (layout, name)
        for causal in (False, True):
            expected = gated_attention(*[w.contiguous()] * 6, chunk_len=16, causal=causal)
            assert torch.equal(gated_attention(*[w] * 6, chunk_len=16, causal=causal), expected), layout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    inputs = make(2, 100, 4, 3, dtype=dtype)
    options = {"chunk_len": 16, "causal": True, "output_final_state": True}
    o, state = gated_attention(**inputs, **options)
    expected, expected_state = gated_attention(
        **{n: y.double() for n, y in inputs.items()}, **options, backend="reference"
    )
    assert o.dtype == dtype
    assert_close(o, expected, torch.finfo(dtype).eps)
    for value, wide in zip(state[:4], expected_state[:4], strict=True):
        assert value.dtype == torch.float32
        assert_close(value, wide, 2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_keeps_the_sums_in_single(causal):
    inputs = make(2, 100, 8, 8, dtype=torch.float32)
    expected = gated_attention(**inputs, chunk_len=16, causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_attention(**inputs, chunk_len=16, causal=causal), expected)


@pytest.mark.parametrize(("causal", "position"), [(False, None), (True, None), (True, [5, 16])])
def test_compiles_whole_and_repeats_itself(causal, position):
    inputs = make(2, 70, 4, 3, dtype=torch.float32)
    state = None if position is None else make_state(2, 4, 3, 16, position, dtype=torch.float32)
    w = torch.randn(2, 70, 3)
    w_state = None if position is None else weights_of_state(2, 4, 3, 16, dtype=torch.float32)
    options = {"chunk_len": 16, "causal": causal, "lengths": torch.tensor([70, 30])}
    expected = run(inputs, w, state, w_state, **options)
    for name, value in run(inputs, w, state, w_state, **options).items():
        assert torch.equal(value, expected[name]), name
    leaves = {name: y.requires_grad_() for name, y in inputs.items()}
    compiled = torch.compile(gated_attention, fullgraph=True, backend="aot_eager")
    if state is None:
        outputs, weights = (compiled(**leaves, **options),), (w,)
    else:
        o, final = compiled(**leaves, **options, initial_state=GatedAttentionState(**state), output_final_state=True)
        outputs, weights = (o, *final[:4]), (w, *w_state)
    assert_close(outputs[0], expected["o"], 1e-6)
    for name, value in zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), weights), strict=True):
        assert_close(value, expected[f"d{name}"], 1e-5, name)


def test_compiles_whole_with_dynamic_shapes():
    compiled = torch.compile(gated_attention, fullgraph=True, dynamic=True, backend="eager")
    for T in (20, 33):
        inputs = make(2, T, 4, 3)
        expected = gated_attention(**inputs, chunk_len=8, causal=True)
        assert_close(compiled(**inputs, chunk_len=8, causal=True), expected, 1e-14)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for y in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(y, Tensor):
                self.numel = max(self.numel, y.untyped_storage().nbytes() // y.element_size())
        return output


@pytest.mark.parametrize(("causal", "stateful"), [(False, False), (True, False), (True, True)])
def test_memory_is_linear_in_time(causal, stateful):
    w_state = weights_of_state(1, 16, 16, 32, dtype=torch.float32) if stateful else None
    for T in (512, 2048):
        inputs = make(1, T, 16, 16, dtype=torch.float32)
        with LargestTensor() as largest:
            run(inputs, torch.ones(1, T, 16), None, w_state, chunk_len=32, causal=causal)
        assert largest.numel <= (T + 32) * 32  # what weights inside chunks take


def test_one_step_costs_one_row():
    """A single step weighs the keys of its chunk only, not every pair of them."""
    inputs, state = make(1, 1, 4, 4), GatedAttentionState(**make_state(1, 4, 4, 256, [300]))
    with LargestTensor() as largest:
        gated_attention(**inputs, chunk_len=256, causal=True, initial_state=state, output_final_state=True)
    assert largest.numel <= 256 * 4


def test_errors():
    inputs = make(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"expected u and v \[B, T, E\].*got \[2, 5, 4\], \[2, 5, 4\] and \[2, 5, 2\]"):
        gated_attention(**inputs | {"q_quad": torch.zeros(2, 5, 2)}, chunk_len=4)
    for causal, offsets in ((True, 4), (False, 7)):
        with pytest.raises(ValueError, match=rf"bias must be \[{offsets}\].*got \[5\]"):
            gated_attention(**inputs, chunk_len=4, causal=causal, bias=torch.zeros(5))
    with pytest.raises(ValueError, match="with T >= 1"):
        gated_attention(**{name: y[:, :0] for name, y in inputs.items()}, chunk_len=4)
    with pytest.raises(ValueError, match="chunk_len must be 1 or more, got 0"):
        gated_attention(**inputs, chunk_len=0)
    with pytest.raises(ValueError, match="only causal attention has a state"):
        gated_attention(**inputs, chunk_len=4, output_final_state=True)
    state = GatedAttentionState.empty(2, 3, 4, 8, device=None, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"initial_state must be memory \[2, 3, 4\], k_quad \[2, 4, 3\]"):
        gated_attention(**inputs, chunk_len=4, causal=True, initial_state=state)
    with pytest.raises(ValueError, match=r"lengths must be int64 \[2\]"):
        gated_attention(**inputs, chunk_len=4, lengths=torch.tensor([5.0, 5.0]))
    with pytest.raises(ValueError, match="no backend 'fast'; valid: auto, chunked, reference"):
        gated_attention(**inputs, chunk_len=4, backend="fast")
