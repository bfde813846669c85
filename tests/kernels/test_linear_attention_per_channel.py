"""linear_attention with a decay per channel: a loop on a CPU, and PyTorch, against the recurrence that defines it."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from agreement import assert_close
from often import others_slow
from torch import Tensor

from seqzoo.kernels import linear_attention
from seqzoo.kernels.linear_attention import per_channel
from seqzoo.kernels.linear_attention.secondary import secondary_chunks

LENGTHS = [37, 1, 0, 64, 5, 90, 0]
STARTS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
FORMS = ["loop", "PyTorch"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Which of the two runs; PyTorch's is that of other devices."""
    if request.param == "PyTorch":
        monkeypatch.setattr(per_channel, "_in_loop", secondary_chunks)
    return request.param


def make(B, T, H, Dk, Dv, *, mean=-0.3, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    """Decays of `mean`, exponentially distributed: small ones beside large ones."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    decay = mean * -torch.log1p(-torch.rand(B, T, H, Dk, dtype=torch.float64, generator=generator))
    inputs = {"q": randn(B, T, H, Dk) / Dk**0.5, "k": randn(B, T, H, Dk), "v": randn(B, T, H, Dv), "log_decay": decay}
    return {name: x.to(dtype) for name, x in inputs.items()}


def run(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = linear_attention(**leaves, output_final_state=w_state is not None, **options)
    outputs, weights = ((outputs,), (w,)) if w_state is None else (outputs, (w, w_state))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("o", "state"), outputs, strict=False)) | dict(
        zip((f"d{name}" for name in leaves), gradients, strict=True)
    )


def expected(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    wide = {name: x.double() for name, x in inputs.items()}
    w_state = None if w_state is None else w_state.double()
    return run(wide, w.double(), w_state, **options, backend="reference")


def assert_agree(values: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert values.keys() == right.keys()
    for name, value in values.items():
        assert_close(value, right[name], tolerance, name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mean", [-0.05, -0.8, -2.4, -20.0])
def test_decays_of_all_sizes(mean, causal, form):
    inputs = make(1, 200, 2, 24, 20, mean=mean, dtype=torch.float32)
    w = torch.randn(1, 200, 2, 20)
    assert_agree(run(inputs, w, causal=causal), expected(inputs, w, causal=causal), 5e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [-0.05, -2.4, -20.0])
def test_constant_decays(size, causal, form):
    """Where no step remembers more than others, so that each gradient of a decay is as small as all of them."""
    inputs = make(1, 200, 2, 24, 20, dtype=torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], size)
    w = torch.randn(1, 200, 2, 20)
    assert_agree(run(inputs, w, causal=causal), expected(inputs, w, causal=causal), 5e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("forgotten", [-1e4, -1e30, -math.inf])
def test_some_channels_forget_everything(forgotten, causal, form):
    """In the middle of chunks and at their ends, one channel and all of them."""
    inputs = make(1, 200, 2, 8, 5, dtype=torch.float32)
    g = inputs["log_decay"]
    g[:, 30, :, 3], g[:, 64, :, ::2], g[:, 70], g[:, 100:103, 1, 1], g[:, 127] = (forgotten,) * 5
    w = torch.randn(1, 200, 2, 5)
    values = run(inputs, w, causal=causal)
    assert_agree(values, expected(inputs, w, causal=causal), 5e-6)
    assert (values["dlog_decay"][g == forgotten] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_channels_are_one_decay_of_the_head(causal, normalize, form):
    inputs = make(2, 150, 2, 6, 4)
    if normalize:
        inputs["q"], inputs["k"] = inputs["q"].exp(), inputs["k"].exp()
    inputs["log_decay"] = inputs["log_decay"][..., 0]
    w, lengths = torch.randn(2, 150, 2, 4, dtype=torch.float64), torch.tensor([150, 70])
    options = {"causal": causal, "normalize": normalize, "lengths": lengths}
    right = run(inputs, w, **options)
    inputs["log_decay"] = inputs["log_decay"][..., None].expand(2, 150, 2, 6)
    values = run(inputs, w, **options)
    values["dlog_decay"] = values["dlog_decay"].sum(-1)
    assert_agree(values, right, 1e-12)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_any_number_of_steps_from_a_state(T, form):
    inputs = make(2, T, 2, 5, 83) | {"initial_state": torch.randn(2, 2, 5, 83, dtype=torch.float64)}
    w, w_state = (torch.randn(2, n, 2, 83, dtype=torch.float64) for n in (T, 5))
    w_state = w_state.transpose(1, 2)
    options = {"causal": True, "lengths": torch.tensor([T, T // 2])}
    assert_agree(run(inputs, w, w_state, **options), expected(inputs, w, w_state, **options), 1e-12)


@pytest.mark.parametrize("lengths", [LENGTHS, [3, 0, 1, 9, 2] * 10, [64, 64]], ids=["few", "short", "whole chunks"])
def test_documents_from_states(lengths, form):
    N, T = len(lengths), sum(lengths)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    inputs = make(1, T, 2, 6, 4) | {"initial_state": torch.randn(N, 2, 6, 4, dtype=torch.float64)}
    w, w_state = torch.randn(1, T, 2, 4, dtype=torch.float64), torch.randn(N, 2, 6, 4, dtype=torch.float64)
    options = {"causal": True, "cu_seqlens": starts}
    assert_agree(run(inputs, w, w_state, **options), expected(inputs, w, w_state, **options), 1e-12)


def test_documents_in_both_directions(form):
    inputs, w = make(1, sum(LENGTHS), 2, 6, 4), torch.randn(1, sum(LENGTHS), 2, 4, dtype=torch.float64)
    assert_agree(run(inputs, w, cu_seqlens=STARTS), expected(inputs, w, cu_seqlens=STARTS), 1e-12)


def test_same_bits_whatever_the_threads(monkeypatch):
    from seqzoo.kernels.linear_attention import loop

    inputs = make(1, sum(LENGTHS), 3, 6, 4, dtype=torch.float32)
    w = torch.randn(1, sum(LENGTHS), 3, 4)
    right = run(inputs, w, causal=True, cu_seqlens=STARTS)
    monkeypatch.setattr(loop, "MIN_WORK", 1)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for name, value in run(inputs, w, causal=True, cu_seqlens=STARTS).items():
                assert torch.equal(value, right[name]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("causal", [True, False])
def test_function_transforms(causal):
    inputs = make(3, 20, 2, 3, 2)
    q, k, v, g = inputs.values()

    def f(q, k, v, g):
        return linear_attention(q[None], k[None], v[None], log_decay=g[None], causal=causal)[0].square()

    right = linear_attention(q, k, v, log_decay=g, causal=causal).square()
    assert_close(torch.vmap(f)(q, k, v, g), right, 1e-13)
    slopes = torch.func.vmap(torch.func.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2, 3)))(q, k, v, g)
    ones = torch.ones_like(right)
    wide = run(inputs, 2 * linear_attention(q, k, v, log_decay=g, causal=causal) * ones, causal=causal)
    for name, slope in zip(("dq", "dk", "dv", "dlog_decay"), slopes, strict=True):
        assert_close(slope, wide[name], 1e-12, name)


@pytest.mark.parametrize("of", ["lengths", "documents"])
def test_operator(of):
    q, k, v, g = make(1 if of == "documents" else 2, 20, 2, 5, 3, dtype=torch.float32).values()
    starts = torch.tensor([0, 7, 7, 20]) if of == "documents" else None
    lengths = None if of == "documents" else torch.tensor([20, 3])
    first = torch.randn(3 if of == "documents" else 2, 2, 5, 3)
    leaves = [x.requires_grad_() for x in (q, k, v, g, first)]
    torch.library.opcheck(torch.ops.seqzoo.linear_attention_per_channel.default, (*leaves, lengths, starts, True))
    given = (torch.randn_like(v), torch.randn_like(first), *leaves, lengths, starts, True)
    of_first_derivative = ("test_schema", "test_autograd_registration", "test_faketensor")
    backward = torch.ops.seqzoo.linear_attention_per_channel_backward.default
    torch.library.opcheck(backward, given, test_utils=of_first_derivative)


MEMORY = """
import sys
import torch
from seqzoo.kernels import linear_attention
from seqzoo.kernels.linear_attention import per_channel
from seqzoo.kernels.linear_attention.secondary import secondary_chunks

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

def peak(T, causal):
    q, k, v, g = (torch.randn(1, T, 4, 32).requires_grad_() for _ in range(4))
    before = kilobytes("VmRSS")
    linear_attention(q, k, v, log_decay=-g.square(), causal=causal).sum().backward()
    return (kilobytes("VmHWM") - before) * 1024 / (4 * q.nbytes)

if sys.argv[1] == "PyTorch":
    per_channel._in_loop = secondary_chunks
peak(256, False)
print(*(peak(T, causal) for T in (4096, 16384) for causal in (True, False)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
@pytest.mark.parametrize("form", others_slow(FORMS, ["loop"]))
def test_memory(form):
    """What forward and backward take at most beside inputs, in what q, k, v and o take, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEMORY, form], capture_output=True, text=True, check=True)
    short, short_both, long, long_both = map(float, done.stdout.split())
    both_ways = 6 if form == "loop" else 8  # PyTorch turns its inputs around
    assert max(short, long) <= 6, done.stdout
    assert max(short_both, long_both) <= both_ways, done.stdout


def test_second_derivatives_of_both_forms(form):
    inputs = make(1, 20, 1, 2, 2)
    call = partial(linear_attention, causal=True)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradgradcheck(lambda q, k, v, g: call(q, k, v, log_decay=g), leaves, fast_mode=True)


def test_what_takes_no_room_is_counted_at_once(monkeypatch):
    from seqzoo.kernels.linear_attention import secondary

    made, outputs = [], secondary._outputs
    monkeypatch.setattr(secondary, "_outputs", lambda *chunks: made.append(len(chunks[0])) or outputs(*chunks))
    inputs = {key: x.to("meta") for key, x in make(2, 500, 3, 8, 8).items()}
    assert linear_attention(**inputs, causal=True).shape == (2, 500, 3, 8)
    assert made == [2 * 3 * 8], "of all chunks of 64 steps"
