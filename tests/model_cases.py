"""Small models of every kind of input, and inputs for them."""

import torch

from seqzoo.models import ModelConfig
from seqzoo.spec import TaskSpec

TOKENS = TaskSpec(name="tokens", kind="tokens", vocab_size=12, max_length=32, num_classes=3, pad_id=1, mask_id=0)
PIXELS = TaskSpec(
    name="pixels",
    kind="pixels",
    vocab_size=256,
    max_length=32,
    num_classes=10,
    channels=3,
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
)
PAIRS = TaskSpec(name="pairs", kind="tokens", vocab_size=12, max_length=32, num_classes=2, mask_id=0, num_inputs=2)


def config(**changes):
    settings = {"name": "m", "d_model": 16, "num_layers": 2, "block": {"name": "lru"}, **changes}
    return ModelConfig(**settings)


def inputs(spec, B=4, T=20):
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "pixels":
        return torch.randint(256, (B, T, spec.channels), generator=generator, dtype=torch.uint8)
    shape = (B, 2, T) if spec.num_inputs == 2 else (B, T)
    return torch.randint(2, spec.vocab_size, shape, generator=generator)
