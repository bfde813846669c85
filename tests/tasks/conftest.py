from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("aclImdb")`: the folder with the published data, if SEQZOO_DATA_DIR has what is named; else a skip."""

    def find(needed: str) -> Path:
        data_dir = os.environ.get("SEQZOO_DATA_DIR")
        if data_dir is None or not Path(data_dir, needed).exists():
            pytest.skip(f"needs {needed} in the folder SEQZOO_DATA_DIR names")
        return Path(data_dir)

    return find
