"""What a block was built with can be read from it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import yaml
from block_cases import CASES, D, every
from registries import forgotten_afterwards

from seqzoo import BLOCKS, build_block, register_block
from seqzoo.blocks import Block, block_name
from seqzoo.blocks.__main__ import main
from seqzoo.blocks.registry import OF_MODELS
from seqzoo.config import CONFIGS


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


@pytest.mark.parametrize("causal", ["no", None, 1])
def test_a_direction_is_true_or_false(causal):
    with pytest.raises(ValueError, match=f"causal={causal!r}: valid: bool"):
        build_block("lru", 16, causal=causal)


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
    with pytest.raises(ValueError, match=r"Own has no name; valid: seqzoo\.register_block, or"):
        block_name(Own(4))


@pytest.fixture
def registered():
    with forgotten_afterwards():
        yield


def test_a_registered_block_is_built_by_its_name(registered):
    assert register_block("own")(Own) is Own
    block = build_block("own", 4, decay=0.5, kind="a")
    assert build_block(block_name(block), **block.options).options == block.options
    register_block("own")(Own)  # read again, as notebooks do

    @register_block("own2")
    class Typed(Own):
        def __init__(self, d_model, *, causal=False, rate: float = 1.0, widths: list[int] | None = None):
            super().__init__(d_model, causal=causal)

    assert build_block("own2", 4, widths=[1, 2]).options["widths"] == [1, 2]
    with pytest.raises(ValueError, match=r"rate='a': valid: float"):
        build_block("own2", 4, rate="a")
    with pytest.raises(ValueError, match=r"no option of own2 'rat' \(did you mean 'rate'\?\)"):
        build_block("own2", 4, rat=1.0)
    with pytest.raises(ValueError, match=r"register_block\('own2'\): valid: letters, digits and _, and no name"):
        register_block("own2")(Own)


def test_what_cannot_be_a_block_is_not_registered(registered):
    with pytest.raises(ValueError, match=r"valid: a subclass of seqzoo\.Block"):
        register_block("own")(torch.nn.Linear)
    for name in ("lru", "flash", "a/b"):
        with pytest.raises(ValueError, match="no name that there is: softmax_attention"):
            register_block(name)(Own)

    class Plain(Own):
        def __init__(self, width):
            super().__init__(width)

    with pytest.raises(ValueError, match=r"Plain takes no d_model and no causal; valid: def __init__\(self, d_model"):
        register_block("own")(Plain)
    assert "own" not in BLOCKS


def test_names_of_models_lead_to_their_blocks():
    models = {path.stem: yaml.safe_load(path.read_text())["block"]["name"] for path in (CONFIGS / "model").iterdir()}
    assert {name: block for name, block in models.items() if name != block} == OF_MODELS
    with pytest.raises(ValueError, match="no block 'flash': in the model of that name it is 'gau'; valid: softmax"):
        build_block("flash", D)
    with pytest.raises(ValueError, match=r"build_block\('lru', 64\), got 64"):
        build_block(64, "lru")


def test_is_built_where_and_as_it_is_asked_for():
    block = build_block("lru", D, device="meta", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in block.parameters()} == {"meta"}
    assert block.out_proj.weight.dtype == torch.bfloat16
    assert {part.dtype for part in block.dynamics.parameters()} == {torch.float32}
    torch.manual_seed(0)
    block = build_block("gau", D, dtype=torch.float64)
    torch.manual_seed(0)
    assert torch.equal(block.uvz_proj.weight, build_block("gau", D).double().uvz_proj.weight)


def test_the_command_lists_blocks(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines[1:] if not line.startswith(" ")]
    assert listed == list(BLOCKS)
    assert "conv                    8,640       256  width=5 dropout=0.0" in lines
    assert lines[1].split()[2:4] == ["128", "T"]
    assert main(["gla", "--d-model=32"]) == 0
    assert "  gate_rank=16\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["lruu"])
    assert "did you mean 'lru'?" in capsys.readouterr().err
