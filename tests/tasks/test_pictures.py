from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from seqzoo.tasks import TaskConfig, pictures
from seqzoo.tasks.pictures import Pictures, shrink

CONFIG = TaskConfig(name="toy", max_length=4, mask_ratio=0.5, val_fraction=0.25, split_seed=0)


def test_validation_is_cut_from_training_and_nothing_is_read_twice(tmp_path):
    trained = Pictures(np.arange(64, dtype=np.uint8).reshape(8, 4, 2), np.arange(8) % 2)
    tested = Pictures(np.arange(100, 116, dtype=np.uint8).reshape(2, 4, 2), np.array([1, 0]))
    readings = []

    def read():
        readings.append(1)
        return trained, tested

    options = {"num_pixels": 4, "num_classes": 2, "mean": (0.1, 0.2), "std": (1.0, 2.0), "source": "toys"}
    task, again = (pictures.build(CONFIG, read, **options, cache_dir=tmp_path) for _ in range(2))
    assert readings == [1]
    assert json.loads((task.folder / "manifest.json").read_text())["source"] == "toys"
    assert (task.spec.channels, task.spec.mean, task.spec.std) == (2, (0.1, 0.2), (1.0, 2.0))
    assert task.val.labels.tolist() == [0, 1]
    both = torch.cat([task.train.values, task.val.values]).view(8, 8)
    assert sorted(both.tolist()) == trained.pixels.reshape(8, 8).tolist()
    assert again.test.values.tolist() == list(range(100, 116))
    assert again.test.labels.tolist() == [1, 0]


def generated(**changes):
    """A build of 8 and 2 grey pictures of 4 x 4 pixels, and what it read."""
    numbers = np.random.default_rng(0)
    trained, tested = (
        Pictures(numbers.permutation(256)[: 16 * n].reshape(n, 16).astype(np.uint8), np.arange(n) % 2) for n in (8, 2)
    )
    config = replace(CONFIG, **({"max_length": 16} | changes))
    options = {"num_pixels": 16, "num_classes": 2, "mean": (0.5,), "std": (0.2,), "source": "toys"}

    def build(cache):
        return pictures.build(config, lambda: (trained, tested), **options, cache_dir=cache)

    return build, tested.pixels


def test_smaller_pictures_are_means_of_squares(tmp_path):
    build, pixels = generated(max_length=4)
    task = build(tmp_path)
    assert (task.spec.max_length, task.note) == (4, "pictures of 2 x 2")
    squares = [pixels.reshape(2, 4, 4)[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] for y in range(2) for x in range(2)]
    means = np.stack([square.astype(float).mean((1, 2)) for square in squares], 1)
    assert (task.test.values.view(2, 4).numpy() == np.floor(means + 0.5)).all()
    build, _ = generated()
    assert (build(tmp_path).spec.max_length, build(tmp_path).note) == (16, ""), "another entry of the cache"


def test_channels_are_averaged_apart():
    colours = np.arange(2 * 16 * 3, dtype=np.uint8).reshape(2, 16, 3)
    apart = np.stack([shrink(colours[..., c], 2) for c in range(3)], -1)
    assert (shrink(colours, 2) == apart).all()


def test_permuted_pictures_share_one_order(tmp_path):
    (plain, _), (permuted, _) = generated(), generated(permuted=True)
    first, second = plain(tmp_path), permuted(tmp_path)
    assert second.note == "pixels in one random order"
    order = [first.test.values.view(2, 16)[0].tolist().index(value) for value in second.test.values[:16].tolist()]
    assert sorted(order) == list(range(16)) != order
    for split in ("train", "val", "test"):
        before, after = (getattr(task, split) for task in (first, second))
        assert torch.equal(before.values.view(-1, 16)[:, order], after.values.view(-1, 16))
        assert torch.equal(before.labels, after.labels)
    assert TaskConfig(name="toy", max_length=4, mask_ratio=0.5, permuted=False).permuted is None


def test_smaller_and_permuted(tmp_path):
    build, _ = generated(max_length=4, permuted=True)
    assert build(tmp_path).note == "pictures of 2 x 2, pixels in one random order"


@pytest.mark.parametrize("length", [15, 9, 64])
def test_sizes_that_pictures_cannot_have(length, tmp_path):
    build, _ = generated(max_length=length)
    with pytest.raises(ValueError, match=f"max_length is {length}; a picture has 16 pixels; valid: 16, or 4 for"):
        build(tmp_path)
