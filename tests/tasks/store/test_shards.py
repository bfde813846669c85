from __future__ import annotations

import os
from contextlib import suppress

import numpy as np
import pytest

from seqzoo.files import LinkError
from seqzoo.tasks import DataError
from seqzoo.tasks.store.shards import array_file


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"values\.npy: 0\.5 GB do not fit on the disk"):
        array_file(tmp_path / "values.npy", (500_000_000,), np.uint8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["values.npy", "values.npy.tmp"])
def test_no_link_in_place_of_an_array_is_followed(tmp_path, victim, name):
    (tmp_path / name).symlink_to(victim)
    with suppress(LinkError):
        array_file(tmp_path / "values.npy", (5,), np.uint8)[:] = 1
