"""favor_attention: the chunked form against the quadratic definition, in values, gradients and state."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from agreement import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.favor_attention import FavorState, favor_attention

NAMES = ("q", "k", "v", "sums")


def make(B, T, H, D, M, Dv, *, state=False, scale=1.0, dtype=torch.float64, seed=0):
    """Inputs by name; the state is one that keys of the same size could have left."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = randn(B, T, H, D) * scale * D**-0.25, randn(B, T, H, D) * scale * D**-0.25, randn(B, T, H, Dv)
    inputs = {"q": q, "k": k, "v": v, "projection": randn(H, M, D)}
    if state:
        inputs |= {"sums": randn(B, H, M, Dv + 1).abs() + 0.1, "log_scale": (randn(B, H, M) - scale) * scale}
    return {name: y.to(dtype) for name, y in inputs.items()}


def call(q, k, v, projection, sums=None, log_scale=None, **options):
    state = None if sums is None else FavorState(sums, log_scale)
    return favor_attention(q, k, v, projection, initial_state=state, **options)


def run(
    inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, *, learnt: bool = False, **options
) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradients, with that of the projection if learnt."""
    names = (*NAMES, "projection") if learnt else NAMES
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names if name in inputs}
    if w_state is None:
        o = call(**inputs | leaves, **options)
        return {"o": o} | gradients((o,), leaves, (w,))
    o, state = call(**inputs | leaves, output_final_state=True, **options)
    return {"o": o, **state._asdict()} | gradients((o, state.sums), leaves, (w, w_state))


def gradients(outputs, leaves, weights):
    values = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    return {f"d{name}": value for name, value in zip(leaves, values, strict=True) if value is not None}


def double(inputs):
    return {name: y.double() for name, y in inputs.items()}


CASES = [  # B, T, H, D, M, Dv, causal, state, lengths
    (2, 1, 2, 8, 5, 3, False, False, None),
    (2, 1, 2, 8, 16, 8, True, True, None),
    (1, 2, 3, 16, 44, 16, True, False, None),
    (2, 15, 1, 8, 16, 3, False, False, [15, 4]),
    (2, 16, 2, 8, 16, 9, True, True, [3, 16]),
    (3, 63, 2, 24, 30, 24, True, False, [63, 0, 40]),
    (3, 64, 2, 8, 16, 17, False, False, [64, 0, 33]),
    (2, 65, 1, 64, 40, 64, True, True, [65, 64]),
    (2, 65, 2, 24, 20, 4, False, False, None),
    (2, 100, 2, 16, 1, 40, True, True, [51, 100]),
    (2, 257, 1, 16, 12, 6, True, True, [257, 130]),
    (1, 257, 1, 8, 16, 8, False, False, [200]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "T", "H", "D", "M", "Dv", "causal", "state", "lengths"), CASES)
def test_agrees_with_reference(B, T, H, D, M, Dv, causal, state, lengths, dtype):
    inputs = make(B, T, H, D, M, Dv, state=state, dtype=dtype)
    w = torch.randn(B, T, H, Dv, dtype=dtype)
    w_state = torch.randn(B, H, M, Dv + 1, dtype=dtype) if causal else None
    options = {"causal": causal, "lengths": None if lengths is None else torch.tensor(lengths)}
    values = run(inputs, w, w_state, **options)
    wide_w_state = None if w_state is None else w_state.double()
    expected = run(double(inputs), w.double(), wide_w_state, **options, backend="reference")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == dtype
        if name == "log_scale":  # -inf where nothing has been seen
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert_close(value, expected[name], 1e-13 if dtype == torch.float64 else 5e-6, name, worst_row=100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("causal", "state"), [(False, False), (True, False), (True, True)])
def test_inputs_thirty_times_as_large(causal, state, dtype):
    """Exponents in the thousands: no overflow, no vanishing denominator, and errors of no more than their rounding."""
    inputs = make(2, 100, 2, 16, 24, 5, state=state, scale=30, dtype=dtype)
    w = torch.randn(2, 100, 2, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    values = run(inputs, w, causal=causal, lengths=torch.tensor([100, 37]))
    expected = run(double(inputs), w.double(), causal=causal, lengths=torch.tensor([100, 37]), backend="reference")
    # A feature's relative error is that of its exponent, rounded at the size of |k|²/2, however it is computed.
    rounding = torch.finfo(dtype).eps / 2 * inputs["k"].square().sum(-1).max().item() / 2
    for name, value in values.items():
        assert_close(value, expected[name], rounding, name, worst_row=1000)


class Halved:
    """Counts the chunks that are computed by halves."""

    def __init__(self, monkeypatch):
        module = import_module("seqzoo.kernels.favor_attention.causal")
        self.times, by_halves = 0, module.causal_by_halves

        def counted(*arguments):
            self.times += 1
            return by_halves(*arguments)

        monkeypatch.setattr(module, "causal_by_halves", counted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [None, [200, 70, 0]])
@pytest.mark.parametrize("state", [False, True])
def test_where_features_rise_steeply_a_chunk_is_computed_by_halves(state, lengths, dtype, monkeypatch):
    """Here the second of four: what it takes and what it gives, forward and backward, are others'."""
    inputs = make(3, 200, 2, 8, 12, 5, state=state, dtype=dtype)
    inputs["k"][:, :90] = inputs["k"][:, :90] / 10 + (7 if dtype == torch.float32 else 14)
    half_square = inputs["k"].square().sum(-1).max().item() / 2
    if state:
        inputs["log_scale"] -= half_square
    w, w_state = torch.randn(3, 200, 2, 5, dtype=dtype), torch.randn(3, 2, 12, 6, dtype=dtype)
    options = {"causal": True, "lengths": None if lengths is None else torch.tensor(lengths), "learnt": True}
    halved = Halved(monkeypatch)
    values = run(inputs, w, w_state, **options)
    assert halved.times == 2
    expected = run(double(inputs), w.double(), w_state.double(), **options, backend="reference")
    for name, value in values.items():
        if name == "log_scale":
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert_close(value, expected[name], torch.finfo(dtype).eps / 2 * half_square, name, worst_row=1000)


