"""delta_rule in Triton against the recurrence that defines it."""

from __future__ import annotations

import math
import weakref
from itertools import product

import pytest
import torch
from agreement import assert_close
from delta_cases import DECAYS, TIMED, make, run, unit, weights, wide
from fused_cases import DEVICE, awkward, poisoned
from often import others_slow
from passes import meta
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels import backends, delta_rule, linear_attention
from seqzoo.kernels.delta_rule import fused, operator

TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
CASES = [  # B, T, H, G, Dk, Dv, decay, erase, state, lengths, dtype
    (2, 1, 2, 2, 3, 5, "none", False, True, None, torch.float32),
    (1, 33, 2, 1, 8, 20, "channel", False, True, None, torch.float32),
    (2, 40, 4, 2, 17, 9, "head", True, False, [40, 17], torch.float32),
    (2, 70, 1, 1, 6, 4, "channel", True, True, [33, 0], torch.float32),
    (1, 70, 2, 2, 16, 16, "none", True, True, None, torch.float16),
    (2, 64, 2, 1, 9, 17, "head", False, True, [64, 33], torch.bfloat16),
    (1, 65, 1, 1, 40, 40, "channel", False, False, None, torch.bfloat16),
]


def given(*shape, dtype=torch.float32, **options) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in make(*shape, dtype=dtype, **options).items()}


