"""Blocks in a model of transformers: built without memory, loaded, and cast while loaded."""

from __future__ import annotations

import copy

import pytest
import torch

from seqzoo import build_block
from seqzoo.blocks import Wide

D = 16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lru", {}),
        ("s4d", {}),
        ("linear_attention", {"decay": True}),
        ("performer", {}),
        ("vq_attention", {}),
        ("vq_attention", {"quantizer": "fsq"}),
    ],
)
def test_saved_and_loaded_by_transformers(name, options, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "block"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.block = build_block(name, D, **options)
            self.post_init()

        def _init_weights(self, module):
            pass

    model = Model(Config()).eval()
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=dtype).eval()
    x = torch.randn(2, 70, D).to(dtype)
    expected = copy.deepcopy(model).block.to(dtype)(x).float()
    assert (loaded.block(x).float() - expected).norm() < 0.01 * expected.norm()
    kept = [part.state_dict() for part in loaded.modules() if isinstance(part, Wide)]
    saved = [part.state_dict() for part in model.modules() if isinstance(part, Wide)]
    for values, expected in zip(kept, saved, strict=True):
        assert all(torch.equal(values[key], expected[key]) for key in expected)
