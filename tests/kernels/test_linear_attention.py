"""linear_attention: the chunked form against the recurrence that defines it, in values, gradients and state."""

from __future__ import annotations

import math
import re
from importlib import import_module

import pytest
import torch
from agreement import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels import linear_attention
from seqzoo.kernels.linear_attention import chunked
from seqzoo.kernels.linear_attention.secondary import secondary_chunks

NAMES = ("q", "k", "v", "log_decay", "initial_state")


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """As on other devices, where one decay of a head is not taken step by step."""
    monkeypatch.setattr(chunked, "SMALL", 0)


def make(B, T, H, Dk, Dv, *, decay="none", state=False, normalize=False, dtype=torch.float64, seed=0):
    """Inputs by name; positive q and k where they are normalised, as any feature map in use makes them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = randn(B, T, H, Dk) / Dk**0.5, randn(B, T, H, Dk), randn(B, T, H, Dv)
    if normalize:
        q, k = q.exp(), k.exp()
    g = {
        "none": None,
        "head": -randn(H).abs() / 8,
        "step": -randn(B, T, H).abs() / 4,
        "channel": -randn(B, T, H, Dk).abs() / 4,
    }[decay]
    S = randn(B, H, Dk, Dv + normalize).abs() if state else None
    tensors = (None if y is None else y.to(dtype) for y in (q, k, v, g, S))
    return dict(zip(NAMES, tensors, strict=True))


def run(inputs: dict[str, Tensor | None], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradient of each input."""
    inputs = {name: y if y is None else y.detach().clone().requires_grad_() for name, y in inputs.items()}
    leaves = {name: y for name, y in inputs.items() if y is not None}
    outputs = linear_attention(**inputs, output_final_state=w_state is not None, **options)
    outputs, weights = ((outputs,), (w,)) if w_state is None else (outputs, (w, w_state))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("o", "state"), outputs, strict=False)) | dict(
        zip((f"d{name}" for name in leaves), gradients, strict=True)
    )


CASES = [  # B, T, H, Dk, Dv, causal, decay, normalize, state, lengths
    (2, 1, 2, 3, 5, True, "none", False, True, None),
    (2, 1, 2, 3, 5, False, "step", True, False, None),
    (3, 1, 2, 3, 5, True, "step", True, True, [1, 0, 1]),
    (3, 1, 2, 3, 5, True, "channel", False, True, [0, 1, 1]),
    (1, 2, 3, 8, 7, True, "step", True, True, None),
    (2, 15, 1, 5, 3, False, "none", True, False, [15, 4]),
    (2, 16, 2, 7, 9, True, "head", False, True, [3, 16]),
    (3, 63, 2, 24, 10, True, "none", True, False, [63, 0, 40]),
    (2, 64, 2, 9, 17, False, "head", True, False, [64, 33]),
    (2, 65, 1, 6, 4, True, "step", False, True, [65, 64]),
    (2, 65, 2, 6, 4, False, "step", False, False, None),
    (2, 100, 2, 33, 20, True, "none", False, True, [51, 100]),
    (1, 100, 3, 5, 12, True, "head", True, True, None),
    (2, 257, 1, 10, 6, True, "step", True, True, [257, 130]),
    (2, 257, 2, 7, 5, False, "step", True, False, [200, 257]),
    (2, 257, 1, 8, 5, False, "head", False, False, [200, 7]),
    (1, 257, 1, 66, 5, True, "none", True, True, None),
    (2, 1, 2, 3, 5, True, "channel", True, True, None),
    (2, 1, 2, 3, 5, False, "channel", False, False, None),
    (3, 63, 2, 24, 10, True, "channel", False, True, [63, 0, 40]),
    (2, 65, 1, 6, 4, False, "channel", True, False, [65, 33]),
    (2, 100, 2, 5, 161, True, "channel", True, True, [51, 100]),
    (2, 257, 2, 33, 20, True, "channel", True, True, [257, 130]),
    (2, 257, 2, 7, 5, False, "channel", False, False, [200, 0]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "T", "H", "Dk", "Dv", "causal", "decay", "normalize", "state", "lengths"), CASES)
