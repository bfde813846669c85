from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from seqzoo.tasks import cifar10


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("aclImdb")`: the folder with the published data, if SEQZOO_DATA_DIR has what is named; else a skip."""

    def find(needed: str) -> Path:
        data_dir = os.environ.get("SEQZOO_DATA_DIR")
        if data_dir is None or not Path(data_dir, needed).exists():
            pytest.skip(f"needs {needed} in the folder SEQZOO_DATA_DIR names")
        return Path(data_dir)

    return find


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Two training files of 100 pictures and a test file of 20, in the official layout, and their pictures."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data, sums = {}, {}
    for filename, n in (("data_batch_1", 100), ("data_batch_2", 100), ("test_batch", 20)):
        data[filename] = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {b"batch_label": b"toy", b"labels": [i % 10 for i in range(n)], b"data": data[filename]}
        (folder / filename).write_bytes(pickle.dumps(content, protocol=4))
        sums[filename] = hashlib.md5((folder / filename).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "TRAIN_FILES", {name: sums[name] for name in ("data_batch_1", "data_batch_2")})
    monkeypatch.setattr(cifar10, "TEST_FILES", {"test_batch": sums["test_batch"]})
    return tmp_path, data
