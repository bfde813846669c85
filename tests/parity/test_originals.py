"""What benchmarks/blocks.py times beside blocks computes what they do, with the same weights."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from originals import ORIGINALS

from seqzoo import build_block

D = 32


@pytest.mark.parametrize("original", ORIGINALS, ids=lambda original: original.name)
@torch.no_grad()
def test_the_same_weights_give_the_same_outputs(original):
    pytest.importorskip(original.package)
    layer, block = original.build(D), build_block(original.block, D, causal=True)
    block.load_state_dict(original.weights(layer))
    x = torch.randn(2, 40, D)
    assert_close(block(x), layer(x), 1e-4)
