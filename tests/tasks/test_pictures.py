from __future__ import annotations

import json

import numpy as np
import torch

from seqzoo.tasks import TaskConfig, pictures
from seqzoo.tasks.pictures import Pictures

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
