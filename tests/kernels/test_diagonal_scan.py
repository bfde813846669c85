"""diagonal_scan: both scans against the loop that defines them, in values, gradients and state."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agreement import assert_close
from torch import Tensor
from torch.testing import assert_close as assert_equal

from seqzoo.kernels import diagonal_scan
from seqzoo.kernels.diagonal_scan import doubling

TOLERANCE = {torch.float32: 2e-6, torch.complex64: 2e-6, torch.float64: 1e-14, torch.complex128: 1e-14}
WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def make(B: int, T: int, D: int, dtype: torch.dtype, constant: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, a (of modulus below 1) and an initial state."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, dtype=dtype, generator=generator)
    a = torch.randn((D,) if constant else (B, T, D), dtype=dtype, generator=generator)
    a = a / (1 + a.abs())
    return x, a, torch.randn(B, D, dtype=dtype, generator=generator)


def run(x, a, h0, w, w_state, factor=None, **options) -> list[Tensor]:
    """h, the final state and the gradients of x, a, h0 and the factor, for output gradients w and w_state."""
    leaves = [y.detach().clone().requires_grad_() for y in (x, a, h0, factor) if y is not None]
    x, a, h0, *given = leaves
    h, state = diagonal_scan(
        x, a, factor=given[0] if given else None, initial_state=h0, output_final_state=True, **options
    )
    return [h, state, *torch.autograd.grad((h, state), leaves, (w, w_state))]


NAMES = ("h", "state", "dx", "da", "dh0", "df")


@pytest.mark.parametrize(
    ("B", "T", "D", "dtype", "constant", "reverse", "lengths"),
    [
        (2, 1, 3, torch.float32, True, False, None),
        (3, 1, 3, torch.complex64, False, True, None),
        (3, 1, 3, torch.complex64, False, True, [1, 0, 1]),
        (3, 1, 3, torch.float32, True, False, [0, 1, 1]),
        (1, 2, 1, torch.complex64, False, False, None),
        (3, 15, 5, torch.float32, False, True, [15, 0, 7]),
        (3, 16, 24, torch.complex64, True, True, [1, 16, 9]),
        (4, 63, 7, torch.float32, True, False, [63, 1, 0, 40]),
        (2, 64, 33, torch.complex64, False, False, [64, 50]),
        (1, 65, 130, torch.float32, False, False, None),
        (2, 100, 17, torch.complex64, True, False, [99, 100]),
        (2, 257, 48, torch.float32, True, True, None),
        (3, 257, 10, torch.float64, False, True, [200, 257, 3]),
        (2, 100, 6, torch.complex128, True, False, [17, 100]),
        (1, 700, 800, torch.float32, True, False, None),  # large enough for several threads
        (2, 12, 300, torch.complex64, True, True, [12, 5]),  # rows long enough to be asked for ahead
        (2, 12, 300, torch.complex64, False, False, [4, 12]),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_agrees_with_reference(B, T, D, dtype, constant, reverse, lengths, scaled):
    x, a, h0 = make(B, T, D, dtype, constant)
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    factor = 0.1 + torch.rand(D, dtype=dtype.to_real()) if scaled else None
    options = {"reverse": reverse, "lengths": None if lengths is None else torch.tensor(lengths)}
    wide = [y if y is None else y.to(WIDER.get(y.dtype, y.dtype)) for y in (x, a, h0, w, w_state, factor)]
    expected = run(*wide, **options, backend="reference")
    for name, value, target in zip(NAMES, run(x, a, h0, w, w_state, factor, **options), expected, strict=False):
        assert value.dtype == (dtype.to_real() if name == "df" else dtype)
        assert_close(value, target, TOLERANCE[dtype], name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("T", [1, 2, 13, 16])
def test_doubling_agrees_with_reference(T, constant, reverse):
    x, a, h0 = make(3, T, 4, torch.complex128, constant)
    lengths = torch.tensor([T, 0, (T + 1) // 2])
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    factor = 0.1 + torch.rand(4, dtype=torch.float64)
    expected = run(x, a, h0, w, w_state, factor, reverse=reverse, lengths=lengths, backend="reference")
    h, state = doubling.scan(x, a, h0, reverse, lengths, factor)
    gradients = doubling.scan_backward(w, w_state, h, a, h0, reverse, lengths, factor)
    for name, value, target in zip(NAMES, (h, state, *gradients), expected, strict=True):
        assert_close(value, target, 1e-14, name)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck(dtype, constant):
    inputs = [y.requires_grad_() for y in (*make(2, 5, 3, dtype, constant), 0.1 + torch.rand(3, dtype=torch.float64))]
    lengths = torch.tensor([5, 3])
    for reverse in (False, True):

        def f(x, a, h0, factor, reverse=reverse):
            options = {"factor": factor, "initial_state": h0, "reverse": reverse, "lengths": lengths}
            return diagonal_scan(x, a, output_final_state=True, **options)

        assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_padding_has_no_effect(backend, reverse):
    lengths = torch.tensor([4, 9, 0])
    x, a, h0 = make(3, 9, 5, torch.float32, constant=False)
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    clean = run(x, a, h0, w, w_state, reverse=reverse, lengths=lengths, backend=backend)
    padding = (torch.arange(9) >= lengths[:, None])[..., None]
    dirty_x, dirty_a, dirty_w = (y.masked_fill(padding, float("nan")) for y in (x, a, w))
    dirty = run(dirty_x, dirty_a, h0, dirty_w, w_state, reverse=reverse, lengths=lengths, backend=backend)
    for value, target in zip(dirty, clean, strict=True):
        assert torch.equal(value, target)
    h, state, dx, da, dh0 = dirty
    for y in (h, dx, da):
        assert (y.masked_select(padding) == 0).all()
    assert torch.equal(state[2], h0[2])  # an empty sequence hands its state on
    assert torch.equal(dh0[2], w_state[2])
    assert torch.equal(state[0], h[0, 0 if reverse else 3])


@pytest.mark.parametrize("constant", [False, True])
def test_split_and_resume(constant):
    x, a, h0 = make(2, 30, 4, torch.complex128, constant)
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    whole = run(x, a, h0, w, w_state)
    x, a, h0 = (y.requires_grad_() for y in (x, a, h0))
    outputs, state = [], h0
    for part in (slice(0, 1), slice(1, 18), slice(18, 30)):
        h, state = diagonal_scan(
            x[:, part], a if constant else a[:, part], initial_state=state, output_final_state=True
        )
        outputs.append(h)
    h = torch.cat(outputs, 1)
    resumed = [h, state, *torch.autograd.grad((h, state), (x, a, h0), (w, w_state))]
    for name, value, target in zip(NAMES, resumed, whole, strict=False):
        assert_close(value, target, 1e-14, name)


def test_closed_forms():
    x = torch.ones(1, 2000, 2)
    sums = diagonal_scan(x, torch.tensor([1.0, 0.5]))
    assert torch.equal(sums[0, :, 0], torch.arange(1.0, 2001.0))  # a = 1: a running sum
    assert_equal(sums[0, -1, 1], torch.tensor(2.0))  # a = 1/2: a geometric series
    assert torch.equal(diagonal_scan(x, torch.zeros(2)), x)
    near_one = diagonal_scan(x, torch.full((2,), 1 - 1e-6), reverse=True)
    assert_close(near_one, diagonal_scan(x.double(), torch.full((2,), 1 - 1e-6).double(), reverse=True), 1e-5)


def test_a_zero_coefficient_resets():
    x, a, h0 = make(1, 20, 3, torch.float64, constant=False)
    a[:, 11] = 0
    whole = diagonal_scan(x, a, initial_state=h0)
    assert torch.equal(whole[:, 11:], diagonal_scan(x[:, 11:], a[:, 11:]))


def test_layouts_of_inputs_and_gradients():
    x, a, h0 = make(2, 12, 6, torch.complex64, constant=False)
    cases = {
        "expanded": torch.ones((), dtype=x.dtype).expand(x.shape),
        "transposed": torch.randn(6, 12, 2, dtype=x.dtype).permute(2, 1, 0),
        "sliced": torch.randn(2, 24, 12, dtype=x.dtype)[:, ::2, 3:9],
        "conjugate": torch.randn_like(x).conj(),
    }
    for name, w in cases.items():
        w_state = w[:, 3]
        expected = run(x, a, h0, w.resolve_conj().contiguous(), w_state.resolve_conj().contiguous())
        for value, target in zip(run(x, a, h0, w, w_state), expected, strict=True):
            assert torch.equal(value, target), name
        expected = run(w.resolve_conj().contiguous(), w.resolve_conj().contiguous() / 4, w_state, w, w_state)
        for value, target in zip(run(w, w / 4, w_state, w, w_state), expected, strict=True):
            assert torch.equal(value, target), name


def test_the_last_output_has_no_part_in_the_gradient_of_a():
    x, a, h0 = make(1, 6, 3, torch.float32, constant=True)
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    *_, expected, _ = run(x, a, h0, w, w_state)
    x[:, -1] = float("inf")
    *_, da, _ = run(x, a, h0, w, w_state)
    assert torch.equal(da, expected)


def test_only_one_output_used():
    x, a, h0 = make(2, 8, 3, torch.float64, constant=True)
    w = torch.randn_like(x)
    expected = run(x, a, h0, w, torch.zeros_like(h0))
    x, a, h0 = (y.requires_grad_() for y in (x, a, h0))
    gradients = torch.autograd.grad(diagonal_scan(x, a, initial_state=h0), (x, a, h0), w)
    for value, target in zip(gradients, expected[2:], strict=True):
        assert torch.equal(value, target)
    _, state = diagonal_scan(x, a, output_final_state=True)
    (dx,) = torch.autograd.grad(state.sum(), x)
    assert_close(dx, (a ** torch.arange(7, -1, -1)[:, None]).expand(2, 8, 3), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    x, a, _ = make(2, 200, 8, torch.float32, constant=True)
    x, a = x.to(dtype), a.to(dtype)
    h, state = diagonal_scan(x, a, output_final_state=True)
    expected, expected_state = diagonal_scan(x.float(), a.float(), output_final_state=True)
    assert (h.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(h, expected.to(dtype))
    assert torch.equal(state, expected_state)


def test_same_bits_whatever_the_threads():
    x, a, h0 = make(3, 3000, 130, torch.float32, constant=True)
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    expected = run(x, a, h0, w, w_state)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for value, target in zip(run(x, a, h0, w, w_state), expected, strict=True):
                assert torch.equal(value, target)
    finally:
        torch.set_num_threads(threads)


def test_concurrent_callers():
    x, a, h0 = make(4, 2000, 140, torch.float32, constant=True)
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    expected = run(x, a, h0, w, w_state)
    with ThreadPoolExecutor(4) as callers:
        for values in callers.map(lambda _: run(x, a, h0, w, w_state), range(8)):
            for value, target in zip(values, expected, strict=True):
                assert torch.equal(value, target)


@pytest.mark.parametrize("constant", [False, True])
def test_opcheck(constant):
    x, a, h0 = make(2, 6, 4, torch.complex64, constant)
    factor = 0.1 + torch.rand(4)
    permuted = x.transpose(1, 2).contiguous().transpose(1, 2)
    for values in (x, permuted):
        inputs = [y.clone().requires_grad_() for y in (values, a, h0)]
        torch.library.opcheck(torch.ops.seqzoo.diagonal_scan.default, (*inputs, True, torch.tensor([6, 2]), factor))
        torch.library.opcheck(torch.ops.seqzoo.diagonal_scan.default, (*inputs[:2], None, False, None, None))
    for given in (None, factor):
        arguments = (permuted, h0, x, a, h0, False, None, given)
        torch.library.opcheck(torch.ops.seqzoo.diagonal_scan_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    x, a, h0 = make(2, 9, 4, torch.complex64, constant=True)
    w, w_state = torch.randn_like(x), torch.randn_like(h0)
    lengths = torch.tensor([9, 5])
    expected = run(x, a, h0, w, w_state, lengths=lengths)
    x, a, h0 = (y.requires_grad_() for y in (x, a, h0))
    compiled = torch.compile(diagonal_scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    outputs = compiled(x, a, initial_state=h0, output_final_state=True, lengths=lengths)
    values = [*outputs, *torch.autograd.grad(outputs, (x, a, h0), (w, w_state))]
    for value, target in zip(values, expected, strict=True):
        assert torch.equal(value, target)


def test_numba_is_imported_at_the_first_call_only():
    code = (
        "import sys, torch; from seqzoo.kernels import diagonal_scan; assert 'numba' not in sys.modules; "
        "diagonal_scan(torch.ones(1, 2, 1), torch.ones(1)); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors():
    x, a, h0 = make(2, 5, 3, torch.float32, constant=True)
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\]"):
        diagonal_scan(x[0], a)
    with pytest.raises(ValueError, match=r"a must be \[D\] = \[3\] or \[B, T, D\] = \[2, 5, 3\], got \[2, 3\]"):
        diagonal_scan(x, h0)
    with pytest.raises(TypeError, match=r"share one.* dtype, got torch.float32 and torch.complex64"):
        diagonal_scan(x, a.to(torch.complex64))
    with pytest.raises(TypeError, match="dtype"):
        diagonal_scan(x.long(), a.long())
    with pytest.raises(ValueError, match=r"initial_state must be \[B, D\] = \[2, 3\], got \[3\]"):
        diagonal_scan(x, a, initial_state=a)
    with pytest.raises(TypeError, match="initial_state must be real"):
        diagonal_scan(x, a, initial_state=h0.to(torch.complex64))
    with pytest.raises(ValueError, match=r"lengths must be int64 \[2\]"):
        diagonal_scan(x, a, lengths=torch.tensor([5]))
    for wrong in ([6, 1], [-1, 5]):
        with pytest.raises(ValueError, match=r"lengths must lie in \[0, T\] = \[0, 5\]"):
            diagonal_scan(x, a, lengths=torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"factor must be \[D\] = \[3\], got \[2\]"):
        diagonal_scan(x, a, factor=torch.ones(2))
    with pytest.raises(TypeError, match="factor must be real"):
        diagonal_scan(x, a, factor=torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="factor is 0 in 1 of 3 channels"):
        diagonal_scan(x, a, factor=torch.tensor([1.0, 0, 1]))
    with pytest.raises(ValueError, match="no backend 'fast'; valid: auto, chunked, reference"):
        diagonal_scan(x, a, backend="fast")


def test_both_directions_are_the_two_of_them():
    x, a = torch.randn(2, 20, 3), torch.rand(3)
    lengths = torch.tensor([20, 7])
    forth, back = diagonal_scan(x, a, reverse="both", lengths=lengths)
    assert torch.equal(forth, diagonal_scan(x, a, lengths=lengths))
    assert torch.equal(back, diagonal_scan(x, a, reverse=True, lengths=lengths))
    with pytest.raises(ValueError, match="a state belongs to one direction"):
        diagonal_scan(x, a, reverse="both", output_final_state=True)
    with pytest.raises(ValueError, match="reverse='up'; valid: False, True, \"both\""):
        diagonal_scan(x, a, reverse="up")
