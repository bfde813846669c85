"""gated_attention in Triton against masked quadratic weights."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from torch import Tensor

from seqzoo.kernels import gated_attention
from seqzoo.kernels.gated_attention import fused

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


@pytest.mark.parametrize(("B", "T", "S", "E", "chunk_len", "causal", "bias", "lengths", "dtype", "pieces"), CASES)
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


@pytest.mark.parametrize(("causal", "T", "bias"), [(True, 9, True), (True, 4, False), (False, 9, True)])
def test_operator(causal, T, bias):
    inputs = make(2, T, 16, 16, 4, causal=causal, bias=bias)
    tensors = [inputs[name].requires_grad_() if name in inputs else None for name in NAMES]
    options = (torch.tensor([T, 3], device=DEVICE), 4, causal, 0.5)
    torch.library.opcheck(torch.ops.seqzoo.gated_attention_fused.default, (*tensors, *options))
    plain = [None if y is None else y.detach() for y in tensors]
    o, memory = torch.ops.seqzoo.gated_attention_fused(*plain, *options)
    backward = torch.ops.seqzoo.gated_attention_fused_backward.default
    torch.library.opcheck(backward, (o, *plain, options[0], memory, *options[1:], bias))


def test_what_no_kernel_takes_runs_without_one(caplog):
    inputs = make(1, 5, 4, 3, 4, causal=True)
    o, state = gated_attention(**inputs, chunk_len=4, causal=True, output_final_state=True, backend="fused")
    expected, _ = gated_attention(**inputs, chunk_len=4, causal=True, output_final_state=True, backend="chunked")
    assert torch.equal(o, expected)
    rest = gated_attention(**inputs, chunk_len=4, causal=True, initial_state=state, backend="fused")
    assert torch.equal(
        rest, gated_attention(**inputs, chunk_len=4, causal=True, initial_state=state, backend="chunked")
    )
    said = "gated_attention: no kernel starts from a state or ends in one; the chunked form runs in place of the fused"
    assert caplog.text.count(said) == 1
    gated_attention(**make(1, 5, 129, 3, 4, causal=True), chunk_len=4, causal=True, backend="fused")
    assert "gated_attention: no kernel takes more than 128 channels in torch.float32; the chunked form" in caplog.text
