"""What the kernels of the delta rule share: where a chunk lies, what decays in it, its triangular system.

A chunk has STEPS steps of one head of one sequence or document. Its decays are of intervals, exponentials of sums of
their own: differences of running sums would lose small ones beside large ones, and turn -inf into NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, piece_of, valid_steps


@triton.jit
def chunk_of(pieces, lengths, slot, T, STEPS: tl.constexpr):
    """Of a chunk: where its sequence begins in memory, how many steps of that are ahead of it, how many steps of it are
    valid, and how many there are."""
    if pieces is None:
        chunks = tl.cdiv(T, STEPS)
        b = (slot // chunks).to(tl.int64)
        ahead = slot % chunks * STEPS
        return b * T, ahead, valid_steps(lengths, b, T) - ahead, T - ahead
    else:
        _, origin, n, ahead = piece_of(pieces, slot)
        return origin, ahead, n - ahead, n - ahead


@triton.jit
def sequence_of(starts, before, lengths, sequence, T, STEPS: tl.constexpr):
    """Of a sequence: where it begins in memory, the slot of its first chunk, how many steps of it are valid, and how
    many there are."""
    if starts is None:
        b = sequence.to(tl.int64)
        return b * T, b * tl.cdiv(T, STEPS), valid_steps(lengths, b, T), T
    else:
        origin = tl.load(starts + sequence)
        n = (tl.load(starts + sequence + 1) - origin).to(tl.int32)
        return origin, tl.load(before + sequence), n, n


@triton.jit
def rows_of(x, origin, ahead, head, heads, width):
    """One head of x [..., heads, width] from a step on. Past here, offsets are short."""
    return x + ((origin + ahead) * heads + head) * width


@triton.jit
def square(x, slot, h, H, STEPS: tl.constexpr):
    """Where x [slots, H, STEPS, STEPS] has a chunk of a head."""
    return x + (slot.to(tl.int64) * H + h) * STEPS * STEPS


@triton.jit
def of_steps(x, i, heads, left):
    """[STEPS], of a number per step."""
    return tl.load(x + i * heads, mask=i < left, other=0.0).to(tl.float32)


@triton.jit
def decays(g, i, stride, c, width, left, N: tl.constexpr):
    """Of N steps: what is left of what was before at each, of each behind the last, and of the one behind the other."""
    at = i[:, None] * stride + c[None, :]
    inside = (c < width)[None, :]
    g_t = tl.load(g + at, mask=(i < left)[:, None] & inside, other=0.0)
    later = tl.load(g + at + stride, mask=(i < tl.minimum(left, N) - 1)[:, None] & inside, other=0.0)
    through, after = tl.cumsum(g_t, 0), tl.cumsum(later, 0, reverse=True)
    return tl.exp(through), tl.exp(after), tl.exp(tl.sum(g_t, 0))


@triton.jit
def between(g, i, heads, left):
    """[N, N], the decay of a head from a key to a query, where the key is not ahead."""
    g_t = of_steps(g, i, heads, left)
    return tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :], g_t[:, None], 0.0), 0))


@triton.jit
def inverse_of(M, i, N: tl.constexpr):
    """(I + M)^-1 of M [N, N] below its diagonal, N a power of two.

    By substitution, of one step in the next, of these two in the next two, and so on: inverses of two blocks A and C
    make that of [[A, 0], [B, C]], whose corner is -C^-1 B A^-1. Powers of M would grow beyond all bounds where keys
    resemble each other.
    """
    T = tl.where(i[:, None] == i[None, :], 1.0, tl.zeros([N, N], tl.float32))
    level = 0
    while (1 << level) < N:
        block = i >> level
        corner = (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
        T -= dot(T, dot(tl.where(corner, M, 0.0), T, "tf32x3"), "tf32x3")
        level += 1
    return T
