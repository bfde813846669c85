"""Which data a task is of: where they come from, and their digest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from task_configs import small_listops

from seqzoo.config import compose
from seqzoo.tasks import TASKS, build_task, fingerprint, from_arrays, origin_of


@pytest.fixture(scope="module")
def listops(tmp_path_factory):
    return build_task(small_listops(), data_dir=None, cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_cache_and_memory_hold_the_same_data(listops, tmp_path):
    found = fingerprint(listops)
    assert str(found) == f"generated (sha256 {found.sha256[:16]})"
    again = build_task(small_listops(), data_dir=None, cache_dir=tmp_path)
    assert fingerprint(again) == found
    assert fingerprint(replace(listops, folder=None)).sha256 == found.sha256


@pytest.mark.parametrize("kind", ["tokens", "pixels"])
@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize("part", ["values", "labels", "order"])
def test_any_change_shows(kind, name, part):
    inputs = [[0, 1, 2], [2, 1], [1], [0, 2, 2, 1]] * 3
    task = from_arrays("mine", kind=kind, inputs=inputs, labels=[0, 1] * 6, val_fraction=0.3, test_fraction=0.3)
    split = getattr(task, name)
    if part == "order":
        other = split.subset(torch.arange(len(split)).flip(0))
    else:
        other = replace(split, **{part: 1 - getattr(split, part)})
    assert fingerprint(replace(task, **{name: other})).sha256 != fingerprint(task).sha256


@pytest.mark.parametrize("name", TASKS)
def test_without_data_of_ones_own_every_task_is_of_its_default_ones(name, tmp_path):
    config = compose([f"task={name}"]).task
    for data_dir in (None, tmp_path):
        assert origin_of(config, data_dir=data_dir, cache_dir=tmp_path) == {}
