"""The checks of states: a sequence in parts is the sequence, and a state is a value. They take what those of `contract`
do."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks import Block
from .agreement import assert_close, expect
from .cases import Build, inputs_of

SPLITS = ([1] * 23, [7, 16], [22, 1], [1, 22], [8, 8, 7], [2, 21], [1, 2, 3, 17])


def streams(block: Block) -> bool:
    """Whether its class has states."""
    return type(block).initial_state is not Block.initial_state


def extend_equals_forward(build: Build, splits: Sequence[Sequence[int]] = SPLITS) -> None:
    block = build()
    x = inputs_of(block, 2, 23)
    whole = block(x)
    for split in splits:
        state = block.initial_state(2, dtype=torch.float64)
        parts = []
        for part in x.split(list(split), 1):
            y, state = block.extend(part, state)
            parts.append(y)
        assert_close(torch.cat(parts, 1), whole, 1e-10, f"extend by {list(split)}, beside forward")
        expect(state.position.tolist() == [23, 23], f"position is {state.position.tolist()} after 23 steps")


def extend_takes_ragged_steps(build: Build) -> None:
    block = build()
    x = inputs_of(block, 2, 30)
    whole = block(x)
    state = block.initial_state(2, dtype=torch.float64)
    position = torch.zeros(2, dtype=torch.int64)
    for lengths in ([5, 1], [9, 9], [1, 4], [10, 3]):
        steps = torch.tensor(lengths)
        piece = torch.full((2, 10, block.d_model), math.nan, dtype=torch.float64)
        for b in range(2):
            piece[b, : lengths[b]] = x[b, position[b] : position[b] + lengths[b]]
        y, state = block.extend(piece, state, lengths=steps)
        for b in range(2):
            here = slice(int(position[b]), int(position[b]) + lengths[b])
            assert_close(y[b, : lengths[b]], whole[b, here], 1e-10, f"extend by lengths={lengths}")
            expect((y[b, lengths[b] :] == 0).all(), "outputs past a length are not zero")
        position += steps
    expect(state.position.tolist() == position.tolist(), f"position is {state.position.tolist()}, not {position}")


def extend_begins_without_a_state(build: Build) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        block = build(dtype=dtype)
        x = inputs_of(block, 2, 12, dtype)
        given, begun = block.initial_state(2), None
        expect(
            all(part.dtype in (torch.int64, dtype, torch.float32) for part in _parts(given)),
            f"a state of a block in {dtype} is kept in {[part.dtype for part in _parts(given)]}",
        )
        for part in x.split([1, 7, 4], 1):
            y, given = block.extend(part, given)
            z, begun = block.extend(part, begun)
            expect(torch.equal(y, z), "from None, extend gives something else than from initial_state")
        same = all(map(torch.equal, _parts(given), _parts(begun)))
        expect(same, "from None, extend leaves another state than from initial_state")
        wide = dtype != torch.float64 or {part.dtype for part in _parts(given)} <= {torch.int64, dtype}
        expect(wide, f"a state in {dtype} is kept in {[part.dtype for part in _parts(given)]}")
    with torch.device("meta"):
        held = _parts(type(block)(**block.options).initial_state(3))
    expect({part.device.type for part in held} == {"meta"}, "a state does not lie where the block's parameters do")


def a_state_is_a_value(build: Build) -> None:
    """Saved, moved, forked and taken apart, it goes on as its sequences do, and stays what it was."""
    block = build()
    x = inputs_of(block, 3, 9)
    y = block(x)[:, 6:]
    _, state = block.extend(x[:, :6], None)
    lacking = [name for name in ("fork", "select", "repeat", "to") if not hasattr(state, name)]
    expect(
        not lacking, f"{type(state).__name__} has no {', '.join(lacking)}; valid: @seqzoo.blocks.state_of() before it"
    )
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    every, some = torch.arange(3), torch.tensor([2, 0])
    for how, taken, rows in (
        ("saved", torch.load(file, weights_only=True), every),
        ("moved", state.to(x.device, x.dtype), every),
        ("forked", state.fork(), every),
        ("selected", state.select(some), some),
        ("repeated", state.repeat(2), every.repeat_interleave(2)),
        ("continued before", state, every),
    ):
        found, _ = block.extend(x[rows, 6:], taken)
        assert_close(found, y[rows], 1e-10, f"from a state that was {how}")


def a_state_of_other_sequences_is_refused(build: Build) -> None:
    block = build()
    _, state = block.extend(inputs_of(block, 2, 5), None)
    _refused(lambda: block.extend(inputs_of(block, 3, 1), state), "a state of 2 sequences for x of 3; valid: ")


def bidirectional_has_no_state(build: Build) -> None:
    block = build()
    _refused(lambda: block.extend(inputs_of(block, 1, 3), None), "causal=True")
    _refused(lambda: block.initial_state(1), "causal=True")


def _parts(state: Any) -> list[Tensor]:
    """The tensors of a state."""
    return [part for part in state if isinstance(part, Tensor)]


def _refused(call: Callable[[], Any], message: str) -> None:
    try:
        call()
    except ValueError as error:
        expect(message in str(error), f"it is refused by {str(error)!r}; expected: {message!r}")
    else:
        raise AssertionError(f"nothing is raised; expected: a ValueError with {message!r}")


CAUSAL: tuple[Callable[[Build], None], ...] = (
    extend_equals_forward,
    extend_takes_ragged_steps,
    extend_begins_without_a_state,
    a_state_is_a_value,
    a_state_of_other_sequences_is_refused,
)
BIDIRECTIONAL: tuple[Callable[[Build], None], ...] = (bidirectional_has_no_state,)
