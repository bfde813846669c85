"""Block sizes as the tables have them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from seqzoo.kernels import backends, measured
from seqzoo.kernels.blocks import Blocks

GPU = torch.device("cuda", 0)
TABLES = ["attention.fused", "diagonal_scan.fused", "favor_attention.fused", "gated_attention.fused"]
TABLES += ["linear_attention.fused", "vq_attention.fused", "vq_attention.nearest"]
TABLE = """architecture,dtype,width,few_warps,kernel,rows,num_warps
80,any,0,0,sum,1,4
80,bfloat16,32,1,sum,2,2
80,bfloat16,64,0,forward,3,4
80,bfloat16,128,0,forward,4,4
90,bfloat16,64,0,forward,5,8
90,bfloat16,128,0,forward,6,8
"""


class Config(NamedTuple):
    rows: int
    num_warps: int


@pytest.fixture
def blocks(tmp_path):
    path = tmp_path / "blocks.csv"
    path.write_text(TABLE)
    return Blocks("op", path, Config)


@pytest.fixture
def on(monkeypatch):
    return lambda architecture: monkeypatch.setattr(backends, "architecture", lambda device: architecture)


def test_the_newest_architecture_and_the_narrowest_row_that_fit(blocks, on):
    for architecture, width, rows in ((80, 16, 3), (86, 64, 3), (89, 65, 4), (90, 64, 5), (120, 100, 6)):
        on(architecture)
        assert blocks.of("forward", GPU, torch.bfloat16, width).rows == rows
        assert blocks.of("sum", GPU, torch.float32).rows == 1
    with pytest.raises(ValueError, match="op: no block sizes of 'forward' for 200 channels of bfloat16"):
        blocks.of("forward", GPU, torch.bfloat16, 200)


def test_few_warps_by_one_switch(blocks, on, monkeypatch):
    on(90)
    assert blocks.of("sum", GPU, torch.bfloat16, 32).rows == 1
    monkeypatch.setattr(backends, "FEW_WARPS", True)
    assert blocks.of("sum", GPU, torch.bfloat16, 32).rows == 2
    assert blocks.of("sum", GPU, torch.bfloat16, 33).rows == 1
    assert blocks.of("forward", GPU, torch.bfloat16, 32).rows == 5


def test_few_warps_where_nothing_else_passed(blocks, on, monkeypatch):
    on(90)
    rows = {measured.Key(90, "op", "bfloat16", 32): measured.Measured(1, "a card", "a run")}
    monkeypatch.setattr(measured, "FASTER", rows)
    measured.few_warps.cache_clear()
    assert blocks.of("sum", GPU, torch.bfloat16, 32).rows == 2
    measured.few_warps.cache_clear()


def test_sizes_are_replaced_for_a_while(blocks, on):
    on(90)
    with blocks.replaced("forward", Config(7, 1)):
        assert blocks.of("forward", GPU, torch.bfloat16, 64) == (7, 1)
        assert blocks.of("sum", GPU, torch.bfloat16, 64).rows == 1
    assert blocks.of("forward", GPU, torch.bfloat16, 64).rows == 5


def test_what_is_written_is_what_was_read(blocks):
    assert blocks.rows
    blocks.path.unlink()
    blocks.write()
    assert blocks.path.read_text() == TABLE


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_its_kernels_on_every_architecture(name):
    blocks = import_module(f"seqzoo.kernels.{name}").BLOCKS
    named = {(key.dtype, key.kernel) for key in blocks.rows}
    for architecture in (80, 90, 100, 120):
        there = {
            (key.dtype, key.kernel) for key in blocks.rows if key.architecture == architecture and not key.few_warps
        }
        assert there == named
    for key, config in blocks.rows.items():
        assert config.num_warps <= (2 if key.few_warps else 8), key
        assert key.width <= 32 or not key.few_warps, key


def test_tables_travel_with_the_package():
    assert '"kernels/**/*.csv"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
