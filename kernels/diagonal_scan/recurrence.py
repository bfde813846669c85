"""The kernel of both passes.

Complex tensors are pairs of float32. Steps are counted in the direction of the recurrence, "past the end" means past a
sequence's length: there a state passes unchanged.

Documents are sequences of lengths of their own in one row, from `starts` on. Where time is cut, every one of them is by
itself: programs then are told by `document` and `number` which piece of which document they have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import place, valid_steps


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
    starts,  # [B + 1], or None: B sequences of T steps
    document,  # [chunks], or None: all sequences have as many chunks; B where there is none
    number,  # [chunks], of the chunk in its document
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
    if document is not None:
        which = tl.load(document + chunk).to(tl.int32)
        if which >= B:
            return
        entry, chunk = entry * B + which, tl.load(number + chunk).to(tl.int32)
    b, down = entry, DOWN
    if BOTH:
        b, down = entry % B, (entry >= B) != BACKWARD
    column = (tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = column < width
    if starts is None:
        n, end = valid_steps(lengths, b, T), T
        shared, sequence = b.to(tl.int64) * T * width, entry.to(tl.int64) * T * width
    else:
        begin = tl.load(starts + b)
        n = (tl.load(starts + b + 1) - begin).to(tl.int32)
        end = n
        shared, sequence = begin * width, ((entry // B).to(tl.int64) * T + begin) * width
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
    if document is not None and y is None:
        if start + chunk_len >= n:  # nothing comes after it
            return
    for first in tl.range(start, min(start + chunk_len, end), STEPS, num_stages=STAGES):
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
            written = (step < end)[:, None] & inside
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
        if document is None:
            final = chunk == chunks - 1
        else:
            final = start + chunk_len >= n
        if after is not None and final:
            if BACKWARD:  # through the first step of the recurrence, the last one here
                row = n.to(tl.int64) * 0 if CONSTANT else place(n - 1, n, down) * width
                here = tl.where(n > 0, inside, False)
                ar, ai = _pairs(tl.load(a + row + column, mask=here, other=0.0).to(tl.float32), PARTS)
                tr, ti = _product(ar, -ai, sr, si, PARTS)
                sr, si = tl.where(n > 0, tr, sr), tl.where(n > 0, ti, si)
            tl.store(after + entry.to(tl.int64) * width + column, _side_by_side(sr, si, PARTS), mask=inside)


@triton.jit(do_not_specialize=["chunks", "B"])
def _carry_kernel(initial, after, through, before, ahead, B, width, chunks, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The state that each chunk starts from, [B, chunks, D] as all of them but `initial` [B, D] or None.

    Of the pieces of documents, there are `ahead` [B + 1] in front of each one's, and `chunks` in all.
    """
    blocks = tl.cdiv(width, WIDTH)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = column < width
    if initial is None:
        s = tl.zeros([1, WIDTH], tl.float32)
    else:
        s = tl.load(initial + b * width + column, mask=inside, other=0.0)
    sr, si = _pairs(s, PARTS)
    if ahead is not None:
        first = tl.load(ahead + b % B)
        own = (tl.load(ahead + b % B + 1) - first).to(tl.int32)
        first = (b // B * chunks + first) * width
        after, through, before = after + first, through + first, before + first
        b, chunks = b * 0, own
    for chunk in range(chunks):
        state = (b * chunks + chunk) * width + column
        tl.store(before + state, _side_by_side(sr, si, PARTS), mask=inside)
        pr, pi = _pairs(tl.load(through + state, mask=inside, other=0.0), PARTS)
        ar, ai = _pairs(tl.load(after + state, mask=inside, other=0.0), PARTS)
        cr, ci = _product(pr, pi, sr, si, PARTS)
        sr, si = cr + ar, ci + ai
