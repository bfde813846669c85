from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from task_configs import small_listops

from seqzoo.tasks import DataError, Task, TaskConfig, build_task, from_arrays
from seqzoo.tasks.checks import verify
from seqzoo.tasks.listops.grammar import MASK, PAD


@pytest.fixture
def listops(tmp_path) -> Task:
    return build_task(small_listops(), data_dir=None, cache_dir=tmp_path)


def changed(task: Task, name: str, part: str, at: int, value: int) -> Task:
    split = getattr(task, name)
    tensor = getattr(split, part).clone()
    tensor[at] = value
    return replace(task, **{name: replace(split, **{part: tensor})})


def test_a_task_as_it_should_be(listops):
    verdict = verify(listops)
    assert verdict.faults == []
    assert verdict.notes[0].startswith("9 files, ")
    assert f"train: 300 examples, {len(listops.train.values):,} values" in verdict.notes


@pytest.mark.parametrize(
    ("name", "part", "at", "value", "fault"),
    [
        ("val", "labels", 3, 10, "val: label 10 of example 3; valid: 0 to 9"),
        ("test", "labels", 7, -1, "test: label -1 of example 7; valid: 0 to 9"),
        ("train", "offsets", 0, 1, "train: sequences reach from 1 to "),
        ("train", "values", 0, 19, "train: 19 in example 0; valid: 0 to 18, <mask> and <pad> excluded"),
        ("train", "values", 0, MASK, "train: 0 in example 0; valid"),
        ("val", "values", -1, PAD, "val: 1 in example 39; valid"),
        ("val", "values", 0, 5, "val: example 0: not a ListOps expression"),
    ],
)
def test_what_is_out_of_range_is_named(listops, name, part, at, value, fault):
    (found,) = verify(changed(listops, name, part, at, value)).faults
    assert found.startswith(fault)


def test_a_tracer_looks_at_pathfinder_labels(tmp_path):
    counts = {"num_train": 40, "num_val": 1, "num_test": 1}
    options = {"difficulty": "curv_contour_length_14", **counts, "generator_seed": 0}
    config = TaskConfig(name="lra_pathfinder", max_length=1024, mask_ratio=0.5, **options)
    task = build_task(config, data_dir=None, cache_dir=tmp_path)
    assert verify(task).faults == []
    swapped = replace(task, train=replace(task.train, labels=1 - task.train.labels))
    (fault,) = verify(swapped).faults
    assert fault.startswith("train: label ")


def test_answers_out_of_range(tmp_path):
    options = {"max_length": 8, "num_symbols": 4, "num_train": 3, "num_val": 3, "num_test": 3, "generator_seed": 0}
    task = build_task(TaskConfig(name="induction_heads", mask_ratio=0.1, **options), data_dir=None, cache_dir=tmp_path)
    assert verify(task).faults == []
    top = task.spec.vocab_size
    (fault,) = verify(changed(task, "val", "targets", 15, top)).faults
    assert fault == f"val: answer {top} in example 1; valid: 0 to {top - 1}, or -100 where nothing is asked"


def test_labels_are_worked_out_anew(listops):
    right = int(listops.test.labels[4])
    (fault,) = verify(changed(listops, "test", "labels", 4, (right + 1) % 10)).faults
    assert fault == f"test: label {(right + 1) % 10} of example 4; its sequence says {right}"


def test_examples_in_two_splits(listops):
    both = replace(listops, test=listops.train.subset(torch.tensor([5, 9])))
    faults = verify(both).faults
    assert faults == [
        "test: 2 examples; the manifest says 50",
        "2 examples of test in train too, such as example 0, 5 there",
    ]


def test_a_damaged_entry(listops):
    path = listops.folder / "val_labels.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"val_labels\.npy has changed"):
        verify(listops)


def test_pixels_pairs_and_arrays_in_memory():
    pictures = np.arange(12 * 5, dtype=np.uint8).reshape(12, 5)
    pixels = from_arrays("p", kind="pixels", inputs=pictures, labels=[0, 1] * 6, val_fraction=0.2, test_fraction=0.2)
    assert verify(pixels).faults == []
    pairs = [[[1, 2], [3]], [[1], [2, 3]], [[4, 5], [5]], [[5, 5], [4]]]
    task = from_arrays(
        "pairs",
        kind="tokens",
        inputs=pairs,
        labels=[0, 1, 0, 1],
        num_inputs=2,
        val=(pairs[:1], [0]),
        test=([[[1], [1]]], [1]),
    )
    assert verify(task).faults == []
    assert verify(task).notes[-1] == "1 example of val in train too, such as example 0, 0 there"
    (fault,) = verify(changed(task, "test", "values", 1, 99)).faults[:1]
    assert fault.startswith("test: 99 in example 0; valid")
