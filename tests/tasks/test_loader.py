"""Splits as PyTorch's data sets."""

import pytest
import torch
from torch.utils.data import DataLoader

from seqzoo import Batch, TaskSpec
from seqzoo.tasks import Split


def split_of(pairs=False, answers=False):
    """40 examples of up to 11 tokens."""
    inputs = 2 if pairs else 1
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (40 * inputs,), generator=generator)
    spec = TaskSpec(
        name="own",
        kind="tokens",
        vocab_size=5,
        max_length=11,
        num_classes=2,
        num_inputs=inputs,
        pad_id=0,
        answer="positions" if answers else "class",
    )
    values = torch.randint(0, 5, (int(lengths.sum()),), generator=generator)
    return Split(
        spec=spec,
        values=values,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        labels=torch.arange(40) % 2,
        targets=values if answers else None,
    )


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"answers": True}])
def test_a_loader_gives_batches(options):
    split = split_of(**options)
    seen = []
    for number, loaded in enumerate(DataLoader(split, batch_size=8, drop_last=False)):
        batch = Batch(**loaded)
        expected = split.batch(torch.arange(8 * number, min(8 * number + 8, len(split))))
        for a, b in zip(batch, expected, strict=True):
            assert a is b is None or torch.equal(a, b)
        seen += batch.index.tolist()
    assert seen == list(range(len(split)))
    shuffled = DataLoader(split, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert sorted(int(n) for loaded in shuffled for n in loaded["index"]) == seen


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"answers": True}])
def test_an_example_has_no_padding(options):
    split = split_of(**options)
    for number, example in enumerate(split):
        batch = split.batch(torch.tensor([number]))
        n = int(batch.lengths.max())
        assert torch.equal(example["inputs"], batch.inputs[0, ..., :n])
        assert torch.equal(example["lengths"], batch.lengths[0])
        assert example["index"] == number
        if options.get("answers"):
            assert torch.equal(example["targets"], batch.targets[0, :n])
    assert torch.equal(split[-1]["inputs"], example["inputs"])
    with pytest.raises(IndexError, match=f"example {len(split)} of {len(split)} of own"):
        split[len(split)]
