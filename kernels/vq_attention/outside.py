"""What attention takes from outside the windows, by code: a loop over blocks, forward and backward.

The loop holds the values summed by code once, where a product over all blocks would hold a sum for each: from block to
block what enters the window is taken out and what leaves it, if not causal, is put back. Where all these sums are
small they are made at once; not if causal, where a product would carry a NaN back in time. It is a registered operator,
or a graph compiler would unroll it. A block's window ends with its neighbours, so that the first block outside is two
away. G = B H sequences, N blocks of L positions each, S codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype
from ..diagonal_scan import diagonal_scan
from ..documents import Documents

AT_ONCE = 2**19  # numbers in the sums of all blocks, two megabytes of them


def sums_outside(blocks: Tensor, causal: bool, starts: Tensor | None = None) -> Tensor:
    """Sums over the blocks outside each block's window, of what each block has: [B, H, N, X].

    Of documents whose first blocks are `starts`, B = 1, each over its own.
    """
    N = blocks.shape[2]
    if starts is not None:
        return _sums_in_documents(blocks, causal, Documents(starts, N))
    outside = F.pad(blocks, (0, 0, 2, 0))[:, :, :N].cumsum(2)
    if not causal:
        outside = outside + F.pad(blocks, (0, 0, 0, 2))[:, :, 2:].flip(2).cumsum(2).flip(2)
    return outside


def _sums_in_documents(blocks: Tensor, causal: bool, documents: Documents) -> Tensor:
    if not blocks.is_floating_point():  # what is exact may be subtracted
        document, block = documents.of_steps(), torch.arange(documents.T, device=blocks.device)
        first, end = documents.starts[document], documents.starts[document + 1]
        up_to = F.pad(blocks.cumsum(2), (0, 0, 1, 0))
        outside = up_to[:, :, torch.maximum(block - 1, first)] - up_to[:, :, first]
        if not causal:
            outside = outside + up_to[:, :, end] - up_to[:, :, torch.minimum(block + 2, end)]
        return outside

    row = blocks[0].transpose(0, 1).flatten(1)  # [N, H X]
    outside = _scan(row, 2, documents) if causal else _scan(row, 2, documents) + _scan(row, -2, documents)
    return outside.unflatten(2, (blocks.shape[1], -1)).transpose(1, 2)


def _scan(row: Tensor, ahead: int, documents: Documents) -> Tensor:
    """Sums over the blocks `ahead` of each or further, or behind: [1, N, X]."""
    source = torch.arange(documents.T, device=row.device) - ahead
    document = documents.of_steps()
    same = (source >= 0) & (source < documents.T) & (document.roll(ahead) == document)
    others = torch.where(same[:, None], row.roll(ahead, 0), 0)[None]
    return diagonal_scan(others, others.new_ones(others.shape[-1]), reverse=ahead < 0, cu_seqlens=documents.starts)


Visit = tuple[int, int, bool | Tensor]


def _visits(documents: Documents, causal: bool) -> list[list[Visit]]:
    """The ways to go through blocks. At each, what the way comes to: a block, the one two ahead of it on the way, and
    whether that is of another document: then nothing outside the block's window is ahead of it."""
    N, number = documents.T, documents.positions()
    ways = [(range(N), -2, number < 2)]
    if not causal:
        ways.append((range(N - 1, -1, -1), 2, documents.lengths[documents.of_steps()] - number <= 2))
    visits = []
    for order, step, fresh in ways:
        known = fresh.tolist() if fresh.device.type == "cpu" else fresh.unbind()
        visits.append([(i, i + step, known[i] if 0 <= i + step < N else True) for i in order])
    return visits


@torch.library.custom_op("seqzoo::vq_read_outside", mutates_args=())
def read_outside(weights: Tensor, values: Tensor, codes: Tensor, causal: bool, starts: Tensor | None = None) -> Tensor:
    """Σ_j weights[codes_j] values_j over the keys j before a query's window and, if not causal, behind it.

    Args:
        weights: [G, N, L, S], for each query and code.
        values: [G, N, L, Dv], zero where there is no key.
        codes: int64 [G, N, L].
        starts: int64, the first block of each document in a row, and N; a key is one of the query's own document.

    Returns: [G, N, L, Dv].
    """
    if _at_once(weights, values, causal, starts):
        return torch.bmm(weights.flatten(0, 1), _sums_at_once(values, codes, weights)).view(values.shape)
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    by_block = _blocks(weights)
    if starts is not None:
        for i, sums in _sums_by_document(weights, values, codes, _visits(Documents(starts, len(by_block)), causal)):
            out[:, i] += torch.bmm(by_block[i], sums)
        return out
    for i, sums in _sums_of_values(weights, values, codes, causal):
        out[:, i] = torch.bmm(by_block[i], sums)
    return out


