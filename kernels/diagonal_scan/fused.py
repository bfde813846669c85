"""The diagonal scan in Triton.

A program runs over a block of channels of one sequence, tile of steps by tile, and carries the state in registers; each
element is read once and written once. Where sequences times blocks of channels do not fill the GPU, time is cut into
chunks too: a first pass finds what each chunk by itself makes of a zero state and how much of a state it lets through,
a short one carries the states from chunk to chunk, and then all chunks run at once.

Backward is the same recurrence in the other direction, with the coefficients of the step before. The gradient of
coefficients that are constant in time is summed in registers, over chunks and sequences after that: no atomics, the
same bits in every run.

Both directions run in one launch, where a direction is one more axis of the batch: what they read of x is shared.

Documents in one row are cut by themselves, each into as many pieces as it needs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..blocks import Blocks
from ..common import accumulation_dtype, contiguous
from ..derivatives import differentiable
from ..documents import Documents, count_of, starts_of
from ..launching import cut_time, launch
from . import doubling
from .operator import register
from .recurrence import _carry_kernel, _scan_kernel

# A shorter chunk costs more in passes than it gains in programs.
_chunk_len = partial(cut_time, least=256, wanted=4)


class Config(NamedTuple):
    steps: int  # in a tile
    channels: int  # in a block, at most
    num_warps: int
    num_stages: int


BLOCKS = Blocks("diagonal_scan", Path(__file__).with_name("blocks.csv"), Config)


def diagonal_scan_fused(
    x: Tensor,  # [B, T, D]
    a: Tensor,  # [D] or [B, T, D]
    initial_state: Tensor | None,  # [B, D]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    factor: Tensor | None,  # [D], real
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    factor = None if factor is None else factor.float()
    initial_state = None if initial_state is None else initial_state.to(accumulation_dtype(x.dtype))
    return _scan(x, a, initial_state, reverse, lengths, factor, starts_of(documents))


def both_scans_fused(
    x: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """h of either direction, [B, T, D] each."""
    starts = starts_of(documents)
    forth, back = _both_scans(x, a, lengths, None if factor is None else factor.float(), starts).unbind(0)
    return forth, back


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    factor: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `doubling.scan`."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    sequences = count_of(starts, len(x))
    final = x.new_empty(sequences, x.shape[-1], dtype=accumulation_dtype(x.dtype))
    _launch(x, a, h, initial_state, final, lengths, starts, factor=factor, down=reverse)
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
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `doubling.scan_backward`."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    d_initial = torch.empty_like(d_state, memory_format=torch.contiguous_format)
    options: dict[str, Any] = {"factor": factor, "down": not reverse, "h": h, "initial": initial_state}
    da, of_factor = _launch(dh, a, dx, d_state, d_initial, lengths, starts, **options)
    assert da is not None
    if factor is None or of_factor is None:
        return dx, da, d_initial, _no_factor(h)
    end = doubling.ends(h, reverse, lengths, starts)
    of_states = d_state * end.of(h, end.last).conj_physical()
    if initial_state is not None:
        of_states = of_states - d_initial * initial_state.conj_physical()
    of_states = torch.where(end.some, of_states, 0).sum(0)
    return dx, da, d_initial, (of_factor + of_states.real) / factor


@torch.library.custom_op("seqzoo::both_scans_fused", mutates_args=())
def _both_scans(
    x: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None, starts: Tensor | None = None
) -> Tensor:
    """h of both directions, [2, B, T, D]."""
    h = x.new_empty(2, *x.shape)
    _launch(x, a, h, None, None, lengths, starts, factor=factor, both=True)
    return h


@torch.library.custom_op("seqzoo::both_scans_fused_backward", mutates_args=())
def _both_scans_backward(
    dh: Tensor, h: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and the factor."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    da, of_factor = _launch(dh, a, dx, None, None, lengths, starts, factor=factor, both=True, h=h)
    assert da is not None
    return dx.sum(0), da, _no_factor(h) if factor is None or of_factor is None else of_factor / factor


@_both_scans.register_fake
def _(x, a, lengths, factor, starts=None):
    return x.new_empty(2, *x.shape)


@_both_scans_backward.register_fake
def _(dh, h, a, lengths, factor, starts=None):
    return h.new_empty(h.shape[1:]), a.new_empty(a.shape), _no_factor(h) if factor is None else factor.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[1:])


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    dx, da, d_factor = _written(dh, *ctx.saved_tensors)
    return dx, da, None, d_factor if ctx.needs_input_grad[3] else None, None


def _plain(
    dh: Tensor, h: Tensor, a: Tensor, lengths: Tensor | None, factor: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, ...]:
    """As `_both_scans_backward`, for PyTorch to differentiate."""
    last = h.new_zeros(count_of(starts, h.shape[1]), h.shape[-1])
    ends = (lengths, factor, starts)
    forth, back = (doubling.gradients(_scan, dh[i], last, h[i], a, None, bool(i), *ends) for i in range(2))
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
    starts: Tensor | None,
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
    backward, constant, width = h is not None, a.dim() == 1, D * parts
    config = BLOCKS.of("scan", x.device, x.dtype)
    block = parts * min(config.channels, triton.next_power_of_2(D))
    blocks = triton.cdiv(width, block)
    directions = 2 if both else 1
    chunk_len = _chunk_len(directions * B * blocks, T, config.steps, x.device)
    chunks = triton.cdiv(T, chunk_len)
    factor, lengths, starts = contiguous(factor, lengths, starts)
    cut = None if starts is None or chunks == 1 else Documents(starts, T).pieces(chunk_len)
    B = count_of(starts, B)
    entries = directions * B
    shape = entries, chunks
    if cut is not None:
        chunks = len(cut.document)
        shape = directions, chunks

    of_coefficients = of_factor = None
    empty = x.new_empty if cut is None else x.new_zeros  # some pieces are of no document
    if backward and factor is not None:
        of_factor = empty(*shape, width, dtype=torch.float32)
    if backward:
        of_coefficients = (
            empty(*shape, D, dtype=accumulation_dtype(x.dtype)) if constant else x.new_empty(y.shape, dtype=a.dtype)
        )
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
    pieces = (None, None, None) if cut is None else (cut.document, cut.number, cut.before)
    sizes = (starts, *pieces[:2], B, T, width, chunk_len, chunks)
    programs = shape[0] * chunks * blocks
    if chunks > 1:
        ends, through, carried = (x.new_empty(*shape, width, dtype=torch.float32) for _ in range(3))
        launch(
            _scan_kernel,
            programs,
            *(*arrays, None, None, ends, through, None, None, None, factor, None, lengths, *sizes),
            **meta,
        )
        launch(
            _carry_kernel,
            entries * blocks,
            *(before, ends, through, carried, pieces[2], None if cut is None else B, width, chunks),
            PARTS=parts,
            WIDTH=block,
            num_warps=config.num_warps,
        )
        if cut is not None and final is not None:  # an empty document has no piece
            final.zero_() if state is None else final.copy_(state)
        before = carried
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
    return of_coefficients.sum(0) if both else of_coefficients, of_factor


def _no_factor(h: Tensor) -> Tensor:
    return h.new_empty(0, dtype=torch.float32)


def _numbers(x: Tensor | None) -> Tensor | None:
    """As the kernels read it: contiguous, complex numbers as pairs."""
    if x is None:
        return None
    return torch.view_as_real(x.resolve_conj().contiguous()) if x.is_complex() else x.contiguous()


_scan, _, _ = register("diagonal_scan_fused", scan, scan_backward)
