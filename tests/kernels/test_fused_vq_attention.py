"""vq_attention in Triton against the attention over all quantised keys that defines it."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from often import others_slow
from torch import Tensor

from seqzoo.kernels import VQState, nearest_code, vq_attention

NAMES = ("q", "k", "v", "bias", "sums", "values")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def make(B, T, H, D, Dv, S, L, *, causal, bias=None, resumed=False, dtype=torch.float32, size=1.0):
    """The inputs that take a gradient, by name; the rest of a state; the codebook."""
    q, k = size * torch.randn(B, T, H, D) / D**0.5, torch.randn(B, T, H, D)
    inputs = {"q": q, "k": k, "v": torch.randn(B, T, H, Dv), "bias": None, "sums": None, "values": None}
    if bias is not None:
        offsets = min(L, 5) + 1 if causal else 2 * min(L, 5) + 1
        inputs["bias"] = torch.randn((H, offsets) if bias == "by head" else (B, T, H, offsets))
    state = None
    if resumed:  # of sequences of different lengths, some shorter than a block
        steps = 3 * L + 1
        codes, values = torch.randint(S, (B, steps, H)), torch.randn(B, steps, H, Dv)
        state = VQState.empty(B, H, S, Dv, L, device=None, dtype=torch.float32)
        state = state.advance(codes, values, torch.linspace(1, steps, B).long())
        inputs["sums"], inputs["values"] = state.sums, state.values
        state = VQState(*(x.to(DEVICE) for x in state))
    inputs = {name: None if x is None else x.to(DEVICE, dtype) for name, x in inputs.items()}
    return inputs, state, torch.randn(H, S, D).to(DEVICE, dtype)


def run(inputs, state, codebook, codes, w, **options) -> dict[str, Tensor]:
    """The output and the gradient of each input."""
    inputs = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    q, k, v, bias, sums, values = inputs.values()
    if state is not None:
        state = VQState(*(x.to(q.device) for x in state))._replace(sums=sums, values=values)
    y = vq_attention(q, k, v, codebook, codes=codes, bias=bias, initial_state=state, **options)
    leaves = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), w)
    return {"y": y} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def check(inputs, state, codebook, *, lengths=None, saturated=False, **options) -> None:
    """Against the reference. Where weights are `saturated`, gradients of q and k are what is left of terms that cancel:
    only the whole tensors are compared.
    """
    k, v = inputs["k"], inputs["v"]
    codes = nearest_code(k, codebook, backend="chunked")
    w = torch.randn_like(v)
    clean = {name: x if x is None else wide(x).cpu() for name, x in inputs.items()}
    given = None if lengths is None else torch.tensor(lengths)
    expected = run(
        *(clean, state, wide(codebook).cpu(), codes.cpu(), wide(w).cpu()), lengths=given, **options, backend="reference"
    )
    if given is not None:
        given = given.to(DEVICE)
        padding = (torch.arange(v.shape[1], device=DEVICE) >= given[:, None])[..., None, None]
        for name in ("q", "k", "v", "bias"):
            x = inputs[name]
            if x is not None and x.dim() == 4:
                inputs[name] = x.masked_fill(padding, float("nan"))
        w = w.masked_fill(padding, float("nan"))
    with poisoned():
        actual = run(inputs, state, codebook, codes, w, lengths=given, **options, backend="fused")
    if state is not None:  # the sum of no values at all is 0, and no one asks how it would change the result
        for gradient in (actual, expected):
            gradient["dsums"] = gradient["dsums"] * (state.counts > 0).to(gradient["dsums"])[..., None]
    for name, value in actual.items():
        value, by = value.cpu(), expected[name]
        if saturated and name in ("dq", "dk"):
            value, by = value.flatten(), by.flatten()
        assert_close(value, by, TOLERANCE[v.dtype], name)


CASES = [  # B, T, H, D, Dv, S, L, causal, bias, resumed, lengths, dtype
    (2, 1, 1, 8, 8, 4, 4, True, None, False, None, torch.float32),
    (2, 2, 2, 8, 4, 4, 4, False, "by head", False, None, torch.float32),
    (2, 15, 2, 16, 8, 8, 4, True, "by query", True, None, torch.float32),
    (2, 16, 1, 24, 8, 4, 4, False, "by query", False, [16, 9], torch.float32),
    (2, 16, 2, 8, 16, 16, 16, True, "by head", True, [16, 0], torch.float32),
    (1, 63, 1, 8, 100, 5, 16, False, None, False, None, torch.float32),
    (2, 64, 2, 8, 8, 8, 16, True, "by query", False, [33, 64], torch.float32),
    (2, 65, 2, 16, 8, 8, 8, False, "by head", False, [65, 40], torch.float32),
    (2, 65, 1, 64, 24, 40, 30, True, None, False, [65, 40], torch.float16),
    (1, 65, 2, 8, 8, 8, 8, False, "by query", False, None, torch.float16),
    (2, 40, 1, 24, 16, 5, 8, True, "by head", True, [40, 17], torch.bfloat16),
    (1, 100, 1, 100, 24, 33, 50, True, "by head", True, [51], torch.float32),
    (2, 100, 1, 8, 8, 8, 33, False, "by query", False, [71, 100], torch.float32),
    (1, 257, 1, 8, 8, 16, 100, True, "by query", False, None, torch.float32),
    (1, 257, 1, 8, 8, 16, 64, False, None, False, [130], torch.float32),
    (2, 5, 1, 8, 8, 1, 1, True, "by head", True, [5, 3], torch.float32),
    (1, 9, 1, 8, 8, 3, 400, True, "by head", False, None, torch.float32),
]


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "Dv", "S", "L", "causal", "bias", "resumed", "lengths", "dtype"),
    others_slow(CASES, CASES[::2]),
)
def test_agrees_with_reference(B, T, H, D, Dv, S, L, causal, bias, resumed, lengths, dtype):
    made = make(B, T, H, D, Dv, S, L, causal=causal, bias=bias, resumed=resumed, dtype=dtype)
    check(*made, lengths=lengths, block_len=L, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_large_logits(causal):
    check(*make(1, 40, 1, 8, 8, 6, 8, causal=causal, size=30.0), block_len=8, causal=causal, saturated=True)


def test_two_runs_give_the_same_bits_and_gradients_come_in_any_layout():
    inputs, _, codebook = make(2, 9, 1, 8, 8, 4, 4, causal=True, bias="by head")
    codes = nearest_code(inputs["k"], codebook)
    options = {"block_len": 4, "causal": True, "backend": "fused"}
    for name, gradient in awkward(torch.randn_like(inputs["v"])).items():
        actual = run(inputs, None, codebook, codes, gradient, **options)
        expected = run(inputs, None, codebook, codes, gradient.contiguous(), **options)
        assert all(torch.equal(actual[key], expected[key]) for key in actual), name


def test_a_split_sequence_goes_on_where_it_stopped():
    inputs, _, codebook = make(2, 40, 1, 8, 6, 5, 8, causal=True, bias="by query")
    q, k, v, bias, _, _ = inputs.values()
    options = {"block_len": 8, "causal": True, "backend": "fused"}
    whole = vq_attention(q, k, v, codebook, bias=bias, **options)
    head, tail = ([x[:, :13] for x in (q, k, v)], [x[:, 13:] for x in (q, k, v)])
    first, state = vq_attention(*head, codebook, bias=bias[:, :13], output_final_state=True, **options)
    rest = vq_attention(*tail, codebook, bias=bias[:, 13:], initial_state=state, **options)
    assert_close(torch.cat([first, rest], 1), whole, 2e-6)


@pytest.mark.parametrize("causal", others_slow([True, False], [True]))
def test_operator(causal):
    inputs, _, codebook = make(2, 5, 1, 16, 16, 3, 2, causal=causal, bias="by head")
    q, k, v, bias, *_ = (None if x is None else x.requires_grad_() for x in inputs.values())
    codes, lengths = nearest_code(k, codebook), torch.tensor([5, 3], device=DEVICE)
    sums = torch.randn(2, 1, 3, 16, device=DEVICE) if causal else None
    counts = torch.ones(2, 1, 3, dtype=torch.int64, device=DEVICE) if causal else None
    arguments = (codebook, codes, bias, sums, counts, None, lengths, 2, causal)
    torch.library.opcheck(torch.ops.seqzoo.vq_attention_fused.default, (q, k, v, *arguments))
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    outputs = torch.ops.seqzoo.vq_attention_fused(q, k, v, codebook, codes, bias, *arguments[3:])
    torch.library.opcheck(
        torch.ops.seqzoo.vq_attention_fused_backward.default,
        (outputs[0], q, k, v, codebook, codes, bias, sums, None, lengths, *outputs, 2, causal, True, causal),
    )


def test_what_no_kernel_takes_runs_without_one(caplog):
    inputs, _, codebook = make(1, 9, 2, 8, 8, 4, 4, causal=True, dtype=torch.float64)
    q, k, v, *_ = inputs.values()
    y = vq_attention(q, k, v, codebook, block_len=4, backend="fused")
    assert torch.equal(y, vq_attention(q, k, v, codebook, block_len=4, backend="chunked"))
    assert "vq_attention: no kernel computes in torch.float64; the chunked form runs" in caplog.text
