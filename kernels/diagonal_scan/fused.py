"""The diagonal scan in Triton.

A program runs over a block of channels of one sequence, tile of steps by tile, and carries the state in registers; each
element is read once and written once. Where sequences times blocks of channels do not fill the GPU, time is cut into
chunks too: a first pass finds what each chunk by itself makes of a zero state and how much of a state it lets through,
a short one carries the states from chunk to chunk, and then all chunks run at once.

Backward is the same recurrence in the other direction, with the coefficients of the step before. The gradient of
coefficients that are constant in time is summed in registers, over chunks and sequences after that: no atomics, the
same bits in every run.

Both directions run in one launch, where a direction is one more axis of the batch: what they read of x is shared.

Complex tensors are pairs of float32. Steps are counted in the direction of the recurrence, "past the end" means past a
sequence's length: there a state passes unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backends
from ..blocks import Blocks
from ..common import accumulation_dtype, contiguous
from ..derivatives import differentiable
from ..launching import launch
from ..tiles import place, valid_steps
from . import doubling
from .operator import register

MIN_CHUNK = 256  # steps: a shorter chunk costs more in passes than it gains in programs
PROGRAMS = 4  # wanted for each multiprocessor, before time is cut


class Config(NamedTuple):
    steps: int  # in a tile
    channels: int  # in a block, at most
    num_warps: int
    num_stages: int


BLOCKS = Blocks("diagonal_scan", Path(__file__).with_name("blocks.csv"), Config)


@triton.jit
def _combine(a_first, x_first, a_second, x_second):
    return a_first * a_second, a_second * x_first + x_second


@triton.jit
def _combine_complex(ar, ai, xr, xi, br, bi, yr, yi):
    return ar * br - ai * bi, ar * bi + ai * br, br * xr - bi * xi + yr, br * xi + bi * xr + yi


@triton.jit
def _pairs(x, PARTS: tl.constexpr):
    """Real and imaginary parts of [steps, 2 D] numbers side by side; of real ones, the number twice."""
    if PARTS == 1:
        return x, x
    else:
        return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _side_by_side(re, im, PARTS: tl.constexpr):
    if PARTS == 1:
        return re
    else:
        return tl.reshape(tl.join(re, im), [re.shape[0], 2 * re.shape[1]])


@triton.jit
def _product(ar, ai, br, bi, PARTS: tl.constexpr):
    if PARTS == 1:
        return ar * br, ai
    else:
        return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _row(tile, which):
    return tl.sum(tl.where(which[:, None], tile, 0.0), 0, keep_dims=True)


@triton.jit
def _coefficients(a, step, n, column, width, down, CONSTANT: tl.constexpr, BACKWARD: tl.constexpr, PARTS: tl.constexpr):
    """What multiplies the state at each step: a, and on the way back the conjugate of the step before's."""
    read = step - 1 if BACKWARD else step
    reads = (read >= 0) & (step < n)
    mask = reads[:, None] & (column < width)
    row = read.to(tl.int64) * 0 if CONSTANT else place(read, n, down) * width
    ar, ai = _pairs(tl.load(a + row[:, None] + column, mask=mask, other=0.0).to(tl.float32), PARTS)
    ar, ai = tl.where(reads[:, None], ar, 1.0), tl.where(reads[:, None], ai, 0.0)
    return ar, -ai if BACKWARD else ai


