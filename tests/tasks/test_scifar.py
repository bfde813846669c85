from __future__ import annotations

import numpy as np
import pytest
import torch
from task_configs import cifar_pictures

from seqzoo.tasks import build_task, scifar


def test_the_task(cifar, tmp_path):
    data_dir, data = cifar
    task = build_task(cifar_pictures("scifar"), data_dir=data_dir, cache_dir=tmp_path / "cache")
    assert [len(split) for split in (task.train, task.val, task.test)] == [180, 20, 20]
    assert (task.spec.kind, task.spec.channels, len(task.spec.mean), len(task.spec.std)) == ("pixels", 3, 3, 3)
    batch = task.test.batch(torch.arange(20))
    assert batch.inputs.shape == (20, 1024, 3)
    assert batch.inputs.dtype == torch.uint8
    planes = data["test_batch"].reshape(20, 3, 1024)
    assert (batch.inputs.numpy() == np.moveaxis(planes, 1, 2)).all()


def test_colours_of_a_pixel_stand_together():
    assert scifar.colours(np.array([[1, 2, 3, 4, 5, 6]], np.uint8)).tolist() == [[[1, 3, 5], [2, 4, 6]]]


def test_pictures_are_not_cut(tmp_path):
    with pytest.raises(ValueError, match="max_length is 512; a picture has 1024 pixels"):
        build_task(cifar_pictures("scifar", max_length=512), data_dir=None, cache_dir=tmp_path)


def test_the_published_pictures(real_data, tmp_path):
    task = build_task(cifar_pictures("scifar"), data_dir=real_data("cifar-10-batches-py"), cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [45_000, 5_000, 10_000]
    pixels = task.train.values[: 3 * 1024 * 10_000].view(-1, 3).double() / 255
    normalised = (pixels - torch.tensor(task.spec.mean)) / torch.tensor(task.spec.std)
    assert normalised.mean(0).tolist() == pytest.approx([0] * 3, abs=0.02)
    assert normalised.std(0).tolist() == pytest.approx([1] * 3, abs=0.02)
