"""What benchmarks/blocks.py times beside blocks computes what they do, with the same weights."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from originals import ORIGINALS, take

from seqzoo import build_block

D = 32


@pytest.mark.parametrize("original", ORIGINALS, ids=lambda original: original.name)
@torch.no_grad()
def test_the_same_weights_give_the_same_outputs(original):
    try:
        layer = original.build(D)
    except ImportError as error:
        pytest.skip(str(error))
    block = build_block(original.block, D, causal=True)
    take(block, original, layer)
    x = torch.randn(2, 40, D)
    assert_close(block(x), layer(x), 1e-4)
