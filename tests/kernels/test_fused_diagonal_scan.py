"""diagonal_scan in Triton against the loop that defines it."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, awkward, poisoned, wide
from often import others_slow
from torch import Tensor

from seqzoo.kernels import diagonal_scan
from seqzoo.kernels.diagonal_scan import fused

NAMES = ("h", "state", "dx", "da")
TOLERANCE = {torch.float32: 1e-6, torch.complex64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make(B: int, T: int, D: int, dtype: torch.dtype, constant: bool, radius: float | None = None) -> list[Tensor]:
    """x, a, an initial state, and gradients of the output and of the final state."""
    draw = dtype if dtype.is_complex else torch.float32
    x, w = (torch.randn(B, T, D, dtype=draw) for _ in range(2))
    a = torch.randn(*((D,) if constant else (B, T, D)), dtype=draw)
    a = a / (1 + a.abs()) if radius is None else radius * a.sgn()
    h0, w_state = (torch.randn(B, D, dtype=draw).to(DEVICE) for _ in range(2))
    x, a, w = (y.to(DEVICE, dtype) for y in (x, a, w))
    return [x, a, h0, w, w_state]


def run(x, a, h0, w, w_state, factor=None, **options) -> dict[str, Tensor]:
    given = {"dx": x, "da": a, "dh0": h0, "df": factor}
    leaves = {name: y.detach().clone().requires_grad_() for name, y in given.items() if y is not None}
    x, a = leaves["dx"], leaves["da"]
    states = {"initial_state": leaves.get("dh0"), "output_final_state": True}
    h, state = diagonal_scan(x, a, factor=leaves.get("df"), **states, **options)
    gradients = torch.autograd.grad((h, state), tuple(leaves.values()), (w, w_state))
    return {"h": h, "state": state, **dict(zip(leaves, gradients, strict=True))}


def check(inputs: list[Tensor | None], tolerance: float, **options) -> None:
    with poisoned():
        values = run(*inputs, **options, backend="fused")
    lengths = options.get("lengths")
    reference = {**options, "lengths": None if lengths is None else lengths.cpu()}
    expected = run(*(None if y is None else wide(y).cpu() for y in inputs), **reference, backend="reference")
    for name, value in values.items():
        assert_close(value.cpu(), expected[name], tolerance, name)


CASES = [  # B, T, D, dtype, constant, reverse, lengths, with an initial state
    (2, 1, 8, torch.float32, True, False, None, True),
    (3, 1, 3, torch.complex64, False, True, [1, 0, 1], True),
    (1, 2, 1, torch.complex64, True, False, None, True),
    (3, 15, 5, torch.float32, False, True, [15, 0, 7], True),
    (3, 16, 24, torch.complex64, True, True, [1, 16, 9], False),
    (2, 63, 7, torch.float32, True, False, [63, 40], False),
    (2, 64, 3, torch.complex64, False, False, [64, 50], True),
    (1, 65, 100, torch.float32, False, False, None, False),
    (2, 65, 16, torch.float16, True, True, [65, 33], True),
    (2, 100, 5, torch.complex64, True, False, [99, 100], True),
    (1, 100, 8, torch.float16, False, False, None, True),
    (1, 257, 6, torch.float32, True, True, None, True),
    (2, 257, 2, torch.complex64, False, True, [200, 257], False),
]


@pytest.mark.parametrize(
    ("B", "T", "D", "dtype", "constant", "reverse", "lengths", "state", "scaled", "chunk_len"),
    others_slow(
        [(*case, n % 2 == 0, chunk_len) for n, case in enumerate(CASES) for chunk_len in (None, 16)],
        [(*case, n % 2 == 0, (None, 16)[n // 2 % 2]) for n, case in enumerate(CASES)],
    ),
)
def test_agrees_with_reference(B, T, D, dtype, constant, reverse, lengths, state, scaled, chunk_len, monkeypatch):
    monkeypatch.setattr(fused, "_chunk_len", lambda programs, T, steps, device: chunk_len or T)
    x, a, h0, w, w_state = make(B, T, D, dtype, constant)
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    if lengths is not None:  # what is past the end is never used
        padding = (torch.arange(T, device=DEVICE) >= lengths[:, None])[..., None]
        x, w = x.masked_fill(padding, float("nan")), w.masked_fill(padding, float("nan"))
        a = a if constant else a.masked_fill(padding, float("nan"))
    factor = 0.1 + torch.rand(D, device=DEVICE) if scaled else None
    check([x, a, h0 if state else None, w, w_state, factor], TOLERANCE[dtype], reverse=reverse, lengths=lengths)


@pytest.mark.parametrize("chunk_len", [None, 16], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(
    ("B", "T", "D", "dtype", "constant", "lengths"),
    [
        (2, 1, 3, torch.float32, True, [1, 0]),
        (3, 40, 5, torch.complex64, True, [40, 0, 17]),
        (2, 33, 8, torch.complex64, False, None),
        (1, 65, 4, torch.float16, True, None),
    ],
)
def test_both_directions_at_once(B, T, D, dtype, constant, lengths, chunk_len, monkeypatch):
    monkeypatch.setattr(fused, "_chunk_len", lambda programs, T, steps, device: chunk_len or T)
    x, a, _, w, _ = make(B, T, D, dtype, constant)
    w, factor = torch.stack([w, torch.randn_like(w)]), 0.1 + torch.rand(D, device=DEVICE)
    given = None if lengths is None else torch.tensor(lengths)
    if given is not None:
        padding = (torch.arange(T) >= given[:, None])[..., None].to(DEVICE)
        x, w = x.masked_fill(padding, float("nan")), w.masked_fill(padding, float("nan"))

    def both(x, a, w, factor, lengths, backend):
        x, a, factor = (y.detach().clone().requires_grad_() for y in (x, a, factor))
        h = diagonal_scan(x, a, factor=factor, reverse="both", lengths=lengths, backend=backend)
        return [*h, *torch.autograd.grad(h, (x, a, factor), tuple(w))]

    with poisoned():
        actual = both(x, a, w, factor, None if given is None else given.to(DEVICE), "fused")
    expected = both(*(wide(y).cpu() for y in (x, a, w, factor)), given, "reference")
    for name, *pair in zip(("forward", "reverse", "dx", "da", "df"), (y.cpu() for y in actual), expected, strict=True):
        assert_close(*pair, TOLERANCE[dtype], name)


@pytest.mark.parametrize("radius", [0.0, 1e-4, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_coefficients_near_zero_and_one(radius, dtype):
    check(make(1, 65, 3, dtype, True, radius), 3e-6)


@pytest.mark.parametrize("constant", [False, True])
def test_gradients_come_in_any_layout(constant):
    x, a, h0, w, w_state = make(2, 17, 4, torch.float32, constant)
    for name, gradient in awkward(w).items():
        value = run(x, a, h0, gradient, w_state, backend="fused")
        expected = run(x, a, h0, gradient.contiguous(), w_state, backend="fused")
        assert all(torch.equal(value[key], expected[key]) for key in NAMES), name


def test_a_split_sequence_goes_on_where_it_stopped():
    x, a, h0, _, _ = make(2, 40, 5, torch.complex64, False)
    whole = diagonal_scan(x, a, initial_state=h0, backend="fused")
    first, state = diagonal_scan(x[:, :13], a[:, :13], initial_state=h0, output_final_state=True, backend="fused")
    rest = diagonal_scan(x[:, 13:], a[:, 13:], initial_state=state, backend="fused")
    assert_close(torch.cat([first, rest], 1), whole, 1e-6)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.complex64])
def test_operator(dtype):
    x, a, h0, w, w_state = make(2, 9, 4, dtype, True)
    lengths = torch.tensor([9, 4], device=DEVICE)
    leaves = (x.requires_grad_(), a.requires_grad_(), h0.requires_grad_())
    factor = 0.1 + torch.rand(4, device=DEVICE)
    torch.library.opcheck(torch.ops.seqzoo.diagonal_scan_fused.default, (*leaves, False, lengths, factor))
    for given in (None, factor):
        arguments = (w, w_state, w, a.detach(), None, True, None, given)
        torch.library.opcheck(torch.ops.seqzoo.diagonal_scan_fused_backward.default, arguments)
    both = torch.ops.seqzoo.both_scans_fused
    torch.library.opcheck(both.default, (x, a, lengths, factor))
    h = both(x, a, lengths, factor).detach()
    torch.library.opcheck(torch.ops.seqzoo.both_scans_fused_backward.default, (h, h, a.detach(), lengths, factor))


def test_what_no_kernel_takes_runs_without_one(caplog):
    x, a, _, _, _ = make(1, 5, 3, torch.float32, True)
    h = diagonal_scan(x.double(), a.double(), backend="fused")
    assert torch.equal(h, diagonal_scan(x.double(), a.double(), backend="chunked"))
    assert "diagonal_scan: no kernel computes in torch.float64" in caplog.text
