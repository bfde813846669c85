from __future__ import annotations

import numpy as np
import pytest
import torch

from seqzoo.tasks import from_arrays

LABELS = [0, 1] * 20


def test_lists_of_tokens():
    inputs = [[i % 5, 4, 2][: 1 + i % 3] for i in range(40)]
    task = from_arrays("mine", kind="tokens", inputs=inputs, labels=LABELS)
    assert (task.spec.vocab_size, task.spec.mask_id, task.spec.pad_id) == (7, 5, 6)  # ids 0 to 4, then <mask> and <pad>
    assert (task.spec.max_length, task.spec.num_classes) == (3, 2)
    assert [len(split) for split in (task.train, task.val, task.test)] == [32, 4, 4]
    assert task.val.labels.bincount().tolist() == task.test.labels.bincount().tolist() == [2, 2]
    seen = []
    for split in (task.train, task.val, task.test):
        batch = split.batch(torch.arange(len(split)))
        seen += [row[:length].tolist() for row, length in zip(batch.inputs, batch.lengths, strict=True)]
        assert (batch.inputs[torch.arange(batch.inputs.shape[1]) >= batch.lengths[:, None]] == 6).all()
    assert sorted(seen) == sorted(inputs)


def test_given_splits_are_kept():
    task = from_arrays(
        "mine",
        kind="tokens",
        inputs=np.array([[1, 2], [3, 0]]),
        labels=[0, 1],
        val=([[1, 1]], [1]),
        test=(torch.tensor([[9, 2], [0, 0]]), torch.tensor([2, 2])),
    )
    assert task.train.batch(torch.arange(2)).inputs.tolist() == [[1, 2], [3, 0]]
    assert task.val.batch(torch.arange(1)).inputs.tolist() == [[1, 1]]
    assert task.test.batch(torch.arange(2)).inputs.tolist() == [[9, 2], [0, 0]]
    assert (task.spec.vocab_size, task.spec.num_classes) == (12, 3)
    assert task.majority == 1


def test_pixels_with_channels():
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 3), dtype=np.uint8)
    task = from_arrays("mine", kind="pixels", inputs=pictures, labels=LABELS)
    assert (task.spec.vocab_size, task.spec.channels, task.spec.mask_id) == (256, 3, None)
    batch = task.train.batch(torch.arange(len(task.train)))
    assert batch.inputs.shape == (32, 16, 3)
    assert batch.inputs.dtype == torch.uint8
    normalised = (batch.inputs / 255 - torch.tensor(task.spec.mean)) / torch.tensor(task.spec.std)
    assert normalised.mean((0, 1)).abs().max() < 1e-5
    assert (normalised.var((0, 1), correction=0) - 1).abs().max() < 1e-5


def test_a_constant_channel_has_a_deviation_to_divide_by():
    task = from_arrays("mine", kind="pixels", inputs=np.full((40, 4), 9), labels=LABELS)
    assert task.spec.std == (1.0,)


def test_pairs():
    inputs = [([i], [i, 1, 2]) for i in range(40)]
    task = from_arrays("mine", kind="tokens", inputs=inputs, labels=LABELS, num_inputs=2)
    batch = task.train.batch(torch.tensor([0, 5]))
    assert batch.inputs.shape == (2, 2, 3)
    assert batch.lengths.tolist() == [[1, 3], [1, 3]]
    assert (batch.inputs[:, 0, 0] == batch.inputs[:, 1, 0]).all()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(254, torch.uint8), (255, torch.int16), (32767, torch.int32)])
def test_values_take_little_room(vocab_size, dtype):
    task = from_arrays("mine", kind="tokens", inputs=[[1, 2]] * 40, labels=LABELS, vocab_size=vocab_size)
    assert task.train.values.dtype == dtype


ONES = [[1, 1]] * 40


