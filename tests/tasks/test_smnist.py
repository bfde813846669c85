from __future__ import annotations

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqzoo.tasks import DataError, TaskConfig, build_task, smnist


def config(**changes) -> TaskConfig:
    settings = {"name": "smnist", "max_length": 784, "mask_ratio": 0.5, "val_fraction": 0.1, "split_seed": 42}
    return TaskConfig(**(settings | changes))


@pytest.fixture(params=["plain", "packed"])
def mnist(request, tmp_path, monkeypatch):
    """100 training and 20 test pictures in the official layout, packed or not, and the test pictures."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    sums, pictures = {}, {}
    for part, n in (("train", 100), ("t10k", 20)):
        pictures[part] = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">4i", 0x803, n, 28, 28) + pictures[part].tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">2i", 0x801, n) + bytes(i % 10 for i in range(n)),
        }
        for filename, content in contents.items():
            sums[filename] = hashlib.md5(content).hexdigest()
            if request.param == "packed":
                (folder / f"{filename}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / filename).write_bytes(content)
    monkeypatch.setattr(smnist, "MD5", sums)
    return folder, pictures["t10k"]


def test_the_task(mnist, tmp_path):
    _, pictures = mnist
    task = build_task(config(), data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert [len(split) for split in (task.train, task.val, task.test)] == [90, 10, 20]
    assert sorted(task.val.labels.tolist()) == list(range(10))
    assert (task.spec.kind, task.spec.channels, task.spec.num_classes) == ("pixels", 1, 10)
    batch = task.test.batch(torch.arange(20))
    assert (batch.inputs.numpy() == pictures.reshape(20, 784, 1)).all()
    assert batch.labels.tolist() == [*range(10), *range(10)]


def test_a_missing_file(mnist, tmp_path):
    next(mnist[0].glob("t10k-labels*")).unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte is missing, packed \(.gz\) or not\.\nPut train-"):
        build_task(config(), data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r"no mnist in .*\nPut train-images-idx3-ubyte, .* into a folder mnist"):
        build_task(config(), data_dir=tmp_path, cache_dir=tmp_path / "cache")


@given(st.data())
def test_a_damaged_file(tmp_path_factory, data):
    content = struct.pack(">2i", 0x801, 9) + bytes(9)
    packed = data.draw(st.booleans())
    whole = gzip.compress(content, mtime=0) if packed else content
    damaged = data.draw(
        st.integers(0, len(whole) - 1).map(lambda n: whole[:n]) | st.binary(max_size=30), label="what is in the file"
    )
    if damaged == whole:
        return
    folder = tmp_path_factory.mktemp("mnist")
    path = folder / ("train-labels-idx1-ubyte" + ".gz" * packed)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{path} (is truncated or damaged: the MD5 sum|cannot be unpacked)"):
        smnist._content(folder, "train-labels-idx1-ubyte")


def test_pictures_are_not_cut(tmp_path):
    with pytest.raises(ValueError, match="max_length is 28; a picture has 784 pixels"):
        build_task(config(max_length=28), data_dir=None, cache_dir=tmp_path)


def test_the_published_pictures(real_data, tmp_path):
    task = build_task(config(), data_dir=real_data("mnist"), cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [54_000, 6_000, 10_000]
    assert task.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    pixels = (task.train.values.double() / 255 - task.spec.mean[0]) / task.spec.std[0]
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((0, 1), abs=0.001)
