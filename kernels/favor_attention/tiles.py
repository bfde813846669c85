"""What the kernels of FAVOR attention share."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, piece_of


@triton.jit
def finite(maximum):
    """A maximum over no key at all, -inf, as 0: what it is subtracted from is -inf itself."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def half_square(k_t):
    k_f = k_t.to(tl.float32)
    return tl.sum(k_f * k_f, 1) / 2


@triton.jit
def key_scores(k_t, half, w_t, seen, inside, PRECISION: tl.constexpr):
    """Logarithms of the features of keys, [keys, features], -inf where there is no key or no feature."""
    scores = dot(k_t, tl.trans(w_t), PRECISION) - half[:, None]
    return tl.where(seen[:, None] & inside[None, :], scores, float("-inf"))


@triton.jit
def pick(x, at, AXIS: tl.constexpr):
    """x without the axis, where it is `at`."""
    index = tl.arange(0, x.shape[AXIS])
    here = (index == at)[None, :] if AXIS == 1 else (index == at)[:, None]
    return tl.sum(tl.where(here, x, 0.0), AXIS)  # a maximum would lose NaN on a GPU


@triton.jit
def in_document(pieces, step, segment_len):
    """Of pieces that count for `segment_len` steps each: how far a step lies from its number; its document's end."""
    piece = step // segment_len
    _, origin, n, ahead = piece_of(pieces, piece)
    begin = piece * segment_len
    return origin + ahead - begin, begin + n - ahead


@triton.jit
def left_out(steep, head, first, T, CAREFUL: tl.constexpr, GROUP: tl.constexpr):
    """Whether the steps from `first` on are for the other launch."""
    is_steep = tl.load(steep + head.to(tl.int64) * tl.cdiv(T, GROUP) + first // GROUP) != 0
    return is_steep != CAREFUL
