from __future__ import annotations

import io
import os
import pickle

import pytest

from seqzoo.tasks import DataError, TaskConfig, build_task, cifar10


def build(data_dir):
    config = TaskConfig(name="lra_image", max_length=1024, mask_ratio=0.5, val_fraction=0.1, split_seed=42)
    return build_task(config, data_dir=data_dir, cache_dir=data_dir / "cache")


def test_a_damaged_file(cifar):
    path = cifar[0] / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="data_batch_2 is truncated or damaged"):
        build(cifar[0])


def test_a_missing_file(cifar):
    (cifar[0] / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match="test_batch is missing"):
        build(cifar[0])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/nonexistent/would-have-run",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused(protocol):
    content = pickle.dumps({"data": Malicious()}, protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir has no place in a file of arrays"):
        cifar10._ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
