"""States that are carried from chunk to chunk: in graphs one operator, which a compiler would unroll otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..documents import Pieces


def carry(
    updates: Tensor,  # [B, H, N, Dk, Dv], what each chunk adds
    decays: Tensor,  # [..., N or 1, 1 or Dk, 1], of each chunk
    state: Tensor,  # [B, H, Dk, Dv], ahead of the first one
    pieces: Pieces | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The state that reaches each chunk [B, H, N, Dk, Dv], and the one that leaves the last [B, H, Dk, Dv].

    Of pieces, `state` and those that leave are of documents, [N, H, Dk, Dv].
    """
    if torch.compiler.is_compiling():
        decays = decays[(None,) * (updates.dim() - decays.dim())]
        if pieces is not None:
            return _in_documents_of_a_graph(updates, decays, state, pieces)
        return carried(updates, decays, state, 2, reverse)
    N = updates.shape[2]
    steps = list(zip(updates.unbind(2), decays.expand(*decays.shape[:-3], N, -1, -1).unbind(-3), strict=True))
    if pieces is not None:
        return _carry_in_documents(steps, state, pieces)
    states = []
    for update, decay in reversed(steps) if reverse else steps:
        states.append(state)
        state = torch.addcmul(update, decay, state)
    return torch.stack(states[::-1] if reverse else states, 2), state


@custom_op("seqzoo::carry", mutates_args=())
def carried(updates: Tensor, decays: Tensor | None, state: Tensor, time: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """The state that reaches each of the chunks along dimension `time`, as `updates`, and the one that leaves the last.

    Args:
        updates: [..., N, ...], what each chunk adds.
        decays: what is kept of a state over each chunk, of as many dimensions, none of them larger; None is all.
        state: ahead of the first one, [..., ...].
        reverse: whether the last chunk is the first that is reached.
    """
    reached, order = torch.empty_like(updates, memory_format=torch.contiguous_format), range(updates.shape[time])
    for i in reversed(order) if reverse else order:
        reached.select(time, i).copy_(state)
        update = updates.select(time, i)
        if decays is None:
            state = state + update
        else:
            decay = decays.select(time, i if decays.shape[time] > 1 else 0)
            state = torch.addcmul(update, decay, state)
    return reached, state.clone(memory_format=torch.contiguous_format)


@carried.register_fake
def _(updates: Tensor, decays: Tensor | None, state: Tensor, time: int, reverse: bool) -> tuple[Tensor, Tensor]:
    return updates.new_empty(updates.shape), state.new_empty(state.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, decays, _, ctx.time, ctx.reverse = inputs
    ctx.save_for_backward(decays, None if decays is None else output[0])


def _gradient(ctx: Any, d_reached: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
    """What is carried back is what was carried forth."""
    decays, reached = ctx.saved_tensors
    d_updates, d_state = carried(d_reached, decays, d_last, ctx.time, not ctx.reverse)
    d_decays = None if decays is None else (d_updates * reached).sum_to_size(decays.shape)
    return d_updates, d_decays, d_state, None, None


carried.register_autograd(_gradient, setup_context=_keep)


def _in_documents_of_a_graph(updates: Tensor, decays: Tensor, first: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """As `_carry_in_documents`. A document's own state comes with its first piece, ahead of which nothing is kept."""
    begin = pieces.begin()[:, None, None]  # [P, 1, 1]
    starts = pieces.of_documents(first).transpose(0, 1)[None]  # [1, H, P, Dk, Dv]
    updates, decays = updates + torch.where(begin, decays * starts, 0), torch.where(begin, 0, decays)
    reached, last = carried(updates, decays, torch.zeros_like(starts[:, :, 0]), 2, False)
    after = torch.cat([reached[:, :, 1:], last[:, :, None]], 2)[0].transpose(0, 1)  # [P, H, Dk, Dv]
    return torch.where(begin, starts, reached).contiguous(), pieces.last(after, first)


def _carry_in_documents(steps: list[tuple[Tensor, Tensor]], first: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    starts, begin = pieces.of_documents(first)[:, None], pieces.begin()  # P times [1, H, Dk, Dv]
    before, after = [], [starts[0]]
    for (update, decay), start, anew in zip(steps, starts, begin, strict=True):
        before.append(torch.where(anew, start, after[-1]))
        after.append(torch.addcmul(update, decay, before[-1]))
    return torch.stack(before, 2), pieces.last(torch.cat(after[1:]), first)