def replaced(values: list, at: int, value) -> list:
    return [*values[:at], value, *values[at + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "words"}, "kind is 'words'; valid: 'tokens', 'pixels'"),
        ({"num_inputs": 3}, "num_inputs is 3; valid: 1, 2"),
        ({"labels": [0, 1]}, "train: 40 inputs and 2 labels"),
        ({"inputs": [], "labels": []}, "train: 0 inputs and 0 labels"),
        ({"inputs": replaced(ONES, 7, [])}, "train: sequence 7 is empty"),
        ({"inputs": replaced(ONES, 7, [0.5])}, r"train: sequence 7 is float64 \[1\]; valid: integers \[T\]"),
        ({"inputs": replaced(ONES, 7, [1, -3])}, "train: sequence 7 has -3 at position 1; valid: 0 to 1"),
        ({"inputs": replaced(ONES, 7, [9]), "vocab_size": 9}, "train: sequence 7 has 9 at position 0; valid: 0 to 8"),
        ({"max_length": 1}, "train: sequence 0 has 2 positions; valid: up to max_length 1"),
        ({"labels": replaced(LABELS, 3, -1)}, "train: label -1 of example 3; valid: 0 to 1"),
        ({"labels": replaced(LABELS, 3, 2), "num_classes": 2}, "train: label 2 of example 3; valid: 0 to 1"),
        ({"labels": [0.0, 1.0] * 20}, r"train: labels are float64 \[40\]"),
        ({"val": (ONES, LABELS[:3])}, "val: 40 inputs and 3 labels"),
        ({"test": ([[]], [0])}, "test: sequence 0 is empty"),
        ({"inputs": ONES[:3], "labels": [0, 1, 0]}, "no test examples are given, and cannot hold 0 of 3"),
        (
            {"inputs": ONES[:1], "labels": [0]},
            "no test examples are given, and none of 1 can be held out; valid: 2 exam",
        ),
        (
            {"inputs": replaced(ONES, 7, [2**31])},
            "train: sequence 7 has 2147483648 at position 0; valid: 0 to 2147483644",
        ),
        ({"inputs": np.ma.masked_array([[1, 2]] * 40, mask=True)}, "train: inputs are a MaskedArray; valid: a list"),
        ({"inputs": (row for row in ONES)}, "train: inputs are a generator; valid: a list"),
        ({"inputs": replaced(ONES, 7, [[1, 2], [3]])}, "train: sequence 7 has rows of unequal length, or no numbers"),
        ({"inputs": replaced([ONES[:2]] * 40, 7, 1), "num_inputs": 2}, "train: example 7 has 0 sequences; valid: 2"),
        ({"val": (ONES,)}, "val is of 1 parts; valid: inputs and labels"),
        ({"name": "lra_image"}, "name='lra_image': valid: a plain name that no task of seqzoo has"),
        ({"mask_ratio": 7.0}, "mask_ratio is 7.0; valid: between 0 and 1"),
        ({"vocab_size": 20.5}, "vocab_size is 20.5; valid: an integer from 1 to"),
        ({"num_classes": "2"}, "num_classes is '2'; valid: an integer from 1 to"),
        ({"kind": "pixels", "vocab_size": 300}, "vocab_size is 300; pixels are uint8"),
        ({"kind": "pixels", "inputs": replaced(ONES, 7, [[1, 2]])}, "train: sequence 7 has 2 channels; valid: 1"),
        (
            {"num_inputs": 2, "inputs": replaced([ONES[:2]] * 40, 7, ONES[:1])},
            "train: example 7 has 1 sequences; valid: 2",
        ),
        (
            {"num_inputs": 2, "inputs": replaced([ONES[:2]] * 40, 7, [[1], []])},
            "train: sequence 1 of example 7 is empty",
        ),
    ],
)
def test_errors_say_where_and_what_is_valid(change, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(**{"name": "mine", "kind": "tokens", "inputs": ONES, "labels": LABELS, **change})
