"""selective_scan: the compiled loop, and the pieces of other devices, against the loop that defines it."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.selective_scan import loop, pieces, selective_scan
from seqzoo.kernels.selective_scan.pieces import PIECE

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
NAMES = ("y", "state", "dv", "ddt", "dA", "dwrite", "dread", "dh0")


def make(B: int, T: int, D: int, N: int, dtype: torch.dtype = torch.float64, rows: int | None = None) -> list[Tensor]:
    """v, dt, A, write, read and an initial state, of B sequences or so many `rows`."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    dt, A = randn(B, T, D).exp() / 4, -randn(D, N).exp()
    inputs = [randn(B, T, D), dt, A, randn(B, T, N), randn(B, T, N), randn(B if rows is None else rows, D, N)]
    return [x.to(dtype) for x in inputs]


def cotangents(inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in (inputs[0], inputs[5])]


def run(inputs: list[Tensor], w: list[Tensor], **options) -> list[Tensor]:
    """y, the final state and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = selective_scan(*leaves[:5], initial_state=leaves[5], output_final_state=True, **options)
    return [*outputs, *torch.autograd.grad(outputs, leaves, w)]


def in_pieces(inputs: list[Tensor], w: list[Tensor], *, reverse=False, lengths=None, starts=None) -> list[Tensor]:
    v, dt, A, write, read, state = inputs
    given = (v, dt, A.mT, write, read, state.mT, reverse, lengths, starts)
    y, last, kept = pieces.scan(*given, True)
    *gradients, d_state = pieces.scan_backward(w[0], w[1].mT, *given, kept)
    gradients[2] = gradients[2].mT
    return [y, last.mT, *gradients, d_state.mT]


SHAPES = [
    (2, 1, 3, 2, False, None),
    (1, PIECE, 5, 16, True, None),
    (3, 2 * PIECE + 5, 7, 3, False, [2 * PIECE + 5, 0, PIECE]),
    (3, 2 * PIECE + 5, 7, 3, True, [1, 2 * PIECE, PIECE + 1]),
    (2, PIECE - 1, loop.WIDTH + 3, 1, True, None),
    (2, 3 * PIECE, 2 * loop.WIDTH, 4, False, [3 * PIECE, PIECE + 2]),
]


@pytest.mark.parametrize(("B", "T", "D", "N", "reverse", "lengths"), SHAPES)
@pytest.mark.parametrize("form", [torch.float32, torch.float64, "pieces"])
def test_agrees_with_reference(B, T, D, N, reverse, lengths, form):
    dtype = torch.float64 if form == "pieces" else form
    inputs = make(B, T, D, N, dtype)
    w, options = cotangents(inputs), {"reverse": reverse, "lengths": None if lengths is None else torch.tensor(lengths)}
    expected = run([x.double() for x in inputs], [x.double() for x in w], **options, backend="reference")
    values = in_pieces(inputs, w, **options) if form == "pieces" else run(inputs, w, **options)
    for name, value, target in zip(NAMES, values, expected, strict=True):
        assert value.dtype == dtype
        assert_close(value, target, TOLERANCE[dtype], name)


LENGTHS = (5, 0, PIECE, 1, 2 * PIECE + 7, 0, PIECE - 6)
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", [torch.float32, torch.float64, "pieces", "reference"])
def test_documents_are_as_if_alone(form, reverse):
    T, N = int(STARTS[-1]), len(LENGTHS)
    dtype = form if isinstance(form, torch.dtype) else torch.float64
    inputs = make(1, T, 6, 3, dtype, rows=N)
    w = cotangents(inputs)
    if form == "pieces":
        values = in_pieces(inputs, w, reverse=reverse, starts=STARTS)
    else:
        backend = "auto" if form != "reference" else form
        values = run(inputs, w, reverse=reverse, cu_seqlens=STARTS.int(), backend=backend)
    expected = [torch.zeros_like(x, dtype=torch.float64) for x in (inputs[0], inputs[5], *inputs)]
    for n, (start, end) in enumerate(zip(STARTS.tolist(), STARTS.tolist()[1:], strict=False)):
        if start == end:
            expected[1][n], expected[7][n] = inputs[5][n], w[1][n]
            continue
        rows, row = slice(start, end), slice(n, n + 1)
        its = [x[:, rows] if x.shape[:2] == (1, T) else x for x in inputs[:5]] + [inputs[5][row]]
        alone = run(
            [x.double() for x in its],
            [w[0][:, rows].double(), w[1][row].double()],
            reverse=reverse,
            backend="reference",
        )
        for name, result, value in zip(NAMES, expected, alone, strict=True):
            if name in ("state", "dh0"):
                result[row] = value
            elif name == "dA":
                result += value
            else:
                result[:, rows] = value
    for name, value, target in zip(NAMES, values, expected, strict=True):
        assert_close(value, target, TOLERANCE[dtype], name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["loop", "pieces", "reference"])
def test_padding_has_no_effect(form, reverse):
    lengths = torch.tensor([4, PIECE + 9, 0])
    inputs = make(3, PIECE + 9, 5, 2)
    w = cotangents(inputs)

    def results(inputs, w):
        if form == "pieces":
            return in_pieces(inputs, w, reverse=reverse, lengths=lengths)
        backend = "chunked" if form == "loop" else form
        return run(inputs, w, reverse=reverse, lengths=lengths, backend=backend)

    padding = (torch.arange(PIECE + 9) >= lengths[:, None])[..., None]
    dirty = [x.masked_fill(padding, math.nan) if x.shape[1] == PIECE + 9 else x for x in (*inputs, *w)]
    for name, value, target in zip(NAMES, results(dirty[:6], dirty[6:]), results(inputs, w), strict=True):
        assert torch.equal(value, target), name
        if value.shape[1] == PIECE + 9:
            assert (value.masked_select(padding) == 0).all()
    _, state, *_, d_state = results(inputs, w)
    assert torch.equal(state[2], inputs[5][2])
    assert torch.equal(d_state[2], w[1][2])


def test_split_and_resume():
    inputs = make(2, 3 * PIECE, 5, 4)
    w = cotangents(inputs)
    whole = run(inputs, w)
    leaves = [x.requires_grad_() for x in inputs]
    *rows, state = leaves
    outputs = []
    for part in (slice(0, 1), slice(1, PIECE + 8), slice(PIECE + 8, None)):
        its = [x if x.dim() == 2 else x[:, part] for x in rows]
        y, state = selective_scan(*its, initial_state=state, output_final_state=True)
        outputs.append(y)
    outputs = [torch.cat(outputs, 1), state]
    for name, value, target in zip(NAMES, [*outputs, *torch.autograd.grad(outputs, leaves, w)], whole, strict=True):
        assert_close(value, target, 1e-13, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shut_gate_forgets_everything(dtype):
    inputs = make(1, PIECE + 11, 5, 4, dtype)
    inputs[1][:, 17] = 1e6
    w = cotangents(inputs)
    values = run(inputs, w)
    assert all(x.isfinite().all() for x in values)
    later = [x[:, 17:] if x.shape[:2] == (1, PIECE + 11) else x for x in inputs]
    expected = run([*later[:5], torch.zeros_like(inputs[5])], [w[0][:, 17:], w[1]])
    for n in (0, 2, 5, 6):
        assert_close(values[n][:, 17:], expected[n], TOLERANCE[dtype])
    assert_close(values[1], expected[1], TOLERANCE[dtype], "state")


def test_the_exponential_is_exact_to_the_last_digits():
    x = torch.cat([torch.linspace(-90, 0, 40_001), torch.tensor([-torch.inf, -1e30, -0.0])])
    inputs = [
        torch.ones(1, 1, len(x)),
        -x[None, None],
        -torch.ones(len(x), 1),
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, 1),
    ]
    y = selective_scan(*inputs, initial_state=torch.ones(1, len(x), 1))[0, 0]
    expected = x.double().exp()
    normal = x > -87
    assert ((y.double() - expected)[normal] / expected[normal]).abs().max() < 1.5 * torch.finfo(torch.float32).eps
    assert (y[~normal] == 0).all()
    inputs[1] = torch.full_like(inputs[1], math.nan)
    assert selective_scan(*inputs, initial_state=torch.ones(1, len(x), 1)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    inputs = [x.to(dtype) for x in make(2, 50, 4, 3)]
    y, state = selective_scan(*inputs[:5], output_final_state=True)
    expected, last = selective_scan(*(x.float() for x in inputs[:5]), output_final_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(state, last)


def test_same_bits_whatever_the_threads(monkeypatch):
    monkeypatch.setattr(loop, "MIN_WORK", 1)
    inputs = make(3, 70, 2 * loop.WIDTH + 10, 4, torch.float32)
    w = cotangents(inputs)
    expected = run(inputs, w)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for value, target in zip(run(inputs, w), expected, strict=True):
                assert torch.equal(value, target)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("ends", [{"lengths": torch.tensor([5, 3])}, {"cu_seqlens": torch.tensor([0, 2, 2, 5])}])
@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives(reverse, ends):
    packed = "cu_seqlens" in ends
    inputs = [x.requires_grad_() for x in make(1 if packed else 2, 5, 3, 2, rows=3 if packed else None)]

    def f(v, dt, A, write, read, h0):
        return selective_scan(v, dt, A, write, read, initial_state=h0, output_final_state=True, reverse=reverse, **ends)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_layouts_of_gradients():
    inputs = make(2, 12, 6, 3, torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:5]]
    expected = torch.autograd.grad(selective_scan(*leaves), leaves, torch.ones(2, 12, 6))
    for value, target in zip(torch.autograd.grad(selective_scan(*leaves).sum(), leaves), expected, strict=True):
        assert torch.equal(value, target)


def test_operator():
    v, dt, A, write, read, state = make(2, 6, 4, 3, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (v, dt, A.mT, write, read, state.mT)]
    lengths = torch.tensor([6, 2])
    torch.library.opcheck(torch.ops.seqzoo.selective_scan.default, (*leaves, True, lengths, None, True))
    plain = [x.detach() for x in leaves]
    kept = torch.ops.seqzoo.selective_scan(*plain, True, lengths, None, True)[2]
    arguments = (torch.randn_like(v), plain[5], *plain, True, lengths, None, kept)
    torch.library.opcheck(torch.ops.seqzoo.selective_scan_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    inputs = make(2, 40, 4, 3, torch.float32)
    w, lengths = cotangents(inputs), torch.tensor([40, 5])
    expected = run(inputs, w, lengths=lengths)
    leaves = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(selective_scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    outputs = compiled(*leaves[:5], initial_state=leaves[5], output_final_state=True, lengths=lengths)
    for value, target in zip([*outputs, *torch.autograd.grad(outputs, leaves, w)], expected, strict=True):
        assert torch.equal(value, target)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for y in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(y, Tensor):
                self.numel = max(self.numel, y.untyped_storage().nbytes() // y.element_size())
        return output


@pytest.mark.parametrize("form", [run, in_pieces])
def test_states_of_all_steps_are_never_held(form):
    T, D, N = 1024, 20, 16
    inputs = make(2, T, D, N, torch.float32)
    w = cotangents(inputs)
    with LargestTensor() as largest:
        form(inputs, w)
    assert largest.numel <= 2 * T * D


def test_errors():
    v, dt, A, write, read, state = make(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"selective_scan: v must be \[B, T, D\] with T >= 1, got \[5, 3\]"):
        selective_scan(v[0], dt, A, write, read)
    with pytest.raises(ValueError, match=r"A must be \[D, N\] with D = 3, got \[4, 3\]"):
        selective_scan(v, dt, A.mT, write, read)
    with pytest.raises(ValueError, match=r"dt must be \[2, 5, 3\], got \[2, 5, 4\]"):
        selective_scan(v, write, A, write, read)
    with pytest.raises(ValueError, match=r"read must be \[2, 5, 4\], got \[2, 4, 4\]"):
        selective_scan(v, dt, A, write, read[:, :4])
    with pytest.raises(TypeError, match=r"real numbers of floating point, got torch\.int64"):
        selective_scan(v, dt, A, write.long(), read)
    with pytest.raises(ValueError, match=r"initial_state must be \[B, D, N\] = \[2, 3, 4\], got \[1, 3, 4\]"):
        selective_scan(v, dt, A, write, read, initial_state=state[:1])
    row = [x.reshape(1, 10, -1) for x in (v, dt, write, read)]
    with pytest.raises(ValueError, match=r"initial_state must be \[documents, D, N\] = \[2, 3, 4\], got \[1, 3, 4\]"):
        selective_scan(*row[:2], A, *row[2:], initial_state=state[:1], cu_seqlens=torch.tensor([0, 4, 10]))
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, T\] = \[0, 5\]"):
        selective_scan(v, dt, A, write, read, lengths=torch.tensor([6, 1]))
    with pytest.raises(ValueError, match="no backend 'fused'; valid: auto, chunked, reference"):
        selective_scan(v, dt, A, write, read, backend="fused")
