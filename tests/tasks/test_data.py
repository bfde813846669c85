from __future__ import annotations

import numpy as np
import pytest
import torch

from seqzoo.spec import IGNORED, TaskSpec
from seqzoo.tasks import Split, Task, epoch_order, nested, stratified


def make_split(lengths, *, kind="tokens", channels=1, num_inputs=1, max_length=80, pad_id=7) -> tuple[Split, list]:
    """A random split and its sequences [T, channels] one by one."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 200, (T, channels), generator=generator, dtype=torch.uint8) for T in lengths]
    spec = TaskSpec(
        name="toy",
        kind=kind,
        vocab_size=256,
        max_length=max_length,
        num_classes=3,
        channels=channels,
        pad_id=pad_id,
        num_inputs=num_inputs,
    )
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    labels = torch.arange(len(lengths) // num_inputs) % 3
    return Split(spec=spec, values=torch.cat(sequences).flatten(), offsets=offsets, labels=labels), sequences


@pytest.mark.parametrize("kind", ["tokens", "pixels"])
@pytest.mark.parametrize("num_inputs", [1, 2])
def test_batch_equals_a_loop(kind, num_inputs):
    channels = 3 if kind == "pixels" else 1
    lengths = [5, 1, 39, 80, 17, 10, 2, 33]
    split, sequences = make_split(lengths, kind=kind, channels=channels, num_inputs=num_inputs)
    index = torch.tensor([2, 0, 2, 3])
    batch = split.batch(index)

    T = batch.inputs.shape[-1] if kind == "tokens" else batch.inputs.shape[-2]
    pad = 7 if kind == "tokens" else 0
    expected = torch.full((len(index), num_inputs, T, channels), pad)
    for b, i in enumerate(index):
        for j in range(num_inputs):
            sequence = sequences[i * num_inputs + j]
            expected[b, j, : len(sequence)] = sequence
    if kind == "tokens":
        expected = expected.squeeze(-1)
    if num_inputs == 1:
        expected = expected.squeeze(1)
    assert batch.inputs.dtype == (torch.int64 if kind == "tokens" else torch.uint8)
    assert batch.inputs.shape == expected.shape
    assert (batch.inputs == expected).all()
    assert batch.lengths.tolist() == split.lengths[index].tolist()
    assert batch.labels.tolist() == (index % 3).tolist()
    assert batch.index.tolist() == index.tolist()


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_a_batch_of_nothing(num_inputs):
    split, _ = make_split([5, 1, 39, 80], num_inputs=num_inputs)
    batch = split.batch(torch.empty(0, dtype=torch.int64))
    assert batch.inputs.shape == ((0, 10) if num_inputs == 1 else (0, 2, 10))
    assert batch.lengths.shape == ((0,) if num_inputs == 1 else (0, 2))


@pytest.mark.parametrize(
    ("longest", "padded"), [(1, 10), (10, 10), (11, 20), (20, 20), (21, 40), (41, 60), (60, 60), (61, 80), (80, 80)]
)
def test_padding_buckets(longest, padded):
    split, _ = make_split([1, longest, 80])
    assert split.batch(torch.tensor([0, 1])).inputs.shape == (2, padded)


def test_bucket_of_an_uneven_length_is_rounded_up():
    split, _ = make_split([1, 2], max_length=9)
    assert split.batch(torch.tensor([0])).inputs.shape == (1, 2)


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_subset_batches_alike(num_inputs):
    split, _ = make_split([5, 1, 39, 80, 17, 10, 2, 33], kind="pixels", channels=2, num_inputs=num_inputs)
    index = torch.tensor([3, 0, 2])
    subset = split.subset(index)
    assert len(subset) == 3
    assert subset.lengths.tolist() == split.lengths[index].tolist()
    assert len(subset.values) == 2 * int(subset.lengths.sum())
    whole, part = split.batch(index), subset.batch(torch.arange(3))
    assert torch.equal(whole.inputs, part.inputs)
    assert torch.equal(whole.labels, part.labels)


def test_mean_length_and_to():
    split, _ = make_split([2, 4, 9])
    assert split.mean_length == 5
    assert torch.equal(split.to("cpu").batch(torch.tensor([1])).inputs, split.batch(torch.tensor([1])).inputs)


@pytest.mark.parametrize("index", [[-1], [0, 3]])
def test_index_out_of_the_split(index):
    split, _ = make_split([2, 4, 9])
    for method in (split.batch, split.subset):
        with pytest.raises(IndexError, match="out of a split of 3"):
            method(torch.tensor(index))


def test_a_split_refuses_lengths_it_cannot_hold():
    with pytest.raises(ValueError, match="0 to 4 positions; valid: 1 to max_length 80"):
        make_split([4, 0])
    with pytest.raises(ValueError, match="4 to 81 positions"):
        make_split([4, 81])
    split, _ = make_split([4, 5])
    with pytest.raises(ValueError, match="3 sequences need 4 offsets, got 3"):
        Split(spec=split.spec, values=split.values, offsets=split.offsets, labels=torch.zeros(3, dtype=torch.int64))


def test_majority():
    split, _ = make_split([1] * 7)  # labels 0 1 2 0 1 2 0
    assert Task(spec=split.spec, train=split, val=split, test=split).majority == 3 / 7


def asking(answer: str, lengths: list[int], targets: torch.Tensor | None = None) -> Split:
    """A split whose values count up from 0 over all sequences."""
    spec = TaskSpec(name="toy", kind="tokens", vocab_size=200, max_length=8, num_classes=200, answer=answer, pad_id=199)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    values, labels = torch.arange(sum(lengths)), torch.zeros(len(lengths), dtype=torch.int64)
    return Split(spec=spec, values=values, offsets=offsets, labels=labels, targets=targets)


def test_targets_go_with_their_positions():
    targets = torch.tensor([IGNORED, 7, 7, IGNORED, 5, 6], dtype=torch.int16)
    split = asking("positions", [2, 3, 1], targets)
    batch = split.batch(torch.tensor([1, 0]))
    assert batch.inputs.tolist() == [[2, 3, 4, 199], [0, 1, 199, 199]]
    assert batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == [[7, IGNORED, 5, IGNORED], [IGNORED, 7, IGNORED, IGNORED]]
    subset = split.subset(torch.tensor([2, 1])).to("cpu")
    assert subset.targets.tolist() == [6, 7, IGNORED, 5]
    assert subset.batch(torch.tensor([0])).targets.tolist() == [[6]]
    assert split.majority == 2 / 4, "of what is asked"


def test_majority_of_next_positions():
    split = asking("next", [3, 2, 1])
    split.values[:] = torch.tensor([1, 1, 2, 1, 1, 1])
    assert split.majority == 2 / 3, "the first of a sequence is not asked for"
    assert split.batch(torch.tensor([0])).targets is None


def test_a_split_refuses_targets_that_do_not_suit_it():
    with pytest.raises(ValueError, match="answer 'positions' takes 3 targets, got none"):
        asking("positions", [1, 2])
    with pytest.raises(ValueError, match="answer 'positions' takes 3 targets, got 2"):
        asking("positions", [1, 2], torch.zeros(2))
    with pytest.raises(ValueError, match="answer 'next' takes no targets, got 3"):
        asking("next", [1, 2], torch.zeros(3))


def test_stratified_keeps_shares():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen = stratified(labels, 20, seed=3)
    assert labels[chosen].bincount().tolist() == [12, 6, 2]
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(chosen, stratified(labels, 20, seed=3))
    assert not torch.equal(chosen, stratified(labels, 20, seed=4))


@pytest.mark.parametrize("n", [0, 1, 7, 99, 100])
def test_stratified_takes_exactly_n(n):
    labels = torch.tensor([5] * 61 + [9] * 29 + [2] * 10)
    chosen = stratified(labels, n, seed=0)
    assert len(chosen) == n
    counts = [(labels[chosen] == label).sum().item() for label in (5, 9, 2)]
    assert all(abs(count - share * n) < 1 for count, share in zip(counts, (0.61, 0.29, 0.1), strict=True))


def test_stratified_cannot_take_more_than_there_are():
    with pytest.raises(ValueError, match="cannot take 4 of 3"):
        stratified(torch.tensor([0, 1, 0]), 4, seed=0)


FRACTIONS = [0.005, 0.01, 0.05, 0.1, 0.3, 0.31, 0.32, 0.5, 1]


def test_smaller_fractions_lie_inside_larger_ones():
    labels = torch.arange(1000) % 7 % 4  # uneven classes, in whose largest remainders `stratified` would take turns
    before: set[int] = set()
    for fraction in FRACTIONS:
        chosen = nested(labels, fraction, seed=0)
        assert torch.equal(chosen, chosen.unique())
        assert before <= set(chosen.tolist())
        before = set(chosen.tolist())
        for size, taken in zip(labels.bincount().tolist(), labels[chosen].bincount().tolist(), strict=True):
            assert taken == max(1, round(size * fraction))
    assert len(before) == 1000
    assert torch.equal(nested(labels, 0.1, seed=0), nested(labels, 0.1, seed=0))
    assert not torch.equal(nested(labels, 0.1, seed=0), nested(labels, 0.1, seed=1))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_a_fraction_is_of_something(fraction):
    with pytest.raises(ValueError, match=f"a fraction of {fraction}; valid: above 0 and up to 1"):
        nested(torch.tensor([0, 1]), fraction, seed=0)


def test_epoch_order_is_a_function_of_seed_and_epoch():
    order = epoch_order(100, seed=1, epoch=2)
    assert order.sort().values.tolist() == list(range(100))
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(order, epoch_order(100, seed=1, epoch=2))
    others = [epoch_order(100, seed=s, epoch=e) for s, e in ((2, 1), (1, 3), (0, 2), (1, 0))]
    assert not any(torch.equal(order, other) for other in others)
