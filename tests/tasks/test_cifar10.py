from __future__ import annotations

import io
import os
import pickle

import pytest
from task_configs import cifar_pictures

from seqzoo.tasks import DataError, build_task, cifar10


def build(data_dir):
    return build_task(cifar_pictures("lra_image"), data_dir=data_dir, cache_dir=data_dir / "cache")


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