def in_triton(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    with poisoned():
        values = run(inputs, w, w_state, **options, backend="fused")
    return {name: value.cpu() for name, value in values.items()}


def expected_of(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    inputs, w = {name: x.cpu() for name, x in wide(inputs).items()}, w.double().cpu()
    options = {name: x.cpu() for name, x in options.items()}
    return run(inputs, w, None if w_state is None else w_state.double().cpu(), **options, backend="reference")


@pytest.mark.parametrize(
    ("B", "T", "H", "G", "Dk", "Dv", "decay", "erase", "state", "lengths", "dtype"), others_slow(CASES, CASES[::2])
)
def test_agrees_with_reference(B, T, H, G, Dk, Dv, decay, erase, state, lengths, dtype):
    """What lies past the lengths is NaN."""
    inputs = given(B, T, H, Dk, Dv, G=G, decay=decay, erase=erase, state=state, dtype=dtype)
    w, w_state = weights(inputs)
    w_state = w_state.float() if state else None
    options = {} if lengths is None else {"lengths": torch.tensor(lengths, device=DEVICE)}
    expected = expected_of(inputs, w, w_state, **options)
    if lengths is not None:
        padding = torch.arange(T, device=DEVICE) >= options["lengths"][:, None]
        for name in inputs.keys() & TIMED:
            of_all = padding.reshape(B, T, *[1] * (inputs[name].dim() - 2))
            inputs[name] = inputs[name].masked_fill(of_all, math.nan)
        w = w.masked_fill(padding[..., None, None], math.nan)
    values = in_triton(inputs, w, w_state, **options)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        # Of a step whose decay does not count, the gradient of that is a difference of larger numbers.
        assert_close(value, expected[name], TOLERANCE[dtype], name, worst_row=300 if name == "dlog_decay" else 30)


@pytest.mark.parametrize(("decay", "scale"), [("head", 20.0), ("channel", 0.0), ("channel", 20.0)])
def test_decays_of_every_size(decay, scale):
    inputs = given(1, 40, 1, 16, 16, decay=decay, scale=scale)
    w, w_state = weights(inputs)
    expected = expected_of(inputs, w, w_state)
    for name, value in in_triton(inputs, w, w_state).items():
        assert_close(value, expected[name], 5e-6, name, worst_row=300 if name == "dlog_decay" else 30)


@pytest.mark.parametrize(("spread", "beta"), [(0.0, 2.0), (0.3, 1.0)])
def test_keys_that_resemble_each_other(spread, beta):
    """Powers of their products would be of the size of 1e17."""
    inputs = given(1, 70, 1, 16, 8, decay="head", scale=0.01)
    inputs["k"] = unit(unit(torch.randn(1, 1, 1, 16)) + spread * torch.randn(1, 70, 1, 16)).to(DEVICE)
    inputs["beta"].fill_(beta)
    w, w_state = weights(inputs)
    expected = expected_of(inputs, w, w_state)
    for name, value in in_triton(inputs, w, w_state).items():
        error, scale = (x.square().mean().sqrt() for x in (value - expected[name], expected[name]))
        # What is overwritten whole does not feel how it decayed: the gradient of that is next to nothing.
        assert error <= 2e-5 * max(scale, 1.0 if name == "dlog_decay" else 0.0), name


@pytest.mark.parametrize(("decay", "erase", "steps"), [("head", False, 32), ("channel", True, 64)])
def test_each_document_is_as_if_it_were_alone(decay, erase, steps):
    """From states and to states, in chunks of each length; int32 and int64."""
    lengths = [37, 1, 0, 32, 66]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32 if erase else torch.int64)
    inputs = given(1, sum(lengths), 2, 6, 4, G=1, decay=decay, erase=erase)
    inputs["initial_state"] = torch.randn(len(lengths), 2, 6, 4, device=DEVICE)
    w, w_state = weights(inputs, len(lengths))
    kernel = "channel_pairs" if decay == "channel" else "pairs"
    with fused.BLOCKS.replaced(kernel, fused.Config(steps, 4, 1)):
        values = in_triton(inputs, w, w_state, cu_seqlens=starts.to(DEVICE))
    expected = expected_of(inputs, w, w_state, cu_seqlens=starts)
    for name, value in values.items():
        assert_close(value, expected[name], 5e-6, name)


def test_nothing_leaks_from_one_document_into_others():
    inputs = given(1, 70, 1, 4, 3, decay="head")
    w, _ = weights(inputs)
    starts = torch.tensor([0, 20, 50, 70], device=DEVICE)
    dirty = {name: x.clone() for name, x in inputs.items()}
    for x in dirty.values():
        x[:, 20:50] = math.nan
    clean, values = (in_triton(x, w, cu_seqlens=starts) for x in (inputs, dirty))
    for name, value in values.items():
        assert torch.equal(value[:, :20], clean[name][:, :20]), name
        assert torch.equal(value[:, 50:], clean[name][:, 50:]), name


def test_without_erasing_it_is_linear_attention():
    inputs = given(1, 40, 1, 5, 4, decay="channel", state=True)
    inputs["erase"] = torch.zeros(1, 40, 1, 5, device=DEVICE)
    o, state = delta_rule(**inputs, output_final_state=True, backend="fused")
    q, k, v, beta, g, S, _ = inputs.values()
    options = {"log_decay": g, "causal": True, "initial_state": S, "output_final_state": True, "backend": "fused"}
    expected, expected_state = linear_attention(q, k, beta[..., None] * v, **options)
    assert_close(o, expected, 2e-6)
    assert_close(state, expected_state, 2e-6)


def test_a_split_sequence_goes_on_where_it_stopped():
    inputs = given(2, 40, 2, 5, 3, decay="head")
    whole = delta_rule(**inputs, backend="fused")
    first, state = delta_rule(**{n: x[:, :13] for n, x in inputs.items()}, output_final_state=True, backend="fused")
    rest = delta_rule(**{name: x[:, 13:] for name, x in inputs.items()}, initial_state=state, backend="fused")
    assert_close(torch.cat([first, rest], 1), whole, 2e-6)


def test_gradients_come_in_any_layout():
    inputs = given(2, 17, 2, 4, 4)
    w, _ = weights(inputs)
    for name, gradient in awkward(w).items():
        value, expected = (run(inputs, x, backend="fused") for x in (gradient, gradient.contiguous()))
        assert all(torch.equal(value[key], expected[key]) for key in value), name


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_operator(packed):
    inputs = given(1 if packed else 2, 9, 2, 4, 3, G=1, decay="channel" if packed else "head", erase=packed)
    lengths = None if packed else torch.tensor([9, 4], device=DEVICE)
    starts = torch.tensor([0, 4, 4, 9], device=DEVICE) if packed else None
    S = torch.randn(3 if packed else 2, 2, 4, 3, device=DEVICE)
    tensors = [*(inputs.get(name) for name in ("q", "k", "v", "beta", "log_decay", "erase")), S]
    leaves = [x if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.seqzoo.delta_rule_fused.default, (*leaves, lengths, starts, True, True))
    plain = [x if x is None else x.detach() for x in tensors]
    o, last, states = torch.ops.seqzoo.delta_rule_fused(*plain, lengths, starts, True, True)
    backward = torch.ops.seqzoo.delta_rule_fused_backward.default
    torch.library.opcheck(backward, (o, last, *plain, lengths, starts, states, True))


def test_no_state_is_kept_where_no_gradient_is_asked_for():
    inputs = given(1, 70, 1, 4, 3)
    for asked in (False, True):
        inputs["v"].requires_grad_(asked)
        o = delta_rule(**inputs, backend="fused")
        kept = [] if o.grad_fn is None else [x for x in o.grad_fn.saved_tensors if x is not None and x.dim() == 4]
        assert sum(x.shape == (3, 1, 4, 3) for x in kept) == asked


class _Held(TorchDispatchMode):
    """How many bytes tensors made inside have at most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        made = op(*arguments, **(keywords or {}))
        if not made._is_view() and all(made is not x for x in arguments):
            self.now += made.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(made, self.freed, made.nbytes)
        return made

    def freed(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.mark.parametrize("architecture", [80, 90])
def test_memory_is_a_few_times_that_of_its_inputs(architecture, monkeypatch):
    """Of both passes, outputs and gradients included, in what q, k, v and o take."""
    monkeypatch.setattr(backends, "architecture", lambda device: architecture)
    monkeypatch.setattr(fused, "launch", lambda *_, **__: None)
    for (dtype, D), decay in product(
        [(torch.bfloat16, 16), (torch.bfloat16, 128), (torch.float32, 16), (torch.float32, 64)], DECAYS
    ):
        q, k, v = (meta(2, 1024, 4, D, dtype=dtype) for _ in range(3))
        g = {"none": None, "head": meta(2, 1024, 4), "channel": meta(2, 1024, 4, D)}[decay]
        inputs = (q, k, v, meta(2, 1024, 4), g, None, None, None, None)
        with _Held() as held:
            o, _, states = operator._delta_rule._init_fn(*inputs, False, True)
            operator._delta_rule_backward._init_fn(o, None, *inputs, states, False)
        assert held.most <= 6 * 4 * q.nbytes, (dtype, D, decay, held.most / (4 * q.nbytes))


def test_what_no_kernel_takes_runs_without_one(caplog):
    wide_heads = given(1, 5, 1, 65, 3)
    o = delta_rule(**wide_heads, backend="fused")
    assert torch.equal(o, delta_rule(**wide_heads, backend="chunked"))
    assert "delta_rule: no kernel takes more than 64 channels in torch.float32; the chunked form runs" in caplog.text
    double = given(1, 5, 1, 4, 3, dtype=torch.float64)
    assert torch.equal(delta_rule(**double, backend="fused"), delta_rule(**double, backend="chunked"))
    assert "delta_rule: no kernel computes in torch.float64" in caplog.text
