"""What a block was built with can be read from it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from block_cases import CASES, D, every

from seqzoo import BLOCKS, build_block
from seqzoo.blocks import Block, block_name


@every
def test_options_build_the_same_block(name, options, causal):
    torch.manual_seed(0)
    block = build_block(name, D, causal=causal, **options)
    assert block.options.items() >= {"d_model": D, "causal": causal, **options}.items()
    assert all(type(value) in (bool, int, float, str, type(None)) for value in block.options.values())
    assert block_name(block) == name
    torch.manual_seed(0)
    other = build_block(name, **block.options)
    assert other.options == block.options
    assert repr(other) == repr(block)
    for (key, a), b in zip(block.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", [case.values[0] for case in CASES if str(case.id).endswith("-0-causal")])
def test_defaults_are_filled_in(name):
    block = BLOCKS[name](32)
    assert BLOCKS[name](**block.options).options == block.options
    assert {key: block.options[key] for key in ("d_model", "causal")} == {"d_model": 32, "causal": False}


def test_options_stand_in_what_is_printed():
    shown = repr(build_block("conv", 8, causal=True, dropout=0.5))
    assert shown.splitlines()[1].strip() == "d_model=8, causal=True, width=5, dropout=0.5"


def test_options_are_the_original_s_in_copies_and_nobody_changes_them():
    block = build_block("gla", 16, gate_rank=3)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.options == block.options
    block.options["gate_rank"] = 5
    assert block.options["gate_rank"] == 3


class Own(Block):
    def __init__(self, d_model, *, causal=False, decay=0.9, **others):
        super().__init__(d_model, causal=causal)
        self.decay, self.others = decay, others

    def mix(self, x, state, lengths):
        return x, None


def test_a_block_of_one_s_own_says_them_without_doing_anything():
    assert Own(4, decay=0.5, kind="a").options == {"d_model": 4, "causal": False, "decay": 0.5, "kind": "a"}
    with pytest.raises(TypeError, match="d_model"):
        Own()
    with pytest.raises(ValueError, match="Own is not among BLOCKS"):
        block_name(Own(4))