@torch.library.custom_op("seqzoo::vq_read_outside_backward", mutates_args=())
def read_outside_backward(
    dy: Tensor, weights: Tensor, values: Tensor, codes: Tensor, causal: bool, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and values from `dy`, that of what was read."""
    if _at_once(weights, values, causal, starts):
        d_weights = torch.bmm(dy.flatten(0, 1), _sums_at_once(values, codes, weights).mT)
        d_sums = torch.bmm(weights.flatten(0, 1).mT, dy.flatten(0, 1)).to(accumulation_dtype(values.dtype))
        d_values = _outside(d_sums, weights.shape[1]).flatten(0, 1)[_rows_at_once(codes, weights.shape[-1])]
        return d_weights.view(weights.shape), d_values.view(values.shape).to(values.dtype)
    d_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    dy_of, weights_of, row = _blocks(dy), _blocks(weights), _rows(codes, weights.shape[-1])
    N, d_sums = len(row), _sums(weights, values)
    # If causal, a block's gradient is written once, else it is a sum.
    dtype = values.dtype if causal else d_sums.dtype
    d_values = torch.zeros_like(values, dtype=dtype, memory_format=torch.contiguous_format)

    def read(block: int) -> Tensor:  # [G, L, Dv]
        return d_sums.flatten(0, 1)[row[block]].view_as(values[:, block])

    if starts is not None:
        visits = _visits(Documents(starts, N), causal)
        for i, sums in _sums_by_document(weights, values, codes, visits):
            d_weights[:, i] += torch.bmm(dy_of[i], sums.mT)
        for way in visits:
            d_sums.zero_()
            for i, other, fresh in reversed(way):
                if fresh is True:
                    d_sums.zero_()
                    continue
                d_sums += torch.bmm(weights_of[i].mT, dy_of[i])
                if fresh is not False:
                    d_sums.masked_fill_(fresh, 0)
                d_values[:, other] += read(other)
        return d_weights, d_values.to(values.dtype)
    for i, sums in _sums_of_values(weights, values, codes, causal):
        d_weights[:, i] = torch.bmm(dy_of[i], sums.mT)
    for i in range(N - 1, 1 if causal else -1, -1):  # adds up the gradients of the sums that blocks from i on read
        d_sums += torch.bmm(weights_of[i].mT, dy_of[i])
        if i >= 2:
            d_values[:, i - 2] = read(i - 2)
        if not causal and i + 1 < N:
            d_values[:, i + 1] -= read(i + 1)
    for i in range(N if causal else 1, N):
        d_values[:, i] += read(i)
    return d_weights, d_values.to(values.dtype)


@read_outside.register_fake
def _(weights: Tensor, values: Tensor, codes: Tensor, causal: bool, starts: Tensor | None = None) -> Tensor:
    return values.new_empty(values.shape)


@read_outside_backward.register_fake
def _(
    dy: Tensor, weights: Tensor, values: Tensor, codes: Tensor, causal: bool, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), values.new_empty(values.shape)


def _at_once(weights: Tensor, values: Tensor, causal: bool, starts: Tensor | None) -> bool:
    """Whether sums for all blocks take less time at once than with calls for each block, and may be made so."""
    return not causal and starts is None and weights[:, :, 0].numel() * values.shape[-1] <= AT_ONCE


def _rows_at_once(codes: Tensor, S: int) -> Tensor:
    """Where the keys of all blocks have their codes in sums [G N S, Dv]: [G N L]."""
    (rows,) = _rows(codes.flatten(0, 1)[:, None], S)
    return rows


def _sums_at_once(values: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """The sums of values by code outside the window of each block, [G N, S, Dv] to multiply."""
    sums = _sums(weights.flatten(0, 1), values)
    rows = _rows_at_once(codes, weights.shape[-1])
    sums.flatten(0, 1).index_add_(0, rows, values.flatten(0, 2).to(sums.dtype))
    return _outside(sums, weights.shape[1]).to(weights.dtype)


def _outside(sums: Tensor, N: int) -> Tensor:
    """As `sums_outside`, on both sides, of what N blocks have each: [G N, S, Dv]. For so few a product takes less time
    than cumulative sums."""
    ones = sums.new_ones(N, N)
    return torch.matmul(ones.tril(-2) + ones.triu(2), sums.view(-1, N, sums[0].numel())).view(sums.shape)


def _sums_of_values(weights: Tensor, values: Tensor, codes: Tensor, causal: bool) -> Iterator[tuple[int, Tensor]]:
    """Each block that has others outside its window, and the sums of their values by code, [G, S, Dv] to multiply."""
    N, row, sums = weights.shape[1], _rows(codes, weights.shape[-1]), _sums(weights, values)

    def add(block: int, sign: int) -> None:
        sums.flatten(0, 1).index_add_(0, row[block], values[:, block].to(sums.dtype).flatten(0, 1), alpha=sign)

    for i in range(N if causal else 1, N):
        add(i, 1)
    for i in range(2 if causal else 0, N):
        if not causal and i + 1 < N:
            add(i + 1, -1)
        if i >= 2:
            add(i - 2, 1)
        yield i, sums.to(weights.dtype)


def _sums_by_document(
    weights: Tensor, values: Tensor, codes: Tensor, visits: list[list[Visit]]
) -> Iterator[tuple[int, Tensor]]:
    """As `_sums_of_values`, once on each way through the blocks of documents."""
    row, sums = _rows(codes, weights.shape[-1]), _sums(weights, values)
    for way in visits:
        sums.zero_()
        for i, other, fresh in way:
            if fresh is True:
                sums.zero_()
                continue
            sums.flatten(0, 1).index_add_(0, row[other], values[:, other].to(sums.dtype).flatten(0, 1))
            if fresh is not False:
                sums.masked_fill_(fresh, 0)
            yield i, sums.to(weights.dtype)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Each block by itself, dense in memory: N of [G, L, .]."""
    return x.transpose(0, 1).contiguous().unbind(0)


def _rows(codes: Tensor, S: int) -> tuple[Tensor, ...]:
    """Where the keys of each block have their codes in sums [G S, Dv]: N of [G L]."""
    return tuple(
        rows.flatten() for rows in _blocks(torch.arange(len(codes), device=codes.device)[:, None, None] * S + codes)
    )


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    """[G, S, Dv], in single precision at least."""
    shape = len(weights), weights.shape[-1], values.shape[-1]
    return values.new_zeros(shape, dtype=accumulation_dtype(values.dtype))