@triton.jit(do_not_specialize=["B", "T", "chunk_len", "chunks"])
def _scan_kernel(
    x,  # [B, T, D]; on the way back, the gradient of h
    a,  # [D] or [B, T, D]
    y,  # [B, T, D], or None: only `after` and `through` are wanted
    before,  # [B, chunks, D], float32, or None: zero
    after,  # [B, chunks, D] if y is None, else [B, D] or None
    through,  # [B, chunks, D] if y is None
    h,  # [B, T, D] and [B, D], on the way back
    initial,
    da,  # [B, chunks, D], or [B, T, D]
    factor,  # [D], real, or None
    df,  # [B, chunks, D], on the way back, the sum of h times its gradient, number by number
    lengths,  # [B] or None
    B,
    T,
    width,  # numbers in a step
    chunk_len,
    chunks,
    CONSTANT: tl.constexpr,
    DOWN: tl.constexpr,
    BOTH: tl.constexpr,  # directions: of a, lengths and, on the way forth, x there are B, of all else 2 B
    BACKWARD: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(width, WIDTH)
    item = tl.program_id(0) // blocks  # a sequence's chunk
    entry, chunk = item // chunks, item % chunks
    b, down = entry, DOWN
    if BOTH:
        b, down = entry % B, (entry >= B) != BACKWARD
    column = (tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = column < width
    n = T if lengths is None else valid_steps(lengths, b, T)
    shared, sequence = b.to(tl.int64) * T * width, entry.to(tl.int64) * T * width
    x += sequence if BACKWARD else shared
    if not CONSTANT:
        a += shared
    state = item.to(tl.int64) * width + column

    if before is None:
        s = tl.zeros([1, WIDTH], tl.float32)
    else:
        s = tl.load(before + state, mask=inside, other=0.0)
    sr, si = _pairs(s, PARTS)
    if initial is not None:
        h_first = tl.load(initial + entry.to(tl.int64) * width + column, mask=inside, other=0.0)
    pr, pi = _pairs(tl.zeros([1, WIDTH], tl.float32), PARTS)
    pr += 1.0  # what of a state at the start is left
    dr, di = _pairs(tl.zeros([1, WIDTH], tl.float32), PARTS)  # the gradient of constant coefficients
    if factor is not None:
        f = tl.load(factor + column // PARTS, mask=inside, other=0.0)
        of_factor = tl.zeros([1, WIDTH], tl.float32)

    start = chunk * chunk_len
    for first in tl.range(start, min(start + chunk_len, T), STEPS, num_stages=STAGES):
        step = first + tl.arange(0, STEPS)
        valid = step < n
        row = place(step, n, down)
        mask = valid[:, None] & inside
        at = row[:, None] * width + column
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if factor is not None:
            if not BACKWARD:
                u *= f
            elif y is not None:
                h_t = tl.load(h + sequence + at, mask=mask, other=0.0).to(tl.float32)
                of_factor += tl.sum(u * h_t, 0, keep_dims=True)
        ur, ui = _pairs(u, PARTS)
        ar, ai = _coefficients(a, step, n, column, width, down, CONSTANT, BACKWARD, PARTS)
        if PARTS == 1:
            ar, ur = tl.associative_scan((ar, ur), 0, _combine)
            ai, ui = ar, ur
        else:
            ar, ai, ur, ui = tl.associative_scan((ar, ai, ur, ui), 0, _combine_complex)
        cr, ci = _product(ar, ai, sr, si, PARTS)
        ur, ui = ur + cr, ui + ci
        last = tl.arange(0, STEPS) == STEPS - 1
        sr, si = _row(ur, last), _row(ui, last)
        if y is None:
            pr, pi = _product(_row(ar, last), _row(ai, last), pr, pi, PARTS)
        else:
            written = (step < T)[:, None] & inside
            ur, ui = tl.where(valid[:, None], ur, 0.0), tl.where(valid[:, None], ui, 0.0)
            out = _side_by_side(ur, ui, PARTS)
            if BACKWARD and factor is not None:
                out *= f
            tl.store(y + sequence + at, out.to(y.dtype.element_ty), mask=written)
            if BACKWARD:
                # With the state that the step started from, the one of the step after on the way back.
                reads = step + 1 < n
                other = place(step + 1, n, down)[:, None] * width + column
                hs = tl.load(h + sequence + other, mask=reads[:, None] & inside, other=0.0).to(tl.float32)
                if initial is not None:
                    hs += tl.where((step + 1 == n)[:, None], h_first, 0.0)
                hr, hi = _pairs(hs, PARTS)
                gr, gi = _product(ur, ui, hr, -hi, PARTS)
                if CONSTANT:
                    dr, di = dr + tl.sum(gr, 0, keep_dims=True), di + tl.sum(gi, 0, keep_dims=True)
                else:
                    tl.store(da + sequence + at, _side_by_side(gr, gi, PARTS).to(da.dtype.element_ty), mask=written)

    if y is None:
        tl.store(after + state, _side_by_side(sr, si, PARTS), mask=inside)
        tl.store(through + state, _side_by_side(pr, pi, PARTS), mask=inside)
    else:
        if BACKWARD and CONSTANT:
            tl.store(da + state, _side_by_side(dr, di, PARTS), mask=inside)
        if BACKWARD and factor is not None:
            tl.store(df + state, of_factor, mask=inside)
        if after is not None and chunk == chunks - 1:
            if BACKWARD:  # through the first step of the recurrence, the last one here
                row = n.to(tl.int64) * 0 if CONSTANT else place(n - 1, n, down) * width
                ar, ai = _pairs(tl.load(a + row + column, mask=inside & (n > 0), other=0.0).to(tl.float32), PARTS)
                tr, ti = _product(ar, -ai, sr, si, PARTS)
                sr, si = tl.where(n > 0, tr, sr), tl.where(n > 0, ti, si)
            tl.store(after + entry.to(tl.int64) * width + column, _side_by_side(sr, si, PARTS), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def _carry_kernel(initial, after, through, before, width, chunks, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The state that each chunk starts from, [B, chunks, D] as all of them but `initial` [B, D] or None."""
    blocks = tl.cdiv(width, WIDTH)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = column < width
    if initial is None:
        s = tl.zeros([1, WIDTH], tl.float32)
    else:
        s = tl.load(initial + b * width + column, mask=inside, other=0.0)
    sr, si = _pairs(s, PARTS)
    for chunk in range(chunks):
        state = (b * chunks + chunk) * width + column
        tl.store(before + state, _side_by_side(sr, si, PARTS), mask=inside)
        pr, pi = _pairs(tl.load(through + state, mask=inside, other=0.0), PARTS)
        ar, ai = _pairs(tl.load(after + state, mask=inside, other=0.0), PARTS)
        cr, ci = _product(pr, pi, sr, si, PARTS)
        sr, si = cr + ar, ci + ai


def diagonal_scan_fused(
    x: Tensor,  # [B, T, D]
    a: Tensor,  # [D] or [B, T, D]
    initial_state: Tensor | None,  # [B, D]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    factor: Tensor | None,  # [D], real
) -> tuple[Tensor, Tensor]:
    factor = None if factor is None else factor.float()
    initial_state = None if initial_state is None else initial_state.to(accumulation_dtype(x.dtype))
    return _scan(x, a, initial_state, reverse, lengths, factor)


def both_scans_fused(x: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """h of either direction, [B, T, D] each."""
    forth, back = _both_scans(x, a, lengths, None if factor is None else factor.float()).unbind(0)
    return forth, back


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `doubling.scan`."""
    B, _, D = x.shape
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty(B, D, dtype=accumulation_dtype(x.dtype))
    _launch(x, a, h, initial_state, final, lengths, factor=factor, down=reverse)
    return h, final


def scan_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `doubling.scan_backward`."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    d_initial = torch.empty_like(d_state, memory_format=torch.contiguous_format)
    options: dict[str, Any] = {"factor": factor, "down": not reverse, "h": h, "initial": initial_state}
    da, of_factor = _launch(dh, a, dx, d_state, d_initial, lengths, **options)
    assert da is not None
    if factor is None or of_factor is None:
        return dx, da, d_initial, _no_factor(h)
    valid, _, last = doubling.ends(h, reverse, lengths)
    of_states = d_state * h[torch.arange(len(h), device=h.device), last].conj_physical()
    if initial_state is not None:
        of_states = of_states - d_initial * initial_state.conj_physical()
    of_states = torch.where(valid[:, 0], of_states, 0).sum(0)
    return dx, da, d_initial, (of_factor + of_states.real) / factor


@torch.library.custom_op("seqzoo::both_scans_fused", mutates_args=())
def _both_scans(x: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None) -> Tensor:
    """h of both directions, [2, B, T, D]."""
    h = x.new_empty(2, *x.shape)
    _launch(x, a, h, None, None, lengths, factor=factor, both=True)
    return h


@torch.library.custom_op("seqzoo::both_scans_fused_backward", mutates_args=())
def _both_scans_backward(
    dh: Tensor, h: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and the factor."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    da, of_factor = _launch(dh, a, dx, None, None, lengths, factor=factor, both=True, h=h)
    assert da is not None
    return dx.sum(0), da, _no_factor(h) if factor is None or of_factor is None else of_factor / factor


@_both_scans.register_fake
def _(x, a, lengths, factor):
    return x.new_empty(2, *x.shape)


@_both_scans_backward.register_fake
def _(dh, h, a, lengths, factor):
    return h.new_empty(h.shape[1:]), a.new_empty(a.shape), _no_factor(h) if factor is None else factor.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[1:])


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    dx, da, d_factor = _written(dh, *ctx.saved_tensors)
    return dx, da, None, d_factor if ctx.needs_input_grad[3] else None


def _plain(dh: Tensor, h: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None) -> tuple[Tensor, ...]:
    """As `_both_scans_backward`, for PyTorch to differentiate."""
    last = torch.zeros_like(h[0, :, 0])
    forth, back = (doubling.gradients(_scan, dh[i], last, h[i], a, None, bool(i), lengths, factor) for i in range(2))
    dx, da, _, d_factor = (x + y for x, y in zip(forth, back, strict=True))
    return dx, da, d_factor


_both_scans.register_autograd(_gradient, setup_context=_save)
_written = differentiable(_both_scans_backward, _plain)


def _launch(
    x: Tensor,  # [B, T, D]; with `both` and h, as y
    a: Tensor,
    y: Tensor,  # [B, T, D], with `both` [2, B, T, D]
    state: Tensor | None,
    final: Tensor | None,
    lengths: Tensor | None,
    *,
    down: bool = False,
    both: bool = False,
    factor: Tensor | None,
    h: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills y and `final`; with h, runs backward and returns the gradient of a, and that of the factor times itself.

    The latter without what the states bring.
    """
    (B, T, D), parts = y.shape[-3:], 2 if x.is_complex() else 1
    entries = 2 * B if both else B
    backward, constant, width = h is not None, a.dim() == 1, D * parts
    config = BLOCKS.of("scan", x.device, x.dtype)
    block = parts * min(config.channels, triton.next_power_of_2(D))
    blocks = triton.cdiv(width, block)
    chunk_len = _chunk_len(entries * blocks, T, config.steps, x.device)
    chunks = triton.cdiv(T, chunk_len)

    of_coefficients = of_factor = None
    factor, lengths = contiguous(factor, lengths)
    if backward and factor is not None:
        of_factor = x.new_empty(entries, chunks, width, dtype=torch.float32)
    if backward:
        shape, dtype = ((entries, chunks, D), accumulation_dtype(x.dtype)) if constant else ((entries, T, D), a.dtype)
        of_coefficients = x.new_empty(shape, dtype=dtype)
    arrays = [_numbers(z) for z in (x, a)]
    before, after, behind = _numbers(state), _numbers(final), [_numbers(z) for z in (h, initial, of_coefficients)]
    meta = {
        "CONSTANT": constant,
        "DOWN": down,
        "BOTH": both,
        "BACKWARD": backward,
        "PARTS": parts,
        "STEPS": config.steps,
        "WIDTH": block,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
    sizes = (B, T, width, chunk_len, chunks)
    programs = entries * chunks * blocks
    if chunks > 1:
        ends, through, starts = (x.new_empty(entries, chunks, width, dtype=torch.float32) for _ in range(3))
        launch(
            _scan_kernel,
            programs,
            *(*arrays, None, None, ends, through, None, None, None, factor, None, lengths, *sizes),
            **meta,
        )
        launch(
            _carry_kernel,
            entries * blocks,
            *(before, ends, through, starts, width, chunks),
            PARTS=parts,
            WIDTH=block,
            num_warps=config.num_warps,
        )
        before = starts
    launch(
        _scan_kernel,
        programs,
        *(*arrays, _numbers(y), before, after, None, *behind, factor, of_factor, lengths, *sizes),
        **meta,
    )
    if of_factor is not None:
        of_factor = of_factor.unflatten(-1, (D, parts)).sum((0, 1, 3))
    if of_coefficients is None:
        return None, None
    if constant:
        return of_coefficients.sum((0, 1)).to(a.dtype), of_factor
    return of_coefficients.unflatten(0, (2, B)).sum(0) if both else of_coefficients, of_factor


def _no_factor(h: Tensor) -> Tensor:
    return h.new_empty(0, dtype=torch.float32)


def _chunk_len(programs: int, T: int, steps: int, device: torch.device) -> int:
    """All of T, or a multiple of `steps` such that the GPU has enough to do."""
    chunks = min(PROGRAMS * backends.multiprocessors(device) // programs, T // MIN_CHUNK)
    return T if chunks < 2 else triton.cdiv(triton.cdiv(T, chunks), steps) * steps


def _numbers(x: Tensor | None) -> Tensor | None:
    """As the kernels read it: contiguous, complex numbers as pairs."""
    if x is None:
        return None
    return torch.view_as_real(x.resolve_conj().contiguous()) if x.is_complex() else x.contiguous()


_scan, _, _ = register("diagonal_scan_fused", scan, scan_backward)
