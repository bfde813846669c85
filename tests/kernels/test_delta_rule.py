"""delta_rule: the chunked form against the recurrence that defines it, and what follows from that recurrence."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from agreement import assert_close
from delta_cases import DECAYS, FORMS, TIMED, computed, make, run, unit, weights, wide
from often import others_slow

from seqzoo.kernels import delta_rule, linear_attention

CASES = [  # B, T, H, G, Dk, Dv, decay, erase, state, lengths
    (2, 1, 2, 2, 3, 5, "none", False, True, None),
    (1, 2, 3, 3, 8, 7, "channel", False, True, None),
    (2, 15, 2, 1, 5, 3, "head", True, False, [15, 4]),
    (2, 16, 2, 2, 7, 9, "channel", True, True, [3, 16]),
    (3, 63, 2, 2, 24, 10, "none", False, False, [63, 0, 40]),
    (2, 64, 4, 2, 9, 17, "head", False, False, [64, 33]),
    (2, 65, 1, 1, 6, 4, "head", False, True, [65, 64]),
    (2, 65, 2, 2, 6, 4, "channel", False, False, None),
    (2, 100, 2, 2, 33, 20, "none", True, True, [51, 100]),
    (1, 257, 3, 3, 5, 12, "channel", False, True, None),
    (2, 257, 4, 1, 10, 6, "head", True, True, [257, 130]),
    (1, 257, 2, 1, 66, 5, "channel", True, False, [200]),
    (1, 300, 2, 2, 16, 16, "none", False, True, None),
    # Of a state with so many columns at a time a loop of its own is compiled.
    pytest.param(2, 65, 2, 1, 6, 96, "head", False, True, [65, 3], marks=pytest.mark.slow),
    pytest.param(1, 20, 2, 2, 5, 200, "head", False, True, None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "T", "H", "G", "Dk", "Dv", "decay", "erase", "state", "lengths"), CASES)
def test_agrees_with_reference(B, T, H, G, Dk, Dv, decay, erase, state, lengths, dtype, form):
    inputs = make(B, T, H, Dk, Dv, G=G, decay=decay, erase=erase, state=state, dtype=dtype)
    w, w_state = weights(inputs)
    w_state = w_state if state else None
    lengths = None if lengths is None else torch.tensor(lengths)
    with computed(form):
        values = run(inputs, w, w_state, lengths=lengths)
    of_state = None if w_state is None else w_state.double()
    expected = run(wide(inputs), w.double(), of_state, lengths=lengths, backend="reference")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == dtype
        assert_close(value, expected[name], 1e-12 if dtype == torch.float64 else 5e-6, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.05, 0.8, 2.4, 20.0])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_decays_of_every_size(decay, scale, form):
    inputs = make(1, 150, 2, 16, 16, decay=decay, scale=scale, dtype=torch.float32)
    w, w_state = weights(inputs)
    with computed(form):
        values = run(inputs, w, w_state)
    expected = run(wide(inputs), w.double(), w_state.double(), backend="reference")
    for name, value in values.items():
        # Of a step that forgets nearly everything, the loop has that gradient as a difference of larger numbers.
        assert_close(value, expected[name], 5e-6, name, worst_row=300 if name == "dlog_decay" else 30)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("erase", [False, True])
def test_gradcheck(decay, erase, form, monkeypatch):
    monkeypatch.setattr(import_module("seqzoo.kernels.delta_rule.chunks"), "CHUNK", 2)
    inputs = make(2, 5, 2, 2, 3, G=1, decay=decay, erase=erase, state=True)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def f(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return delta_rule(**given, output_final_state=True, lengths=torch.tensor([5, 2]))

    with computed(form):
        assert torch.autograd.gradcheck(f, list(leaves.values()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("decay", "erase"), [("none", True), ("head", False), ("channel", True)])
def test_padding_has_no_effect(backend, decay, erase):
    lengths = torch.tensor([40, 70, 0])
    inputs = make(3, 70, 2, 4, 5, decay=decay, erase=erase, state=True)
    w, w_state = weights(inputs)
    options = {"lengths": lengths, "backend": backend}
    clean = run(inputs, w, w_state, **options)
    padding = torch.arange(70) >= lengths[:, None]  # [B, T]

    def poison(x):
        return x.masked_fill(padding.reshape(3, 70, *[1] * (x.dim() - 2)), float("nan"))

    dirty = run({name: poison(x) if name in TIMED else x for name, x in inputs.items()}, poison(w), w_state, **options)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
        if name in TIMED:
            assert not value[padding].any()
    alone = {name: x[:1, :40] if name in TIMED else x[:1] for name, x in inputs.items()}
    expected = run(alone, w[:1, :40], w_state[:1], backend=backend)
    for name, value in expected.items():
        assert_close(dirty[name][:1, :40] if name in TIMED else dirty[name][:1], value, 1e-13, name)


@pytest.mark.parametrize("decay", DECAYS)
def test_split_and_resume(decay):
    inputs = make(2, 150, 2, 4, 3, decay=decay, erase=decay == "none", state=True)
    w, w_state = weights(inputs)
    whole = run(inputs, w, w_state)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs, state = [], leaves["initial_state"]
    for part in (slice(0, 1), slice(1, 130), slice(130, 150)):
        of_part = {name: x[:, part] for name, x in leaves.items() if name in TIMED}
        o, state = delta_rule(**of_part, initial_state=state, output_final_state=True)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad((o, state), list(leaves.values()), (w, w_state))
    resumed = {"o": o, "state": state} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    for name, value in resumed.items():
        assert_close(value, whole[name], 1e-12, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("value", [-1e4, -torch.inf])
@pytest.mark.parametrize("reset", [30, 64, 100])
def test_a_reset_begins_anew(decay, value, reset, form):
    inputs = make(1, 130, 2, 4, 3, decay=decay, dtype=torch.float32)
    inputs["log_decay"][:, reset] = value
    w, _ = weights(inputs)
    with computed(form):
        whole = run(inputs, w)
    for part in (slice(0, reset), slice(reset, 130)):
        alone = run({name: x[:, part] for name, x in inputs.items()}, w[:, part])
        for name in ("o", "dq", "dk", "dv", "dbeta"):
            assert_close(whole[name][:, part], alone[name], 2e-6, name)
    expected = run(wide(inputs), w.double(), backend="reference")
    for name, x in whole.items():
        assert_close(x, expected[name], 5e-6, name)
    assert (whole["dlog_decay"][:, reset] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_channels_are_reset_one_by_one(form):
    inputs = make(1, 130, 2, 6, 3, decay="channel", dtype=torch.float32)
    inputs["log_decay"].masked_fill_(torch.rand(1, 130, 2, 6) < 0.1, -torch.inf)
    w, w_state = weights(inputs)
    with computed(form):
        values = run(inputs, w, w_state)
    expected = run(wide(inputs), w.double(), w_state.double(), backend="reference")
    for name, value in values.items():
        assert_close(value, expected[name], 5e-6, name)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_without_beta_a_state_only_decays(backend):
    inputs = make(2, 70, 2, 4, 3, decay="head", state=True)
    inputs["beta"].zero_()
    o, state = delta_rule(**inputs, output_final_state=True, backend=backend)
    left = inputs["log_decay"].cumsum(1).exp()  # [B, T, H]
    assert_close(o, left[..., None] * torch.einsum("bthk,bhkv->bthv", inputs["q"], inputs["initial_state"]), 1e-13)
    assert_close(state, left[:, -1, :, None, None] * inputs["initial_state"], 1e-13)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_reads_what_it_wrote_to_orthonormal_keys(backend):
    k = torch.linalg.qr(torch.randn(2, 3, 16, 16, dtype=torch.float64))[0].transpose(1, 2)  # [B, T, H, Dk]
    v, beta = torch.randn(2, 16, 3, 5, dtype=torch.float64), torch.ones(2, 16, 3, dtype=torch.float64)
    _, state = delta_rule(k, k, v, beta, output_final_state=True, backend=backend)
    assert_close(torch.einsum("bthk,bhkv->bthv", k, state), v, 1e-13)
    anew = torch.randn(v.shape, dtype=torch.float64)  # takes the place of what was there
    _, state = delta_rule(k, k, anew, beta, initial_state=state, output_final_state=True, backend=backend)
    assert_close(torch.einsum("bthk,bhkv->bthv", k, state), anew, 1e-13)


@pytest.mark.parametrize("decay", DECAYS)
def test_without_erasing_it_is_linear_attention(decay):
    inputs = make(2, 150, 2, 5, 4, decay=decay, state=True)
    inputs["erase"] = torch.zeros(2, 150, 2, 5, dtype=torch.float64)
    o, state = delta_rule(**inputs, output_final_state=True)
    q, k, w = inputs["q"], inputs["k"], inputs["beta"][..., None] * inputs["v"]
    S, expected = inputs["initial_state"], []
    for t in range(150):
        if decay != "none":
            g = inputs["log_decay"][:, t].exp()
            S = S * (g[..., None, None] if decay == "head" else g[..., None])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], w[:, t])
        expected.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    assert_close(o, torch.stack(expected, 1), 1e-12)
    assert_close(state, S, 1e-12)
    if decay != "channel":
        options = {"causal": True, "initial_state": inputs["initial_state"], "output_final_state": True}
        o_linear, state_linear = linear_attention(q, k, w, log_decay=inputs.get("log_decay"), **options)
        assert_close(o, o_linear, 1e-12)
        assert_close(state, state_linear, 1e-12)


def test_equal_channels_are_a_decay_per_head():
    inputs = make(2, 150, 2, 6, 4, decay="head", state=True)
    w, w_state = weights(inputs)
    expected = run(inputs, w, w_state)
    inputs["log_decay"] = inputs["log_decay"][..., None].expand(-1, -1, -1, 6)
    values = run(inputs, w, w_state)
    values["dlog_decay"] = values["dlog_decay"].sum(-1)
    for name, value in values.items():
        assert_close(value, expected[name], 1e-12, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3])
def test_keys_that_resemble_each_other(spread, beta, decay, form):
    """Powers of their products would be of the size of 1e17."""
    inputs = make(1, 200, 2, 16, 8, decay=decay, scale=0.01, dtype=torch.float32)
    inputs["k"] = unit(unit(torch.randn(1, 1, 2, 16)) + spread * torch.randn(1, 200, 2, 16))
    inputs["beta"].fill_(beta)
    w, w_state = weights(inputs)
    with computed(form):
        values = run(inputs, w, w_state)
    expected = run(wide(inputs), w.double(), w_state.double(), backend="reference")
    for name, value in values.items():
        error = (value - expected[name]).square().mean().sqrt()
        scale = expected[name].square().mean().sqrt()
        # What is overwritten whole does not feel how it decayed: the gradient of that is next to nothing.
        assert error <= 2e-5 * max(scale, 1.0 if name == "dlog_decay" else 0.0), name


def plus_low_rank(g, a, b, q, k, v):
    """S_t = (diag(exp(g_t)) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ and o_t = S_tᵀ q_t, of tensors [B, T, H, D]."""
    S, outputs = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[3]), []
    for t in range(q.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = g[:, t, :, :, None].exp() * S + b[:, t, :, :, None] * read[:, :, None]
        S = S + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, 1)


def test_kimi_delta_attention_is_diagonal_plus_low_rank():
    q, k, v, beta, g = make(2, 90, 2, 5, 4, decay="channel").values()
    beta = beta[..., None]
    expected = plus_low_rank(g, -g.exp() * k, beta * k, q, beta * k, v)
    assert_close(delta_rule(q, k, v, beta[..., 0], log_decay=g), expected, 1e-12)


def test_rwkv_7_is_two_steps_each():
    """It forgets what it says of kappa and writes of k, whose state before the decay kappa reads."""
    q, k, v, _, _ = make(2, 90, 2, 5, 4, decay="channel").values()
    kappa, rate = unit(torch.randn_like(q)), torch.rand_like(q)
    g = -(-0.5 * torch.ones_like(q)).exp() * torch.rand_like(q)
    expected = plus_low_rank(g, kappa, -rate * kappa, q, k, v)

    def halves(first, second):  # [B, 2T, H, D]
        return torch.stack([first, second], 2).flatten(1, 2)

    zero = torch.zeros_like(q)
    o = delta_rule(
        halves(zero, q),
        halves(rate * kappa, k),
        halves(torch.zeros_like(v), v),
        torch.ones(2, 180, 2, dtype=torch.float64),
        log_decay=halves(g, zero),
        erase=halves(kappa * (-g).exp(), zero),
    )
    assert_close(o[:, 1::2], expected, 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_heads_of_a_group_read_its_queries_and_keys(decay, form):
    inputs = make(1, 40, 6, 5, 4, G=2, decay=decay)
    w, _ = weights(inputs)
    with computed(form):
        values = run(inputs, w)
    expected = run(inputs | {name: inputs[name].repeat_interleave(3, 2) for name in "qk"}, w)
    for name in ("dq", "dk"):
        expected[name] = expected[name].unflatten(2, (2, 3)).sum(3)
    for name, value in values.items():
        assert_close(value, expected[name], 1e-13, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_is_summed_in_single(decay, dtype):
    inputs = make(2, 100, 2, 4, 3, decay=decay, dtype=dtype)
    o, state = delta_rule(**inputs, output_final_state=True)
    expected, expected_state = delta_rule(**wide(inputs), output_final_state=True, backend="reference")
    assert (o.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(state, expected_state, 2e-6)
    assert_close(o, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", FORMS)
def test_products_are_in_single_precision_whatever_is_allowed(form):
    inputs = make(2, 100, 2, 8, 8, decay="head", dtype=torch.float32)
    w, _ = weights(inputs)
    with computed(form):
        expected = run(inputs, w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = run(inputs, w)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with computed(form):
            allowed = run(inputs, w)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in expected.items():
        assert torch.equal(value, under_autocast[name]), name
        assert torch.equal(value, allowed[name]), name


@pytest.mark.parametrize(("decay", "erase"), [("none", False), ("head", True), ("channel", False)])
def test_compiles_whole_and_repeats_itself(decay, erase):
    inputs = make(2, 130, 4, 4, 3, G=2, decay=decay, erase=erase, state=True, dtype=torch.float32)
    w, _ = weights(inputs)
    options = {"lengths": torch.tensor([130, 70])}
    expected = run(inputs, w, **options)
    for name, value in run(inputs, w, **options).items():
        assert torch.equal(value, expected[name]), name
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")(**leaves, **options)
    assert_close(o, expected["o"], 1e-6)
    for name, value in zip(leaves, torch.autograd.grad(o, list(leaves.values()), w), strict=True):
        assert_close(value, expected[f"d{name}"], 1e-5, name)


@pytest.mark.parametrize("decay", DECAYS)
def test_compiles_whole_with_dynamic_shapes(decay):
    inputs = make(2, 20, 2, 4, 3, decay=decay)
    compiled = torch.compile(delta_rule, fullgraph=True, dynamic=True, backend="eager")
    assert_close(compiled(**inputs), delta_rule(**inputs), 1e-14)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_may_be_asked_for_and_given_in_part(decay):
    inputs = make(2, 70, 2, 4, 3, decay=decay, erase=True, state=True)
    w, w_state = weights(inputs)
    for which in (0, 1):  # of the output alone, and of the state alone
        for name in inputs:
            if which == 1 and name == "q":
                continue
            found = []
            for backend in ("chunked", "reference"):
                leaf = inputs[name].clone().requires_grad_()
                outputs = delta_rule(**inputs | {name: leaf}, output_final_state=True, backend=backend)
                one, weight = outputs[which], (w, w_state)[which]
                found += torch.autograd.grad(one, leaf, weight)
            assert_close(*found, 1e-12, name)


MEMORY = """
import sys, torch
from delta_cases import computed
from seqzoo.kernels import delta_rule

def peak(T, decay):
    shape = (1, T, 2, 64)
    x = [torch.randn(shape) for _ in range(3)]
    x[1] /= x[1].norm(dim=-1, keepdim=True)
    g = {"none": [], "head": [-torch.rand(shape[:3])], "channel": [-torch.rand(shape)]}[decay]
    leaves = [y.requires_grad_() for y in (*x, torch.rand(shape[:3]), *g)]
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    o = delta_rule(*leaves[:4], log_decay=leaves[4] if g else None)
    torch.autograd.grad(o, leaves, torch.ones(()).expand(shape))
    return (status("VmHWM") - before) * 1024 / (4 * o.nbytes)

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

with computed(sys.argv[1]):
    peak(200, sys.argv[2])
    print(peak(int(sys.argv[3]), sys.argv[2]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("T", [4096, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", others_slow(DECAYS, ["channel"]))
def test_memory_is_a_few_times_that_of_its_inputs(decay, form, T):
    """In a process of its own, whose allocator has kept nothing from before."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, form, decay, str(T)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(process.stdout) <= 6


@pytest.mark.parametrize("decay", DECAYS)
def test_same_bits_whatever_the_threads(decay, monkeypatch):
    monkeypatch.setattr(import_module("seqzoo.kernels.delta_rule.loop"), "MIN_WORK", 1)
    inputs = make(3, 70, 4, 5, 3, G=2, decay=decay, dtype=torch.float32)
    w, w_state = weights(inputs)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(run(inputs, w, w_state))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(other[name], value) for other in results), name


@pytest.mark.parametrize("form", ["reference", *FORMS])
@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 4), (2, 5, 0, 3, 4), (2, 5, 2, 0, 4), (2, 5, 2, 3, 0)])
def test_there_may_be_nothing(shape, form):
    inputs = make(*shape)
    with computed(form):
        values = run(inputs, *weights(inputs), backend="reference" if form == "reference" else "chunked")
    assert not any(value.any() for name, value in values.items() if name != "dinitial_state")


def test_errors():
    q, k, v, beta = make(2, 5, 4, 3, 6, G=2).values()
    with pytest.raises(ValueError, match=r"expected q and k \[B, T, G, Dk\].*got \[2, 5, 2, 3\], \[2, 4, 2, 3\]"):
        delta_rule(q, k[:, :4], v, beta)
    with pytest.raises(ValueError, match="2 query/key heads do not divide 3 value heads"):
        delta_rule(q, k, v[:, :, :3], beta[:, :, :3])
    with pytest.raises(ValueError, match=r"beta must be \[B, T, H\] = \[2, 5, 4\].*got \[2, 5, 2\]"):
        delta_rule(q, k, v, beta[:, :, :2])
    with pytest.raises(ValueError, match=r"log_decay must be .*\[2, 5, 4, 3\], got \[4\]; expand"):
        delta_rule(q, k, v, beta, log_decay=torch.zeros(4))
    with pytest.raises(ValueError, match=r"log_decay must be at most 0, got 0.5; valid: logarithms"):
        delta_rule(q, k, v, beta, log_decay=torch.full((2, 5, 4), 0.5))
    with pytest.raises(ValueError, match=r"erase must be \[B, T, H, Dk\] = \[2, 5, 4, 3\].*got \[2, 5, 2, 3\]"):
        delta_rule(q, k, v, beta, erase=k)
    with pytest.raises(ValueError, match=r"v must be a real floating-point tensor, got torch.int64"):
        delta_rule(q, k, v.long(), beta)
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 4, 3, 6\].*got \[2, 2, 3, 6\]"):
        delta_rule(q, k, v, beta, initial_state=torch.zeros(2, 2, 3, 6))
    with pytest.raises(ValueError, match=r"lengths must be int64 \[2\]"):
        delta_rule(q, k, v, beta, lengths=torch.tensor([5.0, 5.0]))
    with pytest.raises(ValueError, match="no backend 'fast'; valid: auto, chunked, reference"):
        delta_rule(q, k, v, beta, backend="fast")


def test_a_decay_above_0_past_lengths_is_none():
    inputs = make(2, 5, 2, 3, 4, decay="head")
    inputs["log_decay"][1, 3:] = 1.0
    delta_rule(**inputs, lengths=torch.tensor([5, 3]))
