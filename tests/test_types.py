"""What a type checker makes of a user's program."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_overloads, get_type_hints

import pytest

import seqzoo
from seqzoo import BLOCKS
from seqzoo.blocks import options

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import torch
import seqzoo
from seqzoo import build_block
from seqzoo.kernels import attention, diagonal_scan, linear_attention

x = torch.randn(1, 4, 64)
block = build_block("softmax_attention", d_model=64, causal=True, num_heads=4, dtype=torch.float64)
reveal_type(block)  # SoftmaxAttention
reveal_type(block.num_heads)  # int
reveal_type(block(x, lengths=torch.tensor([4])))  # Tensor
reveal_type(block.extend(x, None)[0])  # Tensor
build_block("softmax_attention", d_model=64, nhead=4)  # error
build_block("min_gru", 64, cell="grr")  # error
block(x, mask=x)  # error
reveal_type(seqzoo.LRU(64, r_min=0.5)(x))  # Tensor
seqzoo.LRU(64, num_heads=4)  # error
for name in seqzoo.BLOCKS:
    reveal_type(build_block(name, 64, causal=True))  # Block
    build_block(name, **block.options)
reveal_type(linear_attention(x, x, x))  # Tensor
reveal_type(linear_attention(x, x, x, output_final_state=True))  # tuple[Tensor, Tensor]
reveal_type(diagonal_scan(x, x, reverse="both"))  # tuple[Tensor, Tensor]
attention(x, x, x, backend="flas")  # error
linear_attention(x, x, x, backend="flash")  # error
reveal_type(seqzoo.auxiliary_loss(block))  # Tensor
"""


@pytest.mark.parametrize("name", BLOCKS)
def test_options_are_those_of_the_class(name):
    kind = BLOCKS[name]
    declared = get_type_hints(getattr(options, f"{kind.__name__}Options"))
    hints = get_type_hints(kind.__init__)
    of_class = [key for key in inspect.signature(kind).parameters if key not in ("d_model", "causal")]
    shared = get_type_hints(options.Shared)
    assert declared == shared | {key: hints[key] for key in of_class}
    assert [*declared] == [*shared, *of_class]


def test_every_block_has_its_overload_and_stands_in_the_package():
    named = [get_type_hints(each)["name"] for each in get_overloads(seqzoo.build_block)]
    assert [hint.__args__[0] for hint in named[:-1]] == list(BLOCKS)
    assert named[-1] is str
    for kind in BLOCKS.values():
        assert getattr(seqzoo, kind.__name__) is kind
        assert kind.__name__ in seqzoo.__all__


@pytest.mark.slow
def test_a_program_is_followed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ["-m", "mypy", "--follow-imports=silent", "--strict", f"--cache-dir={tmp_path}", tmp_path / "program.py"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    said: dict[int, str] = {}
    for line, kind, rest in re.findall(r"program\.py:(\d+): (error|note): (.*)", done.stdout):
        shown = re.search(r'Revealed type is "(.*)"', rest)
        if kind == "error" or shown:
            said[int(line)] = re.sub(r"[\w.]+\.", "", shown[1]) if shown else "error"
    lines = enumerate(PROGRAM.splitlines(), 1)
    assert said == {number: line.split("  # ")[1] for number, line in lines if "  # " in line}, done.stdout
