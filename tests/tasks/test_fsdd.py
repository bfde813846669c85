from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import write_wav

from seqzoo.models.embedding import PixelEmbedding
from seqzoo.tasks import DataError, TaskConfig, build_task, origin_of


def config(**changes) -> TaskConfig:
    settings = {"name": "fsdd", "max_length": 8192, "mask_ratio": 0.25, "val_fraction": 0.25, "split_seed": 42}
    return TaskConfig(**(settings | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two speakers' takes 0 to 8 of each digit, of 30 samples and more of noise."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "fsdd" / "recordings"
    for digit in range(10):
        for speaker in ("ada", "bo"):
            for take in range(9):
                samples = generator.integers(-900, 1000, 30 + take).astype(np.int16)
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", samples, rate=8000)
    return folder


def build(tmp_path: Path, **changes):
    return build_task(config(**changes), data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_the_task(folder, tmp_path):
    task = build(tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [60, 20, 100]
    assert task.val.labels.bincount().tolist() == [2] * 10
    assert task.test.labels.tolist() == [digit for digit in range(10) for _ in range(10)]
    assert task.test.lengths.tolist() == [30, 31, 32, 33, 34] * 20
    assert set(task.train.lengths.tolist()) | set(task.val.lengths.tolist()) == {35, 36, 37, 38}


def test_the_model_sees_mean_zero_and_unit_variance(folder, tmp_path):
    task = build(tmp_path)
    batch = task.train.batch(torch.arange(60))
    assert batch.inputs.dtype == torch.int16
    assert batch.inputs.min() < 0 < batch.inputs.max()
    values = PixelEmbedding(task.spec, 4).normalise(batch.inputs)
    valid = values[torch.arange(values.shape[1]) < batch.lengths[:, None]]
    assert (valid.mean().item(), valid.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-5)


def test_other_recordings_have_an_entry_and_a_name_of_their_own(folder, tmp_path):
    before, name = build(tmp_path), origin_of(config(), data_dir=tmp_path, cache_dir=tmp_path)
    assert build(tmp_path).folder == before.folder
    write_wav(folder / "7_bo_9.wav", np.arange(50, dtype=np.int16), rate=8000)
    after = build(tmp_path)
    assert len(after.train) + len(after.val) == len(before.train) + len(before.val) + 1
    assert origin_of(config(), data_dir=tmp_path, cache_dir=tmp_path) != name
    write_wav(folder / "7_bo_9.wav", np.arange(50, dtype=np.int16)[::-1], rate=8000)
    assert build(tmp_path).folder not in (before.folder, after.folder)


def test_shorter_recordings_are_noted(folder, tmp_path):
    assert build(tmp_path).note == "val_fraction 0.25"
    assert build(tmp_path, max_length=20).note == "recordings cut to 20 samples, val_fraction 0.25"


def test_takes_are_numbers(folder, tmp_path):
    before = build(tmp_path)
    (folder / "3_ada_8.wav").rename(folder / "3_ada_10.wav")
    assert torch.equal(
        before.test.values, build_task(config(), data_dir=tmp_path, cache_dir=tmp_path / "b").test.values
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x_ada_0.wav", r"x_ada_0\.wav is not named <digit>_<speaker>_<take>\.wav"),
        ("3_ada_01.wav", r"3_ada_01\.wav is not named"),
        ("3_ada.wav", r"3_ada\.wav is not named"),
        ("3_cy_0.wav", r"holds takes \[\] of 0 by cy; expected 0 to 4 and others"),
    ],
)
def test_misnamed_recordings(folder, tmp_path, name, message):
    (folder / "3_ada_8.wav").rename(folder / name)
    with pytest.raises(DataError, match=message):
        build(tmp_path)


def test_missing_takes(folder, tmp_path):
    (folder / "7_bo_2.wav").unlink()
    with pytest.raises(DataError, match=r"holds takes \[0, 1, 3, .*\] of 7 by bo"):
        build(tmp_path)


def test_missing_recordings(tmp_path):
    (tmp_path / "fsdd").mkdir()
    with pytest.raises(DataError, match=r"recordings holds no recordings\.\nPut its folder recordings"):
        build(tmp_path)


def test_another_rate(folder, tmp_path):
    write_wav(folder / "3_ada_8.wav", np.zeros(30, np.int16), rate=16_000)
    with pytest.raises(DataError, match=r"3_ada_8\.wav: 1 channels, 16 bits, 16000 Hz; expected 1, 16 and 8000"):
        build(tmp_path)


def test_the_published_recordings(real_data, tmp_path):
    task = build_task(config(val_fraction=0.1), data_dir=real_data("fsdd"), cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [2430, 270, 300]
    assert task.test.labels.bincount().tolist() == [30] * 10
    assert task.train.mean_length == pytest.approx(3494, abs=1)
