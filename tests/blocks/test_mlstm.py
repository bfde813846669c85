"""mLSTM: its equations, one step at a time and without any scaling, and gates that exponentials do not bear."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close
from torch import Tensor

from seqzoo import build_block
from seqzoo.blocks.mlstm import MLSTM, Memory, mlstm
from seqzoo.kernels.documents import Documents

NAMES = ("q", "k", "v", "i", "f")


def memory(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """h of [B, T, H, D] and gates [B, T, H]: Beck et al. 2024, equations 19 to 27."""
    C, n, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), torch.zeros_like(k[:, 0]), []
    for t in range(q.shape[1]):
        forget, write = f[:, t].sigmoid()[..., None], i[:, t].exp()[..., None]
        key = k[:, t] / math.sqrt(k.shape[-1])
        C = forget[..., None] * C + (write * key)[..., None] * v[:, t, :, None]
        n = forget * n + write * key
        read = (C * q[:, t, :, :, None]).sum(-2)
        outputs.append(read / (n * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1))
    return torch.stack(outputs, 1)


def equations(block: MLSTM, x: Tensor) -> Tensor:
    (B, T, _), H, W, past = x.shape, block.num_heads, block.conv.width, block.conv.past
    x, z = block.in_proj(x).chunk(2, -1)
    padded = F.pad(x, (0, 0, past, W - 1 - past))
    u = F.silu(sum(padded[:, j : j + T] * block.conv.weight[:, j] for j in range(W)) + block.conv.bias)
    q, k, v = (
        y @ torch.block_diag(*layer.weight) for layer, y in ((block.q_proj, u), (block.k_proj, u), (block.v_proj, x))
    )
    weight = torch.cat([layer.weight for layer in block.gate_proj], 1)
    i, f = (torch.cat([q, k, v], -1) @ weight.T + block.gate_bias.bias).chunk(2, -1)
    inputs = [y.view(B, T, H, -1) for y in (q, k, v)] + [i, f]
    h = memory(*inputs)
    if not block.causal:
        h = h + memory(*(y.flip(1) for y in inputs)).flip(1)
    mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
    h = ((h - mean) / (variance + 1e-5).sqrt()).flatten(2) * block.norm_weight
    return block.out_proj((h + block.skip * u) * F.silu(z))


@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("causal", [True, False])
def test_follows_its_equations(causal, T):
    torch.manual_seed(0)
    block = build_block("mlstm", 8, causal=causal).double()
    for layer in block.gate_proj:
        torch.nn.init.normal_(layer.weight, std=0.5)
    x = torch.randn(2, T, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, T, 8, dtype=torch.float64)
    named = dict(block.named_parameters())
    value, target = block(x), equations(block, x)
    assert_close(value, target, 1e-12)
    for actual, expected, name in zip(
        torch.autograd.grad(value, [x, *named.values()], w),
        torch.autograd.grad(target, [x, *named.values()], w),
        ["x", *named],
        strict=True,
    ):
        assert_close(actual, expected, 1e-10, name)


def test_gates_start_as_published():
    block = build_block("mlstm", 64, num_heads=8)
    i, f = block.gate_bias.bias.chunk(2)
    torch.testing.assert_close(f, torch.linspace(3, 6, 8))
    assert i.abs().max() < 0.5
    assert all(not layer.weight.any() for layer in block.gate_proj)
    assert (block.norm_weight == 1).all()
    assert (block.skip == 1).all()


def large(T: int, size: float, *, B: int = 2, H: int = 2, D: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with input gates of up to exp(±size), at times far above all before them and at times far below."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = (randn(B, T, H, D) for _ in range(3))
    i = size * (2 * torch.rand(B, T, H, dtype=torch.float64, generator=generator) - 1)
    return dict(zip(NAMES, (q, k, v, i, 3 * randn(B, T, H)), strict=True))


def with_gradients(form, inputs: dict[str, Tensor], w: Tensor) -> dict[str, Tensor]:
    inputs = {name: y.clone().requires_grad_() for name, y in inputs.items()}
    h = form(**inputs)
    gradients = torch.autograd.grad((h * w.to(h.dtype)).sum(), list(inputs.values()))
    return {"h": h, **{f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}}


@pytest.mark.parametrize("size", [0.0, 5.0, 90.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gates_of_any_size_are_as_exact_as_small_ones(size, dtype):
    """exp(90) is more than single precision holds."""
    inputs = {name: y.to(dtype) for name, y in large(150, size).items()}
    w = torch.randn(2, 150, 2, 5, dtype=torch.float64)
    actual = with_gradients(lambda **x: mlstm(**x)[0], inputs, w)
    expected = with_gradients(memory, {name: y.double() for name, y in inputs.items()}, w)
    for name, value in actual.items():
        assert value.dtype == dtype
        assert_close(value, expected[name], 1e-11 if dtype == torch.float64 else 2e-5, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_gates_over_many_calls_are_as_in_one(dtype):
    """A thousand calls of a step, with m near 90: each rounds it, and what it scales is told."""
    inputs = {name: y.to(dtype) for name, y in large(1000, 2.0).items()}
    inputs |= {"q": inputs["q"].abs(), "k": inputs["k"].abs(), "i": inputs["i"] + 90, "f": inputs["f"].abs() + 4}
    expected = memory(**{name: y.double() for name, y in inputs.items()})
    state = Memory(torch.zeros(2, 2, 5, 6, dtype=dtype), torch.zeros(2, 2, dtype=dtype))
    outputs = []
    for t in range(1000):
        h, state = mlstm(*(inputs[name][:, t : t + 1] for name in NAMES), state)
        outputs.append(h)
    assert_close(torch.cat(outputs, 1), expected, 1e-11 if dtype == torch.float64 else 2e-5)
    whole, last = mlstm(**inputs, before=Memory(torch.zeros_like(state.memory), torch.zeros_like(state.largest)))
    assert_close(whole, expected, 1e-11 if dtype == torch.float64 else 2e-5)
    assert_close(last.memory, state.memory.to(last.memory.dtype), 1e-11 if dtype == torch.float64 else 2e-5)
    torch.testing.assert_close(last.largest, state.largest)


@pytest.mark.parametrize("size", [1.0, 90.0])
def test_documents_know_their_own_largest_gate_alone(size):
    """A document behind one of far larger gates, in one row; from states, too."""
    lengths = [7, 0, 1, 70, 2, 40]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    T, N = int(starts[-1]), len(lengths)
    inputs = {name: y.float() for name, y in large(T, size, B=1).items()}
    inputs["i"][:, :8] += 2 * size
    before = Memory(torch.randn(N, 2, 5, 6).abs(), size * torch.randn(N, 2))
    for state in (None, before):
        row, after = mlstm(**inputs, before=state, documents=Documents(starts, T))
        for n, (start, end) in enumerate(pairwise(starts.tolist())):
            if start == end:
                if after is not None:
                    assert torch.equal(after.memory[n], before.memory[n])
                    assert torch.equal(after.largest[n], before.largest[n])
                continue
            own = None if state is None else Memory(*(part[n : n + 1] for part in state))
            alone, last = mlstm(**{name: y[:, start:end] for name, y in inputs.items()}, before=own)
            assert_close(row[:, start:end], alone, 1e-5)
            if after is not None:
                torch.testing.assert_close(after.largest[n], last.largest[0])
                assert_close(after.memory[n], last.memory[0], 1e-5)


def test_a_batch_of_lengths_ends_where_its_sequences_do():
    lengths = torch.tensor([0, 9, 30])
    inputs = {name: y.float() for name, y in large(30, 90.0, B=3).items()}
    before = Memory(torch.randn(3, 2, 5, 6).abs(), 50 * torch.randn(3, 2))
    h, after = mlstm(**inputs, before=before, lengths=lengths)
    assert torch.equal(after.largest[0], before.largest[0])
    for b, n in enumerate(lengths.tolist()):
        assert (h[b, n:] == 0).all()
        if n:
            own = Memory(*(part[b : b + 1] for part in before))
            alone, last = mlstm(**{name: y[b : b + 1, :n] for name, y in inputs.items()}, before=own)
            assert_close(h[b : b + 1, :n], alone, 1e-5)
            assert_close(after.memory[b], last.memory[0], 1e-5)
            torch.testing.assert_close(after.largest[b], last.largest[0])


@pytest.mark.parametrize("size", [-200.0, 200.0])
def test_gates_beyond_all_floats_stay_finite(size):
    inputs = {name: y.float() for name, y in large(40, 1.0).items()}
    inputs["i"] = inputs["i"] + size
    values = with_gradients(lambda **x: mlstm(**x)[0], inputs, torch.randn(2, 40, 2, 5))
    assert all(value.isfinite().all() for value in values.values())


def test_a_model_of_large_gates_trains():
    """The block whose input gates start at exp(90), in single precision."""
    torch.manual_seed(0)
    block = build_block("mlstm", 16, causal=True)
    with torch.no_grad():
        block.gate_bias.bias[:4] += 90
        for layer in block.gate_proj:
            layer.weight.normal_()
    x = torch.randn(2, 100, 16, requires_grad=True)
    y = block(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert_close(y, equations(block.double(), x.double()), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "makes an inner width of 32, num_heads=5.*valid: heads and blocks that divide it"),
        ({"projection_width": 3}, "projection_width=3; valid"),
        ({"expand": 0.01}, "an inner width of 0"),
    ],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=f"MLSTM: .*{message}"):
        build_block("mlstm", 16, **options)
