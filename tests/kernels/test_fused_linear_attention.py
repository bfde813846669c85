"""linear_attention in Triton against the recurrence that defines it."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from often import others_slow
from torch import Tensor

from seqzoo.kernels import linear_attention
from seqzoo.kernels.linear_attention import fused

NAMES = ("q", "k", "v", "log_decay", "initial_state")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def make(B, T, H, Dk, Dv, *, decay="none", state=False, normalize=False, dtype=torch.float32, rate=0.1, size=1.0):
    """Inputs by name; positive q and k where they are normalised, as any feature map in use makes them."""
    q, k, v = size * torch.randn(B, T, H, Dk) / Dk**0.5, torch.randn(B, T, H, Dk), torch.randn(B, T, H, Dv)
    if normalize:
        q, k = q.exp(), k.exp()
    shape = {"none": None, "head": (H,), "step": (B, T, H), "channel": (B, T, H, Dk)}[decay]
    g = None if shape is None else -rate * torch.rand(shape)
    S = torch.randn(B, H, Dk, Dv + normalize).abs() if state else None
    q, k, v = (y.to(DEVICE, dtype) for y in (q, k, v))
    return dict(zip(NAMES, (q, k, v, *(None if y is None else y.to(DEVICE) for y in (g, S))), strict=True))


def run(inputs: dict[str, Tensor | None], w: Tensor, w_state: Tensor | None, **options) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradient of each input."""
    inputs = {name: y if y is None else y.detach().clone().requires_grad_() for name, y in inputs.items()}
    leaves = {name: y for name, y in inputs.items() if y is not None}
    outputs = linear_attention(**inputs, output_final_state=w_state is not None, **options)
    outputs, weights = ((outputs,), (w,)) if w_state is None else (outputs, (w, w_state))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("o", "state"), outputs, strict=False)) | dict(
        zip((f"d{name}" for name in leaves), gradients, strict=True)
    )


def check(inputs, *, state=False, lengths=None, within=MappingProxyType({}), **options) -> None:
    """Against the reference; `within` has the size that a gradient's error is measured by, if it is not its own."""
    v = inputs["v"]
    normalize = options.get("normalize", False)
    w = torch.randn(v.shape).to(v)
    B, _, H, Dv = v.shape
    w_state = torch.randn(B, H, inputs["q"].shape[-1], Dv + normalize).to(DEVICE) if state else None
    clean = {name: wide(y) if y is None else wide(y).cpu() for name, y in inputs.items()}
    expected = run(
        clean,
        wide(w).cpu(),
        None if w_state is None else wide(w_state).cpu(),
        lengths=None if lengths is None else torch.tensor(lengths),
        **options,
        backend="reference",
    )
    if lengths is not None:
        lengths = torch.tensor(lengths, device=DEVICE)
        padding = torch.arange(v.shape[1], device=DEVICE) >= lengths[:, None]
        for name, y in inputs.items():
            if y is not None and y.dim() > 2 and name != "initial_state":
                inputs[name] = y.masked_fill(padding.reshape(*padding.shape, *(1,) * (y.dim() - 2)), float("nan"))
        w = w.masked_fill(padding[..., None, None], float("nan"))
    with poisoned():
        values = run(inputs, w, w_state, lengths=lengths, **options, backend="fused")
    for name, value in values.items():
        if name in within:
            assert (value.cpu() - expected[name]).abs().max() <= TOLERANCE[v.dtype] * within[name](expected)
        else:
            assert_close(value.cpu(), expected[name], TOLERANCE[v.dtype], name)


CASES = [  # B, T, H, Dk, Dv, causal, decay, normalize, state, lengths, dtype
    (2, 1, 2, 3, 5, True, "none", False, True, None, torch.float32),
    (1, 2, 3, 8, 7, True, "step", True, True, None, torch.float32),
    (2, 15, 1, 5, 3, False, "none", True, False, [15, 4], torch.float32),
    (2, 16, 2, 24, 9, True, "head", False, True, [3, 16], torch.float32),
    (3, 63, 2, 24, 10, True, "none", True, False, [63, 0, 40], torch.float32),
    (2, 64, 2, 9, 17, False, "none", False, False, [64, 33], torch.float32),
    (2, 65, 1, 6, 4, True, "step", False, True, [65, 64], torch.float32),
    (2, 65, 1, 16, 8, True, "none", True, True, [65, 64], torch.float16),
    (1, 64, 2, 8, 64, False, "none", True, False, None, torch.float16),
    (2, 100, 2, 33, 20, True, "none", False, True, [51, 100], torch.float32),
    (1, 100, 3, 5, 12, True, "head", True, True, None, torch.float32),
    (1, 100, 1, 100, 100, True, "none", False, False, None, torch.float16),
    (2, 257, 1, 10, 6, True, "step", True, True, [257, 130], torch.float32),
    (2, 257, 1, 8, 5, True, "head", False, False, [200, 7], torch.float32),
    (1, 257, 1, 64, 16, True, "none", True, True, None, torch.float32),
    (1, 1, 2, 5, 3, True, "channel", True, True, None, torch.float32),
    (2, 33, 2, 6, 20, True, "channel", False, True, [33, 0], torch.float32),
    (2, 48, 1, 24, 9, True, "channel", False, False, [31, 48], torch.float16),
    (2, 70, 1, 17, 5, True, "channel", True, True, [70, 49], torch.float32),
]