def test_growing_keys_do_not_hide_the_past():
    """Each key's features dwarf all before it, which no query before it may notice."""
    inputs = make(1, 50, 1, 8, 12, 3, dtype=torch.float32)
    inputs["projection"] = torch.cat([torch.eye(8), -torch.eye(8)[:4]])[None] * 40
    inputs["k"] = inputs["k"] * torch.linspace(0.1, 20, 50)[:, None, None]
    w = torch.randn(1, 50, 1, 3)
    values = run(inputs, w, causal=True)
    expected = run(double(inputs), w.double(), causal=True, backend="reference")
    for name, value in values.items():
        assert_close(value, expected[name], 1e-4, name, worst_row=1000)
    for n in (1, 7, 33):
        assert_close(call(**inputs, causal=True)[:, :n], expected["o"][:, :n], 1e-4)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_is_the_ratio_of_feature_products(backend, causal):
    """The two sums written out, with nothing subtracted from any exponent."""
    inputs = make(2, 40, 2, 6, 10, 3, scale=0.5)
    q, k, v, W = inputs.values()

    def phi(x):
        return (torch.einsum("bthd,hmd->bthm", x, W) - x.square().sum(-1, keepdim=True) / 2).exp() / 10**0.5

    weights = torch.einsum("bihm,bjhm->bhij", phi(q), phi(k))
    weights = weights.tril() if causal else weights
    expected = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)
    assert_close(call(**inputs, causal=causal, backend=backend), expected, 1e-13)


def test_features_estimate_the_exponential_without_bias():
    """φ(q)·φ(k) from the state that one key leaves, averaged over 2¹⁸ features."""
    D, M = 4, 2**18
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(1, M, D, dtype=torch.float64, generator=generator)
    x = torch.randn(6, 1, 1, D, dtype=torch.float64, generator=generator) * 0.4
    _, state = favor_attention(x, x, x, W, causal=True, output_final_state=True)
    phi = (state.sums[:, 0, :, -1] * state.log_scale[:, 0].exp()) / M**0.5  # [6, M]
    estimate, exact = phi @ phi.T, (x[:, 0, 0] @ x[:, 0, 0].T).exp()
    spread = exact * (((x[:, None] + x).square().sum((2, 3, 4)).exp() - 1) / M).sqrt()
    assert ((estimate - exact).abs() < 4 * spread).all()
    assert (spread / exact).max() < 0.03


