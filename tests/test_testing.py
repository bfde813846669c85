"""The contract as it ships: it passes what keeps it, and names what is broken."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import seqzoo
from seqzoo import Block
from seqzoo.blocks import state_of
from seqzoo.testing import check_block
from seqzoo.testing.contract import CHECKS, PACKED
from seqzoo.testing.states import BIDIRECTIONAL, CAUSAL


class Fading(Block):
    """Written as docs/blocks.md says, without a state."""

    later = 0.0  # how much of what is to come it lets through

    def __init__(self, d_model, *, causal=False, decay: float = 0.9):
        super().__init__(d_model, causal=causal)
        self.decay, self.proj = decay, nn.Linear(d_model, d_model, bias=False)

    def mix(self, x, state, lengths):
        age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        weights = self.decay ** age.abs().to(x.dtype)
        weights = weights * torch.where(age >= 0, 1.0, self.later).to(x.dtype) if self.causal else weights
        return self.over_time(lambda v: weights.to(v.dtype) @ v, self.proj(x)), state


def test_a_block_of_one_s_own_passes():
    passed = check_block(Fading, decay=0.8)
    assert len(passed) == 2 * len(CHECKS) + len(BIDIRECTIONAL)
    assert "reach (causal)" in passed


@pytest.mark.slow
def test_the_project_s_own_passes_with_states_and_documents():
    passed = check_block(seqzoo.GLA, num_heads=2)
    assert len(passed) == 2 * len(CHECKS) + len(BIDIRECTIONAL) + len(CAUSAL) + 2 * len(PACKED)


def test_what_is_broken_is_named():
    class Leaking(Fading):
        later = 1e-3

    with pytest.raises(AssertionError) as found:
        check_block(Leaking)
    (line,) = str(found.value).splitlines()[1:]
    assert line.startswith("reach (causal): an output depends on an input that reach=None and causal=True hide from it")

    class Reading(Fading):
        def mix(self, x, state, lengths):
            y, state = super().mix(x, state, lengths)
            return y @ self.proj.weight + x.mean(0), state  # of other rows, too

    with pytest.raises(AssertionError, match="rows_know_nothing_of_each_other") as found:
        check_block(Reading)
    assert "reach" not in str(found.value)

    class Writing(Fading):
        def mix(self, x, state, lengths):
            y, state = super().mix(x, state, lengths)
            if not torch.is_grad_enabled():
                x.mul_(0.5)
            return y, state

    with pytest.raises(AssertionError) as found:
        check_block(Writing)
    lines = str(found.value).splitlines()[1:]
    assert "inputs_are_left_as_they_were (bidirectional): the inputs are others after a call" in lines


@state_of()
class Total(NamedTuple):
    total: Tensor  # [B, D]
    position: Tensor  # [B]


class Bare(NamedTuple):
    total: Tensor
    position: Tensor


class Summing(Block):
    """The sum of all that came before, with a state."""

    kind: type = Total

    def __init__(self, d_model, *, causal=True):
        if not causal:
            raise ValueError("Summing: valid: causal=True")
        super().__init__(d_model, causal=True)
        self.proj = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size, device=None, dtype=None):
        weight = self.proj.weight
        total = torch.zeros(batch_size, self.d_model, device=device or weight.device, dtype=dtype or weight.dtype)
        return self.kind(total, torch.zeros(batch_size, dtype=torch.int64, device=total.device))

    def mix(self, x, state, lengths):
        before = 0 if state is None else state.total[:, None]
        y = self.over_time(lambda v: v.cumsum(1) + before, self.proj(x))
        if state is None:
            return y, None
        return y, self.kind(y[:, -1], state.position + (x.shape[1] if lengths is None else lengths))


def test_a_state_of_one_s_own():
    assert "a_state_is_a_value (causal)" in check_block(Summing)

    class Lacking(Summing):
        kind = Bare

    with pytest.raises(AssertionError) as found:
        check_block(Lacking)
    (line,) = str(found.value).splitlines()[1:]
    assert line.startswith(
        "a_state_is_a_value (causal): Bare has no fork, select, repeat, to; valid: @seqzoo.blocks.state_of()"
    )


def test_directions_that_are_refused_are_left_out():
    class Causal(Fading):
        def __init__(self, d_model, *, causal=True, decay: float = 0.9):
            if not causal:
                raise ValueError("Causal: valid: causal=True")
            super().__init__(d_model, causal=True, decay=decay)

    assert {name.split()[-1] for name in check_block(Causal)} == {"(causal)"}
    with pytest.raises(ValueError, match=r"LRU cannot be built\. causal: "):
        check_block(seqzoo.LRU, r_min=2.0)


def test_a_block_without_a_state_says_so():
    with pytest.raises(NotImplementedError, match="Fading has no initial_state, so it cannot be continued"):
        Fading(4, causal=True).extend(torch.ones(1, 2, 4), None)
