"""diagonal_scan over documents in one row: each comes out as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, poisoned
from torch import Tensor

from seqzoo.kernels import diagonal_scan

LENGTHS = [5, 0, 1, 37, 64, 90]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
T, N, D = sum(LENGTHS), len(LENGTHS), 6
NAMES = ("h", "state", "dx", "da", "dh0", "df")
TOLERANCE = {torch.float32: 2e-6, torch.complex64: 2e-6, torch.float64: 1e-13, torch.complex128: 1e-13}
BACKENDS = ["reference", "chunked"]


def make(dtype: torch.dtype, constant: bool, D: int = D) -> list[Tensor]:
    """x, a, an initial state for each document, a factor, and gradients of h and of the final states."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(1, T, D, dtype=dtype, generator=generator) for _ in range(2))
    a = torch.randn((D,) if constant else (1, T, D), dtype=dtype, generator=generator)
    h0, w_state = (torch.randn(N, D, dtype=dtype, generator=generator) for _ in range(2))
    factor = 0.1 + torch.rand(D, dtype=dtype.to_real(), generator=generator)
    return [x, a / (1 + a.abs()), h0, factor, w, w_state]


def run(x, a, h0, factor, w, w_state, **options) -> list[Tensor]:
    leaves = [y.detach().clone().requires_grad_() for y in (x, a, h0, factor) if y is not None]
    x, a, h0, *given = leaves
    h, state = diagonal_scan(
        x, a, initial_state=h0, factor=given[0] if given else None, output_final_state=True, **options
    )
    return [h, state, *torch.autograd.grad((h, state), leaves, (w, w_state))]