def test_agrees_with_reference(B, T, H, Dk, Dv, causal, decay, normalize, state, lengths, dtype):
    inputs = make(B, T, H, Dk, Dv, decay=decay, state=state, normalize=normalize, dtype=dtype)
    w = torch.randn(B, T, H, Dv, dtype=dtype)
    w_state = torch.randn(B, H, Dk, Dv + normalize, dtype=dtype) if state else None
    options = {"causal": causal, "normalize": normalize, "lengths": None if lengths is None else torch.tensor(lengths)}
    values = run(inputs, w, w_state, **options)
    wide = {name: None if y is None else y.double() for name, y in inputs.items()}
    expected = run(wide, w.double(), None if w_state is None else w_state.double(), **options, backend="reference")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == dtype
        assert_close(value, expected[name], 1e-12 if dtype == torch.float64 else 5e-6, name)


@pytest.mark.parametrize(
    ("causal", "decay", "normalize"),
    [
        (True, "none", True),
        (True, "step", False),
        (False, "step", True),
        (True, "channel", True),
        (False, "channel", False),
    ],
)
def test_gradcheck(causal, decay, normalize, monkeypatch):
    monkeypatch.setattr(import_module("seqzoo.kernels.linear_attention.chunked"), "MIN_CHUNK", 2)
    inputs = make(2, 5, 1, 2, 3, decay=decay, state=causal, normalize=normalize)
    leaves = {name: y.requires_grad_() for name, y in inputs.items() if y is not None}

    def f(*tensors):
        return linear_attention(
            **dict(zip(leaves, tensors, strict=True)),
            causal=causal,
            normalize=normalize,
            output_final_state=causal,
            lengths=torch.tensor([5, 2]),
        )

    assert torch.autograd.gradcheck(f, list(leaves.values()))


def quadratic(q, k, v, g, causal, normalize):
    """The output from its [T, T] weights, a third way to it: g [B, T, H]."""
    T = q.shape[1]
    b = g.transpose(1, 2).cumsum(-1)  # [B, H, T]
    weights = torch.einsum("bihd,bjhd->bhij", q, k) * (-(b[..., :, None] - b[..., None, :]).abs()).exp()
    if causal:
        weights = weights * torch.ones(T, T).tril()
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_agrees_with_quadratic_form(causal, normalize, backend):
    inputs = make(2, 70, 2, 5, 4, decay="step", normalize=normalize)
    q, k, v, g = (inputs[name] for name in NAMES[:4])
    o = linear_attention(q, k, v, log_decay=g, causal=causal, normalize=normalize, backend=backend)
    assert_close(o, quadratic(q, k, v, g, causal, normalize), 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("causal", "decay"),
    [(True, "none"), (True, "step"), (True, "head"), (False, "step"), (True, "channel"), (False, "channel")],
)
def test_padding_has_no_effect(backend, causal, decay):
    lengths = torch.tensor([40, 70, 0])
    inputs = make(3, 70, 2, 4, 5, decay=decay, state=causal, normalize=True)
    w = torch.randn(3, 70, 2, 5, dtype=torch.float64)
    w_state = torch.randn(3, 2, 4, 6, dtype=torch.float64) if causal else None
    options = {"causal": causal, "normalize": True, "lengths": lengths, "backend": backend}
    clean = run(inputs, w, w_state, **options)
    padding = torch.arange(70) >= lengths[:, None]  # [B, T]

    def poison(y):
        return y.masked_fill(padding.reshape(3, 70, *[1] * (y.dim() - 2)), float("nan"))

    timed = [name for name, y in inputs.items() if y is not None and y.shape[:2] == (3, 70)]
    dirty = run(inputs | {name: poison(inputs[name]) for name in timed}, poison(w), w_state, **options)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    for name in ("o", *(f"d{name}" for name in timed)):
        assert (dirty[name][padding] == 0).all()
    if causal:
        assert torch.equal(dirty["state"][2], inputs["initial_state"][2])  # an empty sequence hands its state on
        alone = {name: y[:1, :40] if name in timed else y for name, y in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][:1]
        _, state = linear_attention(**alone, causal=True, normalize=True, output_final_state=True, backend=backend)
        assert_close(dirty["state"][:1], state, 1e-13)


