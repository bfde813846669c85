from __future__ import annotations

import numpy as np
import pytest
import torch
from task_configs import cifar_pictures

from seqzoo.tasks import build_task, lra_image


def test_the_task(cifar, tmp_path):
    data_dir, data = cifar
    task = build_task(cifar_pictures("lra_image"), data_dir=data_dir, cache_dir=tmp_path / "cache")
    assert [len(split) for split in (task.train, task.val, task.test)] == [180, 20, 20]
    assert task.train.labels.bincount().tolist() == [18] * 10
    assert task.val.labels.bincount().tolist() == [2] * 10
    assert (task.spec.kind, task.spec.vocab_size, task.spec.channels, task.spec.mask_id) == ("pixels", 256, 1, None)
    batch = task.test.batch(torch.arange(20))
    assert batch.inputs.shape == (20, 1024, 1)
    assert batch.inputs.dtype == torch.uint8
    assert batch.lengths.tolist() == [1024] * 20
    weights = np.array([0.299, 0.587, 0.114])
    luma = np.einsum("nct,c->nt", data["test_batch"].reshape(20, 3, 1024), weights)
    assert np.abs(batch.inputs.squeeze(-1).numpy() - luma).max() <= 0.51  # rounded, of weights in 16 bits
    grey = lra_image.grey(np.concatenate([data["data_batch_1"], data["data_batch_2"]]))
    together = torch.cat([split.values.view(-1, 1024) for split in (task.train, task.val)])
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, grey))


def test_grey_is_that_of_pil():
    image = pytest.importorskip("PIL.Image")
    planes = np.random.default_rng(1).integers(0, 256, (4, 3072), dtype=np.uint8)
    for row, picture in zip(lra_image.grey(planes), planes, strict=True):
        rgb = np.ascontiguousarray(picture.reshape(3, 32, 32).transpose(1, 2, 0))
        assert (row.reshape(32, 32) == np.asarray(image.fromarray(rgb).convert("L"))).all()


def test_grey_levels():
    pure = np.array([[255, 0, 0, 255, 0], [0, 255, 0, 255, 0], [0, 0, 255, 255, 0]], dtype=np.uint8).reshape(1, -1)
    assert lra_image.grey(pure).tolist() == [[76, 150, 29, 255, 0]]


def test_pictures_are_not_cut(tmp_path):
    with pytest.raises(ValueError, match="max_length is 512; a picture has 1024 pixels"):
        build_task(cifar_pictures("lra_image", max_length=512), data_dir=None, cache_dir=tmp_path)


def test_the_published_pictures(real_data, tmp_path):
    task = build_task(cifar_pictures("lra_image"), data_dir=real_data("cifar-10-batches-py"), cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [45_000, 5_000, 10_000]
    for split in (task.train, task.val, task.test):
        assert split.labels.bincount().tolist() == [len(split) // 10] * 10
    pixels = task.train.values[: 1024 * 10_000].double() / 255
    normalised = (pixels - task.spec.mean[0]) / task.spec.std[0]
    assert normalised.mean().item() == pytest.approx(0, abs=0.02)
    assert normalised.std().item() == pytest.approx(1, abs=0.02)