@pytest.mark.parametrize(
    ("B", "T", "H", "Dk", "Dv", "causal", "decay", "normalize", "state", "lengths", "dtype", "segment_len"),
    others_slow(
        [(*case, segment_len) for case in CASES for segment_len in (None, 32)],
        [(*case, (None, 32)[n % 2]) for n, case in enumerate(CASES)],
    ),
)
def test_agrees_with_reference(
    B, T, H, Dk, Dv, causal, decay, normalize, state, lengths, dtype, segment_len, monkeypatch
):
    monkeypatch.setattr(fused, "_segment_len", lambda programs, T, steps, device: segment_len or T)
    inputs = make(B, T, H, Dk, Dv, decay=decay, state=state, normalize=normalize, dtype=dtype)
    check(inputs, state=state, lengths=lengths, causal=causal, normalize=normalize)


@pytest.mark.parametrize("decay", ["head", "step", "channel"])
@pytest.mark.parametrize("rate", [0.0, 1e-6, 30.0, float("inf")])
def test_decays_near_zero_and_one(rate, decay):
    inputs = make(1, 65, 2, 4, 3, decay=decay, rate=0 if rate == float("inf") else rate)
    if rate == float("inf"):
        g = inputs["log_decay"]
        inputs["log_decay"] = torch.where(torch.rand_like(g) < 0.5, -torch.inf, g)
    # The decay's gradient is a sum of products q·dq, and k·dk, that cancel where nothing is remembered.
    q = inputs["q"].double().cpu()
    within = {"dlog_decay": lambda expected: (q * expected["dq"]).sum(-1).abs().sum()} if rate == 30 else {}
    check(inputs, causal=True, within=within)


@pytest.mark.parametrize("log_decay", [-1e4, float("-inf")])
def test_what_channels_forget_is_as_if_it_had_not_been(log_decay):
    """In the middle of a chunk."""
    inputs = {name: y for name, y in make(1, 30, 1, 5, 3, decay="channel").items() if y is not None}
    inputs["log_decay"][:, 21] = log_decay
    w = torch.randn_like(inputs["v"])
    whole = run(inputs, w, None, causal=True, backend="fused")
    for part in (slice(21), slice(21, None)):
        of_part = {name: y[:, part] for name, y in inputs.items()}
        for name, expected in run(of_part, w[:, part], None, causal=True, backend="reference").items():
            assert_close(whole[name][:, part], expected, 2e-6, name)
    assert not whole["dlog_decay"][:, 21].any()


@pytest.mark.parametrize("decay", ["head", "step"])
@pytest.mark.parametrize("log_decay", [-1e4, float("-inf")])
def test_what_keeps_nothing_has_no_gradient(log_decay, decay):
    inputs = make(1, 30, 2, 5, 3, decay=decay)
    inputs["log_decay"][..., 1] = log_decay
    d_log = run(inputs, torch.randn_like(inputs["v"]), None, causal=True, backend="fused")["dlog_decay"]
    assert d_log[..., 0].any()
    assert not d_log[..., 1].any()


def test_large_logits():
    check(make(1, 65, 1, 8, 4, size=30.0), causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_come_in_any_layout(causal):
    inputs = make(2, 17, 2, 4, 4, normalize=True)
    w = torch.randn_like(inputs["v"])
    for name, gradient in awkward(w).items():
        options = {"causal": causal, "normalize": True, "backend": "fused"}
        value, expected = run(inputs, gradient, None, **options), run(inputs, gradient.contiguous(), None, **options)
        assert all(torch.equal(value[key], expected[key]) for key in value), name


def test_a_split_sequence_goes_on_where_it_stopped():
    inputs = make(2, 40, 2, 5, 3, decay="step", normalize=True)
    options = {"causal": True, "normalize": True, "backend": "fused"}
    q, k, v, g, _ = inputs.values()
    whole = linear_attention(q, k, v, log_decay=g, **options)
    first, state = linear_attention(
        *(y[:, :13] for y in (q, k, v)), log_decay=g[:, :13], output_final_state=True, **options
    )
    rest = linear_attention(*(y[:, 13:] for y in (q, k, v)), log_decay=g[:, 13:], initial_state=state, **options)
    assert_close(torch.cat([first, rest], 1), whole, 2e-6)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("causal", "decay", "normalize"),
    others_slow(
        [(True, "step", True), (True, "channel", True), (False, "none", False)],
        [(True, "channel", True), (False, "none", False)],
    ),
)
def test_operator(causal, decay, normalize, packed):
    inputs = make(1 if packed else 2, 9, 2, 4, 3, decay=decay, normalize=normalize, state=causal and not packed)
    tensors = [y if y is None else y.requires_grad_() for y in inputs.values()]
    lengths = None if packed else torch.tensor([9, 4], device=DEVICE)
    starts = torch.tensor([0, 4, 4, 9], device=DEVICE) if packed else None
    options = (causal, normalize, causal)
    torch.library.opcheck(torch.ops.seqzoo.linear_attention_fused.default, (*tensors, lengths, starts, *options))
    plain = [y if y is None else y.detach() for y in tensors]
    o, state, norms = torch.ops.seqzoo.linear_attention_fused(*plain, lengths, starts, *options)
    torch.library.opcheck(
        torch.ops.seqzoo.linear_attention_fused_backward.default,
        (o, state, *plain, lengths, starts, o, state, norms, *options, decay != "none"),
    )


def test_what_no_kernel_takes_runs_without_one(caplog):
    inputs = make(1, 5, 2, 4, 3, decay="head")
    o = linear_attention(**inputs, backend="fused")
    assert torch.equal(o, linear_attention(**inputs, backend="chunked"))
    assert "linear_attention: no kernel decays in both directions; the chunked form runs" in caplog.text