def one_by_one(x, a, h0, factor, w, w_state, *, reverse: bool, starts=STARTS) -> list[Tensor]:
    """What the definition makes of each document alone."""
    results = [torch.zeros_like(y) for y in (x, h0, x, a, h0, factor) if y is not None]
    for n, (start, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        if start == end:
            results[1][n], results[4][n] = h0[n], w_state[n]
            continue
        rows, row = slice(start, end), slice(n, n + 1)
        its = a if a.dim() == 1 else a[:, rows]
        values = run(
            *(x[:, rows], its, h0[row], factor, w[:, rows], w_state[row]), reverse=reverse, backend="reference"
        )
        for name, result, value in zip(NAMES, results, values, strict=False):
            if name in ("state", "dh0"):
                result[row] = value
            elif result.dim() == 1:
                result += value
            else:
                result[:, rows] = value
    return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("scaled", [False, True])
def test_documents_are_as_if_alone(scaled, dtype, constant, reverse, backend):
    inputs = make(dtype, constant)
    inputs[3] = inputs[3] if scaled else None
    double = torch.complex128 if dtype.is_complex else torch.float64
    wide = [None if y is None else y.to(double if y.dtype == dtype else torch.float64) for y in inputs]
    expected = one_by_one(*wide, reverse=reverse)
    ends = STARTS.int() if scaled else STARTS
    values = run(*inputs, reverse=reverse, cu_seqlens=ends, backend=backend)
    for name, value, target in zip(NAMES, values, expected, strict=False):
        assert value.dtype == (dtype.to_real() if name == "df" else dtype)
        assert_close(value, target, TOLERANCE[dtype], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constant", [False, True])
def test_both_directions_are_the_two_of_them(constant, backend):
    x, a, *_ = make(torch.complex64, constant)
    options = {"cu_seqlens": STARTS, "backend": backend}
    forth, back = diagonal_scan(x, a, reverse="both", **options)
    assert torch.equal(forth, diagonal_scan(x, a, **options))
    assert torch.equal(back, diagonal_scan(x, a, reverse=True, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_nothing_leaks_from_another_document(constant, reverse, backend):
    inputs = make(torch.float64, constant)
    inputs[3] = None
    start, end = STARTS[3:5].tolist()
    dirty = [None if y is None else y.clone() for y in inputs]
    for y in (dirty[0], *([] if constant else [dirty[1]])):
        y[:, start:end] = math.nan
    options = {"reverse": reverse, "cu_seqlens": STARTS, "backend": backend}
    for name, actual, expected in zip(NAMES, run(*dirty, **options), run(*inputs, **options), strict=False):
        if name in ("state", "dh0"):
            actual[3] = expected[3]
        elif actual.dim() == 3:
            actual[:, start:end] = expected[:, start:end]
        if actual.dim() > 1:
            assert torch.equal(actual, expected), name


def test_same_bits_whatever_the_threads(monkeypatch):
    from seqzoo.kernels.diagonal_scan import loop

    inputs = make(torch.float32, False)
    expected = run(*inputs, cu_seqlens=STARTS)
    monkeypatch.setattr(loop, "MIN_WORK", 1)
    monkeypatch.setattr(loop, "MIN_BLOCK", 2)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for value, target in zip(run(*inputs, cu_seqlens=STARTS), expected, strict=True):
                assert torch.equal(value, target)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("constant", [False, True])
def test_doubling(constant):
    from seqzoo.kernels.diagonal_scan import doubling

    for reverse in (False, True):
        x, a, h0, factor, w, w_state = make(torch.complex128, constant)
        expected = one_by_one(x, a, h0, factor, w, w_state, reverse=reverse)
        values = doubling.scan(x, a, h0, reverse, None, factor, STARTS)
        gradients = doubling.scan_backward(w, w_state, values[0], a, h0, reverse, None, factor, STARTS)
        for name, value, target in zip(NAMES, (*values, *gradients), expected, strict=True):
            assert_close(value, target, 1e-13, name)


@pytest.mark.parametrize("constant", [False, True])
def test_derivatives(constant):
    D, ends = 2, torch.tensor([0, 2, 2, 7])
    x, a, _, _, _, _ = make(torch.float64, constant, D)
    inputs = (x[:, :7], a if constant else a[:, :7], torch.randn(3, D).double(), 0.1 + torch.rand(D).double())
    inputs = [y.clone().requires_grad_() for y in inputs]
    for reverse in (False, True):

        def f(x, a, h0, factor, reverse=reverse):
            options = {"factor": factor, "initial_state": h0, "reverse": reverse, "cu_seqlens": ends}
            return diagonal_scan(x, a, output_final_state=True, **options)

        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    x, a, h0, factor, w, w_state = make(torch.complex64, True)
    expected = run(x, a, h0, factor, w, w_state, cu_seqlens=STARTS)
    x, a, h0, factor = (y.requires_grad_() for y in (x, a, h0, factor))
    compiled = torch.compile(diagonal_scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    outputs = compiled(x, a, factor=factor, initial_state=h0, output_final_state=True, cu_seqlens=STARTS)
    values = [*outputs, *torch.autograd.grad(outputs, (x, a, h0, factor), (w, w_state))]
    for value, target in zip(values, expected, strict=True):
        assert torch.equal(value, target)


def test_operator():
    x, a, h0, factor, w, w_state = make(torch.float32, True)
    leaves = [y.clone().requires_grad_() for y in (x, a, h0)]
    arguments = (True, None, factor, STARTS)
    torch.library.opcheck(torch.ops.seqzoo.diagonal_scan.default, (*leaves, *arguments))
    torch.library.opcheck(torch.ops.seqzoo.diagonal_scan_backward.default, (w, w_state, x, a, h0, *arguments))


def test_errors():
    x, a, h0, *_ = make(torch.float32, True)
    with pytest.raises(ValueError, match=r"initial_state must be \[N, D\], a row for each document, = \[6, 6\], got"):
        diagonal_scan(x, a, initial_state=h0[:1], cu_seqlens=STARTS)
    with pytest.raises(ValueError, match="diagonal_scan: got cu_seqlens and lengths"):
        diagonal_scan(x, a, lengths=torch.tensor([T]), cu_seqlens=STARTS)


@pytest.mark.parametrize("chunk_len", [None, 16], ids=["whole", "cut"])
@pytest.mark.parametrize(
    ("dtype", "constant", "reverse"),
    [(torch.complex64, True, False), (torch.float32, False, True), (torch.complex64, False, True)],
)
def test_in_triton(dtype, constant, reverse, chunk_len, monkeypatch):
    from seqzoo.kernels.diagonal_scan import fused

    monkeypatch.setattr(fused, "_chunk_len", lambda programs, T, steps, device: chunk_len or T)
    inputs = make(dtype, constant)
    double = torch.complex128 if dtype.is_complex else torch.float64
    expected = one_by_one(*(y.to(double if y.dtype == dtype else torch.float64) for y in inputs), reverse=reverse)
    with poisoned():
        values = run(*(y.to(DEVICE) for y in inputs), reverse=reverse, cu_seqlens=STARTS.to(DEVICE), backend="fused")
    for name, value, target in zip(NAMES, values, expected, strict=True):
        assert_close(value.cpu(), target, TOLERANCE[dtype], name)


@pytest.mark.parametrize("chunk_len", [None, 16], ids=["whole", "cut"])
def test_both_directions_in_triton(chunk_len, monkeypatch):
    from seqzoo.kernels.diagonal_scan import fused

    monkeypatch.setattr(fused, "_chunk_len", lambda programs, T, steps, device: chunk_len or T)
    x, a, _, factor, w, _ = make(torch.complex64, True)

    def both(x, a, factor, backend, device):
        leaves = [y.to(device).requires_grad_() for y in (x, a, factor)]
        options = {"cu_seqlens": STARTS.to(device), "reverse": "both", "backend": backend}
        h = diagonal_scan(leaves[0], leaves[1], factor=leaves[2], **options)
        return [*h, *torch.autograd.grad(h, leaves, (w.to(h[0]), w.flip(1).to(h[0])))]

    expected = both(x.to(torch.complex128), a.to(torch.complex128), factor.double(), "reference", "cpu")
    with poisoned():
        values = both(x, a, factor, "fused", DEVICE)
    for name, value, target in zip(("forward", "reverse", "dx", "da", "df"), values, expected, strict=True):
        assert_close(value.cpu(), target, TOLERANCE[x.dtype], name)