def test_many_features_make_softmax_attention():
    inputs = make(1, 30, 1, 4, 2**15, 3, scale=0.4)
    q, k, v = (inputs[name] for name in "qkv")
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    future = torch.ones(30, 30, dtype=torch.bool).triu(1)
    for causal in (False, True):
        weights = (scores.masked_fill(future, -torch.inf) if causal else scores).softmax(-1)
        assert_close(call(**inputs, causal=causal), torch.einsum("bhij,bjhv->bihv", weights, v), 0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal, monkeypatch):
    monkeypatch.setattr(import_module("seqzoo.kernels.favor_attention.causal"), "CHUNK", 2)
    inputs = make(2, 5, 1, 3, 4, 2, state=causal)
    leaves = {name: inputs[name].requires_grad_() for name in (*NAMES, "projection") if name in inputs}

    def f(*tensors):  # outputs only: the scale of a state's sums is a constant for the gradient, but not in differences
        given = inputs | dict(zip(leaves, tensors, strict=True))
        return call(**given, causal=causal, lengths=torch.tensor([5, 2]))

    assert torch.autograd.gradcheck(f, list(leaves.values()))


def test_gradient_through_a_state_is_exact():
    """The loss on the second half of a sequence, by keys of the first, by differences."""
    inputs = make(1, 8, 1, 3, 4, 2)
    q, k, v, W = inputs.values()

    def f(k, v):
        _, state = favor_attention(q[:, :5], k[:, :5], v[:, :5], W, causal=True, output_final_state=True)
        return favor_attention(q[:, 5:], k[:, 5:], v[:, 5:], W, causal=True, initial_state=state)

    assert torch.autograd.gradcheck(f, (k.requires_grad_(), v.requires_grad_()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_has_no_effect(backend, causal):
    lengths = torch.tensor([40, 70, 0])
    inputs = make(3, 70, 2, 4, 6, 5, state=causal)
    w = torch.randn(3, 70, 2, 5, dtype=torch.float64)
    w_state = torch.randn(3, 2, 6, 6, dtype=torch.float64) if causal else None
    options = {"causal": causal, "lengths": lengths, "backend": backend}
    clean = run(inputs, w, w_state, **options)
    padding = torch.arange(70) >= lengths[:, None]  # [B, T]

    def poison(y):
        return y.masked_fill(padding[..., None, None], float("nan"))

    dirty = run(inputs | {name: poison(inputs[name]) for name in "qkv"}, poison(w), w_state, **options)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    for name in ("o", "dq", "dk", "dv"):
        assert (dirty[name][padding] == 0).all()
    if causal:
        assert torch.equal(dirty["sums"][2], inputs["sums"][2])  # an empty sequence hands its state on
        assert torch.equal(dirty["log_scale"][2], inputs["log_scale"][2])
    alone = {name: y if name == "projection" else y[:1] for name, y in inputs.items()}
    alone |= {name: alone[name][:, :40] for name in "qkv"}
    for name, value in run(alone, w[:1, :40], None if w_state is None else w_state[:1], causal=causal).items():
        part = dirty[name][:1]
        assert_close(part[:, :40] if name in ("o", "dq", "dk", "dv") else part, value, 1e-13, name, worst_row=100)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("parts", [(1, 129, 20), (64, 64, 22), (1,) * 150])
def test_split_and_resume(scale, parts):
    inputs = make(2, 150, 2, 4, 6, 3, state=True, scale=scale)
    w, w_state = torch.randn(2, 150, 2, 3, dtype=torch.float64), torch.randn(2, 2, 6, 4, dtype=torch.float64)
    whole = run(inputs, w, w_state, causal=True)
    leaves = {name: inputs[name].requires_grad_() for name in NAMES}
    outputs, state = [], FavorState(inputs["sums"], inputs["log_scale"])
    for q, k, v in zip(*(inputs[name].split(parts, 1) for name in "qkv"), strict=True):
        o, state = favor_attention(
            q, k, v, inputs["projection"], causal=True, initial_state=state, output_final_state=True
        )
        outputs.append(o)
    o = torch.cat(outputs, 1)
    resumed = {"o": o, **state._asdict()} | gradients((o, state.sums), leaves, (w, w_state))
    for name, value in resumed.items():
        assert_close(value, whole[name], 1e-11, name, worst_row=1000)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_future_changes_nothing_to_the_bit(backend):
    """Not even through a maximum: huge keys after a step leave it as it was."""
    inputs = make(1, 70, 2, 8, 12, 4, dtype=torch.float32)
    before = call(**inputs, causal=True, backend=backend)
    inputs["k"][:, 41:] *= 30
    assert torch.equal(call(**inputs, causal=True, backend=backend)[:, :41], before[:, :41])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_zero_denominator_gives_zero(backend, causal):
    inputs = make(2, 6, 1, 4, 5, 3)
    inputs["k"][0] = 1e30  # |k|²/2 is beyond single precision, so that every feature is exactly 0
    inputs = {name: y.float() for name, y in inputs.items()}
    values = run(inputs, torch.ones(2, 6, 1, 3), causal=causal, backend=backend)
    assert (values["o"][0] == 0).all()
    assert (values["o"][1] != 0).all()
    assert (values["dq"][0] == 0).all()
    assert all(value[1].isfinite().all() for value in values.values())


def test_layouts_of_inputs_and_gradients():
    inputs = make(2, 70, 3, 4, 6, 4, state=True)
    w_state = torch.ones((), dtype=torch.float64).expand(2, 3, 6, 5)
    layouts = {
        "expanded": torch.ones((), dtype=torch.float64).expand(2, 70, 3, 4),
        "transposed": torch.randn(4, 3, 70, 2, dtype=torch.float64).permute(3, 2, 1, 0),
        "sliced": torch.randn(2, 140, 3, 8, dtype=torch.float64)[:, ::2, :, 2:6],
    }
    for causal in (False, True):
        options = {"causal": True, "w_state": w_state} if causal else {}
        given = inputs if causal else {name: inputs[name] for name in ("q", "k", "v", "projection")}
        for layout, w in layouts.items():
            expected = run(given, w.contiguous(), **options)
            for name, value in run(given, w, **options).items():
                assert torch.equal(value, expected[name]), (layout, name)
            x, W = w.contiguous(), inputs["projection"]
            assert torch.equal(
                favor_attention(w, w, w, W, causal=causal), favor_attention(x, x, x, W, causal=causal)
            ), layout


def test_one_projection_serves_all_heads():
    q, k, v, W = make(2, 20, 3, 4, 6, 3).values()
    shared = favor_attention(q, k, v, W[0])
    assert torch.equal(shared, favor_attention(q, k, v, W[:1].repeat(3, 1, 1)))


def test_bidirectional_ignores_order():
    q, k, v, W = make(1, 90, 2, 4, 6, 3).values()
    order = torch.randperm(90)
    assert_close(favor_attention(q, k[:, order], v[:, order], W), favor_attention(q, k, v, W), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    inputs = make(2, 100, 2, 4, 6, 3, dtype=dtype)
    o, state = call(**inputs, causal=True, output_final_state=True)
    expected, expected_state = call(**double(inputs), causal=True, output_final_state=True, backend="reference")
    assert (o.dtype, state.sums.dtype, state.log_scale.dtype) == (dtype, torch.float32, torch.float32)
    assert_close(state.sums, expected_state.sums, 5e-6)
    assert_close(o, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_bfloat16(causal):
    """Of products in bfloat16, where the CPU has them: errors of a few roundings."""
    inputs = make(2, 150, 2, 16, 44, 16, state=causal, dtype=torch.bfloat16)
    w = torch.randn(2, 150, 2, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    options = {"causal": causal, "lengths": torch.tensor([150, 70]), "learnt": True}
    expected = run(double(inputs), w.double(), **options, backend="reference")
    for name, value in run(inputs, w, **options).items():
        assert value.dtype == torch.bfloat16
        assert_close(value, expected[name], 2 * torch.finfo(torch.bfloat16).eps, name, worst_row=100)


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_keeps_features_and_sums_in_single(causal):
    inputs = make(2, 100, 2, 8, 12, 8, dtype=torch.float32)
    expected = call(**inputs, causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(**inputs, causal=causal), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_two_runs_are_equal_to_the_bit(causal):
    inputs = make(2, 130, 2, 8, 12, 8, dtype=torch.float32)
    w = torch.randn(2, 130, 2, 8)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(inputs, w, causal=causal) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole(causal, monkeypatch):
    """To the form that looks at no values."""
    inputs = make(2, 70, 2, 4, 6, 3, dtype=torch.float32, state=causal)
    options = {"causal": causal, "lengths": torch.tensor([70, 33])}
    w, w_state = torch.randn(2, 70, 2, 3), torch.randn(2, 2, 6, 4) if causal else None
    with monkeypatch.context() as patch:
        patch.setattr(import_module("seqzoo.kernels.favor_attention.chunked"), "eager", lambda *_: False)
        expected = run(inputs, w, w_state, **options)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES if name in inputs}
    if causal:
        o, state = compiled(**inputs | leaves, output_final_state=True, **options)
        values = {"o": o, **state._asdict()} | gradients((o, state.sums), leaves, (w, w_state))
    else:
        o = compiled(**inputs | leaves, **options)
        values = {"o": o} | gradients((o,), leaves, (w,))
    for name, value in values.items():
        assert_close(value, expected[name], 1e-6, name)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for y in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(y, Tensor):
                self.numel = max(self.numel, y.untyped_storage().nbytes() // y.element_size())
        return output


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("D", "M"), [(16, 44), (40, 80)])
def test_memory_is_linear_in_time(causal, D, M):
    sizes = []
    for T in (512, 2048):
        inputs = make(1, T, 1, D, M, D, dtype=torch.float32)
        with LargestTensor() as largest:
            run(inputs, torch.ones(1, T, 1, D), causal=causal)
        sizes.append(largest.numel)
        assert largest.numel <= T * (M + -M % 16)  # the features themselves, in rows of whole cache lines
    assert sizes[1] <= 4 * sizes[0]


def test_errors():
    q, k, v, W = make(2, 5, 3, 4, 6, 2).values()
    with pytest.raises(ValueError, match=r"expected q and k \[B, T, H, D\]"):
        favor_attention(q, k[:, :4], v, W)
    for wrong in (W[:2], W[..., :3], W[0, 0], W[:, :0]):
        with pytest.raises(ValueError, match=r"projection must be \[H, M, D\] = \[3, M, 4\] or \[M, D\] = \[M, 4\]"):
            favor_attention(q, k, v, wrong)
    with pytest.raises(ValueError, match="v must be a real floating-point tensor"):
        favor_attention(q, k, v.long(), W)
    state = FavorState.empty(2, 3, 6, 2, device=None, dtype=torch.float64)
    for options in ({"initial_state": state}, {"output_final_state": True}):
        with pytest.raises(ValueError, match="need causal=True"):
            favor_attention(q, k, v, W, **options)
    with pytest.raises(ValueError, match=r"here \[2, 3, 6, 3\] and \[2, 3, 6\], got \[2, 3, 5, 3\]"):
        favor_attention(q, k, v, W, causal=True, initial_state=FavorState(state.sums[:, :, :5], state.log_scale))
    with pytest.raises(ValueError, match=r"lengths must be int64 \[2\]"):
        favor_attention(q, k, v, W, lengths=torch.tensor([5.0, 5.0]))
    with pytest.raises(ValueError, match="no backend 'fast'; valid: auto, chunked, reference"):
        favor_attention(q, k, v, W, backend="fast")