@pytest.mark.parametrize(
    ("decay", "normalize"), [("none", True), ("head", False), ("step", True), ("channel", False), ("channel", True)]
)
def test_split_and_resume(decay, normalize):
    inputs = make(2, 150, 2, 4, 3, decay=decay, state=True, normalize=normalize)
    w = torch.randn(2, 150, 2, 3, dtype=torch.float64)
    w_state = torch.randn(2, 2, 4, 3 + normalize, dtype=torch.float64)
    whole = run(inputs, w, w_state, causal=True, normalize=normalize)
    leaves = {name: y.requires_grad_() for name, y in inputs.items() if y is not None}
    outputs, state = [], inputs["initial_state"]
    for part in (slice(0, 1), slice(1, 130), slice(130, 150)):
        q, k, v = (inputs[name][:, part] for name in "qkv")
        g = inputs["log_decay"][:, part] if decay in ("step", "channel") else inputs["log_decay"]
        o, state = linear_attention(
            q, k, v, log_decay=g, causal=True, normalize=normalize, initial_state=state, output_final_state=True
        )
        outputs.append(o)
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad((o, state), list(leaves.values()), (w, w_state))
    resumed = {"o": o, "state": state} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    for name, value in resumed.items():
        assert_close(value, whole[name], 1e-12, name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("g", [-1e-7, -0.5, -200.0])
def test_extreme_decays(g, causal):
    inputs = make(1, 200, 2, 4, 3, dtype=torch.float32)
    inputs["log_decay"] = torch.full((1, 200, 2), g)
    inputs["log_decay"][:, ::50] = -1e30  # beside a decay this large, a difference of sums would lose the others
    w = torch.randn(1, 200, 2, 3)
    values = run(inputs, w, causal=causal)
    wide = {name: None if y is None else y.double() for name, y in inputs.items()}
    expected = run(wide, w.double(), causal=causal, backend="reference")
    for name, value in values.items():
        if name != "dlog_decay" or g > -200:  # at -200 that gradient is zero in single precision
            assert_close(value, expected[name], 5e-6, name)


@pytest.mark.parametrize("decay", ["step", "channel"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reset", [30, 64, 100])
def test_minus_infinity_resets(causal, reset, decay):
    inputs = make(1, 130, 2, 4, 3, decay=decay, normalize=True)
    inputs["log_decay"][:, reset] = float("-inf")
    w = torch.randn(1, 130, 2, 3, dtype=torch.float64)
    whole = run(inputs, w, causal=causal, normalize=True)
    for part in (slice(0, reset), slice(reset, 130)):
        alone = run(
            {n: y if y is None else y[:, part] for n, y in inputs.items()}, w[:, part], causal=causal, normalize=True
        )
        for name in ("o", "dq", "dk", "dv"):
            assert_close(whole[name][:, part], alone[name], 1e-12, name)
    assert torch.isfinite(whole["dlog_decay"]).all()
    assert (whole["dlog_decay"][:, reset] == 0).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_zero_denominator_gives_zero(backend):
    inputs = make(1, 6, 1, 2, 3, normalize=True)
    inputs["k"][:, :4] = 0
    values = run(inputs, torch.ones(1, 6, 1, 3, dtype=torch.float64), causal=True, normalize=True, backend=backend)
    assert (values["o"][:, :4] == 0).all()
    assert (values["o"][:, 4:] != 0).all()
    assert all(torch.isfinite(value).all() for value in values.values())
    assert_close(values["o"][:, 4], inputs["v"][:, 4], 1e-14)  # the only step seen so far, with weight 1


@pytest.mark.parametrize("backend", ["chunked", "reference", "fused"])
@pytest.mark.parametrize("starts", [None, torch.tensor([0, 20, 70])], ids=["row", "packed"])
@pytest.mark.parametrize(
    ("causal", "decay"), [(True, "none"), (False, "none"), (True, "head"), (True, "step"), (True, "channel")]
)
def test_sums_of_weights_too_small_for_their_inverse(causal, decay, starts, backend):
    inputs = make(1, 70, 1, 4, 3, decay=decay, normalize=True)
    options = {"causal": causal, "normalize": True, "cu_seqlens": starts}
    scale = {"q": 2.0**-69, "k": 2.0**-69}
    small = {name: x.float() * scale.get(name, 1) for name, x in inputs.items() if x is not None}
    o = linear_attention(**small, **options, backend=backend)
    wide = {name: x.double() for name, x in small.items()}
    assert_close(o, linear_attention(**wide, **options, backend="reference"), 1e-4)


@pytest.mark.parametrize("decay", ["step", "channel"])
def test_layouts_of_inputs_and_gradients(decay):
    inputs = make(2, 70, 3, 4, 4, decay=decay, state=True)
    w_state = torch.ones((), dtype=torch.float64).expand(2, 3, 4, 4)
    gradients = {
        "expanded": torch.ones((), dtype=torch.float64).expand(2, 70, 3, 4),
        "transposed": torch.randn(4, 3, 70, 2, dtype=torch.float64).permute(3, 2, 1, 0),
        "sliced": torch.randn(2, 140, 3, 8, dtype=torch.float64)[:, ::2, :, 2:6],
    }
    for layout, w in gradients.items():
        expected = run(inputs, w.contiguous(), w_state.contiguous(), causal=True)
        for name, value in run(inputs, w, w_state, causal=True).items():
            assert torch.equal(value, expected[name]), (layout, name)
        expected = linear_attention(w.contiguous(), w.contiguous(), w.contiguous(), causal=True)
        assert torch.equal(linear_attention(w, w, w, causal=True), expected), layout


def test_bidirectional_without_decay_ignores_order():
    inputs = make(1, 90, 2, 4, 3)
    order = torch.randperm(90)
    o = linear_attention(inputs["q"], inputs["k"][:, order], inputs["v"][:, order])
    assert_close(o, linear_attention(inputs["q"], inputs["k"], inputs["v"]), 1e-13)


@pytest.mark.parametrize("decay", ["step", "channel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype, decay):
    inputs = {n: y if y is None else y.to(dtype) for n, y in make(2, 100, 2, 4, 3, decay=decay, normalize=True).items()}
    options = {"causal": True, "normalize": True, "output_final_state": True}
    o, state = linear_attention(**inputs, **options)
    wide = {name: None if y is None else y.double() for name, y in inputs.items()}
    expected, expected_state = linear_attention(**wide, **options, backend="reference")
    assert (o.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(state, expected_state, 2e-6)
    assert_close(o, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("decay", ["step", "channel"])
def test_autocast_keeps_the_sums_in_single(decay):
    inputs = make(2, 100, 2, 8, 8, decay=decay, dtype=torch.float32)
    expected = linear_attention(**inputs, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(**inputs, causal=True), expected)


@pytest.mark.parametrize(
    ("causal", "decay"), [(True, "none"), (True, "step"), (False, "head"), (True, "channel"), (False, "channel")]
)
def test_compiles_whole_and_repeats_itself(causal, decay):
    inputs = make(2, 130, 2, 4, 3, decay=decay, state=causal, normalize=True, dtype=torch.float32)
    w = torch.randn(2, 130, 2, 3)
    options = {"causal": causal, "normalize": True, "lengths": torch.tensor([130, 70])}
    expected = run(inputs, w, **options)
    for name, value in run(inputs, w, **options).items():
        assert torch.equal(value, expected[name]), name
    leaves = {name: y.requires_grad_() for name, y in inputs.items() if y is not None}
    o = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")(**inputs, **options)
    assert_close(o, expected["o"], 1e-6)
    for name, value in zip(leaves, torch.autograd.grad(o, list(leaves.values()), w), strict=True):
        assert_close(value, expected[f"d{name}"], 1e-5, name)


@pytest.mark.parametrize("decay", ["head", "step", "channel"])
def test_compiles_whole_with_dynamic_shapes(decay):
    inputs = make(2, 20, 2, 4, 3, decay=decay)
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend="eager")
    assert_close(compiled(**inputs, causal=True), linear_attention(**inputs, causal=True), 1e-14)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for y in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(y, Tensor):
                self.numel = max(self.numel, y.untyped_storage().nbytes() // y.element_size())
        return output


@pytest.mark.parametrize(
    ("causal", "decay"),
    [
        *((True, decay) for decay in ("none", "head", "step", "channel")),
        *((False, decay) for decay in ("none", "step", "channel")),
    ],
)
def test_memory_is_linear_in_time(causal, decay):
    D, sizes = 16, []
    for T in (512, 2048):
        inputs = make(1, T, 1, D, D, decay=decay, dtype=torch.float32)
        with LargestTensor() as largest:
            run(inputs, torch.ones(1, T, 1, D), causal=causal)
        sizes.append(largest.numel)
        assert largest.numel <= T * 64  # what weights inside chunks of 64 take, and less than [T, D, D]
    assert sizes[1] <= 4 * sizes[0]


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_of_channels_are_made_a_few_at_a_time(causal):
    """In PyTorch, where a decay per channel has pairs one by one: 16 times what the queries of a block take."""
    D = 16
    for T in (512, 2048):
        q, k, v, g = (make(1, T, 1, D, D, decay="channel", dtype=torch.float32)[name] for name in NAMES[:4])
        with LargestTensor() as largest:
            o, _ = secondary_chunks(*(x.requires_grad_() for x in (q, k, v, g)), None, None, None, causal)
            o.sum().backward()
        assert largest.numel <= 2 * T * D


def test_errors():
    inputs = make(2, 5, 3, 4, 6)
    q, k, v = (inputs[name] for name in "qkv")
    with pytest.raises(ValueError, match=r"expected q and k \[B, T, H, Dk\]"):
        linear_attention(q, k[:, :4], v)
    shapes = r"\[H\] = \[3\], \[B, T, H\] = \[2, 5, 3\] or \[B, T, H, Dk\] = \[2, 5, 3, 4\]"
    for wrong in ((2,), (2, 5, 3, 6)):
        with pytest.raises(ValueError, match=rf"log_decay must be {shapes}, got {re.escape(str(list(wrong)))}"):
            linear_attention(q, k, v, log_decay=torch.zeros(wrong))
    with pytest.raises(ValueError, match="v must be a real floating-point tensor"):
        linear_attention(q, k, v.long())
    state = torch.zeros(2, 3, 4, 6)
    for wrong in ({"initial_state": state}, {"output_final_state": True}):
        with pytest.raises(ValueError, match="need causal=True"):
            linear_attention(q, k, v, **wrong)
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 3, 4, 7\].*Dv \+ 1\] with normalize"):
        linear_attention(q, k, v, causal=True, normalize=True, initial_state=state)
    with pytest.raises(ValueError, match=r"lengths must be int64 \[2\]"):
        linear_attention(q, k, v, lengths=torch.tensor([5.0, 5.0]))
    with pytest.raises(ValueError, match="no backend 'fast'; valid: auto, chunked, reference"):
        linear_attention(q, k, v, backend="fast")


@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (2, 5, 3, 4)])
def test_decays_that_grow_are_refused(shape, backend):
    """Where they can be looked at; past lengths there may be anything, and NaN is no number to refuse."""
    q, k, v = (make(2, 5, 3, 4, 6)[name] for name in "qkv")
    options = {"causal": True, "backend": backend}
    g = torch.zeros(shape)
    for valid in (0.0, -math.inf, math.nan):
        g.view(-1)[-1] = valid
        linear_attention(q, k, v, log_decay=g, **options)
    for grows in (1e-30, math.inf):
        g.view(-1)[-1] = grows
        g.view(-1)[0] = math.nan
        with pytest.raises(ValueError, match=r"log_decay must be at most 0, got .*; valid: logarithms of what is kept"):
            linear_attention(q, k, v, log_decay=g.requires_grad_(), **options)
        g = g.detach()
        if len(shape) > 1:
            linear_attention(q, k, v, log_decay=g, lengths=torch.tensor([5, 4]), **options)
            with pytest.raises(ValueError, match="log_decay must be at most 0"):
                linear_attention(q, k, v, log_decay=g, lengths=torch.tensor([4, 5]), **options)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="eager")
    compiled(q, k, v, log_decay=g, **options)
    with pytest.raises(ValueError, match="log_decay must be at most 0"):
        torch.func.jvp(lambda q: linear_attention(q, k, v, log_decay=g, **options), (q,), (q,))
