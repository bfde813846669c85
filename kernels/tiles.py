"""What Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from . import backends

INTERPRETED = tl.constexpr(backends.INTERPRETED)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b in float32, of operands in bfloat16 or float16, or in float32 with the `input_precision` named."""
    if PRECISION == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif PRECISION == "bf16" and not INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        precision: tl.constexpr = "ieee" if INTERPRETED else PRECISION
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=precision)


@triton.jit
def valid_steps(lengths, b, T):
    """How many of T steps are valid, whatever stands in `lengths` [B]: nothing outside of tensors is ever touched.

    All of them, where `lengths` is None.
    """
    if lengths is None:
        return T
    else:
        return tl.minimum(tl.maximum(tl.load(lengths + b), 0), T).to(tl.int32)


@triton.jit
def piece_of(pieces, piece):
    """Of a row of `pieces` [P, 4]: its document, where that begins, its steps, and how many are ahead of the piece."""
    row = pieces + piece.to(tl.int64) * 4
    document, origin, n, ahead = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return document, origin, n.to(tl.int32), ahead.to(tl.int32)


@triton.jit
def place(step, n, down):
    """Where in memory a step of a pass over a sequence lies, from its end if `down`. What is past the end stays."""
    return tl.where(down & (step < n), n - 1 - step, step).to(tl.int64)


@triton.jit
def head_rows(x, b, first, length, head, heads, width):
    """One head of x [B, length, heads, width], from position `first` on. Past here, offsets are short."""
    return x + ((b * length + first) * heads + head) * width


@triton.jit
def load_tile(x, row, stride, channel, width, mask):
    """[rows, channels]."""
    at = row[:, None] * stride + channel[None, :]
    return tl.load(x + at, mask=mask[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def absorb(scores, v_t, sums, m, total, PRECISION: tl.constexpr):
    """What some columns change of the weighted sum of values, the maximum and the sum of weights; scores to base 2."""
    highest = tl.maximum(m, tl.max(scores, 1))
    level = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - level[:, None])
    fading = tl.exp2(m - level)
    return sums * fading[:, None] + dot(weights, v_t, PRECISION), highest, total * fading + tl.sum(weights, 1)
